"""Batch size."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution

from optuna_nnhp.hyperparameters.spec import Hyperparameter

BATCH_SIZE = Hyperparameter(
    name="batch_size",
    distribution=CategoricalDistribution((16, 32, 64, 128, 256, 512, 1024)),
    default=64,
    grid_values=(16, 32, 64, 128, 256, 512, 1024),
    domain=(1, 2**20),
    static=True,
    task="table",
    help="Examples per step. Smaller batches take more steps per epoch and add noise; larger ones "
    "use the hardware better and need a larger learning rate. At most the number of examples.",
)
