"""HypergradientSampler of optuna_nnhp, as a package of OptunaHub."""

from .hypergradient import HypergradientSampler

__all__ = ["HypergradientSampler"]
