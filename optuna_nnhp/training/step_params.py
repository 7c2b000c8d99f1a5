"""Hyperparameters of a cohort's step as the step wants them: a number for each member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.learning_rate import learning_rates
from optuna_nnhp.hyperparameters.optimizer import UpdateCoefficients
from optuna_nnhp.hyperparameters.spec import Value


@dataclass(frozen=True)
class Member:
    """One trial in a cohort.

    Args:
        number:
            The trial's number, by which the caller knows it.
        seed:
            Where its first weights come from.
        params:
            All its hyperparameters, "off" as 0 (see `hyperparameters.effective_params`).
    """

    number: int
    seed: int
    params: dict[str, Value]


def param_column(members: Sequence[Member], name: str) -> list[float]:
    """One hyperparameter of all members as numbers; 0 where they have none of this name."""
    return [float(m.params.get(name) or 0) for m in members]


class StepParams:
    """What the loop reads of the members' hyperparameters at every step.

    Args:
        members:
            The trials.
        like:
            A tensor of the device and precision that are wanted.

    Attributes:
        l1, clip_norm, weight_decay: See `hyperparameters.regularization`.
        decoupled: Members whose weight decay is adamw's.
        optimizers: Names.
        coefficients: The other numbers of their update rules.
        has_l1: Whether any member has an L1 penalty.

    Shape:
        - l1: ``(k, 1)``; clip_norm, weight_decay, decoupled: ``(k,)``.
    """

    def __init__(self, members: Sequence[Member], like: Tensor) -> None:
        def tensor(name: str) -> Tensor:
            return torch.tensor(param_column(members, name)).to(like)

        self._members = members
        self.l1 = tensor("l1")[:, None]
        self.has_l1 = bool((self.l1 > 0).any())
        self.clip_norm, self.weight_decay = tensor("clip_norm"), tensor("weight_decay")
        self.optimizers = [str(m.params["optimizer"]) for m in members]
        self.decoupled = torch.tensor([name == "adamw" for name in self.optimizers]).to(
            like.device
        )
        self.coefficients = [
            UpdateCoefficients(*numbers)
            for numbers in zip(
                param_column(members, "momentum"), param_column(members, "beta2"), strict=True
            )
        ]

    def rates(self, done: Sequence[int], steps: int, total: Sequence[int]) -> Tensor:
        """Learning rates of the next steps.

        Args:
            done:
                Steps that each member has done.
            steps:
                How many steps.
            total:
                Steps of each member's whole budget.

        Shape:
            - Output: ``(steps, k)``, in float64.
        """

        def tensor(name: str) -> Tensor:
            return torch.tensor(param_column(self._members, name))

        return learning_rates(
            tensor("learning_rate"),
            [str(m.params["learning_rate_decay"]) for m in self._members],
            tensor("warmup"),
            tensor("min_lr_ratio"),
            torch.tensor(done)[:, None] + torch.arange(steps),
            torch.tensor(total),
        ).T
