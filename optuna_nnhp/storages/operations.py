"""Conditional operations: what a storage is asked to change, and under which conditions."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from datetime import datetime
import json
from typing import Any
from typing import NamedTuple
from typing import Protocol
from uuid import uuid4

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages._optuna_internals import copy_trial

WORKER = "worker"  # user attribute of a trial: the worker that trains it
REQUEUED_BY = "requeued_by"  # user attribute of a partly trained WAITING trial: its last worker
TOKEN = "optuna_nnhp:token"  # system attribute of a trial: the last operation on its state
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
_JSON_SCALARS = (float, int, str, bool, type(None))  # types that JSON returns unchanged


@dataclass
class TrialChange:
    """New values of a trial's fields.

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
            New state, None to keep it.
        values:
            Values of the objectives.
        started:
            Start, local time.
        completed:
            End, local time.
    """

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)
    intermediate_values: dict[int, float] = field(default_factory=dict)
    state: TrialState | None = None
    values: list[float] | None = None
    started: datetime | None = None
    completed: datetime | None = None

    def apply_to(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a changed copy of a trial."""
        changed = copy_trial(trial)
        for name, (value, distribution) in self.params.items():
            changed.params[name] = distribution.to_external_repr(value)
            changed.distributions[name] = distribution
        changed.user_attrs.update(self.user_attrs)
        changed.system_attrs.update(self.system_attrs)
        changed.intermediate_values.update(self.intermediate_values)
        changed.state = changed.state if self.state is None else self.state
        changed.values = changed.values if self.values is None else self.values
        changed.datetime_start = self.started or changed.datetime_start
        changed.datetime_complete = self.completed or changed.datetime_complete
        return changed

    def merged(self, later: TrialChange) -> TrialChange:
        """Return this change followed by another one."""
        return TrialChange(
            params={**self.params, **later.params},
            user_attrs={**self.user_attrs, **later.user_attrs},
            system_attrs={**self.system_attrs, **later.system_attrs},
            intermediate_values={**self.intermediate_values, **later.intermediate_values},
            state=self.state if later.state is None else later.state,
            values=self.values if later.values is None else later.values,
            started=later.started or self.started,
            completed=later.completed or self.completed,
        )


@dataclass
class Op:
    """One conditional operation on one trial.

    A change of state leaves the operation's token in the trial, so that an operation whose answer
    was lost can be recognized, and repeated without harm.

    Args:
        study_id:
            Study of the trial.
        trial_id:
            The trial; None to create one.
        change:
            New values of its fields.
        if_state:
            States in which the trial is changed; in any other one the operation is rejected.
        if_owner:
            Workers of which one must have the trial (None: no worker); no condition if None.
        limit:
            Number of trials of the study that may have begun, this one included; None for any.
        token:
            Unique name of the operation.

    Example:
        >>> op = Op(study_id=0, trial_id=7, change=TrialChange(state=TrialState.COMPLETE))
        >>> op.change_with_token.system_attrs == {TOKEN: op.token}
        True
    """

    study_id: int
    trial_id: int | None
    change: TrialChange
    if_state: tuple[TrialState, ...] = UNFINISHED
    if_owner: tuple[str | None, ...] | None = None
    limit: int | None = None
    token: str = field(default_factory=lambda: uuid4().hex[:16])

    @property
    def change_with_token(self) -> TrialChange:
        """The change, with the token if it changes the state."""
        if self.change.state is None:
            return self.change
        return self.change.merged(TrialChange(system_attrs={TOKEN: self.token}))

    @property
    def starts_trial(self) -> bool:
        """Whether a trial begins to run."""
        return self.change.state == TrialState.RUNNING


@dataclass
class StudyAttr:
    """A new value of a study's attribute.

    Args:
        study_id:
            The study.
        kind:
            "user" or "system".
        key:
            Its name.
        value:
            Its value.
    """

    study_id: int
    kind: str
    key: str
    value: Any


@dataclass
class Applied:
    """The outcome of an operation that was applied.

    Args:
        trial_id:
            The trial, -1 for an attribute of a study.
        number:
            Number of a created trial, else -1.
        is_repeated:
            Whether it had been applied before, and nothing was written now.
    """

    trial_id: int = -1
    number: int = -1
    is_repeated: bool = False


Operation = Op | StudyAttr
Outcome = Applied | Exception  # an exception says why an operation was rejected


class TrialTakenOver(UpdateFinishedTrialError):
    """Another worker has taken the trial over, so that this one cannot change it any more."""

    def __init__(self, trial_id: int, owner: object) -> None:
        super().__init__(f"The trial with the id {trial_id} was taken over by {owner}.")
        self.owner = owner


class TrialLimitReached(Exception):
    """As many trials of the study have begun as its limit allows."""

    def __init__(self, limit: int | None) -> None:
        super().__init__(f"The study has reached its limit of {limit} trials.")


