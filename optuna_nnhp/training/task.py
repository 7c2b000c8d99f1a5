"""The task of a cohort: its data, network, loss, metric and update."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optuna_nnhp.engine.gpt import CompiledGPT
from optuna_nnhp.engine.gpt import CompiledGPTSubset
from optuna_nnhp.hyperparameters.optimizer import optimizer_step
from optuna_nnhp.hyperparameters.regularization import add_l1
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.hyperparameters.regularization import decay_weights
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.flat_parameters import StepParams
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.batches import Batches
from optuna_nnhp.training.batches import rounds_per_epoch

Apply = Callable[[Tensor], Tensor] | CompiledGPTSubset  # forward pass of some members


@dataclass(frozen=True)
class Member:
    """One trial in a cohort."""

    number: int
    seed: int  # of its initial weights
    params: dict[str, Value]  # all of them; an effect that is off is 0, see `effective_params`


@dataclass(frozen=True)
class Arrays:
    """The data of a study, on the device of training; all cohorts share them.

    Shape:
        - train_x: ``(n, features)``; train_y: ``(n,)``.
        - valid_x: ``(m, features)``; valid_y: ``(m,)``.
    """

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor


class Updater(Protocol):
    """Updates the parameters of a cohort."""

    def step(self, rates: Tensor) -> None:
        """Update all members from their gradients, at each member's learning rate ``(k,)``."""


class Update:
    """Updates each member by its own optimizer, at one learning rate for all its parameters."""

    def __init__(self, flat: FlatParameters, step_params: StepParams) -> None:
        self.flat, self.step_params = flat, step_params

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Regularize and clip the gradients, then update each member by its own optimizer."""
        flat, step_params = self.flat, self.step_params
        for block in flat.blocks:
            weights, grads = flat.weights[block], flat.grads[block]
            matrices = weights[:, : flat.num_decayed], grads[:, : flat.num_decayed]
            if step_params.has_l1:
                add_l1(*matrices, step_params.l1[block])
            clip_gradients(grads, step_params.clip_norm[block])
            decay = step_params.weight_decay[block], step_params.decoupled[block]
            decay_weights(*matrices, rates[block].to(weights), *decay)
            for state, name, rate, coefficients in zip(
                *(flat.optimizer_states[block], step_params.optimizers[block]),
                *(rates[block].tolist(), step_params.coefficients[block]),
                strict=True,
            ):
                optimizer_step(name, state, rate, coefficients)


@dataclass(frozen=True)
class Task:
    """The data, network, loss and metric of a cohort.

    All members share the batch order and the dropout noise, which come from the study's seed, so
    that differences between trials come from their hyperparameters only.
    """

    arrays: Arrays
    build: Callable[[Sequence[Member]], StackedModule]
    loss: Callable[[Sequence[Member]], Callable[[Tensor, Tensor], Tensor]]
    # From outputs on the validation part, (k, m, outputs), to (k,); None if `evaluate` is another.
    metric: Callable[[Tensor], Tensor] | None
    maximize: bool  # whether a greater metric is better
    seed: int
    compile: bool = False  # whether `torch.compile` generates the code of a step
    # The loss on the validation part, (k,), from outputs and targets, the same for all
    # hyperparameters; if None, the training loss.
    validation_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def can_append(self) -> bool:
        """Whether members that have finished different numbers of rounds can train together."""
        return True

    @property
    def rounds(self) -> int:
        """Rounds per epoch."""
        return rounds_per_epoch(len(self.arrays.train_y))

    def make_batches(self, members: Sequence[Member]) -> Batches:
        """Return the batches of members that share a batch size."""
        size, rows = int(members[0].params["batch_size"] or 1), self.arrays.train_y
        return Batches(len(rows), size, self.rounds, self.seed, rows.device)

    def total_steps(self, member: Member, per_round: int) -> int:
        """Return the steps of a member's whole budget, given the steps of a round."""
        params, per_epoch = member.params, per_round * self.rounds
        return int(params["iterations"] or 0) or per_epoch * int(params["epochs"] or 1)

    def make_updater(
        self,
        flat: FlatParameters,
        step_params: StepParams,
        network: StackedModule,
        members: Sequence[Member],
    ) -> Updater:
        """Return the object that updates the members' parameters."""
        return Update(flat, step_params)

    def engine(self, network: StackedModule, flat: FlatParameters) -> CompiledGPT | None:
        """Return the engine that computes gradients, or None if autograd computes them."""
        return None

    def evaluate(
        self, apply: Apply, members: Sequence[Member], is_over: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Compute the loss and the metric of some members on the validation part.

        Args:
            apply:
                The members' forward pass.
            members:
                The members.
            is_over:
                Whether a member has used up its budget, or all validation data are required.

        Returns:
            The loss ``(k,)``, the metric ``(k,)``, and whether the metric may be used as a
            trial's value.
        """
        assert self.metric is not None and not isinstance(apply, CompiledGPTSubset)
        outputs = apply(self.arrays.valid_x)
        loss = self.validation_loss or self.loss(members)
        return loss(outputs, self.arrays.valid_y), self.metric(outputs), True


@dataclass(frozen=True)
class Scores:
    """The results of one evaluation; each list has one entry for each evaluated member."""

    indices: list[int]  # in `cohort.members`
    rounds: list[int]  # that each has finished
    train_loss: list[float]  # mean over the batches since the previous evaluation
    validation_loss: list[float]
    value: list[float]  # the metric on the validation part
    best_round: list[int]  # the round with the best value so far; 0 if there is none
    ended: list[str | None]  # "finished", "early stopping" or "diverged"; None if it continues
