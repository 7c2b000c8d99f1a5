"""A step of all members: regularize, clip, and each by its own optimizer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.optimizer import update
from optuna_nnhp.hyperparameters.regularization import add_l1
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.hyperparameters.regularization import decay_weights
from optuna_nnhp.training.knobs import Knobs
from optuna_nnhp.training.parameters import FlatParameters


class Updater(Protocol):
    """What steps the parameters of a cohort."""

    def step(self, rates: Tensor) -> None:
        """Update all members from their gradients, at each one's learning rate ``(k,)``."""


class Update:
    """One rate for all of a member's parameters, and the optimizer that it has.

    Args:
        flat:
            The members' parameters.
        knobs:
            Their hyperparameters.
    """

    def __init__(self, flat: FlatParameters, knobs: Knobs) -> None:
        self.flat, self.knobs = flat, knobs

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Regularize and clip the gradients, then step each member by its own optimizer."""
        flat, knobs = self.flat, self.knobs
        for block in flat.blocks:
            weights, grads = flat.weights[block], flat.grads[block]
            matrices = weights[:, : flat.decayed], grads[:, : flat.decayed]
            if knobs.has_l1:
                add_l1(*matrices, knobs.l1[block])
            clip_gradients(grads, knobs.clip_norm[block])
            decay = knobs.weight_decay[block], knobs.decoupled[block]
            decay_weights(*matrices, rates[block].to(weights), *decay)
            for row, name, rate, coefficients in zip(
                *(flat.rows[block], knobs.optimizers[block]),
                *(rates[block].tolist(), knobs.coefficients[block]),
                strict=True,
            ):
                update(name, row, rate, coefficients)
