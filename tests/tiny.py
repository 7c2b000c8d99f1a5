"""The smallest data and budgets that still train, and a call that uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp import Result
from optuna_nnhp import optimize

Array = NDArray[Any]

# One shape for all trials: every cohort is one stack.
SHAPE: dict[str, Any] = {
    "width": 16,
    "hidden_layers": 1,
    "batch_size": 32,
    "normalization": "none",
}
TINY = SHAPE | {"epochs": 4}
# Trials that end one after the other.
DIFFERENT_LENGTHS: dict[str, Any] = {
    "space": {"epochs": IntDistribution(1, 9)},
    "fixed": {name: value for name, value in TINY.items() if name != "epochs"},
    "method": "random",
}
# For numbers: a squared error and steps that each time go farther past the minimum.
DIVERGING = TINY | {
    "epochs": 50,
    "optimizer": "sgd",
    "learning_rate": 100.0,
    "learning_rate_decay": "constant",
    "warmup": 0.0,
    "clip_norm": 1e12,
    "loss": "mse",
    "activation": "relu",
}
ROWS, TRAIN_ROWS = 80, 64
# Of another Python process that imports this file.
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def classes(rows: int = ROWS, seed: int = 0) -> tuple[Array, Array]:
    """Two classes by the sign of a column, as texts."""
    X = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    return X, np.where(X[:, 0] > 0, "up", "down")


def numbers(rows: int = ROWS, seed: int = 0) -> tuple[Array, Array]:
    """A sum of columns, far from standardized."""
    X = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    return X, 1000.0 + 50.0 * (X[:, 0] - X[:, 1]).astype(np.float64)


def tune(X: Any = None, y: Any = None, **options: Any) -> Result:
    """Call `optimize`, by default in memory, without pruning, on two classes."""
    if X is None:
        X, y = classes()
    usual = {
        "n_trials": 3,
        "storage": None,
        "fixed": TINY,
        "pruner": optuna.pruners.NopPruner(),
        "device": "cpu",
    }
    return optimize("dnn", X, y, **(usual | options))


def trials(result: Result) -> list[FrozenTrial]:
    return result.study.get_trials(deepcopy=False)


def states(result: Result) -> list[TrialState]:
    return [trial.state for trial in trials(result)]


def causes(result: Result) -> list[str]:
    return [trial.user_attrs["cause"] for trial in trials(result)]


def learning_curves(result: Result) -> list[Any]:
    """Return the curves of all trials, which are equal for equal studies only."""
    return [
        (t.number, t.params, t.value, t.state, t.intermediate_values, t.user_attrs["train_loss"])
        for t in trials(result)
    ]
