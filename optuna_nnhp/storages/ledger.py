"""What this process knows of studies, and what of it is not written yet."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from datetime import datetime
from datetime import timedelta
import math
import time

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.generic_adapter import GenericAdapter
from optuna_nnhp.storages.journal_adapter import JournalAdapter
from optuna_nnhp.storages.journal_adapter import JournalFileAdapter
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.operations import Change
from optuna_nnhp.storages.operations import StorageAdapter
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import Written
from optuna_nnhp.storages.operations import copied

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

NEW = -1  # id of a trial that the backend has not numbered yet
LONG_SILENCE = 20.0  # seconds without writing, after which owners are looked at first
DOUBTED_FOR = 120.0  # seconds in which a lost answer's writing may still appear


@dataclass
class View:
    """One study as this process sees it.

    Args:
        study_id:
            Its id.
        trials:
            By number.
        waiting:
            Numbers of the WAITING ones.
        unfinished:
            Ids of all that have not ended.
        held:
            RUNNING ones that nobody has asked for yet.
        distributions:
            Of every parameter, as first used.
        after:
            All trials with ids up to this one are here.
        synced:
            Clock of the last reading, seconds.
    """

    study_id: int
    trials: list[FrozenTrial] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)
    unfinished: set[int] = field(default_factory=set)
    held: list[FrozenTrial] = field(default_factory=list)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    after: int = -1
    synced: float = -math.inf

    def put(self, trial: FrozenTrial) -> None:
        """Take in a trial, new or changed; numbers have no gaps."""
        if trial._number == len(self.trials):
            self.trials.append(trial)
        else:
            self.trials[trial._number] = trial
        if trial.state.is_finished():
            self.unfinished.discard(trial._trial_id)
        else:
            self.unfinished.add(trial._trial_id)
        if trial.state == TrialState.WAITING:
            self.waiting.add(trial._number)
        else:
            self.waiting.discard(trial._number)
        for name, distribution in trial._distributions.items():
            self.distributions.setdefault(name, distribution)

    def listed(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Trials in some states, by number, without those at the end that nobody has asked for.

        Of those that are WAITING alone, without those that wait to be gone on with.
        """
        if states == (TrialState.WAITING,):  # what `Study.ask` looks for
            trials = [self.trials[number] for number in sorted(self.waiting)]
            return [t for t in trials if REQUEUED_BY not in t._user_attrs]
        end = len(self.trials)
        for trial in reversed(self.held):
            if trial._number != end - 1:
                break
            end -= 1
        trials = self.trials[:end]
        return trials if states is None else [t for t in trials if t.state in states]


