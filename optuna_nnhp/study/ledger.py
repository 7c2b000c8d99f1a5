"""What this process knows of studies, and what of it is not written yet."""

from __future__ import annotations

from collections.abc import Container
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

from optuna_nnhp.study.batches import Batch
from optuna_nnhp.study.batches import Change
from optuna_nnhp.study.batches import Writer
from optuna_nnhp.study.batches import Written
from optuna_nnhp.study.writers import CallWriter
from optuna_nnhp.study.writers import JournalWriter

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


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
        """Trials in some states, by number, without those at the end that nobody has asked for."""
        if states == (TrialState.WAITING,):  # what `Study.ask` looks for
            return [self.trials[number] for number in sorted(self.waiting)]
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

    Attributes:
        views: By study id.
        homes: Study and number of each trial, by its id.
        own: Ids of the trials that run here.
        changes: What is to be written, by trial id.
        oldest: Clock of the oldest change.
        has_ends: Whether a change is an end.
        claimed: Trials that are RUNNING in the backend, but still WAITING here, by id.
    """

    def __init__(self, backend: BaseStorage, sync_every: float) -> None:
        self.backend, self.sync_every = backend, sync_every
        self.writer = writer_of(backend)
        self.views: dict[int, View] = {}
        self.homes: dict[int, tuple[View, int]] = {}
        self.own: set[int] = set()
        self.changes: dict[int, Change] = {}
        self.oldest, self.has_ends = math.inf, False
        self.claimed: dict[int, FrozenTrial] = {}

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

    def write(self, batch: Batch) -> Written:
        """Write a batch, and all changes before it."""
        batch.changes = self.changes
        written = self.writer.write(batch)
        self.changes, self.oldest, self.has_ends = {}, math.inf, False
        self.own.difference_update(i for i, c in batch.changes.items() if c.state is not None)
        for trial_id, error in list(written.refused.items()):
            if self._is_written(trial_id, batch.changes[trial_id]):
                del written.refused[trial_id]
                continue
            self.own.discard(trial_id)
            view, number = self.homes[trial_id]
            view.unfinished.add(trial_id)  # so that it is read again, and at once
            view.synced = -math.inf
            _logger.warning(f"What trial {number} did here since its end is lost: {error}")
        return written

    def _is_written(self, trial_id: int, change: Change) -> bool:
        """Whether a trial has ended as it should: an attempt to write may fail afterwards."""
        try:
            trial = self.backend.get_trial(trial_id)
        except KeyError:
            return False
        return (trial.state, trial.values) == (change.state, change.values)

    def view(self, study_id: int) -> View:
        """A study: while trials run here not older than `sync_every`, and else as it is."""
        view = self.views.get(study_id) or View(study_id)
        if not self.own or time.monotonic() - view.synced > self.sync_every:
            self.sync(view)
            self.views[study_id] = view
        return view

    def known(self, study_id: int) -> View:
        """A study, however old: enough to add to it."""
        return self.views.get(study_id) or self.view(study_id)

    def sync(self, view: View) -> None:
        """Read what other processes have written."""
        now = time.monotonic()
        trials = self.writer.read(view.study_id, view.unfinished - self.own, view.after)
        for trial in trials:
            number, trial_id = trial._number, trial._trial_id
            if number < len(view.trials) and view.trials[number] is trial:
                continue
            if trial_id in self.claimed:
                trial = self.claimed[trial_id]
            elif trial_id in self.changes:
                trial = self.changes[trial_id].applied_to(trial)
            self.homes[trial_id] = view, number
            view.put(trial)
        view.after = max([view.after, *(t._trial_id for t in trials)])
        view.synced = now

    def home(self, trial_id: int) -> tuple[View, int] | None:
        """Where a trial is, None if no known study has it."""
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


def writer_of(storage: BaseStorage) -> Writer:
    """The fastest writer for a storage.

    Example:
        >>> type(writer_of(optuna.storages.RDBStorage("sqlite://"))).__name__
        'TableWriter'
    """
    if isinstance(storage, JournalStorage):
        return JournalWriter(storage)
    if isinstance(storage, RDBStorage):
        # Not above: SQLAlchemy takes 0.3 s, and a journal does without.
        from optuna_nnhp.study import tables

        if storage.engine.name in tables.DIALECTS:
            return tables.TableWriter(storage)
    return CallWriter(storage)
