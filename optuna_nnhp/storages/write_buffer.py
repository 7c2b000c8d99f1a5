"""The ordered list of operations that are not written yet, and the cached studies they change."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Container
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
import math
import time

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages._optuna_internals import copy_trial
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages._optuna_internals import journal_file
from optuna_nnhp.storages._optuna_internals import shallow_copy_trial
from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.generic_adapter import GenericAdapter
from optuna_nnhp.storages.journal_file import JournalAdapter
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.operations import TOKEN
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import StorageAdapter
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.operations import TrialTakenOver


@dataclass
class StudyCache:
    """The trials of a study, with the changes that are not written yet.

    Args:
        study_id:
            The study.
        trials:
            By number.
        sources:
            The same trials as the storage has returned them, by id.
        waiting:
            Numbers of the WAITING trials.
        unfinished:
            Ids of the trials that have not ended.
        prefetched:
            RUNNING trials of this process that nobody has asked for yet.
        distributions:
            Of each parameter, as first used.
        last_trial_id:
            All trials with ids up to this one are in the cache.
        synced_at:
            Clock of the last reading, in seconds.

    Example:
        >>> cache = StudyCache(study_id=0)
        >>> cache.trials_in_states(states=None)
        []
    """

    study_id: int
    trials: list[FrozenTrial] = field(default_factory=list)
    sources: dict[int, FrozenTrial] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    unfinished: set[int] = field(default_factory=set)
    prefetched: list[FrozenTrial] = field(default_factory=list)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    last_trial_id: int = -1
    synced_at: float = -math.inf

    def put(self, trial: FrozenTrial) -> None:
        """Add or replace a trial; numbers have no gaps."""
        if trial.number == len(self.trials):
            self.trials.append(trial)
        else:
            self.trials[trial.number] = trial
        if trial.state.is_finished():
            self.unfinished.discard(id_of(trial))
        else:
            self.unfinished.add(id_of(trial))
        if trial.state == TrialState.WAITING:
            self.waiting.add(trial.number)
        else:
            self.waiting.discard(trial.number)
        for name, distribution in trial.distributions.items():
            self.distributions.setdefault(name, distribution)

    def mark_stale(self) -> None:
        """Let the next access read what other processes have written."""
        self.synced_at = -math.inf

    def waiting_trials(self, *, requeued: bool) -> list[FrozenTrial]:
        """Return WAITING trials by number: new ones, or those that were trained in part."""
        trials = [self.trials[number] for number in sorted(self.waiting)]
        return [trial for trial in trials if (REQUEUED_BY in trial.user_attrs) == requeued]

    def trials_in_states(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Return trials in some states by number, as `BaseStorage.get_all_trials` does.

        Prefetched trials at the end do not exist for callers. The query for WAITING trials alone
        is the one of `Study.ask`, which does not start requeued trials.
        """
        if states == (TrialState.WAITING,):
            return self.waiting_trials(requeued=False)
        end = len(self.trials)
        for trial in reversed(self.prefetched):
            if trial.number != end - 1:
                break
            end -= 1
        trials = self.trials[:end]
        return trials if states is None else [t for t in trials if t.state in states]


_logger = optuna.logging.get_logger(f"optuna.{__name__}")

MAX_SILENCE = 20.0  # seconds without writing, after which owners of trials are checked first
IN_DOUBT_FOR = 120.0  # seconds in which a start whose answer was lost may still appear
Key = int | tuple[int, str, str]  # a trial, or an attribute of a study


