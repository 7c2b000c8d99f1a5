"""Starts trials in this process: new ones, WAITING ones, and those of dead workers."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages._optuna_internals import copy_trial
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.operations import TrialLimitReached
from optuna_nnhp.storages.operations import new_trial_op
from optuna_nnhp.storages.write_buffer import StudyCache
from optuna_nnhp.storages.write_buffer import WriteBuffer


class TrialStarter:
    """Starts trials with one write for many, and not more than a study's limit.

    Args:
        buffer:
            Writes the operations.
        breaker:
            Guards all calls of the storage.
        trial_attrs:
            The user attributes of each trial that starts in this process.
    """

    def __init__(
        self,
        buffer: WriteBuffer,
        breaker: CircuitBreaker,
        trial_attrs: Mapping[str, Any],
    ) -> None:
        self._buffer, self._breaker, self._trial_attrs = buffer, breaker, trial_attrs
        self._limits: dict[int, int | None] = {}  # of begun trials, by study id
        self._prefetch_count = 0  # trials that will be asked for
        self._prefetch_depth = 0  # nested `prefetching`

    @property
    def is_prefetching(self) -> bool:
        """Whether more trials than one are started at once."""
        return self._prefetch_depth > 0

    def set_limit(self, study_id: int, limit: int | None) -> None:
        """Set the number of trials of a study that may begin, None for any number."""
        self._limits[study_id] = limit

    @contextmanager
    def prefetching(self, n_trials: int) -> Iterator[None]:
        """Start that many trials together when the first one in the block is asked for."""
        before, self._prefetch_count = self._prefetch_count, n_trials
        self._prefetch_depth += 1
        try:
            yield
        finally:
            self._prefetch_count = before
            self._prefetch_depth -= 1

    def requeue_prefetched(self) -> bool:
        """Let prefetched trials wait for any process; return whether there were any."""
        buffer = self._buffer
        unused = list(buffer.claimed.values())
        buffer.claimed = {}
        for cache in buffer.studies.values():
            unused += cache.prefetched
            cache.prefetched = []
        for trial in unused:
            waiting = copy_trial(trial)
            change = buffer.set_state(waiting, TrialState.WAITING)
            change.user_attrs.update(dict.fromkeys(self._trial_attrs))
            buffer.put(change.apply_to(waiting))
        return bool(unused)

    def start_new(self, cache: StudyCache) -> int:
        """Start a new trial and return its id.

        Raises:
            TrialLimitReached: If as many trials have begun as the limit allows.
            StorageUnavailable: If the storage does not answer.
        """
        if not cache.prefetched:
            self._breaker.call(lambda: self._prefetch(cache), writes=True)
        if not cache.prefetched:
            raise TrialLimitReached(self._limits.get(cache.study_id))
        self._prefetch_count = max(0, self._prefetch_count - 1)
        return id_of(cache.prefetched.pop(0))

    def _prefetch(self, cache: StudyCache) -> None:
        """Create RUNNING trials; an outage raises its own error."""
        if self._buffer.in_doubt:  # an attempt before this one may have been successful
            self._buffer.sync_once(cache)
        if not cache.prefetched:
            limit, count = self._limits.get(cache.study_id), max(1, self._prefetch_count)
            ops = [
                Op(cache.study_id, None, self._start_change(), limit=limit) for _ in range(count)
            ]
            cache.prefetched = self._create_trials(cache, ops)

    def _start_change(self) -> TrialChange:
        """Return the change of a trial that starts in this process."""
        return TrialChange(
            state=TrialState.RUNNING,
            started=datetime.now(),
            user_attrs=dict(self._trial_attrs),
        )

    def add(self, cache: StudyCache, templates: Sequence[FrozenTrial]) -> list[int]:
        """Add trials without parameters and values as they are, and return their ids.

        Raises:
            KeyError: If there is no such study.
            StorageUnavailable: If the storage does not answer; they may be added all the same.
        """
        ops = [new_trial_op(cache.study_id, template) for template in templates]
        trials = self._breaker.call(
            lambda: self._create_trials(cache, ops), writes=True, retry=False
        )
        return [id_of(trial) for trial in trials]

    def _create_trials(self, cache: StudyCache, ops: Sequence[Op]) -> list[FrozenTrial]:
        """Create trials with one write, fewer at the limit; an outage raises its own error."""
        buffer, trials = self._buffer, list[FrozenTrial]()
        try:
            for op, outcome in zip(ops, buffer.write_once(ops)[0], strict=True):
                if isinstance(outcome, Applied):
                    trial = op.change.apply_to(_blank_trial(outcome.trial_id, outcome.number))
                    trials.append(trial)
                elif not isinstance(outcome, TrialLimitReached):
                    raise outcome
            started = {id_of(t) for t in trials if t.state == TrialState.RUNNING}
            buffer.own |= started
            if any(t.number > number for number, t in enumerate(trials, len(cache.trials))):
                buffer.sync_once(cache)  # others have started trials since the last reading
        except KeyError:  # the study was deleted
            raise
        except BaseException:
            buffer.own.difference_update(id_of(trial) for trial in trials)
            buffer.add_in_doubt(ops)
            raise
        for trial in trials:
            if trial.number == len(cache.trials):
                cache.last_trial_id = id_of(trial)
            buffer.locations[id_of(trial)] = cache, trial.number
            cache.put(trial)
        return trials

    def start_waiting(self, trial_id: int) -> bool:
        """Start a WAITING trial, and with it others that will be asked for.

        Returns:
            Whether it runs here now; another process may have been faster.
        """
        buffer, (cache, number) = self._buffer, self._buffer.locations[trial_id]
        trial = cache.trials[number]
        if trial_id not in buffer.claimed:
            self._breaker.call(lambda: self._start_waiting_trials(cache, trial), writes=True)
            if trial_id not in buffer.claimed:
                return False
        running = copy_trial(buffer.claimed.pop(trial_id))
        running.state = TrialState.RUNNING
        cache.put(running)
        self._prefetch_count = max(0, self._prefetch_count - 1)
        return True

    def _start_waiting_trials(self, cache: StudyCache, trial: FrozenTrial) -> None:
        """Start WAITING trials with one write; an outage raises its own error."""
        buffer = self._buffer
        if buffer.in_doubt:  # an attempt before this one may have been successful
            buffer.sync_once(cache)
            if id_of(trial) in buffer.claimed:
                return
        others = [
            t
            for t in cache.waiting_trials(requeued=False)
            if t is not trial and id_of(t) not in buffer.claimed
        ]
        trials = [trial, *others[: max(0, self._prefetch_count - 1)]]
        limit, waits = self._limits.get(cache.study_id), (TrialState.WAITING,)
        ops = [
            Op(cache.study_id, id_of(t), self._start_change(), if_state=waits, limit=limit)
            for t in trials
        ]
        try:
            outcomes, _ = buffer.write_once(ops)
        except BaseException:
            buffer.add_in_doubt(ops)
            raise
        for op, old, outcome in zip(ops, trials, outcomes, strict=True):
            if isinstance(outcome, Applied):
                claimed = buffer.claimed[id_of(old)] = op.change.apply_to(old)
                claimed.state = TrialState.WAITING
                buffer.own.add(id_of(old))
            else:
                cache.mark_stale()

    def take_over(self, owners: Mapping[int, str]) -> None:
        """Let known trials of other workers run here, see `BufferedStorage.take_over`."""
        attrs = dict(self._trial_attrs)
        if WORKER not in attrs:
            raise ValueError(f"`trial_attrs` must have the attribute {WORKER!r}, but has {attrs}.")
        self._breaker.call(lambda: self._take_over(owners, attrs), writes=True)

    def _take_over(self, owners: Mapping[int, str], attrs: Mapping[str, Any]) -> None:
        buffer = self._buffer
        ops = [
            Op(
                buffer.locations[trial_id][0].study_id,
                trial_id,
                TrialChange(user_attrs=dict(attrs)),
                if_state=(TrialState.RUNNING,),
                if_owner=(owner, attrs[WORKER]),
            )
            for trial_id, owner in owners.items()
            if trial_id not in buffer.own
        ]
        if not ops:
            return
        outcomes, _ = buffer.write_once(ops)
        for study_id in {op.study_id for op in ops}:
            buffer.sync_once(buffer.studies[study_id])  # the last owner's values
        for outcome in outcomes:
            if isinstance(outcome, Applied):
                buffer.own.add(outcome.trial_id)
                buffer.taken_over.pop(outcome.trial_id, None)


def _blank_trial(trial_id: int, number: int) -> FrozenTrial:
    return FrozenTrial(
        number=number,
        trial_id=trial_id,
        state=TrialState.WAITING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
    )
