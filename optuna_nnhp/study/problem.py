"""Define the interface of a template that the study uses."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol
from typing import Self

from optuna.distributions import BaseDistribution
import torch
from torch import nn

from optuna_nnhp.hyperparameters.spec import Hyperparameter
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
    """A template with its data: what is tuned, and how trials are trained.

    This is what the study needs of a template; `templates.base.Template` adds what users need.

    Attributes:
        name: Default name of its study; another data set has another name.
        space: What is tuned.
        fixed: Values of all other hyperparameters.
        maximize: Whether a greater metric is better.
        seed: Seed of everything.
        rounds_per_epoch: How many of Optuna's steps make an epoch (see `training.batches`).
        device: Where the networks are trained.
        compile: Whether `torch.compile` compiles the networks.
        sequential: Whether a trial is trained to its end before the next leader is asked, because
            trials are long and stacking them saves little.
        min_resource: The round after which the default pruner first prunes.
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
    device: torch.device
    compile: bool
    description: dict[str, Any]

    def defaults(self) -> dict[str, Value]:
        """Return the configuration of the first trial, as far as it lies in the space."""

    def portfolio(self) -> list[dict[str, Value]]:
        """Return more configurations to try first; cheap ones, the best first."""

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        """Return a trial from its number and the values of the tuned parameters."""

    def signature(self, member: Member) -> Hashable:
        """Return what trials must have in common to be trained as one cohort.

        Raises:
            TrialError: If the trial cannot be trained.
        """

    def pin_to_leader(self, leader: Member) -> Callable[[str, Any], Any]:
        """Return the function that changes proposed values so that they fit a leader's cohort.

        It maps a parameter's name and proposed value to the value to use.
        """

    def mutable_names(self) -> frozenset[str]:
        """Return the tuned parameters whose values may change while a network trains."""

    def is_stackable(self, leader: Member) -> bool:
        """Return whether trials like this one can be trained as one stack."""

    def cohort_size(self, leader: Member) -> int:
        """Return how many trials with a leader's signature to train at once."""

    def memory(self, member: Member) -> int:
        """Return about how many bytes a trial takes while it trains."""

    def cohort(self, members: Sequence[Member]) -> Cohort:
        """Return a cohort of members with the same signature."""

    def with_seed(self, seed: int) -> Self:
        """Return the same problem with other first weights, batches and noise."""

    def count_weights(self, member: Member) -> int:
        """Return the number of trained weights."""

    def attributes(self, member: Member) -> dict[str, Any]:
        """Return attributes to store with a trial, besides those that all trials have."""

    def specs(self) -> dict[str, Hyperparameter]:
        """Return the catalogue's entries for the problem's hyperparameters, by name."""

    def uses_compiled_engine(self) -> bool:
        """Return whether the compiled engine trains the networks here."""

    def network(self, member: Member) -> nn.Module:
        """Return a trial's network as a plain module, its weights not yet loaded."""