class Ledger:
    """The views of studies, and the changes that the backend does not know yet.

    Args:
        backend:
            Where things are written.
        sync_every:
            Seconds that a view may be old, while trials run here.
        reach:
            Asks the backend.
        worker:
            Says whose the trials that run here are; None if that is not known.

    Attributes:
        views: By study id.
        homes: Study and number of each trial, by its id.
        own: Ids of the trials that run here.
        lost: Who has taken over those that ran here before, by id.
        changes: What is to be written, by trial id.
        oldest: Clock of the oldest change.
        has_ends: Whether a change is an end.
        claimed: Trials that are RUNNING in the backend, but still WAITING here, by id.
        doubts: Trials that were being started when the backend was lost: perhaps they are.
    """

    def __init__(
        self,
        backend: BaseStorage,
        sync_every: float,
        reach: CircuitBreaker,
        worker: Callable[[], str | None],
    ) -> None:
        self.backend, self.sync_every, self.reach = backend, sync_every, reach
        self.writer, self._worker = writer_of(backend), worker
        self.views: dict[int, View] = {}
        self.homes: dict[int, tuple[View, int]] = {}
        self.own: set[int] = set()
        self.lost: dict[int, object] = {}
        self.changes: dict[int, Change] = {}
        self.oldest, self.has_ends = math.inf, False
        self.claimed: dict[int, FrozenTrial] = {}
        self.doubts: list[FrozenTrial] = []
        self._written = _clocks()

    def change(self, trial_id: int) -> Change:
        """The unwritten change of a trial."""
        if not self.changes:
            self.oldest = time.monotonic()
        change = self.changes.get(trial_id)
        if change is None:
            change = self.changes[trial_id] = Change()
        return change

    def put(self, trial: FrozenTrial) -> None:
        """Take in a changed trial."""
        self.homes[trial._trial_id][0].put(trial)

    def write(self) -> Written:
        """Write all changes.

        Raises:
            StorageUnavailable: If they must wait.
        """
        return self.reach.ask(lambda: self.write_once(Batch()), writes=True)

    def write_once(self, batch: Batch) -> Written:
        """Write a batch, and all changes before it; an outage is raised as it comes."""
        batch.changes = self.changes
        if _silence(self._written) > LONG_SILENCE:  # others may have thought that we are dead
            batch.owner = self._worker()
        written = self.writer.write(batch)
        for trial_id in list(written.refused):
            if self.is_written(trial_id, batch.changes[trial_id]):
                del written.refused[trial_id]
        self.changes, self.oldest, self.has_ends = {}, math.inf, False
        self._written = _clocks()
        self.own.difference_update(i for i, c in batch.changes.items() if c.state is not None)
        for trial_id, error in written.refused.items():
            self._lose(trial_id, error)
        return written

    def _lose(self, trial_id: int, error: Exception) -> None:
        """Note that what a trial did here was refused."""
        self.own.discard(trial_id)
        view, number = self.homes[trial_id]
        view.unfinished.add(trial_id)  # so that it is read again, and at once
        view.synced = -math.inf
        if isinstance(error, TrialTakenOver):
            self.lost[trial_id] = error.owner
            _logger.warning(f"Trial {number} goes on elsewhere: {error}")
        else:
            _logger.warning(f"What trial {number} did here since its end is lost: {error}")

    def is_written(self, trial_id: int, change: Change) -> bool:
        """Whether a trial has ended as it should: an attempt to write may fail afterwards."""
        try:
            trial = self.backend.get_trial(trial_id)
        except KeyError:
            return False
        return (trial.state, trial.values) == (change.state, change.values)

    def view(self, study_id: int) -> View:
        """A study: while trials run here not older than `sync_every`, and else as it is.

        Raises:
            StorageUnavailable: If the backend does not answer, and never did for this study.
        """
        view = self.views.get(study_id)
        if view is None:
            view = View(study_id)
            self.sync(view)
            self.views[study_id] = view
        elif not self.own or time.monotonic() - view.synced > self.sync_every:
            with suppress(StorageUnavailable):  # then it is as it was
                self.sync(view)
        return view

    def sync(self, view: View) -> None:
        """Read what other processes have written.

        Raises:
            StorageUnavailable: If the backend does not answer.
        """
        self.reach.ask(lambda: self.sync_once(view))

    def sync_once(self, view: View) -> None:
        """The same; an outage is raised as it comes."""
        now = time.monotonic()
        trials = self.writer.read(view.study_id, view.unfinished - self.own, view.after)
        for trial in trials:
            number, trial_id = trial._number, trial._trial_id
            if number < len(view.trials) and view.trials[number] is trial:
                continue
            if self.doubts and trial_id not in self.own:
                self._recognize(view, trial)
            if trial_id in self.claimed:
                trial = self.claimed[trial_id]
            elif trial_id in self.changes:
                trial = self.changes[trial_id].applied_to(trial)
            self.homes[trial_id] = view, number
            view.put(trial)
        view.after = max([view.after, *(t._trial_id for t in trials)])
        view.synced = now

    def _recognize(self, view: View, trial: FrozenTrial) -> None:
        """Take in a trial that was started here after all."""
        for place, doubt in enumerate(self.doubts):
            if trial.state != TrialState.RUNNING or not _is_same(doubt, trial):
                continue
            del self.doubts[place]
            self.own.add(trial._trial_id)
            if doubt._trial_id == NEW:
                view.held.append(trial)
            else:
                claimed = copied(trial)
                claimed.state = TrialState.WAITING
                self.claimed[trial._trial_id] = claimed
            return

    def forget_doubts(self) -> None:
        """Drop those that are too old to turn up."""
        recent = datetime.now() - timedelta(seconds=DOUBTED_FOR)
        self.doubts = [d for d in self.doubts if d.datetime_start and d.datetime_start > recent]

    def home(self, trial_id: int) -> tuple[View, int] | None:
        """Where a trial is, None if no known study has it.

        Raises:
            StorageUnavailable: If it is not known, and the backend does not answer.
        """
        if trial_id not in self.homes:
            for view in list(self.views.values()):
                try:
                    self.sync(view)
                except KeyError:  # another process has deleted the study
                    self.forget(view)
        return self.homes.get(trial_id)

    def forget(self, view: View) -> None:
        """Drop a study that is no more."""
        del self.views[view.study_id]
        for trial in view.trials:
            del self.homes[trial._trial_id]
            self.own.discard(trial._trial_id)
            self.changes.pop(trial._trial_id, None)


def _is_same(doubt: FrozenTrial, trial: FrozenTrial) -> bool:
    """Whether a running trial is the one that may have been started."""
    if doubt._trial_id not in (NEW, trial._trial_id):
        return False
    if not doubt._user_attrs.items() <= trial._user_attrs.items():
        return False
    started, begun = doubt.datetime_start, trial.datetime_start
    if started is None or begun is None:
        return False
    # A marked one is this worker's for sure; some databases round times to seconds.
    return abs(begun - started) <= timedelta(seconds=60 if doubt._user_attrs else 1)


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.time()


def _silence(since: tuple[float, float]) -> float:
    """Seconds since then, those that the machine slept included."""
    return max(now - then for now, then in zip(_clocks(), since, strict=True))


def writer_of(storage: BaseStorage) -> StorageAdapter:
    """The fastest writer for a storage.

    Example:
        >>> type(writer_of(optuna.storages.RDBStorage("sqlite://"))).__name__
        'RdbAdapter'
    """
    if isinstance(storage, JournalStorage):
        backend = storage._backend
        if isinstance(backend, JournalFileBackend):
            return JournalFileAdapter(storage, backend)
        return JournalAdapter(storage)
    if isinstance(storage, RDBStorage):
        # Not above: SQLAlchemy takes 0.3 s, and a journal does without.
        from optuna_nnhp.storages import rdb_adapter

        if storage.engine.name in rdb_adapter.DIALECTS:
            return rdb_adapter.RdbAdapter(storage)
    return GenericAdapter(storage)
