"""The part of a write-behind storage that starts trials here: new, WAITING, or a dead worker's."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import suppress
from datetime import datetime
import math
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.ledger import NEW
from optuna_nnhp.storages.ledger import Ledger
from optuna_nnhp.storages.ledger import View
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.operations import copied
from optuna_nnhp.storages.passing import ABOUT_STUDIES
from optuna_nnhp.storages.passing import PassingStorage


class TrialLimitReached(Exception):
    """As many trials of a study have begun as may: see `BufferedStorage.set_trial_limit`."""


class StartingStorage(PassingStorage):
    """Starts trials: each in one process only, many at once, and no more than a study shall have.

    Args:
        backend:
            Any Optuna storage.
        flush_every:
            Seconds that running trials' data may be unwritten, and others' unread.
        mark:
            Gives the user attributes that a trial has from its start in this process: numbers
            and texts.
    """

    def __init__(
        self, backend: BaseStorage, flush_every: float, mark: Callable[[], Mapping[str, Any]]
    ) -> None:
        super().__init__(backend)
        self._mark = mark
        self._ledger = Ledger(backend, flush_every, self._reach, lambda: mark().get(WORKER))
        self._most: dict[int, int] = {}  # trials that may begin, by study id
        self._wanted = 0  # trials that will be asked for
        self._reservations = 0

    def _view(self, study_id: int) -> View:
        """A study, fresh enough to read."""
        if study_id in self._ledger.views:
            return self._ledger.view(study_id)
        return self._known(study_id)

    def _known(self, study_id: int) -> View:
        """A study, however old: enough to add to it."""
        if study_id not in self._ledger.views:
            self._ledger.view(study_id)
            for question in ABOUT_STUDIES:  # the answers do when there are none any more
                self._know(question, study_id)
        return self._ledger.views[study_id]

    def set_trial_limit(self, study_id: int, most: int | None) -> None:
        """Let no more than so many trials of a study begin, in all processes that say the same.

        A trial has begun if its state is another one than WAITING. When there are as many,
        `create_new_trial` raises `TrialLimitReached`, and WAITING trials stay so. It holds exactly
        for databases and journal files. In other storages processes may in rare cases start one
        too many or one too few, and what was too many waits again.

        Trials that are added as they are do not ask for room.

        Args:
            study_id:
                The study.
            most:
                How many; None for any number.

        Raises:
            ValueError: If it is negative.
        """
        if most is not None and most < 0:
            raise ValueError(f"`most` must be at least 0, but got {most}.")
        with self._lock:
            if most is None:
                self._most.pop(study_id, None)
            else:
                self._most[study_id] = most

    def take_over(self, owners: Mapping[int, str]) -> list[int]:
        """Let trials run here instead of with workers that are dead.

        Of several processes that try at once one gets each trial: it is this one's if it is
        RUNNING and was still the named worker's. It keeps its number, and has this process's mark.

        Args:
            owners:
                Who each trial runs with (its user attribute "worker"), by trial id.

        Returns:
            The ids of those that run here now, with all that is known of them.

        Raises:
            ValueError: If the mark does not say which worker this is.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            mark = dict(self._mark())
            if WORKER not in mark:
                raise ValueError(f"`mark` must give the attribute {WORKER!r}, but gives {mark}.")
            takes = {i: owner for i, owner in owners.items() if self._ledger.home(i)}
            return self._reach.ask(lambda: self._try_take(takes, mark), writes=True)

    def _try_take(self, takes: Mapping[int, str], mark: Mapping[str, Any]) -> list[int]:
        ledger = self._ledger
        others = {i: owner for i, owner in takes.items() if i not in ledger.own}
        taken = set[int]()
        if others:
            taken |= set(ledger.write_once(Batch(takes=others, mark=mark)).taken)
            for study_id in {ledger.homes[i][0].study_id for i in others}:
                ledger.sync_once(ledger.views[study_id])  # before they are only written here
        ledger.own |= taken
        for trial_id in taken & ledger.lost.keys():
            del ledger.lost[trial_id]
        return [i for i in takes if i in ledger.own]

    @contextmanager
    def prefetch_trials(self, trials: int) -> Iterator[None]:
        """Within, that many trials are started at once when the first is asked for.

        WAITING trials come first, as always. What is not asked for waits (WAITING) for
        whoever asks next, in any process.

        Args:
            trials:
                How many will be asked for.

        Raises:
            ValueError: If it is negative.
        """
        if trials < 0:
            raise ValueError(f"`trials` must be at least 0, but got {trials}.")
        before, self._wanted = self._wanted, trials
        self._reservations += 1
        try:
            yield
        finally:
            self._wanted = before
            self._reservations -= 1
            if not before:
                self._release()

    def _release(self) -> None:
        """Give back what was reserved and not asked for."""
        with self._lock:
            unused = list(self._ledger.claimed.values())
            self._ledger.claimed = {}
            for view in self._ledger.views.values():
                unused += view.held
                view.held = []
            for trial in unused:
                change = self._ledger.change(trial._trial_id)
                change.state = TrialState.WAITING
                change.user_attrs.update(dict.fromkeys(self._mark()))
                self._ledger.put(change.applied_to(trial))
            if unused:
                self._flush()

    def _flush(self) -> None:
        """Write everything that waits, if the storage answers."""
        ledger = self._ledger
        with self._lock, suppress(StorageUnavailable):
            if ledger.changes:
                ledger.write()
            if self.notes:
                self.send_notes()
            if ledger.doubts:
                for view in ledger.views.values():
                    ledger.sync(view)
                ledger.forget_doubts()
                if not self._reservations:
                    self._release()

    def _start(self, view: View) -> int:
        """A new trial of this process."""
        if not view.held:
            self._reach.ask(lambda: self._try_start(view), writes=True)
        if not view.held:
            raise TrialLimitReached(f"All {self._most.get(view.study_id)} trials have begun.")
        self._wanted = max(0, self._wanted - 1)
        return view.held.pop(0)._trial_id

    def _try_start(self, view: View) -> None:
        if self._ledger.doubts:  # an attempt before this one may have done it
            self._ledger.sync_once(view)
        if not view.held:
            templates = [_blank(self._mark()) for _ in range(max(1, self._wanted))]
            view.held = self._try_create(view, templates, self._most.get(view.study_id))

    def _try_create(
        self, view: View, templates: Sequence[FrozenTrial], most: int | None = None
    ) -> list[FrozenTrial]:
        """Start or add trials, all at once; fewer if there is no room."""
        ledger, trials = self._ledger, list[FrozenTrial]()
        batch = Batch(study_id=view.study_id, templates=templates, most=most)
        try:
            created = ledger.write_once(batch).created
            for template, (trial_id, number) in zip(templates, created, strict=most is None):
                trial = copied(template)
                trial._trial_id, trial._number = trial_id, number
                trials.append(trial)
            running = {t._trial_id for t in trials if t.state == TrialState.RUNNING}
            ledger.own |= running
            if any(t._number > number for number, t in enumerate(trials, len(view.trials))):
                ledger.sync_once(view)  # others have started trials since the last reading
        except BaseException:
            ledger.own.difference_update(trial._trial_id for trial in trials)
            ledger.doubts += [t for t in templates if t.state == TrialState.RUNNING]
            raise
        for trial in trials:
            if trial._number == len(view.trials):
                view.after = trial._trial_id
            ledger.homes[trial._trial_id] = view, trial._number
            view.put(trial)
        return trials

    def _claim(self, trial_id: int) -> bool:
        """Start a WAITING trial, and along with it others that will be asked for."""
        ledger = self._ledger
        home = ledger.home(trial_id)
        if home is None:
            return self._reach.ask(
                lambda: self.backend.set_trial_state_values(trial_id, TrialState.RUNNING),
                writes=True,
            )
        view, number = home
        trial = view.trials[number]
        self.check_trial_is_updatable(trial_id, trial.state)
        if trial.state == TrialState.RUNNING:
            return False
        if trial_id not in ledger.claimed:
            self._reach.ask(lambda: self._try_claim(view, number), writes=True)
            if trial_id not in ledger.claimed:
                return False
        started = copied(ledger.claimed.pop(trial_id))
        started.state = TrialState.RUNNING
        view.put(started)
        self._wanted = max(0, self._wanted - 1)
        return True

    def released(self, study_id: int) -> list[FrozenTrial]:
        """WAITING trials that have been trained in part; nobody who asks for a trial gets them."""
        with self._lock:
            view = self._ledger.view(study_id)
            waiting = [view.trials[number] for number in sorted(view.waiting)]
            return [trial for trial in waiting if REQUEUED_BY in trial._user_attrs]

    def _try_claim(self, view: View, number: int) -> None:
        ledger, mark = self._ledger, dict(self._mark())
        trial_id = view.trials[number]._trial_id
        if ledger.doubts:  # an attempt before this one may have done it
            ledger.sync_once(view)
            if trial_id in ledger.claimed:
                return
        waiting = (view.trials[n] for n in sorted(view.waiting) if n != number)
        others = (trial._trial_id for trial in waiting if REQUEUED_BY not in trial._user_attrs)
        free = [i for i in others if i not in ledger.claimed][: max(0, self._wanted - 1)]
        batch = Batch(claims=[trial_id, *free], study_id=view.study_id, mark=mark)
        batch.most = self._most.get(view.study_id)
        started = dict[int, FrozenTrial]()
        for claim in batch.claims:
            held = started[claim] = copied(view.trials[ledger.homes[claim][1]])
            held.datetime_start = batch.now
            held._user_attrs.update(mark)
        try:
            claimed = ledger.write_once(batch).claimed
        except BaseException:
            ledger.doubts += started.values()
            raise
        ledger.claimed |= {claim: started[claim] for claim in claimed}
        ledger.own.update(claimed)
        if len(claimed) < len(batch.claims):
            view.synced = -math.inf


def _blank(user_attrs: Mapping[str, Any]) -> FrozenTrial:
    """A trial that starts now."""
    return FrozenTrial(
        number=-1,
        trial_id=NEW,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs=dict(user_attrs),
        system_attrs={},
        intermediate_values={},
    )
