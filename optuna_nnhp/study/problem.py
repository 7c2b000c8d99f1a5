"""What the study's machinery needs to know of a template."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol
from typing import Self

from optuna.distributions import BaseDistribution
from torch import nn

from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member


class TrialError(RuntimeError):
    """A trial cannot be trained as it is proposed; other trials can.

    The text is the last line of what went wrong. `Problem.signature`, `Problem.cohort_size` and
    `Problem.cohort` may raise it.
    """


class TrialTooLarge(TrialError):
    """A trial needs more memory than there is."""


class Problem(Protocol):
    """A template with its data: what is tuned, on what, and how trials are trained.

    Attributes:
        name: Default name of its study; another data set has another name.
        space: What is tuned.
        fixed: Values of all other hyperparameters.
        maximize: Whether a greater metric is better.
        seed: Seed of everything.
        rounds_per_epoch: How many of Optuna's steps make an epoch (see `training.rounds`).
        one_by_one: Whether a trial is trained to its end before the next leader is asked, as where
            trials are long and stacking them brings little.
        first_rung: Round after which the default pruner first judges.
        description: What a reader of the study should know, as JSON; kept as its attributes.
            Two studies with different ``"template"``, ``"task"``, ``"metric"`` or
            ``"fingerprint"`` must not be mixed.
    """

    name: str
    space: dict[str, BaseDistribution]
    fixed: dict[str, Value]
    maximize: bool
    seed: int
    rounds_per_epoch: int
    sequential: bool
    min_resource: int
    description: dict[str, Any]

    def defaults(self) -> dict[str, Value]:
        """The configuration of the first trial, as far as it lies in the space."""

    def portfolio(self) -> list[dict[str, Value]]:
        """More configurations worth trying before anything is known; cheap ones, best first."""

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        """A trial, given its number and the values of what is tuned."""

    def signature(self, member: Member) -> Hashable:
        """What trials must have in common to be trained as one cohort."""

    def pin(self, leader: Member) -> Callable[[str, Any], Any]:
        """How a proposed value is moved so that the trial can join a leader's cohort."""

    def mutable_names(self) -> frozenset[str]:
        """What of the space may change while a network trains."""

    def is_stackable(self, leader: Member) -> bool:
        """Whether trials like one can be trained as one stack at all."""

    def cohort_size(self, leader: Member) -> int:
        """How many trials of a leader's signature to train at once."""

    def memory(self, member: Member) -> int:
        """Bytes that a trial takes while it trains, about."""

    def cohort(self, members: Sequence[Member]) -> Cohort:
        """A cohort of members with one signature."""

    def with_seed(self, seed: int) -> Self:
        """The same on the same data, with other first weights, batches and noise."""

    def count_weights(self, member: Member) -> int:
        """Number of trained weights."""

    def attributes(self, member: Member) -> dict[str, Any]:
        """What a reader should know of a trial, besides what all templates tell."""

    def network(self, member: Member) -> nn.Module:
        """A trial's network as a plain module, weights not yet loaded."""