class StorageAdapter(Protocol):
    """Applies operations to one kind of storage."""

    def apply(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Apply operations in their order and make them durable.

        Returns:
            One outcome for each operation.
        """
        ...

    def read(self, study_id: int, unfinished: set[int], last_trial_id: int) -> list[FrozenTrial]:
        """Return the unfinished trials that may have changed, and all with later ids."""
        ...

    def as_stored(self, value: Any) -> Any:
        """Return an attribute as the storage will return it.

        Raises:
            TypeError: If the storage cannot keep it.
        """
        ...


class TrialStatus(NamedTuple):
    """What the conditions of operations depend on: a trial's state, worker, and last token."""

    state: TrialState
    owner: object
    token: object

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialStatus:
        """Return the status of a trial as the storage returns it."""
        return cls(trial.state, trial.user_attrs.get(WORKER), trial.system_attrs.get(TOKEN))


@dataclass
class StudyCounts:
    """Numbers of a study's trials: those that have begun (are not WAITING), and all."""

    begun: int = 0
    created: int = 0

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> StudyCounts:
        """Count all trials of a study."""
        return cls(sum(trial.state != TrialState.WAITING for trial in trials), len(trials))


@dataclass
class PlannedWrites:
    """What a storage is to write for a list of operations.

    Args:
        outcomes:
            One for each operation.
        changes:
            Of trials that exist, by id.
        new:
            Operations that create trials.
        study_attrs:
            Attributes of studies.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    changes: dict[int, TrialChange] = field(default_factory=dict)
    new: list[Op] = field(default_factory=list)
    study_attrs: list[StudyAttr] = field(default_factory=list)

    def set_ids(self, ids: Iterable[int]) -> None:
        """Note the ids of the created trials."""
        created = (o for o in self.outcomes if isinstance(o, Applied) and o.number >= 0)
        for outcome, trial_id in zip(created, ids, strict=True):
            outcome.trial_id = trial_id


def plan_writes(
    ops: Sequence[Operation],
    trials: dict[int, TrialStatus],
    studies: Mapping[int, StudyCounts],
) -> PlannedWrites:
    """Check operations in their order against a storage that nobody else can change meanwhile.

    Args:
        ops:
            The operations.
        trials:
            The trials of the operations that exist, by id.
        studies:
            The studies of which the operations create trials, limit their number, or set
            attributes, as far as they exist.
    """
    planned = PlannedWrites()
    for op in ops:
        outcome: Outcome | None = None
        study = studies.get(op.study_id)
        if isinstance(op, Op):
            trial = None if op.trial_id is None else trials.get(op.trial_id)
            outcome = check_conditions(op, trial, study) or _add_to_plan(
                op, planned, trials, study
            )
        elif study is None:
            outcome = _missing_study_error(op.study_id)
        else:
            planned.study_attrs.append(op)
            outcome = Applied()
        planned.outcomes.append(outcome)
    return planned


def _add_to_plan(
    op: Op, planned: PlannedWrites, trials: dict[int, TrialStatus], study: StudyCounts | None
) -> Applied:
    """Add an operation to a plan; later operations depend on it."""
    study = study or StudyCounts()
    study.begun += op.starts_trial
    if op.trial_id is None:
        study.created += 1
        planned.new.append(op)
        return Applied(number=study.created - 1)
    change, now = op.change_with_token, trials[op.trial_id]
    trials[op.trial_id] = TrialStatus(
        now.state if change.state is None else change.state,
        change.user_attrs.get(WORKER, now.owner),
        change.system_attrs.get(TOKEN, now.token),
    )
    if op.trial_id in planned.changes:
        planned.changes[op.trial_id] = planned.changes[op.trial_id].merged(change)
    else:
        planned.changes[op.trial_id] = change
    return Applied(op.trial_id)


def check_conditions(
    op: Op, trial: TrialStatus | None, study: StudyCounts | None
) -> Outcome | None:
    """Check an operation's conditions.

    Args:
        op:
            The operation.
        trial:
            Its trial, None if there is none.
        study:
            Its study; None if there is none, or its trials need not be counted.

    Returns:
        None if the operation is to be applied, else its outcome.
    """
    if op.trial_id is None and study is None:
        return _missing_study_error(op.study_id)
    if op.trial_id is not None:
        if trial is None:
            return KeyError(f"There is no trial with the id {op.trial_id}.")
        if (trial.state, trial.token) == (op.change.state, op.token):
            return Applied(op.trial_id, is_repeated=True)
        if trial.state not in op.if_state:
            text = f"The trial with the id {op.trial_id} is already {trial.state.name}."
            return UpdateFinishedTrialError(text)
        if op.if_owner is not None and trial.owner not in op.if_owner:
            return TrialTakenOver(op.trial_id, trial.owner)
    if op.limit is not None and op.starts_trial and study is not None and study.begun >= op.limit:
        return TrialLimitReached(op.limit)
    return None


def _missing_study_error(study_id: int) -> KeyError:
    return KeyError(f"There is no study with the id {study_id}.")


def new_trial_op(study_id: int, trial: FrozenTrial, limit: int | None = None) -> Op:
    """Return the operation that adds a trial without parameters and values."""
    change = TrialChange(
        user_attrs=dict(trial.user_attrs),
        system_attrs=dict(trial.system_attrs),
        state=trial.state,
        started=trial.datetime_start,
    )
    return Op(study_id, None, change, limit=limit)


def json_round_trip(value: Any) -> Any:
    """Return a value as JSON returns it: tuples become lists, keys become texts.

    Raises:
        TypeError: If JSON cannot keep it.

    Example:
        >>> json_round_trip({1: (2.0, None)})
        {'1': [2.0, None]}
    """
    return value if type(value) in _JSON_SCALARS else json.loads(json.dumps(value))
