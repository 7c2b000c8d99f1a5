"""Test replays where torch computes, so that the cohort affects the last digits of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pytest
from torch import nn

from optuna_nnhp import Objective
from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp.engine.library import ENGINE_VARIABLE
from optuna_nnhp.engine.mlp import load_library
from optuna_nnhp.training.cohort import Cohort
from tests.templates.test_custom_network import convolutional
from tests.templates.test_custom_network import images
from tests.tiny import DIFFERENT_LENGTHS
from tests.tiny import TINY
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune

CHANNELS = {"channels": CategoricalDistribution((4,))}
LENGTHS = {"epochs": IntDistribution(2, 9)}


def perceptron(params: Mapping[str, Any]) -> nn.Module:
    """Build a network with one output, for which torch multiplies a stack differently."""
    units = int(params["width"])
    return nn.Sequential(nn.Linear(3, units), nn.ReLU(), nn.Linear(units, 1))


def tune_network(network: Any, data: Any, **options: Any) -> Result:
    X, y = data
    usual = {"n_trials": 8, "storage": None, "cohort_size": 4, "device": "cpu"}
    return optimize(network=network, X=X, y=y, **(usual | options))


STUDIES = {
    "convolutions": lambda: tune_network(
        *(convolutional, images()), metric="log_loss", space=CHANNELS, fixed={"epochs": 8}
    ),
    "members come and leave": lambda: tune_network(
        *(convolutional, images()),
        **{"metric": "log_loss", "space": CHANNELS | LENGTHS, "method": "random"},
    ),
    "one output": lambda: tune_network(
        *(perceptron, numbers()), space=LENGTHS, fixed={"width": 16}, method="random"
    ),
    "population": lambda: tune_network(
        *(perceptron, numbers()),
        **{"fixed": {"width": 16, "epochs": 6, "batch_size": 16}, "cohort_size": None},
        **{"method": "population", "method_options": {"size": 3, "generations": 3}},
    ),
    "gradient": lambda: tune_network(
        *(perceptron, numbers()),
        **{"fixed": {"width": 16, "epochs": 6, "batch_size": 16}, "cohort_size": None},
        **{"method": "gradient", "method_options": {"starts": 2}, "n_trials": 3},
    ),
}


@pytest.mark.parametrize("name", STUDIES)
def test_user_networks_are_reproduced_exactly(name: str) -> None:
    result = STUDIES[name]()
    assert any("numerics_context" in trial.user_attrs for trial in trials(result))
    for trial in trials(result):
        found = result.replay(trial.number)
        assert found.is_exact, str(found)
        assert found.first_difference is None, str(found)
    assert result.replay().stored_value == result.replay().retrained_value == result.best_value


@pytest.mark.parametrize("options", [{"fixed": TINY}, DIFFERENT_LENGTHS], ids=["one", "many"])
def test_perceptrons_trained_by_torch_are_reproduced_exactly(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    result = tune(*numbers(), n_trials=8, cohort_size=4, **options)
    for trial in trials(result):
        assert result.replay(trial.number).is_exact
    assert result.replay().stored_value == result.best_value


def test_learning_curve_has_the_values_in_the_cohort() -> None:
    result = STUDIES["convolutions"]()
    trial = result.best_trial
    among = trial.intermediate_values[trial.user_attrs["best_epoch"]]
    assert trial.value == trial.user_attrs["best_value"] == pytest.approx(among, rel=1e-5)


def test_compiled_engine_stores_no_numerics_context() -> None:
    if load_library() is None:
        pytest.skip("there was no C compiler")
    result = tune(*numbers(), n_trials=4, cohort_size=4)
    assert not any("numerics_context" in trial.user_attrs for trial in trials(result))


def test_value_in_the_cohort_is_used_if_evaluation_alone_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> float:
        raise RuntimeError("no room")

    monkeypatch.setattr(Cohort, "evaluate_best", full)
    result = STUDIES["one output"]()
    trial = result.best_trial
    assert trial.value == trial.intermediate_values[trial.user_attrs["best_epoch"]]


def test_objective_with_a_user_network_is_reproduced() -> None:
    X, y = images()
    objective = Objective(
        "dnn", X, y, network=convolutional, space=CHANNELS, fixed={"epochs": 3}, device="cpu"
    )
    study = optuna.create_study(direction=objective.direction)
    study.optimize(objective, n_trials=3)
    result = objective.result(study)
    assert result.replay().stored_value == study.best_value
    assert all(trial.state == TrialState.COMPLETE for trial in trials(result))
    assert np.isfinite(study.best_value)
