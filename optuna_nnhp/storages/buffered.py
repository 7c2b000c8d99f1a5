"""A storage that keeps what running trials write in memory, and writes it behind in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import suppress
import copy
from datetime import datetime
import math
from pathlib import Path
import threading
import time
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage
from optuna.storages import _CachedStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.circuit_breaker import StorageUnavailable as StorageUnavailable
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import copied
from optuna_nnhp.storages.outbox import Unsent
from optuna_nnhp.storages.outbox import keep
from optuna_nnhp.storages.starting import StartingStorage
from optuna_nnhp.storages.starting import TrialLimitReached as TrialLimitReached

LOOK_EVERY = 0.1  # seconds between looks at whether to stop waiting


class BufferedStorage(StartingStorage):
    """Wraps a storage, and writes what this process's running trials say behind, in batches.

    An end of a trial is written at once, with everything before it: when `set_trial_state_values`
    returns, the trial is durable. Within `batch`, the ends of many trials are one writing (one
    append to a journal, one transaction of a database) at its end. Everything else waits until
    then, until `flush`, or until it is ``flush_every`` seconds old: it is written by the next call
    of any method after that. There is no thread: who trains for long between two calls must
    call `flush_if_due`, or other processes see an older study.

    While the storage does not answer, everything waits, ends of trials too, and is tried again
    after 1, 2, 4 and at most 30 seconds, by the next call of any method after that; readings are
    the last ones. What needs an answer, such as starting a trial, raises `StorageUnavailable`.

    What other processes write is read every ``flush_every`` seconds while trials run here, and at
    once when none does or an unknown trial is asked for. Trials that do not run here, and
    attributes of the study, are written through.

    Args:
        backend:
            Any Optuna storage. Afterwards the attribute holds the database itself, if it was in
            Optuna's cache.
        flush_every:
            Seconds that running trials' data may be unwritten, and others' unread.
        mark:
            Gives the user attributes that a trial has from its start in this process: numbers
            and texts.

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
        mark: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        if flush_every < 0:
            raise ValueError(f"`flush_every` must be at least 0 seconds, but got {flush_every}.")
        # Optuna wraps databases in a cache; what is read here is kept here.
        backend = backend._backend if isinstance(backend, _CachedStorage) else backend
        super().__init__(backend, flush_every, mark)
        self.flush_every = flush_every
        self._batches = threading.local()  # how many `batch` each thread is in
        self._kept: Path | None = None  # what would not be written otherwise

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {"backend": self.backend, "flush_every": self.flush_every, "mark": self._mark}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def flush(self) -> None:
        """Write everything now, if the storage answers. If not it stays, and is written later."""
        self._flush()
        if self._kept is not None and not self._ledger.changes and not self.notes:
            self._kept.unlink(missing_ok=True)
            self._kept = None

    def flush_if_due(self) -> None:
        """Write everything if the oldest is older than ``flush_every``."""
        is_late = time.monotonic() - self._ledger.oldest > self.flush_every
        may_try = self._reach.may_try and not self._in_batch
        if may_try and (is_late or not self._reach.is_up):
            self.flush()

    @property
    def is_available(self) -> bool:
        """Whether the storage has answered last time. If not, what is written here waits."""
        return self._reach.is_up

    def wait_until_available(
        self, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Try again until the storage answers, at first after a second, later every 30 s.

        What waits is written then.

        Args:
            seconds:
                How long at most.
            stop:
                Once it says yes, that is enough.

        Returns:
            Whether another question to the storage is worth it.
        """
        end = time.monotonic() + seconds
        while not self._reach.is_up:
            if stop():
                return False
            if self._reach.may_try and self._answers_now():
                return True
            now = time.monotonic()
            if now >= end:
                return False
            time.sleep(max(0.0, min(LOOK_EVERY, self._reach.due - now, end - now)))
        return True

    def save_outbox(self, folder: Path) -> Path | None:
        """Keep everything that is not written yet in a file, for when the storage stays away.

        See `replay_outbox`. If this process writes it after all, the file goes.

        Args:
            folder:
                Where; it is made.

        Returns:
            The file, None if everything is written.

        Raises:
            OSError: If it cannot be kept.
        """
        with self._lock:
            studies: dict[str, Unsent] = defaultdict(Unsent)
            for trial_id, change in self._ledger.changes.items():
                view, number = self._ledger.homes[trial_id]
                studies[self.name_of(view.study_id)].changes[number] = change
            for (study_id, kind, key), value in self.notes.items():
                studies[self.name_of(study_id)].attributes[kind, key] = value
            if not studies:
                return None
            worker = str(self._mark().get(WORKER) or f"{machine_id()}:{process_id()}")
            self._kept = keep(folder, worker, studies)
            return self._kept

    def _answers_now(self) -> bool:
        self.flush()
        if self._reach.is_up or not self._reach.may_try:
            return self._reach.is_up
        view = next(iter(self._ledger.views.values()), None)
        try:  # there was nothing to write
            with self._lock:
                if view is None:
                    self._reach.ask(self.backend.get_all_studies)
                else:
                    self._ledger.sync(view)
        except StorageUnavailable:
            return False
        return True

    @property
    def _in_batch(self) -> int:
        return getattr(self._batches, "depth", 0)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Within, this thread's writing waits for the end: one for all, even if there is an error.

        Only starting trials writes before, what is there already along with it.
        """
        self._batches.depth = self._in_batch + 1
        try:
            yield
        finally:
            self._batches.depth -= 1
            if self._ledger.has_ends and not self._in_batch:
                self.flush()
        self.flush_if_due()

    def refresh(self) -> None:
        """Let the next reading see what other processes have written until now."""
        with self._lock:
            for view in self._ledger.views.values():
                view.synced = -math.inf

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Start a trial, or add one as it is.

        Raises:
            TrialLimitReached: If as many have begun as may, see `set_trial_limit`.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            if template_trial is not None:
                return self.create_new_trials(study_id, [template_trial])[0]
            self.flush_if_due()
            return self._start(self._known(study_id))

    def create_new_trials(self, study_id: int, templates: Sequence[FrozenTrial]) -> list[int]:
        """Add many trials as they are: one writing if none has parameters or values.

        Args:
            study_id:
                The study.
            templates:
                The trials, for instance WAITING ones.

        Returns:
            Their ids.

        Raises:
            KeyError: If there is no such study.
            StorageUnavailable: If the storage does not answer; they may be added.
        """
        with self._lock:
            view = self._known(study_id)
            if not any(t.state.is_finished() or _has_more(t) for t in templates):
                trials = self._reach.ask(
                    lambda: self._try_create(view, templates), writes=True, again=False
                )
                return [trial._trial_id for trial in trials]
            ids = [self._through("create_new_trial", study_id, t, again=False) for t in templates]
            running = (t.state == TrialState.RUNNING for t in templates)
            self._ledger.own.update(i for i, r in zip(ids, running, strict=True) if r)
            view.synced = -math.inf
            return ids

    def _through(self, name: str, *arguments: Any, again: bool = True) -> Any:
        """What the backend says to a call that changes something, at once."""
        call = getattr(self.backend, name)
        return self._reach.ask(lambda: call(*arguments), writes=True, again=again)

    def _open(self, trial_id: int) -> FrozenTrial | None:
        """A trial that runs here, to be changed in part; None if it does not run here."""
        self.flush_if_due()
        home = self._ledger.home(trial_id)
        if home is None:
            return None
        view, number = home
        trial = view.trials[number]
        if trial_id in self._ledger.lost:
            raise TrialTakenOver(trial_id, self._ledger.lost[trial_id])
        if trial.state.is_finished():
            self.check_trial_is_updatable(trial_id, trial.state)
        if trial_id not in self._ledger.own:
            view.synced = -math.inf
            return None
        twin = view.trials[number] = FrozenTrial.__new__(FrozenTrial)  # others have the old one
        twin.__dict__.update(trial.__dict__)
        return twin

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Start or end a trial; an end is durable when this returns, except within `batch`.

        And except while the storage is away: see `is_available`.
        """
        with self._lock:
            if state == TrialState.RUNNING:
                return self._claim(trial_id)
            if (trial := self._open(trial_id)) is None:
                return bool(self._through("set_trial_state_values", trial_id, state, values))
            change = self._ledger.change(trial_id)
            change.state = trial.state = state
            if values is not None:
                change.values = trial._values = [float(value) for value in values]
            if state.is_finished():
                change.completed = trial.datetime_complete = datetime.now()
            self._ledger.put(trial)
            self._ledger.has_ends = True
            if not self._in_batch:
                with suppress(StorageUnavailable):  # then it is written later
                    refused = self._ledger.write().refused
                    if trial_id in refused:
                        raise refused[trial_id]
            return True

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Give a trial a parameter."""
        with self._lock:
            if (trial := self._open(trial_id)) is None:
                arguments = trial_id, param_name, param_value_internal, distribution
                self._through("set_trial_param", *arguments)
                return
            view, _ = self._ledger.homes[trial_id]
            known = view.distributions.setdefault(param_name, distribution)
            if known is not distribution:
                check_distribution_compatibility(known, distribution)
                if known == distribution:
                    distribution = known  # one object for all trials
            value = distribution.to_external_repr(param_value_internal)
            trial._params = {**trial._params, param_name: value}
            trial._distributions = {**trial._distributions, param_name: distribution}
            self._ledger.change(trial_id).params[param_name] = (param_value_internal, distribution)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Report a value."""
        with self._lock:
            if (trial := self._open(trial_id)) is None:
                arguments = trial_id, step, intermediate_value
                self._through("set_trial_intermediate_value", *arguments)
                return
            trial.intermediate_values = {**trial.intermediate_values, step: intermediate_value}
            self._ledger.change(trial_id).intermediate_values[step] = intermediate_value

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        with self._lock:
            if (trial := self._open(trial_id)) is None:
                self._through("set_trial_user_attr", trial_id, key, value)
                return
            value = self._ledger.writer.frozen(value)
            trial._user_attrs = {**trial._user_attrs, key: value}
            self._ledger.change(trial_id).user_attrs[key] = value

    def write_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute at once, also of a trial that is another process's.

        Raises:
            UpdateFinishedTrialError: If the trial has ended.
            StorageUnavailable: If the storage does not answer.
        """
        with self._lock:
            self._through("set_trial_user_attr", trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        with self._lock:
            if (trial := self._open(trial_id)) is None:
                self._through("set_trial_system_attr", trial_id, key, value)
                return
            value = self._ledger.writer.frozen(value)
            trial._system_attrs = {**trial._system_attrs, key: value}
            self._ledger.change(trial_id).system_attrs[key] = value

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial."""
        with self._lock:
            self.flush_if_due()
            home = self._ledger.home(trial_id)
            if home is None:
                return self._reach.ask(lambda: self.backend.get_trial(trial_id))
            view, number = home
            trial = self._view(view.study_id).trials[number]
            # Optuna's `Trial` writes into what it is given.
            return trial if trial.state.is_finished() else copied(trial)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """All trials of a study, by number."""
        with self._lock:
            self.flush_if_due()
            trials = self._view(study_id).listed(states)
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """A trial's id."""
        with self._lock:
            view = self._view(study_id)
            if trial_number >= len(view.trials):
                self._ledger.sync(view)
            if not 0 <= trial_number < len(view.trials):
                raise KeyError(f"No trial {trial_number} exists in the study {study_id}.")
            return view.trials[trial_number]._trial_id

    def delete_study(self, study_id: int) -> None:
        """As the backend; what is unwritten is written before."""
        with self._lock:
            self.flush()
            self._through("delete_study", study_id)
            if view := self._ledger.views.get(study_id):
                self._ledger.forget(view)

    def remove_session(self) -> None:
        """Write everything, and close this thread's connection."""
        self.flush()
        self.backend.remove_session()


def _has_more(trial: FrozenTrial) -> bool:
    """Whether it holds what only the backend's own call can write."""
    return bool(trial.params or trial.intermediate_values or trial.values)
