"""PopulationSampler of optuna_nnhp, as a package of OptunaHub."""

from .population import PopulationSampler

__all__ = ["PopulationSampler"]
