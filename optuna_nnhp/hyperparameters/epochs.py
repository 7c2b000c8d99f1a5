"""Epochs and iterations: the training budget of a trial."""

from __future__ import annotations

from optuna.distributions import IntDistribution

from optuna_nnhp.hyperparameters.spec import Hyperparameter

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
