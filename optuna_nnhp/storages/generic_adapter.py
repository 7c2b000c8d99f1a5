"""Applies operations to any other storage, call by call."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence
from contextlib import nullcontext
import threading
import time
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial

from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.operations import StudyCounts
from optuna_nnhp.storages.operations import TrialLimitReached
from optuna_nnhp.storages.operations import TrialStatus
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import check_conditions
from optuna_nnhp.storages.operations import json_round_trip

REJECTIONS = (KeyError, UpdateFinishedTrialError)  # a storage says: deleted, or finished
SETTLING_TIME = 0.2  # seconds after which the last of several new owners has a trial
_memory_lock = threading.Lock()  # only threads of this process can change what is in memory


class GenericAdapter:
    """Uses Optuna's calls of a storage, one for each value.

    Another process may change a trial between the check of a condition and the call. So takeovers
    and the number of trials are checked again afterwards, and trials over the limit are requeued.
    In memory one lock keeps others away.

    Args:
        storage:
            The storage.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._is_exclusive = isinstance(storage, InMemoryStorage)

    def apply(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Apply operations one by one; an error leaves those before it applied."""
        with _memory_lock if self._is_exclusive else nullcontext():
            counts = dict[int, StudyCounts]()
            outcomes = [self._apply_one(op, counts) for op in ops]
            if not self._is_exclusive:
                self._check_takeovers(ops, outcomes)
                self._requeue_excess(ops, outcomes)
        return outcomes

    def _apply_one(self, op: Operation, counts: dict[int, StudyCounts]) -> Outcome:
        try:
            if isinstance(op, StudyAttr):
                set_attr = getattr(self._storage, f"set_study_{op.kind}_attr")
                set_attr(op.study_id, op.key, op.value)
                return Applied()
            return self._apply_to_trial(op, self._count_begun_trials(op, counts))
        except REJECTIONS as error:
            return error

    def _apply_to_trial(self, op: Op, study: StudyCounts) -> Outcome:
        if op.limit is not None and op.starts_trial and study.begun >= op.limit:
            return TrialLimitReached(op.limit)
        if op.trial_id is None:
            outcome: Outcome = self._create_trial(op)
        else:
            # The storage itself rejects changes of finished trials: one call less.
            if op.if_owner is not None:
                rejection = check_conditions(op, self._read_status(op.trial_id), study)
                if rejection is not None:
                    return rejection
            try:
                outcome = self._change_trial(op.trial_id, op)
            except UpdateFinishedTrialError as error:
                return check_conditions(op, self._read_status(op.trial_id), study) or error
        study.begun += op.starts_trial and isinstance(outcome, Applied)
        return outcome

    def _count_begun_trials(self, op: Op, counts: dict[int, StudyCounts]) -> StudyCounts:
        """Return the number of trials that have begun, if the operation depends on it."""
        if op.limit is None:
            return StudyCounts()
        if op.study_id not in counts:
            trials = self._storage.get_all_trials(op.study_id, deepcopy=False)
            counts[op.study_id] = StudyCounts.of(trials)
        return counts[op.study_id]

    def _read_status(self, trial_id: int) -> TrialStatus:
        return TrialStatus.of(self._storage.get_trial(trial_id))

    def _create_trial(self, op: Op) -> Outcome:
        change = op.change_with_token
        assert change.state is not None
        template = create_trial(
            state=change.state, user_attrs=change.user_attrs, system_attrs=change.system_attrs
        )
        template.datetime_start = change.started
        trial_id = self._storage.create_new_trial(op.study_id, template)
        return Applied(trial_id, self._storage.get_trial_number_from_id(trial_id))

    def _change_trial(self, trial_id: int, op: Op) -> Outcome:
        storage, change = self._storage, op.change_with_token
        if op.starts_trial and not storage.set_trial_state_values(trial_id, TrialState.RUNNING):
            return UpdateFinishedTrialError(f"Another process has started the trial {trial_id}.")
        for name, (value, distribution) in change.params.items():
            storage.set_trial_param(trial_id, name, value, distribution)
        for key, attribute in change.system_attrs.items():
            storage.set_trial_system_attr(trial_id, key, attribute)
        for key, attribute in change.user_attrs.items():
            storage.set_trial_user_attr(trial_id, key, attribute)
        for step, number in change.intermediate_values.items():
            storage.set_trial_intermediate_value(trial_id, step, number)
        if change.state is not None and not op.starts_trial:
            storage.set_trial_state_values(trial_id, change.state, change.values)
        return Applied(trial_id)

    def _check_takeovers(self, ops: Sequence[Operation], outcomes: list[Outcome]) -> None:
        """Reject takeovers of trials for which another process has written its name later."""
        taken = [
            (place, op.trial_id, op.change.user_attrs[WORKER])
            for place, (op, outcome) in enumerate(zip(ops, outcomes, strict=True))
            if isinstance(op, Op) and isinstance(outcome, Applied) and op.trial_id is not None
            if op.change.state is None and op.change.user_attrs.get(WORKER) is not None
        ]
        if taken:
            time.sleep(SETTLING_TIME)
        for place, trial_id, worker in taken:
            owner = self._read_status(trial_id).owner
            if owner != worker:
                outcomes[place] = TrialTakenOver(trial_id, owner)

    def _requeue_excess(self, ops: Sequence[Operation], outcomes: list[Outcome]) -> None:
        """Let started trials wait again if others have started some meanwhile."""
        for study_id, limit in {(op.study_id, op.limit) for op in ops if isinstance(op, Op)}:
            if limit is None:
                continue
            started = {
                outcome.trial_id: (place, op)
                for place, (op, outcome) in enumerate(zip(ops, outcomes, strict=True))
                if isinstance(op, Op) and isinstance(outcome, Applied) and op.starts_trial
                if (op.study_id, op.limit) == (study_id, limit)
            }
            trials = self._storage.get_all_trials(study_id, deepcopy=False)
            created = {i for i, (_, op) in started.items() if op.trial_id is None}
            for trial_id in excess_trials(trials, created, started.keys() - created, limit):
                place, op = started[trial_id]
                self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
                for key in op.change.user_attrs:
                    self._storage.set_trial_user_attr(trial_id, key, None)
                outcomes[place] = TrialLimitReached(limit)

    def read(self, study_id: int, unfinished: set[int], last_trial_id: int) -> list[FrozenTrial]:
        """Return all trials: such storages keep them in memory."""
        return self._storage.get_all_trials(study_id, deepcopy=False)

    def as_stored(self, value: Any) -> Any:
        """Return a value as it is if it stays in memory, else as JSON returns it."""
        return value if self._is_exclusive else json_round_trip(value)


def excess_trials(
    trials: Iterable[FrozenTrial], created: Iterable[int], claimed: Iterable[int], limit: int
) -> list[int]:
    """Return the started trials that are to wait again, because a study has too many.

    Of created trials those with the lower numbers stay: all processes see it the same way. Claimed
    ones have any number, and wait again if there are too many at all.

    Args:
        trials:
            All of the study, as they are now.
        created:
            Ids of the trials that this process has created.
        claimed:
            Ids of the WAITING trials that it has started.
        limit:
            Number of trials that may have begun.
    """
    numbers = {id_of(t): t.number for t in trials if t.state != TrialState.WAITING}
    begun = sorted(numbers.values())
    late = [i for i in created if i in numbers and bisect_left(begun, numbers[i]) >= limit]
    excess, claims = max(0, len(begun) - limit - len(late)), sorted(claimed)
    return sorted(late) + claims[max(0, len(claims) - excess) :]
