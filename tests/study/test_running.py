"""Suggested values, learning curves and attributes of one trial."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pytest

from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.running import suggest
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores

SPACE: dict[str, BaseDistribution] = {
    "float": FloatDistribution(0.5, 1.0),
    "log": FloatDistribution(1e-5, 1.0, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
    "int": IntDistribution(1, 9),
    "log int": IntDistribution(1, 1000, log=True),
    "int step": IntDistribution(0, 100, step=20),
    "choice": CategoricalDistribution(("a", 1, 2.5, None, True)),
}


def make_running_trial(maximize: bool) -> tuple[optuna.Study, RunningTrial]:
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    return study, RunningTrial(study.ask(), Member(0, 0, {}), maximize)


def make_scores(value: float, done: int, best_round: int) -> Scores:
    """Return the scores of two members of a cohort; the trial is the second one."""
    losses = {"train_loss": [9.0, 0.1], "validation_loss": [9.0, 0.2]}
    rounds = {"rounds": [9, done], "best_round": [9, best_round]}
    return Scores(indices=[3, 5], value=[9.0, value], ended=[None, None], **losses, **rounds)


def test_suggested_values_have_the_distributions_of_the_space() -> None:
    study = optuna.create_study()
    values = suggest(study.ask(), SPACE)
    trial = study.trials[0]
    assert trial.params == values
    assert trial.distributions == SPACE
    assert all(SPACE[n]._contains(SPACE[n].to_internal_repr(v)) for n, v in values.items())


def test_unknown_distributions_are_rejected() -> None:
    with pytest.raises(TypeError, match="`x` must have a known distribution, not"):
        suggest(optuna.create_study().ask(), {"x": "odd"})  # type: ignore[dict-item]


@pytest.mark.parametrize("maximize", [True, False])
def test_finite_values_are_reported_once(maximize: bool) -> None:
    study, trial = make_running_trial(maximize)
    for done, value, best_round in [(1, 0.5, 1), (3, math.nan, 1), (9, 0.7, 9)]:
        trial.add_scores(make_scores(value, done, best_round), 1)
    assert trial.train_loss == [0.1] * 3
    assert trial.validation_loss == [0.2] * 3
    trial.report()
    trial.report()
    assert study.trials[0].intermediate_values == {1: 0.5, 9: 0.7}  # NaN is not reported
    trial.tell(study.tell, TrialState.COMPLETE)
    assert study.trials[0].value == 0.7


def test_a_trial_without_a_value_is_pruned() -> None:
    study, trial = make_running_trial(maximize=True)
    trial.add_scores(make_scores(math.nan, 1, 0), 1)
    trial.tell(study.tell, TrialState.PRUNED)
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].intermediate_values == {}


@pytest.mark.parametrize(("best_round", "best"), [(0, None), (1, 0.5)])
def test_a_trial_has_no_best_value_before_its_first_value(
    best_round: int, best: float | None
) -> None:
    _, trial = make_running_trial(maximize=True)
    trial.add_scores(make_scores(0.5, 1, best_round), 1)
    assert trial.best == best


@pytest.mark.parametrize(
    ("maximize", "value", "than", "expected"),
    [
        (True, 2.0, 1.0, True),
        (True, 1.0, 1.0, False),
        (False, 0.5, 1.0, True),
        (False, 2.0, 1.0, False),
        (False, 2.0, None, True),
    ],
)
def test_is_better_follows_the_direction(
    maximize: bool, value: float, than: float | None, expected: bool
) -> None:
    assert make_running_trial(maximize)[1].is_better(value, than) is expected


def test_describe_stores_the_trials_attributes() -> None:
    class Problem:
        rounds_per_epoch = 3

        def count_weights(self, member: Member) -> int:
            return 7

        def attributes(self, member: Member) -> dict[str, Any]:
            return {}

    problem: Any = Problem()
    study, trial = make_running_trial(maximize=True)
    trial.describe(problem, 0, TrialOutcome.KILLED)
    assert "best_value" not in study.trials[0].user_attrs
    trial.add_scores(make_scores(0.5, 1, 1), 1)
    trial.add_scores(make_scores(0.4, 3, 1), 1)
    trial.describe(problem, iterations=12, outcome=TrialOutcome.FINISHED)
    attributes = study.trials[0].user_attrs
    assert attributes.pop("seconds") >= 0
    assert attributes == {
        "train_loss": [0.1, 0.1],
        "validation_loss": [0.2, 0.2],
        "epochs": 1,
        "iterations": 12,
        "weights": 7,
        "cause": "finished",
        "best_epoch": 0.3333,
        "best_value": 0.5,
    }
