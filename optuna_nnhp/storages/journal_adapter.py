"""Applies operations to a journal file: one append under the journal's lock."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import UTC
from datetime import datetime
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from optuna_nnhp.storages._optuna_internals import JournalOperation
from optuna_nnhp.storages._optuna_internals import JournalState
from optuna_nnhp.storages._optuna_internals import get_lock_file
from optuna_nnhp.storages._optuna_internals import journal_lock
from optuna_nnhp.storages._optuna_internals import journal_path
from optuna_nnhp.storages.journal_file import append
from optuna_nnhp.storages.journal_file import encode
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import Plan
from optuna_nnhp.storages.operations import StudyCounts
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.operations import TrialStatus
from optuna_nnhp.storages.operations import json_round_trip
from optuna_nnhp.storages.operations import plan

Log = dict[str, Any]


class JournalAdapter:
    """Appends the entries of all operations with one synchronization of the disk.

    Under the file's lock nobody else can append, so that the conditions of the operations hold.

    Args:
        storage:
            The storage.
        file:
            Its file.
    """

    def __init__(self, storage: JournalStorage, file: JournalFileBackend) -> None:
        self._storage = storage
        self._journal = JournalState(storage)
        self._lock, self._path = journal_lock(file), journal_path(file)

    def apply(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Append the operations whose conditions hold.

        Raises:
            OSError: If the file cannot be written; it holds whole lines all the same.
        """
        with self._journal.exclusive():
            with get_lock_file(self._lock):
                self._journal.sync()  # with it what an attempt that failed has left
                planned = self._plan(ops)
                first_id = len(self._journal.trials)
                lines = encode(self._journal.signed(_logs(planned)))
                if lines:
                    append(self._path, lines)
            errors = self._journal.sync()
        planned.set_ids(range(first_id, first_id + len(planned.new)))
        return [_outcome(outcome, errors) for outcome in planned.outcomes]

    def _plan(self, ops: Sequence[Operation]) -> Plan:
        trials, studies = dict[int, TrialStatus](), dict[int, StudyCounts]()
        for op in ops:
            if isinstance(op, Op) and op.trial_id in self._journal.trials:
                trials[op.trial_id] = TrialStatus.of(self._journal.trials[op.trial_id])
            needs_study = not isinstance(op, Op) or op.trial_id is None or op.limit is not None
            if needs_study and op.study_id not in studies:
                known = self._journal.trials_of(op.study_id)
                if known is not None:
                    studies[op.study_id] = StudyCounts.of(known)
        return plan(ops, trials, studies)

    def read(self, study_id: int, unfinished: set[int], last_trial_id: int) -> list[FrozenTrial]:
        """Return all trials: a journal is kept in memory."""
        return self._storage.get_all_trials(study_id, deepcopy=False)

    def as_stored(self, value: Any) -> Any:
        """Return a value as JSON returns it."""
        return json_round_trip(value)


def _outcome(outcome: Outcome, errors: Mapping[int, Exception]) -> Outcome:
    """Return the error of an operation whose entries Optuna refuses, such as an odd parameter."""
    return errors.get(outcome.trial_id, outcome) if isinstance(outcome, Applied) else outcome


def _logs(planned: Plan) -> Iterator[Log]:
    """Return the journal's entries for planned operations."""
    for trial_id, change in planned.changes.items():
        yield from _trial_logs(trial_id, change)
    for op in planned.new:
        change = op.signed_change
        yield {
            "op_code": JournalOperation.CREATE_TRIAL,
            "study_id": op.study_id,
            "datetime_start": change.started and _utc(change.started),
            "state": change.state,
            "value": None,
            "values": None,
            "distributions": {},
            "params": {},
            "user_attrs": change.user_attrs,
            "system_attrs": change.system_attrs,
            "intermediate_values": {},
        }
    for attr in planned.study_attrs:
        code = {
            "user": JournalOperation.SET_STUDY_USER_ATTR,
            "system": JournalOperation.SET_STUDY_SYSTEM_ATTR,
        }[attr.kind]
        entry = {"study_id": attr.study_id, f"{attr.kind}_attr": {attr.key: attr.value}}
        yield {"op_code": code, **entry}


def _trial_logs(trial_id: int, change: TrialChange) -> Iterator[Log]:
    """Return the entries for a trial that exists; the one of its state is last."""
    trial = {"trial_id": trial_id}
    for name, (value, distribution) in change.params.items():
        yield {
            "op_code": JournalOperation.SET_TRIAL_PARAM,
            **trial,
            "param_name": name,
            "param_value_internal": value,
            "distribution": distribution_to_json(distribution),
        }
    for key, attribute in change.system_attrs.items():
        code = JournalOperation.SET_TRIAL_SYSTEM_ATTR
        yield {"op_code": code, **trial, "system_attr": {key: attribute}}
    for key, attribute in change.user_attrs.items():
        code = JournalOperation.SET_TRIAL_USER_ATTR
        yield {"op_code": code, **trial, "user_attr": {key: attribute}}
    for step, number in change.intermediate_values.items():
        code = JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE
        yield {"op_code": code, **trial, "step": step, "intermediate_value": number}
    if change.state is not None:
        code = JournalOperation.SET_TRIAL_STATE_VALUES
        log = {"op_code": code, **trial, "state": change.state, "values": change.values}
        times = {"datetime_start": change.started, "datetime_complete": change.completed}
        yield log | {name: _utc(time) for name, time in times.items() if time is not None}


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