class WriteBuffer:
    """Operations in the order in which they are to be written, and the caches of studies.

    Args:
        backend:
            The storage.
        sync_every:
            Age in seconds up to which a cache is used, while trials run in this process.
        breaker:
            Guards all calls of the storage.
        worker:
            Returns the worker of the trials that run in this process, None if it has no name.

    Attributes:
        studies: Caches, by study id.
        locations: Cache and number of each trial, by its id.
        own: Ids of the trials that run in this process.
        taken_over: Workers that have taken over trials that ran in this process, by id.
        pending: One operation for each changed trial and study attribute.
        pending_since: Clock of the oldest pending operation.
        has_ends: Whether a pending operation ends a trial.
        claimed: Trials that are RUNNING in the storage, and still WAITING for callers, by id.
        in_doubt: Starts whose answer was lost, and the clock of the loss, by token.
    """

    def __init__(
        self,
        backend: BaseStorage,
        sync_every: float,
        breaker: CircuitBreaker,
        worker: Callable[[], str | None],
    ) -> None:
        self.backend, self.sync_every, self.breaker = backend, sync_every, breaker
        self.adapter, self._worker = adapter_for(backend), worker
        self.studies: dict[int, StudyCache] = {}
        self.locations: dict[int, tuple[StudyCache, int]] = {}
        self.own: set[int] = set()
        self.taken_over: dict[int, object] = {}
        self.pending: dict[Key, Operation] = {}
        self.pending_since, self.has_ends = math.inf, False
        self.claimed: dict[int, FrozenTrial] = {}
        self.in_doubt: dict[str, tuple[Op, float]] = {}
        self._written_at = _monotonic_and_wall_time()

    # --- Operations ---

    def change(self, trial_id: int) -> TrialChange:
        """Return the pending change of a trial of this process, to be added to."""
        op = self.pending.get(trial_id)
        if not isinstance(op, Op):
            op = Op(self.locations[trial_id][0].study_id, trial_id, TrialChange())
            self._add(trial_id, op)
        return op.change

    def set_state(self, trial: FrozenTrial, state: TrialState) -> TrialChange:
        """Change the state of a trial of this process, and return its pending change."""
        change = self.change(id_of(trial))
        change.state = trial.state = state
        return change

    def add_study_attr(self, attr: StudyAttr) -> None:
        """Add the attribute of a study, instead of an earlier one with the same name."""
        self._add((attr.study_id, attr.kind, attr.key), attr)

    def _add(self, key: Key, op: Operation) -> None:
        if not self.pending:
            self.pending_since = time.monotonic()
        self.pending[key] = op

    def write(self) -> dict[Key, Exception]:
        """Write all pending operations; return the rejections.

        Raises:
            StorageUnavailable: If they must wait.
        """
        return self.breaker.call(lambda: self.write_once(())[1], writes=True)

    def write_once(self, ops: Sequence[Op]) -> tuple[list[Outcome], dict[Key, Exception]]:
        """Write all pending operations, and others after them; an outage raises its own error.

        Returns:
            The outcomes of the others, and the rejections of pending operations.
        """
        if _seconds_since(self._written_at) > MAX_SILENCE:  # others may take this worker for dead
            self._require_this_worker()
        pending = dict(self.pending)
        outcomes = self.adapter.apply([*pending.values(), *ops])
        self.pending, self.pending_since, self.has_ends = {}, math.inf, False
        self._written_at = _monotonic_and_wall_time()
        rejections = dict[Key, Exception]()
        for (key, op), outcome in zip(pending.items(), outcomes, strict=False):
            if isinstance(op, Op) and op.change.state is not None:
                self.own.discard(key)
            if isinstance(outcome, Exception):
                rejections[key] = outcome
                self._note_rejection(op, outcome)
        return outcomes[len(pending) :], rejections

    def _require_this_worker(self) -> None:
        worker = self._worker()
        for op in self.pending.values() if worker is not None else ():
            if isinstance(op, Op):
                op.if_owner = None, worker

    def _note_rejection(self, op: Operation, error: Exception) -> None:
        if isinstance(op, StudyAttr):
            _logger.warning(f"Discarded the attribute {op.key!r} of a study: {error}")
            return
        assert op.trial_id is not None
        self.own.discard(op.trial_id)
        cache, number = self.locations[op.trial_id]
        cache.unfinished.add(op.trial_id)  # so that it is read again, and at once
        cache.sources.pop(op.trial_id, None)
        cache.mark_stale()
        if isinstance(error, TrialTakenOver):
            self.taken_over[op.trial_id] = error.owner
        _logger.warning(f"Discarded the changes to trial {number}: {error}")

    # --- Caches ---

    def study(self, study_id: int) -> StudyCache:
        """Return a study's cache: not older than `sync_every` while trials run here, else new.

        Raises:
            StorageUnavailable: If the storage has never answered for this study.
        """
        cache = self.studies.get(study_id)
        if cache is None:
            cache = StudyCache(study_id)
            self.sync(cache)
            self.studies[study_id] = cache
        elif not self.own or time.monotonic() - cache.synced_at > self.sync_every:
            with suppress(StorageUnavailable):  # the cache stays as it is
                self.sync(cache)
        return cache

    def sync(self, cache: StudyCache) -> None:
        """Read what other processes have written.

        Raises:
            StorageUnavailable: If the storage does not answer.
        """
        self.breaker.call(lambda: self.sync_once(cache))

    def sync_once(self, cache: StudyCache) -> None:
        """Read what other processes have written; an outage raises its own error."""
        now, others = time.monotonic(), cache.unfinished - self.own
        trials = self.adapter.read(cache.study_id, others, cache.last_trial_id)
        for trial in trials:
            number, trial_id = trial.number, id_of(trial)
            if cache.sources.get(trial_id) is trial:
                continue
            cache.sources[trial_id] = trial
            token = trial.system_attrs.get(TOKEN)
            if token is not None:
                trial = without_token(trial)
            if token in self.in_doubt:
                self._recognize(cache, trial, token)
            pending = self.pending.get(trial_id)
            if trial_id in self.claimed:
                trial = self.claimed[trial_id]
            elif isinstance(pending, Op):
                trial = pending.change.apply_to(trial)
            self.locations[trial_id] = cache, number
            cache.put(trial)
        cache.last_trial_id = max([cache.last_trial_id, *(id_of(t) for t in trials)])
        cache.synced_at = now

    def put(self, trial: FrozenTrial) -> None:
        """Replace a trial in its study's cache."""
        self.locations[id_of(trial)][0].put(trial)

    def find_trial(self, trial_id: int) -> tuple[StudyCache, int] | None:
        """Return a trial's cache and number, None if no known study has it.

        Raises:
            StorageUnavailable: If it is not known, and the storage does not answer.
        """
        if trial_id not in self.locations:
            for cache in list(self.studies.values()):
                try:
                    self.sync(cache)
                except KeyError:  # another process has deleted the study
                    self.drop_study(cache.study_id)
        return self.locations.get(trial_id)

    def drop_study(self, study_id: int) -> None:
        """Drop a deleted study."""
        cache = self.studies.pop(study_id, None)
        for trial in cache.trials if cache else ():
            del self.locations[id_of(trial)]
            self.own.discard(id_of(trial))
            self.pending.pop(id_of(trial), None)

    # --- Starts whose answer was lost ---

    def add_in_doubt(self, ops: Sequence[Op]) -> None:
        """Note operations whose answer was lost."""
        now = time.monotonic()
        self.in_doubt.update({op.token: (op, now) for op in ops if op.starts_trial})

    def _recognize(self, cache: StudyCache, trial: FrozenTrial, token: str) -> None:
        """Adopt a trial that an operation in doubt has started."""
        op, _ = self.in_doubt.pop(token)
        if trial.state != TrialState.RUNNING or id_of(trial) in self.own:
            return
        self.own.add(id_of(trial))
        if op.trial_id is None:
            cache.prefetched.append(trial)
        else:
            waiting = self.claimed[id_of(trial)] = copy_trial(trial)
            waiting.state = TrialState.WAITING

    def resolve_doubts(self) -> None:
        """Look for the trials of operations in doubt, and drop the oldest of these.

        Raises:
            StorageUnavailable: If the storage does not answer.
        """
        for cache in self.studies.values():
            self.sync(cache)
        recent = time.monotonic() - IN_DOUBT_FOR
        self.in_doubt = {t: (op, at) for t, (op, at) in self.in_doubt.items() if at > recent}


def without_token(trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as callers see it: tokens are the storage's own business."""
    copied = shallow_copy_trial(trial)
    copied.system_attrs = {k: v for k, v in trial.system_attrs.items() if k != TOKEN}
    return copied


def _monotonic_and_wall_time() -> tuple[float, float]:
    return time.monotonic(), time.time()


def _seconds_since(then: tuple[float, float]) -> float:
    """Return the seconds since two clocks were read, those of a sleeping machine included."""
    return max(now - before for now, before in zip(_monotonic_and_wall_time(), then, strict=True))


def adapter_for(storage: BaseStorage) -> StorageAdapter:
    """Return the fastest adapter for a storage.

    Example:
        >>> type(adapter_for(optuna.storages.RDBStorage("sqlite://"))).__name__
        'RdbAdapter'
    """
    file = journal_file(storage)
    if file is not None and isinstance(storage, JournalStorage):
        return JournalAdapter(storage, file)
    if isinstance(storage, RDBStorage):
        # Imported here: SQLAlchemy takes 0.3 s, and a journal does not need it.
        from optuna_nnhp.storages import rdb_adapter

        if storage.engine.name in rdb_adapter.DIALECTS:
            return rdb_adapter.RdbAdapter(storage)
    return GenericAdapter(storage)
