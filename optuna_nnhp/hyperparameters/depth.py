"""Number of hidden layers."""

from __future__ import annotations

from optuna.distributions import IntDistribution

from optuna_nnhp.hyperparameters.spec import Hyperparameter

# Tuned multilayer perceptrons on 86 tables: 8, 18, 12, 13, 21, 14 of them with 1 to 6 layers
# (Gorishniy et al. 2024, arXiv:2410.24210, published tuning results), so no narrow bound.
HIDDEN_LAYERS = Hyperparameter(
    name="hidden_layers",
    distribution=IntDistribution(1, 8),
    default=2,
    grid_values=(1, 2, 4, 8),
    domain=(1, 64),
    static=True,
    task="table",
    help="Number of hidden layers. Deeper networks can represent more but are harder to train.",
)
