"""How a storage takes a batch of changes: any storage call by call, a journal as one append."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from datetime import datetime
import pickle
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages.journal._base import BaseJournalSnapshot
from optuna.storages.journal._storage import SNAPSHOT_INTERVAL
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.study.batches import Batch
from optuna_nnhp.study.batches import Change
from optuna_nnhp.study.batches import Written
from optuna_nnhp.study.batches import json_copy

REFUSALS = (KeyError, UpdateFinishedTrialError)  # deleted, or ended by somebody else


class CallWriter:
    """Any storage, call by call.

    Args:
        storage:
            The storage.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def write(self, batch: Batch) -> Written:
        """One call for each value, as Optuna itself does it."""
        written, storage = Written(), self._storage
        for trial_id, change in batch.changes.items():
            try:
                self._change(trial_id, change)
            except REFUSALS as error:
                written.refused[trial_id] = error
        for trial_id in batch.claims:
            try:
                if storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                    written.claimed.append(trial_id)
            except UpdateFinishedTrialError:
                continue  # another process has run it already
        for template in batch.templates:
            trial_id = storage.create_new_trial(batch.study_id, template)
            written.created.append((trial_id, storage.get_trial_number_from_id(trial_id)))
        return written

    def _change(self, trial_id: int, change: Change) -> None:
        storage = self._storage
        for name, (value, distribution) in change.params.items():
            storage.set_trial_param(trial_id, name, value, distribution)
        for key, attribute in change.system_attrs.items():
            storage.set_trial_system_attr(trial_id, key, attribute)
        for key, attribute in change.user_attrs.items():
            storage.set_trial_user_attr(trial_id, key, attribute)
        for step, number in change.intermediate_values.items():
            storage.set_trial_intermediate_value(trial_id, step, number)
        if change.state is not None:
            storage.set_trial_state_values(trial_id, change.state, change.values)

    def read(self, study_id: int, unfinished: set[int], after: int) -> list[FrozenTrial]:
        """All trials: such a storage keeps them in memory."""
        return self._storage.get_all_trials(study_id, deepcopy=False)

    def frozen(self, value: Any) -> Any:
        """The value itself if it stays in memory, else after a way through JSON."""
        return value if isinstance(self._storage, InMemoryStorage) else json_copy(value)


class JournalWriter:
    """A journal: one append, under one lock and with one synchronization of the disk.

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
            worker = {"worker_id": storage._replay_result.worker_id}
            storage._backend.append_logs([{**log, **worker} for log in _journal_logs(batch)])
            return self._replay()

    def _replay(self) -> Written:
        """Take in what is new in the journal; the replies are for what this thread appended."""
        written, storage = Written(), self._storage
        replayed, gone = storage._replay_result, None
        for log in storage._backend.read_logs(replayed.log_number_read):
            trial = replayed._trials.get(log.get("trial_id", -1))
            try:
                replayed.apply_logs((log,))
            except (*REFUSALS, ValueError) as error:
                if trial is None:
                    gone = error  # the study of a new trial
                elif log.get("state") != TrialState.RUNNING:
                    written.refused[trial._trial_id] = error
                continue
            if log["worker_id"] != replayed.worker_id:
                continue
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
        if gone is not None:
            raise gone
        return written

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


def _journal_logs(batch: Batch) -> Iterable[dict[str, Any]]:
    """The lines of a batch, without who writes them."""
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
        for key, attribute in change.user_attrs.items():
            yield {"op_code": operation.SET_TRIAL_USER_ATTR, **head, "user_attr": {key: attribute}}
        for step, number in change.intermediate_values.items():
            code = operation.SET_TRIAL_INTERMEDIATE_VALUE
            yield {"op_code": code, **head, "step": step, "intermediate_value": number}
        if change.state is not None:
            code = operation.SET_TRIAL_STATE_VALUES
            log = {"op_code": code, **head, "state": change.state, "values": change.values}
            yield log | ({"datetime_complete": _utc(change.completed)} if change.completed else {})
    for trial_id in batch.claims:
        yield {
            "op_code": operation.SET_TRIAL_STATE_VALUES,
            "trial_id": trial_id,
            "state": TrialState.RUNNING,
            "values": None,
            "datetime_start": _utc(batch.now),
        }
    for template in batch.templates:
        yield {
            "op_code": operation.CREATE_TRIAL,
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


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
