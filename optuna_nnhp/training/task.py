"""What a cohort trains on, and what an evaluation brings."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from optuna_nnhp.engine.gpt import CompiledGPT
from optuna_nnhp.engine.gpt import CompiledGPTSubset
from optuna_nnhp.hyperparameters.epochs import total_iterations
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.batches import Batches
from optuna_nnhp.training.rounds import rounds_per_epoch
from optuna_nnhp.training.step_params import Member
from optuna_nnhp.training.step_params import StepParams
from optuna_nnhp.training.update import Update
from optuna_nnhp.training.update import Updater

Apply = Callable[[Tensor], Tensor] | CompiledGPTSubset  # some members' network, in evaluation


@dataclass(frozen=True)
class Arrays:
    """The data of a study, on the device it is trained on; held once for all cohorts.

    Shape:
        - train_x: ``(n, features)``; train_y: ``(n,)``.
        - valid_x: ``(m, features)``; valid_y: ``(m,)``.
    """

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor


@dataclass(frozen=True)
class Task:
    """What a cohort trains on and is judged by.

    Args:
        arrays:
            The data.
        build:
            Makes the stacked network of some members.
        loss:
            Makes their loss.
        metric:
            Value of each member, ``(k,)``, from the outputs on the validation part,
            ``(k, m, outputs)``; None if `evaluate` needs none.
        maximize:
            Whether a greater metric is better.
        seed:
            The study's seed: batch order and dropout noise, which all members share, so that
            trials differ by their hyperparameters and not by their luck.
        compile:
            Whether `torch.compile` makes the code of a step's forward and backward pass.
        validation_loss:
            Loss on the validation part, ``(k,)``, from outputs and targets: one that does not
            depend on the members' hyperparameters; what they train with if None.
    """

    arrays: Arrays
    build: Callable[[Sequence[Member]], StackedModule]
    loss: Callable[[Sequence[Member]], Callable[[Tensor, Tensor], Tensor]]
    metric: Callable[[Tensor], Tensor] | None
    maximize: bool
    seed: int
    compile: bool = False
    validation_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def can_append(self) -> bool:
        """Whether members of different ages can be evaluated together."""
        return True

    @property
    def rounds(self) -> int:
        """Rounds in an epoch."""
        return rounds_per_epoch(len(self.arrays.train_y))

    def make_batches(self, members: Sequence[Member]) -> Batches:
        """What some members see at each step."""
        size, rows = int(members[0].params["batch_size"] or 1), self.arrays.train_y
        return Batches(len(rows), size, self.rounds, self.seed, rows.device)

    def total_steps(self, member: Member, per_round: int) -> int:
        """Steps of a trial's whole budget, given those of a round."""
        return total_iterations(member.params, per_round * self.rounds)

    def make_updater(
        self,
        flat: FlatParameters,
        step_params: StepParams,
        network: StackedModule,
        members: Sequence[Member],
    ) -> Updater:
        """What steps the members' parameters."""
        return Update(flat, step_params)

    def engine(self, network: StackedModule, flat: FlatParameters) -> CompiledGPT | None:
        """What computes gradients instead of autograd, if there is something."""
        return None

    def evaluate(
        self, apply: Apply, members: Sequence[Member], is_over: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Loss and metric of some members on the validation part.

        Args:
            apply:
                Their network: from inputs to outputs, or by a language model's engine.
            members:
                They.
            is_over:
                Whether one of them has done its whole budget, or all data are to be read anyway.

        Returns:
            Both, ``(k,)``, and whether a value of this evaluation may be a trial's.
        """
        assert self.metric is not None and not isinstance(apply, CompiledGPTSubset)
        outputs = apply(self.arrays.valid_x)
        loss = self.validation_loss or self.loss(members)
        return loss(outputs, self.arrays.valid_y), self.metric(outputs), True


@dataclass(frozen=True)
class Scores:
    """What training up to an evaluation brought, for each of the members that were evaluated.

    Args:
        indices:
            Who was evaluated, as places in ``cohort.members``.
        rounds:
            Rounds that each has done.
        train_loss:
            Mean loss over the batches since the last one, while training.
        validation_loss:
            Loss on the validation part after it.
        value:
            Metric on the validation part after it.
        best_round:
            Round with the best value so far, 0 while there is none.
        ended:
            Why a member has ended: ``"finished"``, ``"early stopping"``, ``"diverged"``; None
            while it goes on.
    """

    indices: list[int]
    rounds: list[int]
    train_loss: list[float]
    validation_loss: list[float]
    value: list[float]
    best_round: list[int]
    ended: list[str | None]
