"""A step of all members: regularize, clip, and each by its own optimizer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.optimizer import optimizer_step
from optuna_nnhp.hyperparameters.regularization import add_l1
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.hyperparameters.regularization import decay_weights
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.training.step_params import StepParams


class Updater(Protocol):
    """What steps the parameters of a cohort."""

    def step(self, rates: Tensor) -> None:
        """Update all members from their gradients, at each one's learning rate ``(k,)``."""


class Update:
    """One rate for all of a member's parameters, and the optimizer that it has.

    Args:
        flat:
            The members' parameters.
        step_params:
            Their hyperparameters.
    """

    def __init__(self, flat: FlatParameters, step_params: StepParams) -> None:
        self.flat, self.step_params = flat, step_params

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Regularize and clip the gradients, then step each member by its own optimizer."""
        flat, step_params = self.flat, self.step_params
        for block in flat.blocks:
            weights, grads = flat.weights[block], flat.grads[block]
            matrices = weights[:, : flat.num_decayed], grads[:, : flat.num_decayed]
            if step_params.has_l1:
                add_l1(*matrices, step_params.l1[block])
            clip_gradients(grads, step_params.clip_norm[block])
            decay = step_params.weight_decay[block], step_params.decoupled[block]
            decay_weights(*matrices, rates[block].to(weights), *decay)
            for row, name, rate, coefficients in zip(
                *(flat.optimizer_states[block], step_params.optimizers[block]),
                *(rates[block].tolist(), step_params.coefficients[block]),
                strict=True,
            ):
                optimizer_step(name, row, rate, coefficients)
