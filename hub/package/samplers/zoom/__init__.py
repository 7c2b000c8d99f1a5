"""ZoomSampler of optuna_nnhp, as a package of OptunaHub."""

from .zoom import ZoomSampler

__all__ = ["ZoomSampler"]
