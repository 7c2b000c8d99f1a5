"""A storage that keeps what running trials write in memory and writes it in batches."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import suppress
import copy
from datetime import datetime
from pathlib import Path
import threading
import time
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages._optuna_internals import BaseHeartbeat
from optuna_nnhp.storages._optuna_internals import FrozenStudy
from optuna_nnhp.storages._optuna_internals import copy_trial
from optuna_nnhp.storages._optuna_internals import shallow_copy_trial
from optuna_nnhp.storages._optuna_internals import stale_trial_ids
from optuna_nnhp.storages._optuna_internals import without_cache
from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.liveness import machine_id
from optuna_nnhp.storages.liveness import process_id
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.operations import TrialLimitReached
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import json_round_trip
from optuna_nnhp.storages.operations import new_trial_op
from optuna_nnhp.storages.outbox import Outbox
from optuna_nnhp.storages.outbox import SavedOp
from optuna_nnhp.storages.outbox import write_outbox
from optuna_nnhp.storages.study_cache import StudyCache
from optuna_nnhp.storages.write_buffer import WriteBuffer

POLL_INTERVAL = 0.1  # seconds between checks whether waiting is to end
STUDY_QUERIES = (  # their last answers are used while the storage is unavailable
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
)


class BufferedStorage(BaseStorage, BaseHeartbeat):
    """Wraps a storage, buffers the writes of this process's running trials, and caches studies.

    The end of a trial is written at once, with everything before it: when
    `set_trial_state_values` returns, the trial is durable. Within `batch`, the ends of many trials
    are written together (one append to a journal, one transaction of a database) at its end.
    Everything else is written then, by `flush`, or by the next call of any method after
    ``flush_every`` seconds. There is no thread: code that trains for long between two calls must
    call `flush_if_due`, or other processes see an old study.

    While the storage is unavailable, all writes wait, ends of trials too, and are tried again
    after 1, 2, 4 and at most 30 seconds, by the next call of any method after that; queries return
    their last answers. Calls that need an answer, such as starting a trial, raise
    `StorageUnavailable`.

    Writes of other processes are read every ``flush_every`` seconds while trials run here, and at
    once if none does or an unknown trial is asked for. Changes to trials that run elsewhere, and
    to attributes of the study, are written at once.

    Args:
        backend:
            Any Optuna storage. Afterwards the attribute holds the database itself, if it was in
            Optuna's cache.
        flush_every:
            Maximum age of unwritten data of running trials and of the cache, in seconds.
        trial_attrs:
            Returns the user attributes of each trial that starts in this process: numbers and
            texts.

    Raises:
        ValueError: If ``flush_every`` is negative.

    Example:
        >>> import optuna
        >>> storage = BufferedStorage(optuna.storages.InMemoryStorage())
        >>> study = optuna.create_study(storage=storage)
        >>> with storage.prefetch_trials(2), storage.batch():
        ...     for trial in [study.ask(), study.ask()]:
        ...         _ = study.tell(trial, trial.suggest_float("x", 0, 1))
        >>> len(storage.backend.get_all_trials(study._study_id))
        2
    """

    def __init__(
        self,
        backend: BaseStorage,
        flush_every: float = 2.0,
        trial_attrs: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        if flush_every < 0:
            raise ValueError(f"`flush_every` must be at least 0 seconds, but got {flush_every}.")
        self.backend = without_cache(backend)
        self.flush_every, self.trial_attrs = flush_every, trial_attrs
        self._lock = threading.RLock()
        self._breaker = CircuitBreaker(str(getattr(self.backend, "url", "")))
        self._buffer = WriteBuffer(
            self.backend, flush_every, self._breaker, lambda: trial_attrs().get(WORKER)
        )
        self._last_answers: dict[tuple[str, Any], Any] = {}
        self._limits: dict[int, int] = {}  # of begun trials, by study id
        self._prefetch_count = 0  # trials that will be asked for
        self._prefetch_depth = 0  # nested `prefetch_trials`
        self._batches = threading.local()  # nested `batch` of each thread
        self._outbox: Path | None = None  # file with the pending operations

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        names = ("backend", "flush_every", "trial_attrs")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # --- Writing and waiting ---

    def flush(self) -> None:
        """Write everything now; what cannot be written is written later."""
        with self._lock:
            with suppress(StorageUnavailable):
                if self._buffer.pending:
                    self._buffer.write()
                if self._buffer.in_doubt:
                    self._buffer.resolve_doubts()
                    if not self._prefetch_depth and self._requeue_prefetched():
                        self._buffer.write()
            if self._outbox is not None and not self._buffer.pending:
                self._outbox.unlink(missing_ok=True)
                self._outbox = None

    def flush_if_due(self) -> None:
        """Write everything if the oldest change is older than ``flush_every``."""
        is_late = time.monotonic() - self._buffer.pending_since > self.flush_every
        may_write = self._breaker.allows_call and not self._batch_depth
        if may_write and (is_late or not self._breaker.is_available):
            self.flush()

    @property
    def _batch_depth(self) -> int:
        return getattr(self._batches, "depth", 0)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Delay this thread's writes to the end of the block, also if it raises an error.

        Starting a trial writes the changes before it.
        """
        self._batches.depth = self._batch_depth + 1
        try:
            yield
        finally:
            self._batches.depth -= 1
            if self._buffer.has_ends and not self._batch_depth:
                self.flush()
        self.flush_if_due()

    def refresh(self) -> None:
        """Let the next query read what other processes have written until now."""
        with self._lock:
            for cache in self._buffer.studies.values():
                cache.expire()

    @property
    def is_available(self) -> bool:
        """Whether the storage has answered the last call; if not, writes wait."""
        return self._breaker.is_available

    def wait_until_available(
        self, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Try again until the storage answers, at first after a second, later every 30 s.

        Pending changes are written then.

        Args:
            seconds:
                Maximum time to wait.
            stop:
                Ends the waiting when it returns True.

        Returns:
            Whether the storage answers.
        """
        end = time.monotonic() + seconds
        while not self._breaker.is_available:
            if stop():
                return False
            if self._breaker.allows_call and self._probe():
                return True
            now = time.monotonic()
            if now >= end:
                return False
            time.sleep(max(0.0, min(POLL_INTERVAL, self._breaker.retry_at - now, end - now)))
        return True

    def _probe(self) -> bool:
        """Try to write everything; if there is nothing to write, ask for something."""
        self.flush()
        if self._breaker.is_available or not self._breaker.allows_call:
            return self._breaker.is_available
        cache = next(iter(self._buffer.studies.values()), None)
        try:
            with self._lock:
                if cache is None:
                    self._breaker.call(self.backend.get_all_studies)
                else:
                    self._buffer.sync(cache)
        except StorageUnavailable:
            return False
        return True

    def save_outbox(self, folder: Path) -> Path | None:
        """Save all pending changes in a file, for a storage that may stay unavailable.

        See `outbox.replay_outbox`. If this process writes the changes after all, it deletes the
        file.

        Args:
            folder:
                Folder of the file; it is made.

        Returns:
            The file, None if everything is written.

        Raises:
            OSError: If the file cannot be written.
        """
        with self._lock:
            if not self._buffer.pending:
                return None
            saved = [
                SavedOp(
                    self.study_name(op.study_id),
                    op,
                    self._buffer.locations[key][1] if isinstance(key, int) else None,
                )
                for key, op in self._buffer.pending.items()
            ]
            worker = self.trial_attrs().get(WORKER) or f"{machine_id()}:{process_id()}"
            self._outbox = write_outbox(folder, Outbox(str(worker), saved))
            return self._outbox

    def write_ops(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Write operations at once, which belong to no trial of this process.

        Raises:
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            outcomes = self._breaker.call(lambda: self._buffer.adapter.apply(ops), writes=True)
            self.refresh()
            return outcomes

    def _write_through(self, name: str, *arguments: Any, retry: bool = True) -> Any:
        """Call a method of the backend that writes at once."""
        method = getattr(self.backend, name)
        return self._breaker.call(lambda: method(*arguments), writes=True, retry=retry)

    # --- Studies ---

    def _query(self, name: str, argument: Any) -> Any:
        """Return the backend's answer, or its last one while it is unavailable."""
        with self._lock:
            try:
                answer = self._breaker.call(lambda: getattr(self.backend, name)(argument))
            except StorageUnavailable:
                if (name, argument) not in self._last_answers:
                    raise
                return self._last_answers[name, argument]
            self._last_answers[name, argument] = answer
            return answer

    def study_name(self, study_id: int) -> str:
        """Return a study's name, without a call of the backend if it is known.

        Raises:
            StorageUnavailable: If it is not known, and the storage does not answer.
        """
        if ("get_study_name_from_id", study_id) in self._last_answers:
            return str(self._last_answers["get_study_name_from_id", study_id])
        for (query, name), answer in self._last_answers.items():
            if query == "get_study_id_from_name" and answer == study_id:
                return str(name)
        return self.get_study_name_from_id(study_id)

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Create a study."""
        is_named = study_name is not None
        study_id = int(
            self._write_through("create_new_study", directions, study_name, retry=is_named)
        )
        if is_named:
            self._last_answers["get_study_id_from_name", study_name] = study_id
        return study_id

    def delete_study(self, study_id: int) -> None:
        """Delete a study, after pending changes are written."""
        with self._lock:
            self.flush()
            self._write_through("delete_study", study_id)
            self._buffer.forget(study_id)

    def _set_study_attr(self, attr: StudyAttr) -> None:
        """Write an attribute of a study, or keep it until the storage is available."""
        with self._lock:
            key = attr.study_id, attr.kind, attr.key
            attr.value = self._buffer.adapter.as_stored(attr.value)
            try:
                (outcome,) = self._breaker.call(
                    lambda: self._buffer.adapter.apply([attr]), writes=True
                )
            except StorageUnavailable:
                attr.value = json_round_trip(attr.value)
                self._buffer.add_study_attr(attr)
                return
            self._buffer.pending.pop(key, None)
            if isinstance(outcome, Exception):
                raise outcome

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute of a study at once, or as soon as the storage is available."""
        self._set_study_attr(StudyAttr(study_id, "user", key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a system attribute of a study at once, or as soon as the storage is available."""
        self._set_study_attr(StudyAttr(study_id, "system", key, value))

    def _study_attrs(self, study_id: int, kind: str) -> dict[str, Any]:
        with self._lock:
            written = self._query(f"get_study_{kind}_attrs", study_id)
            pending = {
                op.key: op.value
                for op in self._buffer.pending.values()
                if isinstance(op, StudyAttr) and (op.study_id, op.kind) == (study_id, kind)
            }
            return {**written, **pending} if pending else written

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's user attributes, with pending ones."""
        return self._study_attrs(study_id, "user")

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's system attributes, with pending ones."""
        return self._study_attrs(study_id, "system")

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return a study's id."""
        return int(self._query("get_study_id_from_name", study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return a study's name."""
        return str(self._query("get_study_name_from_id", study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return the directions of a study's objectives."""
        return list(self._query("get_study_directions", study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies of the backend."""
        with self._lock:
            return self._breaker.call(self.backend.get_all_studies)

    def _study(self, study_id: int) -> StudyCache:
        """Return a study's cache, fresh enough to read."""
        if study_id in self._buffer.studies:
            return self._buffer.study(study_id)
        return self._known_study(study_id)

    def _known_study(self, study_id: int) -> StudyCache:
        """Return a study's cache of any age, to add trials to it."""
        if study_id not in self._buffer.studies:
            self._buffer.study(study_id)
            for query in STUDY_QUERIES:
                self._query(query, study_id)
        return self._buffer.studies[study_id]

    # --- Reading trials ---

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial."""
        with self._lock:
            self.flush_if_due()
            location = self._buffer.location(trial_id)
            if location is None:
                return self._breaker.call(lambda: self.backend.get_trial(trial_id))
            cache, number = location
            trial = self._study(cache.study_id).trials[number]
            # Optuna's `Trial` changes the trial that it is given.
            return trial if trial.state.is_finished() else copy_trial(trial)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return a study's trials by number."""
        with self._lock:
            self.flush_if_due()
            trials = self._study(study_id).listed(states)
        return copy.deepcopy(trials) if deepcopy else trials

    def requeued_trials(self, study_id: int) -> list[FrozenTrial]:
        """Return WAITING trials that were trained in part, which `Study.ask` does not start."""
        with self._lock:
            return self._buffer.study(study_id).queued(requeued=True)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Return a trial's id."""
        with self._lock:
            cache = self._study(study_id)
            if trial_number >= len(cache.trials):
                self._buffer.sync(cache)
            if not 0 <= trial_number < len(cache.trials):
                raise KeyError(f"No trial {trial_number} exists in the study {study_id}.")
            return cache.trials[trial_number]._trial_id

    # --- Starting trials ---

    def set_trial_limit(self, study_id: int, limit: int | None) -> None:
        """Limit the number of a study's trials that may begin, in all processes with this limit.

        A trial has begun if its state is not WAITING. At the limit, `create_new_trial` raises
        `TrialLimitReached`, and WAITING trials stay so. The number is exact for databases and
        journal files. In other storages processes may in rare cases start one trial too many or
        too few, and trials over the limit wait again. Trials that are added as they are do not
        count against the limit.

        Args:
            study_id:
                The study.
            limit:
                The number; None for any number.

        Raises:
            ValueError: If it is negative.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"`limit` must be at least 0, but got {limit}.")
        with self._lock:
            if limit is None:
                self._limits.pop(study_id, None)
            else:
                self._limits[study_id] = limit

    @contextmanager
    def prefetch_trials(self, n_trials: int) -> Iterator[None]:
        """Start that many trials together when the first one in the block is asked for.

        WAITING trials come first, as always. Trials that nobody asks for are WAITING after the
        block, for any process.

        Args:
            n_trials:
                Number of trials that will be asked for.

        Raises:
            ValueError: If it is negative.
        """
        if n_trials < 0:
            raise ValueError(f"`n_trials` must be at least 0, but got {n_trials}.")
        before, self._prefetch_count = self._prefetch_count, n_trials
        self._prefetch_depth += 1
        try:
            yield
        finally:
            self._prefetch_count = before
            self._prefetch_depth -= 1
            if not before:
                with self._lock:
                    if self._requeue_prefetched():
                        self.flush()

    def _requeue_prefetched(self) -> bool:
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
            change.user_attrs.update(dict.fromkeys(self.trial_attrs()))
            buffer.put(change.apply_to(waiting))
        return bool(unused)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Start a trial, or add one as it is.

        Raises:
            TrialLimitReached: If as many trials have begun as `set_trial_limit` allows.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            if template_trial is not None:
                return self.create_new_trials(study_id, [template_trial])[0]
            self.flush_if_due()
            cache = self._known_study(study_id)
            if not cache.prefetched:
                self._breaker.call(lambda: self._prefetch(cache), writes=True)
            if not cache.prefetched:
                raise TrialLimitReached(self._limits.get(study_id))
            self._prefetch_count = max(0, self._prefetch_count - 1)
            return cache.prefetched.pop(0)._trial_id

    def _prefetch(self, cache: StudyCache) -> None:
        """Create RUNNING trials; an outage raises its own error."""
        if self._buffer.in_doubt:  # an attempt before this one may have been successful
            self._buffer.sync_once(cache)
        if not cache.prefetched:
            limit, count = self._limits.get(cache.study_id), max(1, self._prefetch_count)
            ops = [
                Op(cache.study_id, None, self._start_change(), limit=limit) for _ in range(count)
            ]
            cache.prefetched = self._create(cache, ops)

    def _start_change(self) -> TrialChange:
        """Return the change of a trial that starts in this process."""
        return TrialChange(
            state=TrialState.RUNNING,
            started=datetime.now(),
            user_attrs=dict(self.trial_attrs()),
        )

    def create_new_trials(self, study_id: int, templates: Sequence[FrozenTrial]) -> list[int]:
        """Add many trials as they are, with one write if none has parameters or values.

        Args:
            study_id:
                The study.
            templates:
                The trials, for instance WAITING ones.

        Returns:
            Their ids.

        Raises:
            KeyError: If there is no such study.
            StorageUnavailable: If the storage does not answer; they may be added all the same.
        """
        with self._lock:
            cache = self._known_study(study_id)
            if not any(t.state.is_finished() or _has_values(t) for t in templates):
                ops = [new_trial_op(study_id, template) for template in templates]
                trials = self._breaker.call(
                    lambda: self._create(cache, ops), writes=True, retry=False
                )
                return [trial._trial_id for trial in trials]
            ids = [
                int(self._write_through("create_new_trial", study_id, template, retry=False))
                for template in templates
            ]
            running = (t.state == TrialState.RUNNING for t in templates)
            self._buffer.own.update(i for i, r in zip(ids, running, strict=True) if r)
            cache.expire()
            return ids

    def _create(self, cache: StudyCache, ops: Sequence[Op]) -> list[FrozenTrial]:
        """Create trials with one write, fewer at the limit; an outage raises its own error."""
        buffer, trials = self._buffer, list[FrozenTrial]()
        try:
            for op, outcome in zip(ops, buffer.write_once(ops)[0], strict=True):
                if isinstance(outcome, Applied):
                    trial = op.change.apply_to(_blank_trial(outcome.trial_id, outcome.number))
                    trials.append(trial)
                elif not isinstance(outcome, TrialLimitReached):
                    raise outcome
            started = {t._trial_id for t in trials if t.state == TrialState.RUNNING}
            buffer.own |= started
            if any(t._number > number for number, t in enumerate(trials, len(cache.trials))):
                buffer.sync_once(cache)  # others have started trials since the last reading
        except KeyError:  # the study was deleted
            raise
        except BaseException:
            buffer.own.difference_update(trial._trial_id for trial in trials)
            buffer.add_in_doubt(ops)
            raise
        for trial in trials:
            if trial._number == len(cache.trials):
                cache.last_trial_id = trial._trial_id
            buffer.locations[trial._trial_id] = cache, trial._number
            cache.put(trial)
        return trials

    def _start_waiting(self, trial_id: int) -> bool:
        """Start a WAITING trial, and with it others that will be asked for."""
        buffer, location = self._buffer, self._buffer.location(trial_id)
        if location is None:
            started = self._write_through("set_trial_state_values", trial_id, TrialState.RUNNING)
            return bool(started)
        cache, number = location
        trial = cache.trials[number]
        self.check_trial_is_updatable(trial_id, trial.state)
        if trial.state == TrialState.RUNNING:
            return False
        if trial_id not in buffer.claimed:
            self._breaker.call(lambda: self._claim(cache, trial), writes=True)
            if trial_id not in buffer.claimed:
                return False
        running = copy_trial(buffer.claimed.pop(trial_id))
        running.state = TrialState.RUNNING
        cache.put(running)
        self._prefetch_count = max(0, self._prefetch_count - 1)
        return True

    def _claim(self, cache: StudyCache, trial: FrozenTrial) -> None:
        """Start WAITING trials with one write; an outage raises its own error."""
        buffer = self._buffer
        if buffer.in_doubt:  # an attempt before this one may have been successful
            buffer.sync_once(cache)
            if trial._trial_id in buffer.claimed:
                return
        others = [
            t
            for t in cache.queued(requeued=False)
            if t is not trial and t._trial_id not in buffer.claimed
        ]
        trials = [trial, *others[: max(0, self._prefetch_count - 1)]]
        limit, waits = self._limits.get(cache.study_id), (TrialState.WAITING,)
        ops = [
            Op(cache.study_id, t._trial_id, self._start_change(), if_state=waits, limit=limit)
            for t in trials
        ]
        try:
            outcomes, _ = buffer.write_once(ops)
        except BaseException:
            buffer.add_in_doubt(ops)
            raise
        for op, old, outcome in zip(ops, trials, outcomes, strict=True):
            if isinstance(outcome, Applied):
                claimed = buffer.claimed[old._trial_id] = op.change.apply_to(old)
                claimed.state = TrialState.WAITING
                buffer.own.add(old._trial_id)
            else:
                cache.expire()

    def take_over(self, owners: Mapping[int, str]) -> list[int]:
        """Let trials of dead workers run in this process.

        Of several processes that try at once one gets each trial: this one, if the trial is
        RUNNING and still the named worker's. It keeps its number, and has this process's
        attributes.

        Args:
            owners:
                Worker of each trial (its user attribute "worker"), by trial id.

        Returns:
            The ids of the trials that run here now, with all their data.

        Raises:
            ValueError: If ``trial_attrs`` does not name this worker.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            attrs = dict(self.trial_attrs())
            if WORKER not in attrs:
                raise ValueError(
                    f"`trial_attrs` must have the attribute {WORKER!r}, but has {attrs}."
                )
            known = {i: owner for i, owner in owners.items() if self._buffer.location(i)}
            self._breaker.call(lambda: self._take_over(known, attrs), writes=True)
            return [trial_id for trial_id in known if trial_id in self._buffer.own]

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
            buffer.sync_once(buffer.studies[study_id])  # before they are changed only here
        for outcome in outcomes:
            if isinstance(outcome, Applied):
                buffer.own.add(outcome.trial_id)
                buffer.taken_over.pop(outcome.trial_id, None)

    # --- Changing trials ---

    def _editable(self, trial_id: int) -> FrozenTrial | None:
        """Return a copy of a trial in the cache, to be changed; None if it does not run here."""
        self.flush_if_due()
        buffer, location = self._buffer, self._buffer.location(trial_id)
        if location is None:
            return None
        cache, number = location
        trial = cache.trials[number]
        if trial_id in buffer.taken_over:
            raise TrialTakenOver(trial_id, buffer.taken_over[trial_id])
        if trial.state.is_finished():
            self.check_trial_is_updatable(trial_id, trial.state)
        if trial_id not in buffer.own:
            cache.expire()
            return None
        copied = cache.trials[number] = shallow_copy_trial(trial)  # callers may have the old one
        return copied

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Start or end a trial; the end is durable when this returns, except within `batch`.

        While the storage is unavailable (see `is_available`) it is durable later.
        """
        with self._lock:
            if state == TrialState.RUNNING:
                return self._start_waiting(trial_id)
            if (trial := self._editable(trial_id)) is None:
                return bool(self._write_through("set_trial_state_values", trial_id, state, values))
            change = self._buffer.set_state(trial, state)
            if values is not None:
                change.values = trial._values = [float(value) for value in values]
            if state.is_finished():
                change.completed = trial.datetime_complete = datetime.now()
            self._buffer.put(trial)
            self._buffer.has_ends = True
            if not self._batch_depth:
                with suppress(StorageUnavailable):  # then it is written later
                    rejections = self._buffer.write()
                    if trial_id in rejections:
                        raise rejections[trial_id]
            return True

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter of a trial."""
        with self._lock:
            if (trial := self._editable(trial_id)) is None:
                arguments = trial_id, param_name, param_value_internal, distribution
                self._write_through("set_trial_param", *arguments)
                return
            cache, _ = self._buffer.locations[trial_id]
            known = cache.distributions.setdefault(param_name, distribution)
            if known is not distribution:
                check_distribution_compatibility(known, distribution)
                if known == distribution:
                    distribution = known  # one object for all trials
            value = distribution.to_external_repr(param_value_internal)
            trial._params = {**trial._params, param_name: value}
            trial._distributions = {**trial._distributions, param_name: distribution}
            change = self._buffer.change(trial_id)
            change.params[param_name] = (param_value_internal, distribution)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set an intermediate value of a trial."""
        with self._lock:
            if (trial := self._editable(trial_id)) is None:
                arguments = trial_id, step, intermediate_value
                self._write_through("set_trial_intermediate_value", *arguments)
                return
            trial.intermediate_values = {**trial.intermediate_values, step: intermediate_value}
            self._buffer.change(trial_id).intermediate_values[step] = intermediate_value

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute of a trial."""
        with self._lock:
            if (trial := self._editable(trial_id)) is None:
                self._write_through("set_trial_user_attr", trial_id, key, value)
                return
            value = self._buffer.adapter.as_stored(value)
            trial._user_attrs = {**trial._user_attrs, key: value}
            self._buffer.change(trial_id).user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute of a trial."""
        with self._lock:
            if (trial := self._editable(trial_id)) is None:
                self._write_through("set_trial_system_attr", trial_id, key, value)
                return
            value = self._buffer.adapter.as_stored(value)
            trial._system_attrs = {**trial._system_attrs, key: value}
            self._buffer.change(trial_id).system_attrs[key] = value

    def write_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute at once, also of another process's trial.

        Raises:
            UpdateFinishedTrialError: If the trial has ended.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            self._write_through("set_trial_user_attr", trial_id, key, value)

    # --- Heartbeats and sessions ---

    def record_heartbeat(self, trial_id: int) -> None:
        """Record a heartbeat, if the backend has them and answers."""
        if isinstance(self.backend, BaseHeartbeat):
            with suppress(StorageUnavailable):
                self._write_through("record_heartbeat", trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        backend = self.backend
        if isinstance(backend, BaseHeartbeat):
            return self._breaker.call(lambda: stale_trial_ids(backend, study_id))
        return []

    def get_heartbeat_interval(self) -> int | None:
        """Return the backend's heartbeat interval, None if it has no heartbeat."""
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend.get_heartbeat_interval()
        return None

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None] | None:
        """Return the backend's callback for stale trials, None if it has no heartbeat."""
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend.get_heartbeat_stale_trial_callback()
        return None

    def remove_session(self) -> None:
        """Write everything, and close this thread's connection."""
        self.flush()
        self.backend.remove_session()


def _has_values(trial: FrozenTrial) -> bool:
    """Return whether a trial has data that only the backend's own call can write."""
    return bool(trial.params or trial.intermediate_values or trial.values)


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
