"""Epochs and iterations: the training budget of a trial."""

from __future__ import annotations

from collections.abc import Mapping
import math

from optuna.distributions import IntDistribution

from optuna_nnhp.hyperparameters.spec import Hyperparameter
from optuna_nnhp.hyperparameters.spec import Value

EPOCHS = Hyperparameter(
    name="epochs",
    distribution=IntDistribution(1, 100, log=True),
    default=50,
    grid_values=(1, 10, 50, 100),
    domain=(1, 1_000_000),
    tuned=False,
    task="table",
    active_if={"iterations": (0,)},
    help="Budget of a trial in passes over the training data: iterations = ceil(examples / "
    "batch size) * epochs. Early stopping and pruning may end it sooner.",
)
ITERATIONS = Hyperparameter(
    name="iterations",
    distribution=IntDistribution(0, 1_000_000),
    default=0,
    grid_values=(100, 1000, 10000),
    domain=(0, 1_000_000_000),
    static=True,
    tuned=False,
    help="Budget of a trial in optimizer steps, used instead of epochs; 0 means `epochs`.",
)


def iterations_per_epoch(examples: int, batch_size: int) -> int:
    """Return the steps of one pass over the data; the last batch may be smaller.

    Example:
        >>> iterations_per_epoch(1437, 64)
        23
    """
    return math.ceil(examples / batch_size)


def total_iterations(params: Mapping[str, Value], per_epoch: int) -> int:
    """Return the steps of a trial's whole budget.

    Args:
        params:
            The trial's hyperparameters.
        per_epoch:
            Steps of one pass over the data.

    Example:
        >>> total_iterations({"epochs": 50, "iterations": 0}, per_epoch=23)
        1150
        >>> total_iterations({"epochs": 50, "iterations": 100}, per_epoch=23)
        100
    """
    return int(params["iterations"] or 0) or per_epoch * int(params["epochs"] or 1)
