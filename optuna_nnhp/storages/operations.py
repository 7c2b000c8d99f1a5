"""What is written at once: many changes of many trials."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from datetime import datetime
import json
import math
from typing import Any
from typing import Protocol

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

WORKER = "worker"  # trial attribute: who trains it
REQUEUED_BY = "requeued_by"  # attribute of a WAITING trial that has been trained in part: by whom
PLAIN = (float, int, str, bool, type(None))  # what JSON gives back as it was


@dataclass
class Change:
    """What one trial has become since it was last written.

    Args:
        params:
            Internal value and distribution, by name.
        user_attrs:
            By key.
        system_attrs:
            By key.
        intermediate_values:
            By step.
        state:
            New state, None if it is the same.
        values:
            Values of the objectives, if there are any.
        completed:
            When it ended, local time.
    """

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)
    intermediate_values: dict[int, float] = field(default_factory=dict)
    state: TrialState | None = None
    values: list[float] | None = None
    completed: datetime | None = None

    def applied_to(self, trial: FrozenTrial) -> FrozenTrial:
        """A copy of a trial that has changed so."""
        changed = copied(trial)
        for name, (value, distribution) in self.params.items():
            changed._params[name] = distribution.to_external_repr(value)
            changed._distributions[name] = distribution
        changed._user_attrs.update(self.user_attrs)
        changed._system_attrs.update(self.system_attrs)
        changed.intermediate_values.update(self.intermediate_values)
        if self.state is not None:
            changed.state = self.state
        if self.values is not None:
            changed._values = self.values
        if self.completed is not None:
            changed.datetime_complete = self.completed
        return changed


@dataclass
class Batch:
    """What is written at once, in this order.

    Args:
        changes:
            Of trials that run here, by trial id.
        takes:
            Trials that shall run here instead of with another worker: its name, by trial id.
        claims:
            Ids of WAITING trials that shall run here.
        study_id:
            Study of the claimed and of the new trials.
        templates:
            The new trials: RUNNING or WAITING, without values.
        mark:
            User attributes of the trials that are taken over or claimed.
        most:
            How many trials of the study may have begun; None: any number.
        owner:
            Whose the changed trials must be still; None: there is no doubt.
        now:
            When the claimed trials start, local time.
    """

    changes: Mapping[int, Change] = field(default_factory=dict)
    takes: Mapping[int, str] = field(default_factory=dict)
    claims: Sequence[int] = ()
    study_id: int = -1
    templates: Sequence[FrozenTrial] = ()
    mark: Mapping[str, Any] = field(default_factory=dict)
    most: int | None = None
    owner: str | None = None
    now: datetime = field(default_factory=datetime.now)

    @property
    def starts(self) -> bool:
        """Whether trials shall start here."""
        return bool(self.claims or self.takes or self.templates)

    def room(self, begun: int) -> float:
        """How many trials may start yet."""
        return math.inf if self.most is None else max(0, self.most - begun)

    def possible(self, room: float, claims: Iterable[int]) -> tuple[list[int], list[FrozenTrial]]:
        """The claims and the new trials that there is room for.

        Example:
            >>> Batch(claims=[4, 5]).possible(1, claims=[5, 6])
            ([5], [])
        """
        claimed: list[int] = []
        for trial_id in claims:
            if room > len(claimed):
                claimed.append(trial_id)
        room -= len(claimed)
        created: list[FrozenTrial] = []
        for template in self.templates:
            begins = template.state != TrialState.WAITING
            if begins and room <= 0:
                continue
            room -= begins
            created.append(template)
        return claimed, created


@dataclass
class Written:
    """What became of a batch.

    Args:
        refused:
            Why a trial's changes cannot be written any more, by its id: another process has
            ended or deleted it, or taken it over.
        taken:
            Ids of the trials that this worker has now instead of the named one.
        claimed:
            Ids of the claimed trials that no other process has taken first.
        created:
            Ids and numbers of the new trials; fewer than wanted if there was no room.
    """

    refused: dict[int, Exception] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)
    claimed: list[int] = field(default_factory=list)
    created: list[tuple[int, int]] = field(default_factory=list)


class TrialTakenOver(UpdateFinishedTrialError):
    """Another worker has the trial: for this one it is over."""

    def __init__(self, trial_id: int, owner: object) -> None:
        super().__init__(f"The trial with the id {trial_id} has been taken over by {owner}.")
        self.owner = owner


class StorageAdapter(Protocol):
    """One kind of storage."""

    def write(self, batch: Batch) -> Written:
        """Make a batch durable: as one transaction, if the storage can."""
        ...

    def read(self, study_id: int, unfinished: set[int], after: int) -> list[FrozenTrial]:
        """Trials that may be new: at least those unfinished, and those with ids above `after`."""
        ...

    def frozen(self, value: Any) -> Any:
        """An attribute as the storage will give it back.

        Raises:
            TypeError: If the storage cannot keep it.
        """
        ...


def copied(trial: FrozenTrial) -> FrozenTrial:
    """A trial that can be changed, and this one stays; three times as fast as `copy.copy`.

    Example:
        >>> import optuna
        >>> trial = optuna.trial.create_trial(value=1.0)
        >>> copied(trial) == trial, copied(trial).params is trial.params
        (True, False)
    """
    twin = FrozenTrial.__new__(FrozenTrial)
    twin.__dict__.update(trial.__dict__)
    twin._params = trial._params.copy()
    twin._distributions = trial._distributions.copy()
    twin._user_attrs = trial._user_attrs.copy()
    twin._system_attrs = trial._system_attrs.copy()
    twin.intermediate_values = trial.intermediate_values.copy()
    return twin


def surplus(trials: Iterable[FrozenTrial], written: Written, most: int | None) -> list[int]:
    """Ids of started trials that go back to WAITING, as others have started some meanwhile.

    For storages in which nobody can look and write in one. Of new trials those with the lower
    numbers stay: all see it the same way. Claimed ones have any number, and go back if there are
    too many at all.

    Args:
        trials:
            All of the study, as they are now.
        written:
            What this process has started.
        most:
            How many may have begun.
    """
    if most is None:
        return []
    begun = sorted(t._number for t in trials if t.state != TrialState.WAITING)
    theirs = set(begun)
    new = [(i, number) for i, number in written.created if number in theirs]
    back = [i for i, number in new if bisect_left(begun, number) >= most]
    over = max(0, len(begun) - most - len(back))
    return back + written.claimed[max(0, len(written.claimed) - over) :]


def json_copy(value: Any) -> Any:
    """A value after a way through JSON: tuples are lists, keys are texts.

    Example:
        >>> json_copy({1: (2.0, None)})
        {'1': [2.0, None]}
    """
    return value if type(value) in PLAIN else json.loads(json.dumps(value))
