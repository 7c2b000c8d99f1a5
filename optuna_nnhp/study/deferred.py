"""A storage that keeps what running trials write in memory, and writes it behind in batches."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
import copy
from datetime import datetime
import math
import threading
import time
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage
from optuna.storages import _CachedStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.study.batches import Batch
from optuna_nnhp.study.batches import copied
from optuna_nnhp.study.ledger import Ledger
from optuna_nnhp.study.ledger import View
from optuna_nnhp.study.passing import PassingStorage


class DeferredStorage(PassingStorage):
    """Wraps a storage, and writes what this process's running trials say behind, in batches.

    An end of a trial is written at once, with everything before it: when `set_trial_state_values`
    returns, the trial is durable. Within `batch`, the ends of many trials are one writing (one
    append to a journal, one transaction of a database) at its end. Everything else waits until
    then, until `flush`, or until it is ``flush_every`` seconds old: it is written by the next call
    of any method after that. There is no thread: who trains for long between two calls must
    call `flush_if_due`, or other processes see an older study.

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
        >>> storage = DeferredStorage(optuna.storages.InMemoryStorage())
        >>> study = optuna.create_study(storage=storage)
        >>> with storage.reserved(2), storage.batch():
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
        super().__init__(backend._backend if isinstance(backend, _CachedStorage) else backend)
        self.flush_every, self._mark = flush_every, mark
        self._ledger = Ledger(self.backend, flush_every)
        self._lock = threading.RLock()
        self._batches = threading.local()  # how many `batch` each thread is in
        self._wanted = 0  # trials that will be asked for

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {"backend": self.backend, "flush_every": self.flush_every, "mark": self._mark}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def flush(self) -> None:
        """Write everything now. If that fails it stays, and the next call tries again."""
        with self._lock:
            if self._ledger.changes:
                self._ledger.write(Batch())

    def flush_if_due(self) -> None:
        """Write everything if the oldest is older than ``flush_every``."""
        if time.monotonic() - self._ledger.oldest > self.flush_every and not self._in_batch:
            self.flush()

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

    @contextmanager
    def reserved(self, trials: int) -> Iterator[None]:
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
        try:
            yield
        finally:
            self._wanted = before
            if not before:
                self._release()

    def refresh(self) -> None:
        """Let the next reading see what other processes have written until now."""
        with self._lock:
            for view in self._ledger.views.values():
                view.synced = -math.inf

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
                self.flush()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Start a trial, or add one as it is."""
        with self._lock:
            if template_trial is not None:
                return self.create_new_trials(study_id, [template_trial])[0]
            self.flush_if_due()
            view = self._ledger.known(study_id)
            if not view.held:
                number = max(1, self._wanted)
                view.held = self._create(view, [_blank(self._mark()) for _ in range(number)])
            self._wanted = max(0, self._wanted - 1)
            return view.held.pop(0)._trial_id

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
        """
        with self._lock:
            view = self._ledger.known(study_id)
            if not any(t.state.is_finished() or _has_more(t) for t in templates):
                return [t._trial_id for t in self._create(view, templates)]
            ids = [self.backend.create_new_trial(study_id, template) for template in templates]
            running = (t.state == TrialState.RUNNING for t in templates)
            self._ledger.own.update(i for i, r in zip(ids, running, strict=True) if r)
            view.synced = -math.inf
            return ids

    def _create(self, view: View, templates: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Start trials, all at once."""
        written = self._ledger.write(Batch(study_id=view.study_id, templates=templates))
        trials = []
        for template, (trial_id, number) in zip(templates, written.created, strict=True):
            trial = copied(template)
            trial._trial_id, trial._number = trial_id, number
            if number > len(view.trials):  # others have started trials since the last reading
                self._ledger.sync(view)
            else:
                view.after = trial_id
            self._ledger.homes[trial_id] = view, number
            view.put(trial)
            if trial.state == TrialState.RUNNING:
                self._ledger.own.add(trial_id)
            trials.append(trial)
        return trials

    def _claim(self, trial_id: int) -> bool:
        """Start a WAITING trial, and along with it others that will be asked for."""
        home = self._ledger.home(trial_id)
        if home is None:
            return self.backend.set_trial_state_values(trial_id, TrialState.RUNNING)
        view, number = home
        trial = view.trials[number]
        self.check_trial_is_updatable(trial_id, trial.state)
        if trial.state == TrialState.RUNNING:
            return False
        if trial_id not in self._ledger.claimed:
            others = (view.trials[n]._trial_id for n in sorted(view.waiting) if n != number)
            free = [i for i in others if i not in self._ledger.claimed][: max(0, self._wanted - 1)]
            batch = Batch(claims=[trial_id, *free])
            claimed = self._ledger.write(batch).claimed
            for claim in claimed:
                held = copied(view.trials[self._ledger.homes[claim][1]])
                held.datetime_start = batch.now
                self._ledger.claimed[claim] = held
                self._ledger.own.add(claim)
                if mark := self._mark():
                    self._ledger.change(claim).user_attrs.update(mark)
            self.flush()  # only now that they are ours
            if len(claimed) <= len(free):
                view.synced = -math.inf
            if trial_id not in self._ledger.claimed:
                return False
        started = copied(self._ledger.claimed.pop(trial_id))
        started.state = TrialState.RUNNING
        started._user_attrs.update(self._mark())
        view.put(started)
        self._wanted = max(0, self._wanted - 1)
        return True

    def _open(self, trial_id: int) -> FrozenTrial | None:
        """A trial that runs here, to be changed in part; None if it does not run here."""
        self.flush_if_due()
        home = self._ledger.home(trial_id)
        if home is None:
            return None
        view, number = home
        trial = view.trials[number]
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
        """Start or end a trial; an end is durable when this returns, except within `batch`."""
        with self._lock:
            if state == TrialState.RUNNING:
                return self._claim(trial_id)
            if (trial := self._open(trial_id)) is None:
                return self.backend.set_trial_state_values(trial_id, state, values)
            change = self._ledger.change(trial_id)
            change.state = trial.state = state
            if values is not None:
                change.values = trial._values = [float(value) for value in values]
            if state.is_finished():
                change.completed = trial.datetime_complete = datetime.now()
            self._ledger.put(trial)
            self._ledger.has_ends = True
            if not self._in_batch:
                refused = self._ledger.write(Batch()).refused
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
                self.backend.set_trial_param(
                    trial_id, param_name, param_value_internal, distribution
                )
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
                self.backend.set_trial_intermediate_value(trial_id, step, intermediate_value)
                return
            trial.intermediate_values = {**trial.intermediate_values, step: intermediate_value}
            self._ledger.change(trial_id).intermediate_values[step] = intermediate_value

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        with self._lock:
            if (trial := self._open(trial_id)) is None:
                self.backend.set_trial_user_attr(trial_id, key, value)
                return
            value = self._ledger.writer.frozen(value)
            trial._user_attrs = {**trial._user_attrs, key: value}
            self._ledger.change(trial_id).user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        with self._lock:
            if (trial := self._open(trial_id)) is None:
                self.backend.set_trial_system_attr(trial_id, key, value)
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
                return self.backend.get_trial(trial_id)
            view, number = home
            trial = self._ledger.view(view.study_id).trials[number]
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
            trials = self._ledger.view(study_id).listed(states)
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """A trial's id."""
        with self._lock:
            view = self._ledger.view(study_id)
            if trial_number >= len(view.trials):
                self._ledger.sync(view)
            if not 0 <= trial_number < len(view.trials):
                raise KeyError(f"No trial {trial_number} exists in the study {study_id}.")
            return view.trials[trial_number]._trial_id

    def delete_study(self, study_id: int) -> None:
        """As the backend; what is unwritten is written before."""
        with self._lock:
            self.flush()
            self.backend.delete_study(study_id)
            if view := self._ledger.views.get(study_id):
                self._ledger.forget(view)

    def remove_session(self) -> None:
        """Write everything, and close this thread's connection."""
        self.flush()
        self.backend.remove_session()


def _has_more(trial: FrozenTrial) -> bool:
    """Whether it holds what only the backend's own call can write."""
    return bool(trial.params or trial.intermediate_values or trial.values)


def _blank(user_attrs: Mapping[str, Any]) -> FrozenTrial:
    """A trial that starts now."""
    return FrozenTrial(
        number=-1,
        trial_id=-1,
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
