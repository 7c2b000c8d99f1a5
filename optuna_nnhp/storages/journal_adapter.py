"""How a journal takes a batch of changes: one append, played back to see what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC
from datetime import datetime
import pickle
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import SNAPSHOT_INTERVAL
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.generic_adapter import REFUSALS
from optuna_nnhp.storages.journal_file import append
from optuna_nnhp.storages.journal_file import encoded
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import Written
from optuna_nnhp.storages.operations import json_copy
from optuna_nnhp.storages.operations import surplus

Log = dict[str, Any]


class JournalAdapter:
    """A journal of any kind: one append, and the order of its lines decides.

    Another process may append between this one's look and its append. What it was faster with
    stays its, and what was too much goes back.

    Args:
        storage:
            The storage.
    """

    def __init__(self, storage: JournalStorage) -> None:
        self._storage = storage

    def write(self, batch: Batch) -> Written:
        """Append the batch, and play it back to see what became of it."""
        storage = self._storage
        with storage._thread_lock:  # another thread's reading would take our replies
            refused: dict[int, Exception] = {}
            if batch.starts or batch.owner is not None:
                self._replay(Batch())
                batch, refused = self._possible(batch)
            storage._backend.append_logs(self._signed(_logs(batch)))
            written = self._replay(batch)
            trials = self._all(batch.study_id) if batch.most is not None else []
            back = surplus(trials, written, batch.most)
            logs = [log for i in back for log in _waiting_logs(i, batch.mark)]
            written.claimed = [i for i in written.claimed if i not in back]
            written.created = [(i, number) for i, number in written.created if i not in back]
            logs += (log for i in written.claimed for log in _attribute_logs(i, batch.mark))
            if logs:
                storage._backend.append_logs(self._signed(iter(logs)))
        written.refused |= refused
        return written

    def _signed(self, logs: Iterator[Log]) -> list[Log]:
        worker = {"worker_id": self._storage._replay_result.worker_id}
        return [{**log, **worker} for log in logs]

    def _possible(self, batch: Batch) -> tuple[Batch, dict[int, Exception]]:
        """What can be written of a batch as things are now, and why not the rest."""
        replayed, refused = self._storage._replay_result, dict[int, Exception]()
        trials, takes = replayed._trials, dict[int, str]()
        for trial_id in batch.changes if batch.owner is not None else ():
            owner = trials[trial_id].user_attrs.get(WORKER)
            if owner not in (None, batch.owner):
                refused[trial_id] = TrialTakenOver(trial_id, owner)
        for trial_id, owner in batch.takes.items():
            trial = trials.get(trial_id)
            if trial is None or trial.state != TrialState.RUNNING:
                continue
            if trial.user_attrs.get(WORKER) in (owner, batch.mark[WORKER]):
                takes[trial_id] = owner
        begun = 0
        if batch.most is not None:
            begun = sum(t.state != TrialState.WAITING for t in self._all(batch.study_id))
        waiting = (i for i in batch.claims if trials[i].state == TrialState.WAITING)
        claims, templates = batch.possible(batch.room(begun), waiting)
        changes = {i: c for i, c in batch.changes.items() if i not in refused}
        possible = replace(batch, changes=changes, takes=takes, claims=claims, templates=templates)
        return possible, refused

    def _all(self, study_id: int) -> list[FrozenTrial]:
        replayed = self._storage._replay_result
        ids = replayed._study_id_to_trial_ids.get(study_id, [])
        return [replayed._trials[trial_id] for trial_id in ids]

    def _replay(self, batch: Batch) -> Written:
        """Take in what is new in the journal; the replies are for what this thread appended."""
        written, storage = Written(), self._storage
        replayed, gone = storage._replay_result, None
        faster = dict[int, Any]()  # owners whose lines come before ours
        for log in storage._backend.read_logs(replayed.log_number_read):
            trial = replayed._trials.get(log.get("trial_id", -1))
            is_ours = log["worker_id"] == replayed.worker_id
            try:
                replayed.apply_logs((log,))
            except (*REFUSALS, ValueError) as error:
                if trial is None:
                    gone = error  # the study of a new trial
                elif log.get("state") != TrialState.RUNNING:
                    written.refused[trial._trial_id] = error
                continue
            if trial is not None and WORKER in log.get("user_attr", {}):
                self._note_owner(trial._trial_id, log, batch, written, faster)
            if is_ours:
                self._note_start(log, trial, written)
        self._restore(faster)
        if gone is not None:
            raise gone
        return written

    def _note_owner(
        self, trial_id: int, log: Log, batch: Batch, written: Written, faster: dict[int, Any]
    ) -> None:
        """Note who was the first to take a trial over that this worker wanted."""
        if trial_id not in batch.takes or trial_id in written.taken:
            return
        if log["worker_id"] != self._storage._replay_result.worker_id:
            faster.setdefault(trial_id, log["user_attr"][WORKER])
        elif trial_id not in faster:
            written.taken.append(trial_id)

    def _note_start(self, log: Log, trial: FrozenTrial | None, written: Written) -> None:
        """Note that a line of ours has started a trial."""
        replayed = self._storage._replay_result
        if log["op_code"] == JournalOperation.CREATE_TRIAL:
            created = replayed._trials[replayed._last_created_trial_id_by_this_process]
            written.created.append((created._trial_id, created.number))
            self._save_snapshot(created._trial_id)
        elif (
            trial is not None
            and trial.state == TrialState.WAITING
            and log.get("state") == TrialState.RUNNING
        ):
            written.claimed.append(trial._trial_id)

    def _restore(self, owners: Mapping[int, Any]) -> None:
        """Write again who was the first to take trials over."""
        if owners:
            code = JournalOperation.SET_TRIAL_USER_ATTR
            logs = (
                {"op_code": code, "trial_id": i, "user_attr": {WORKER: owner}}
                for i, owner in owners.items()
            )
            self._storage._backend.append_logs(self._signed(logs))

    def _save_snapshot(self, trial_id: int) -> None:
        """As the storage itself does when it creates a trial."""
        backend = self._storage._backend
        if (
            isinstance(backend, BaseJournalSnapshot)
            and trial_id
            and not (trial_id % SNAPSHOT_INTERVAL)
        ):
            backend.save_snapshot(pickle.dumps(self._storage._replay_result))

    def read(self, study_id: int, unfinished: set[int], after: int) -> list[FrozenTrial]:
        """All trials: a journal is kept in memory."""
        return self._storage.get_all_trials(study_id, deepcopy=False)

    def frozen(self, value: Any) -> Any:
        """The value after a way through JSON."""
        return json_copy(value)


class JournalFileAdapter(JournalAdapter):
    """A journal in a file: under its lock nobody comes between a look and an append.

    Args:
        storage:
            The storage.
        backend:
            Its file.
    """

    def __init__(self, storage: JournalStorage, backend: JournalFileBackend) -> None:
        super().__init__(storage)
        self._file = backend

    def write(self, batch: Batch) -> Written:
        """Append the batch, under one lock and with one synchronization of the disk."""
        refused: dict[int, Exception] = {}
        with self._storage._thread_lock:
            if batch.starts or batch.owner is not None:
                with get_lock_file(self._file._lock):
                    self._replay(Batch())  # with it what an attempt that failed has left
                    batch, refused = self._possible(batch)
                    self._append(encoded(self._signed(_logs(batch, is_certain=True))))
            else:
                lines = encoded(self._signed(_logs(batch)))
                with get_lock_file(self._file._lock):
                    self._append(lines)
            written = self._replay(batch)
        written.refused |= refused
        return written

    def _append(self, lines: bytes) -> None:
        if lines:
            append(self._file._file_path, lines)


def _logs(batch: Batch, *, is_certain: bool = False) -> Iterator[Log]:
    """The lines of a batch, without who writes them; marks of trials only if they will be ours."""
    operation = JournalOperation
    for trial_id, change in batch.changes.items():
        head = {"trial_id": trial_id}
        for name, (value, distribution) in change.params.items():
            yield {
                "op_code": operation.SET_TRIAL_PARAM,
                **head,
                "param_name": name,
                "param_value_internal": value,
                "distribution": distribution_to_json(distribution),
            }
        for key, attribute in change.system_attrs.items():
            code = operation.SET_TRIAL_SYSTEM_ATTR
            yield {"op_code": code, **head, "system_attr": {key: attribute}}
        yield from _attribute_logs(trial_id, change.user_attrs)
        for step, number in change.intermediate_values.items():
            code = operation.SET_TRIAL_INTERMEDIATE_VALUE
            yield {"op_code": code, **head, "step": step, "intermediate_value": number}
        if change.state is not None:
            code = operation.SET_TRIAL_STATE_VALUES
            log = {"op_code": code, **head, "state": change.state, "values": change.values}
            yield log | ({"datetime_complete": _utc(change.completed)} if change.completed else {})
    yield from _start_logs(batch, is_certain)


def _start_logs(batch: Batch, is_certain: bool) -> Iterator[Log]:
    for trial_id in batch.takes:
        yield from _attribute_logs(trial_id, batch.mark)
    for trial_id in batch.claims:
        yield {
            "op_code": JournalOperation.SET_TRIAL_STATE_VALUES,
            "trial_id": trial_id,
            "state": TrialState.RUNNING,
            "values": None,
            "datetime_start": _utc(batch.now),
        }
        yield from _attribute_logs(trial_id, batch.mark if is_certain else {})
    for template in batch.templates:
        yield {
            "op_code": JournalOperation.CREATE_TRIAL,
            "study_id": batch.study_id,
            "datetime_start": template.datetime_start and _utc(template.datetime_start),
            "state": template.state,
            "value": None,
            "values": None,
            "distributions": {},
            "params": {},
            "user_attrs": template.user_attrs,
            "system_attrs": template.system_attrs,
            "intermediate_values": {},
        }


def _attribute_logs(trial_id: int, attributes: Mapping[str, Any]) -> Iterator[Log]:
    code = JournalOperation.SET_TRIAL_USER_ATTR
    for key, value in attributes.items():
        yield {"op_code": code, "trial_id": trial_id, "user_attr": {key: value}}


def _waiting_logs(trial_id: int, mark: Mapping[str, Any]) -> Iterator[Log]:
    code, state = JournalOperation.SET_TRIAL_STATE_VALUES, TrialState.WAITING
    yield {"op_code": code, "trial_id": trial_id, "state": state, "values": None}
    yield from _attribute_logs(trial_id, dict.fromkeys(mark))


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
