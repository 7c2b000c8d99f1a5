"""A storage that keeps what running trials write in memory and writes it in batches."""

from __future__ import annotations

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

from optuna.distributions import BaseDistribution
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages._optuna_internals import copy_trial
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages._optuna_internals import shallow_copy_trial
from optuna_nnhp.storages._optuna_internals import without_cache
from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.guarded_storage import GuardedStorage
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.outbox import Outbox
from optuna_nnhp.storages.outbox import SavedOp
from optuna_nnhp.storages.outbox import write_outbox
from optuna_nnhp.storages.trial_starter import TrialStarter
from optuna_nnhp.storages.write_buffer import Key
from optuna_nnhp.storages.write_buffer import WriteBuffer


class BufferedStorage(GuardedStorage):
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
            User attributes, numbers and texts, of each trial that starts in this process; see
            `set_trial_attr`.

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
        trial_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        if flush_every < 0:
            raise ValueError(f"`flush_every` must be at least 0 seconds, but got {flush_every}.")
        backend = without_cache(backend)
        breaker = CircuitBreaker(str(getattr(backend, "url", "")))
        self.flush_every, self.trial_attrs = flush_every, dict(trial_attrs or {})
        buffer = WriteBuffer(backend, flush_every, breaker, lambda: self.trial_attrs.get(WORKER))
        super().__init__(backend, breaker, buffer)
        self._starter = TrialStarter(buffer, breaker, self.trial_attrs)
        self._batches = threading.local()  # nested `batch` of each thread
        self._outbox: Path | None = None  # file with the pending operations

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        names = ("backend", "flush_every", "trial_attrs")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def set_trial_attr(self, key: str, value: Any) -> None:
        """Set a user attribute of the trials that start from now on; None removes it."""
        with self._lock:
            if value is None:
                self.trial_attrs.pop(key, None)
            else:
                self.trial_attrs[key] = value

    # --- Writing and waiting ---

    def flush(self) -> dict[Key, Exception]:
        """Write everything now and return the rejections; write later what cannot be written."""
        rejections: dict[Key, Exception] = {}
        with self._lock:
            with suppress(StorageUnavailable):
                if self._buffer.pending:
                    rejections = self._buffer.write()
                if self._buffer.in_doubt:
                    self._buffer.resolve_doubts()
                    if not self._starter.is_prefetching and self._starter.requeue_prefetched():
                        self._buffer.write()
            self._delete_written_outbox()
        return rejections

    def _delete_written_outbox(self) -> None:
        """Delete the outbox file once the storage has its operations."""
        with self._lock:
            if self._outbox is not None and not self._buffer.pending:
                self._outbox.unlink(missing_ok=True)
                self._outbox = None

    def flush_if_due(self) -> None:
        """Write everything if the oldest change is older than ``flush_every``."""
        self._delete_written_outbox()
        is_late = time.monotonic() - self._buffer.pending_since > self.flush_every
        may_write = self._breaker.allows_call and not self._batch_depth
        if may_write and (is_late or not self._breaker.is_available):
            self.flush()

    @property
    def _batch_depth(self) -> int:
        return getattr(self._batches, "depth", 0)

    @contextmanager
    def batch(self) -> Iterator[Mapping[Key, Exception]]:
        """Delay this thread's writes to the end of the block, also if it raises an error.

        Starting a trial writes the changes before it. After the block the mapping that it got
        says, by trial id, why the changes to a trial were rejected.
        """
        rejections: dict[Key, Exception] = {}
        self._batches.depth = self._batch_depth + 1
        try:
            yield rejections
        finally:
            self._batches.depth -= 1
            if self._buffer.has_ends and not self._batch_depth:
                rejections |= self.flush()
        self.flush_if_due()

    def refresh(self) -> None:
        """Let the next query read what other processes have written until now."""
        with self._lock:
            for cache in self._buffer.studies.values():
                cache.mark_stale()

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
            worker = self.trial_attrs.get(WORKER) or f"{machine_id()}:{process_id()}"
            self._outbox = write_outbox(folder, Outbox(str(worker), saved))
            return self._outbox

    def write_ops(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Write operations on trials of other processes now; raise if the storage is away."""
        with self._lock:
            outcomes = self._breaker.call(lambda: self._buffer.adapter.apply(ops), writes=True)
            self.refresh()
            return outcomes

    def delete_study(self, study_id: int) -> None:
        """Delete a study, after pending changes are written."""
        with self._lock:
            self.flush()
            self._write_through("delete_study", study_id)
            self._buffer.drop_study(study_id)

    # --- Reading trials ---

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial."""
        with self._lock:
            self.flush_if_due()
            location = self._buffer.find_trial(trial_id)
            if location is None:
                return self._breaker.call(lambda: self.backend.get_trial(trial_id))
            cache, number = location
            trial = self._fresh_study_cache(cache.study_id).trials[number]
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
            trials = self._fresh_study_cache(study_id).trials_in_states(states)
        return copy.deepcopy(trials) if deepcopy else trials

    def requeued_trials(self, study_id: int) -> list[FrozenTrial]:
        """Return WAITING trials that were trained in part, which `Study.ask` does not start."""
        with self._lock:
            return self._buffer.study(study_id).waiting_trials(requeued=True)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Return a trial's id."""
        with self._lock:
            cache = self._fresh_study_cache(study_id)
            if trial_number >= len(cache.trials):
                self._buffer.sync(cache)
            if not 0 <= trial_number < len(cache.trials):
                raise KeyError(f"No trial {trial_number} exists in the study {study_id}.")
            return id_of(cache.trials[trial_number])

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
            self._starter.set_limit(study_id, limit)

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
        try:
            with self._starter.prefetching(n_trials):
                yield
        finally:
            with self._lock:
                if not self._starter.is_prefetching and self._starter.requeue_prefetched():
                    self.flush()

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
            return self._starter.start_new(self._study_cache(study_id))

    def create_new_trials(self, study_id: int, templates: Sequence[FrozenTrial]) -> list[int]:
        """Add many trials as they are, with one write if none has parameters or values.

        Returns:
            Their ids.

        Raises:
            KeyError: If there is no such study.
            StorageUnavailable: If the storage does not answer; they may be added all the same.
        """
        with self._lock:
            cache = self._study_cache(study_id)
            if not any(t.state.is_finished() or _has_values(t) for t in templates):
                return self._starter.add(cache, templates)
            ids = [
                int(self._write_through("create_new_trial", study_id, template, retry=False))
                for template in templates
            ]
            running = (t.state == TrialState.RUNNING for t in templates)
            self._buffer.own.update(i for i, r in zip(ids, running, strict=True) if r)
            cache.mark_stale()
            return ids

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
            known = {i: owner for i, owner in owners.items() if self._buffer.find_trial(i)}
            self._starter.take_over(known)
            return [trial_id for trial_id in known if trial_id in self._buffer.own]

    # --- Changing trials ---

    def _editable(self, trial_id: int) -> FrozenTrial | None:
        """Return a copy of a trial in the cache, to be changed; None if it does not run here."""
        self.flush_if_due()
        buffer, location = self._buffer, self._buffer.find_trial(trial_id)
        if location is None:
            return None
        cache, number = location
        trial = cache.trials[number]
        if trial_id in buffer.taken_over:
            raise TrialTakenOver(trial_id, buffer.taken_over[trial_id])
        if trial.state.is_finished():
            self.check_trial_is_updatable(trial_id, trial.state)
        if trial_id not in buffer.own:
            cache.mark_stale()
            return None
        copied = cache.trials[number] = shallow_copy_trial(trial)  # callers may have the old one
        return copied

    def _start_waiting(self, trial_id: int) -> bool:
        cache, number = self._buffer.locations[trial_id]
        state = cache.trials[number].state
        self.check_trial_is_updatable(trial_id, state)
        return state == TrialState.WAITING and self._starter.start_waiting(trial_id)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Start or end a trial; the end is durable when this returns, except within `batch`.

        While the storage is unavailable (see `is_available`) it is durable later.
        """
        with self._lock:
            if state == TrialState.RUNNING and self._buffer.find_trial(trial_id) is not None:
                return self._start_waiting(trial_id)
            if (trial := self._editable(trial_id)) is None:
                return bool(self._write_through("set_trial_state_values", trial_id, state, values))
            change = self._buffer.set_state(trial, state)
            if values is not None:
                change.values = trial.values = [float(value) for value in values]
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
            trial.params = {**trial.params, param_name: value}
            trial.distributions = {**trial.distributions, param_name: distribution}
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
            trial.user_attrs = {**trial.user_attrs, key: value}
            self._buffer.change(trial_id).user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute of a trial."""
        with self._lock:
            if (trial := self._editable(trial_id)) is None:
                self._write_through("set_trial_system_attr", trial_id, key, value)
                return
            value = self._buffer.adapter.as_stored(value)
            trial.system_attrs = {**trial.system_attrs, key: value}
            self._buffer.change(trial_id).system_attrs[key] = value

    def write_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute at once, also of another process's trial.

        Raises:
            UpdateFinishedTrialError: If the trial has ended.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            self._write_through("set_trial_user_attr", trial_id, key, value)

    def remove_session(self) -> None:
        """Write everything, and close this thread's connection."""
        self.flush()
        self.backend.remove_session()


def _has_values(trial: FrozenTrial) -> bool:
    """Return whether a trial has data that only the backend's own call can write."""
    return bool(trial.params or trial.intermediate_values or trial.values)
