"""Test `Objective`: the same networks in plain Optuna studies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp import CohortHalvingPruner
from optuna_nnhp import Objective
from tests.tiny import DIVERGING
from tests.tiny import SHAPE
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()


def study_of(objective: Objective, **options: Any) -> optuna.Study:
    options = {"sampler": optuna.samplers.RandomSampler(seed=0)} | options
    return optuna.create_study(direction=objective.direction, **options)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_objective_works_with_pruner_storage_callbacks_and_n_jobs(
    n_jobs: int, folder: Any
) -> None:
    held_out = numbers(60, seed=1)
    objective = Objective("dnn", X, Y, validation=held_out, fixed=TINY)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = study_of(objective, storage="sqlite:///s.db", pruner=pruner)
    calls: list[int] = []

    def record(study: optuna.Study, trial: FrozenTrial) -> None:
        calls.append(trial.number)

    study.optimize(objective, n_trials=9, n_jobs=n_jobs, callbacks=[record])
    assert sorted(calls) == list(range(9))
    states = [t.state for t in study.trials]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in study.trials:
        attributes, curve = trial.user_attrs, trial.intermediate_values
        assert list(curve) == list(range(1, attributes["epochs"] + 1))
        assert attributes["iterations"] == math.ceil(80 / 32) * attributes["epochs"]
        assert attributes["best_value"] == min(curve.values())
        if trial.state == TrialState.COMPLETE:
            assert trial.value == attributes["best_value"]
    result = objective.result(study)
    assert result.best_value == study.best_value
    assert result.score(*held_out) == pytest.approx(study.best_value, rel=1e-4)
    assert result.predict(X).shape == (80,)


@pytest.mark.parametrize(("make", "direction"), [(classes, "maximize"), (numbers, "minimize")])
def test_space_and_direction_are_those_of_optimize(make: Any, direction: str) -> None:
    space = {"learning_rate": FloatDistribution(0.01, 0.1), "hidden_layers": IntDistribution(1, 2)}
    fixed = {name: value for name, value in TINY.items() if name not in space}
    objective = Objective("dnn", *make(), space=space, fixed=fixed)
    assert objective.direction == direction
    study = study_of(objective)
    study.optimize(objective, n_trials=2)
    other = tune(*make(), space=space, fixed=fixed, n_trials=2)
    assert study.trials[0].distributions == trials(other)[0].distributions == objective.space


def test_trial_has_the_same_values_as_in_optimize() -> None:
    objective = Objective("dnn", X, Y, fixed=TINY)
    study = study_of(objective)
    study.enqueue_trial(objective.defaults)
    study.optimize(objective, n_trials=1)
    other = trials(tune(X, Y, n_trials=1))[0]
    assert study.trials[0].params == other.params
    assert study.trials[0].value == other.value
    assert study.trials[0].intermediate_values == other.intermediate_values


def test_missing_weights_are_retrained() -> None:
    first = Objective("dnn", X, Y, fixed=TINY)
    study = study_of(first)
    study.optimize(first, n_trials=4)
    second = Objective("dnn", X, Y, fixed=TINY)
    expected = first.result(study).predict(X)
    np.testing.assert_allclose(second.result(study).predict(X), expected, rtol=1e-4)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_halving_pruner_works_in_plain_optuna(n_jobs: int) -> None:
    objective = Objective("dnn", X, Y, fixed=TINY)
    study = study_of(objective, pruner=CohortHalvingPruner())
    study.optimize(objective, n_trials=10, n_jobs=n_jobs)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert pruned
    assert {t.user_attrs["epochs"] for t in pruned} <= {1, 2}  # the rungs
    assert {t.user_attrs["cause"] for t in pruned} == {"pruned"}


def test_early_stopped_trials_are_complete() -> None:
    objective = Objective("dnn", X, Y, fixed=SHAPE | {"epochs": 60, "patience": 2})
    study = study_of(objective)
    study.optimize(objective, n_trials=4)
    stopped = [t for t in study.trials if t.user_attrs["cause"] == "early stopping"]
    assert stopped
    assert all(t.state == TrialState.COMPLETE for t in stopped)


def test_diverged_trials_are_pruned() -> None:
    objective = Objective("dnn", X, Y, fixed=DIVERGING)
    study = study_of(objective)
    study.optimize(objective, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.PRUNED] * 2
    assert [t.user_attrs["cause"] for t in study.trials] == ["diverged"] * 2
    with pytest.raises(RuntimeError, match="A best trial must have finished"):
        _ = objective.result(study).best_params


def test_study_must_have_the_direction_of_the_metric() -> None:
    objective = Objective("dnn", X, Y, fixed=TINY)
    study = optuna.create_study(direction="maximize")
    message = "The study's direction must be 'minimize' for rmse, but got 'maximize'"
    with pytest.raises(ValueError, match=message):
        study.optimize(objective, n_trials=1)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="'dn' is not a template; did you mean 'dnn'"):
        Objective("dn", X, Y)
    with pytest.raises(ValueError, match="must have the same number of rows"):
        Objective("dnn", X, Y[:-1])
    with pytest.raises(TypeError, match="n_trials"):
        Objective("dnn", X, Y, n_trials=3)


def test_studies_with_the_same_name_have_separate_weights() -> None:
    fixed, space = {"epochs": 2, "hidden_layers": 1}, {"width": IntDistribution(16, 32)}
    objective = Objective("dnn", X, Y, fixed=fixed, space=space)
    studies = []
    for width in (17, 30):
        studies.append(optuna.create_study(study_name="s", direction=objective.direction))
        studies[-1].enqueue_trial({"width": width})
        studies[-1].optimize(objective, n_trials=1)
    results = [objective.result(study) for study in studies]
    assert [r.model[0].out_features for r in results] == [17, 30]  # type: ignore[index]
    assert all(result.replay().is_exact for result in results)


def test_one_objective_can_serve_two_studies() -> None:
    fixed, space = {"epochs": 2, "hidden_layers": 1}, {"width": IntDistribution(16, 32)}
    objective = Objective("dnn", X, Y, fixed=fixed, space=space)
    studies = [study_of(objective) for _ in range(2)]
    for width, study in zip((17, 30), studies, strict=True):
        study.enqueue_trial({"width": width})
        study.optimize(objective, n_trials=1)
    widths = [objective.result(s).model[0].out_features for s in studies]  # type: ignore[index]
    assert widths == [17, 30]
    other = study_of(objective)
    other.add_trials(studies[0].get_trials())  # its weights are missing, so it is retrained
    assert objective.result(other).model[0].out_features == 17  # type: ignore[index]
