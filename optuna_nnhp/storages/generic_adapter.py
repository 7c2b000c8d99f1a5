"""How any storage takes a batch of changes: call by call."""

from __future__ import annotations

from contextlib import nullcontext
import threading
import time
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.operations import Change
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import Written
from optuna_nnhp.storages.operations import json_copy
from optuna_nnhp.storages.operations import surplus

REFUSALS = (KeyError, UpdateFinishedTrialError)  # deleted, or ended by somebody else
SETTLING = 0.2  # seconds after which the last of several owners is the one that stays
_alone = threading.Lock()  # what is in memory is this process's only


class GenericAdapter:
    """Any storage, call by call.

    What a trial may become depends on what it is, and another process may come in between: there
    it is looked at afterwards, and what was too much goes back. In memory nobody comes in between.

    Args:
        storage:
            The storage.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._is_ours = isinstance(storage, InMemoryStorage)

    def write(self, batch: Batch) -> Written:
        """One call for each value, as Optuna itself does it."""
        written = Written()
        with _alone if self._is_ours else nullcontext():
            for trial_id, change in batch.changes.items():
                try:
                    self._check_owner(trial_id, batch.owner)
                    self._change(trial_id, change)
                except REFUSALS as error:
                    written.refused[trial_id] = error
            if batch.takes:
                self._take(batch, written)
            if batch.claims or batch.templates:
                self._start(batch, written)
        return written

    def _check_owner(self, trial_id: int, owner: str | None) -> None:
        """Raise if a trial is another worker's by now."""
        if owner is not None:
            now = self._storage.get_trial(trial_id).user_attrs.get(WORKER)
            if now not in (None, owner):
                raise TrialTakenOver(trial_id, now)

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

    def _take(self, batch: Batch, written: Written) -> None:
        """Write a new owner where the old one is, and see whether it stays."""
        mine, tried = batch.mark[WORKER], list[int]()
        for trial_id, owner in batch.takes.items():
            if self._is_owned(trial_id, (owner, mine)):
                for key, value in batch.mark.items():
                    self._storage.set_trial_user_attr(trial_id, key, value)
                tried.append(trial_id)
        if tried and not self._is_ours:
            time.sleep(SETTLING)
        written.taken += [trial_id for trial_id in tried if self._is_owned(trial_id, (mine,))]

    def _is_owned(self, trial_id: int, owners: tuple[str, ...]) -> bool:
        try:
            trial = self._storage.get_trial(trial_id)
        except KeyError:
            return False
        return trial.state == TrialState.RUNNING and trial.user_attrs.get(WORKER) in owners

    def _start(self, batch: Batch, written: Written) -> None:
        """Claim and create trials; those that others left no room for go back."""
        storage, begun = self._storage, 0
        if batch.most is not None:
            begun = sum(t.state != TrialState.WAITING for t in self._all(batch))
        claims, templates = batch.possible(batch.room(begun), batch.claims)
        for trial_id in claims:
            try:
                if storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                    written.claimed.append(trial_id)
                    for key, value in batch.mark.items():
                        storage.set_trial_user_attr(trial_id, key, value)
            except UpdateFinishedTrialError:
                continue  # another process has run it already
        for template in templates:
            trial_id = storage.create_new_trial(batch.study_id, template)
            written.created.append((trial_id, storage.get_trial_number_from_id(trial_id)))
        back = surplus(self._all(batch), written, batch.most) if batch.most is not None else []
        for trial_id in back:
            storage.set_trial_state_values(trial_id, TrialState.WAITING)
            for key in batch.mark:
                storage.set_trial_user_attr(trial_id, key, None)
        written.claimed = [i for i in written.claimed if i not in back]
        written.created = [(i, number) for i, number in written.created if i not in back]

    def _all(self, batch: Batch) -> list[FrozenTrial]:
        return self._storage.get_all_trials(batch.study_id, deepcopy=False)

    def read(self, study_id: int, unfinished: set[int], after: int) -> list[FrozenTrial]:
        """All trials: such a storage keeps them in memory."""
        return self._storage.get_all_trials(study_id, deepcopy=False)

    def frozen(self, value: Any) -> Any:
        """The value itself if it stays in memory, else after a way through JSON."""
        return value if self._is_ours else json_copy(value)
