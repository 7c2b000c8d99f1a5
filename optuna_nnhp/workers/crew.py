"""A study's crew: starts its workers, watches over them, and replaces those that die."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import math
import os
import signal
import time
from typing import Any
from typing import Protocol

from joblib.externals import loky
import optuna
from optuna import Study
from optuna.samplers import BaseSampler
from optuna.samplers import GridSampler
from optuna.trial import TrialState

from optuna_nnhp.messages import first_line
from optuna_nnhp.search.levels import LevelsSampler
from optuna_nnhp.storages.deferred import DeferredStorage
from optuna_nnhp.study.loop import Budget
from optuna_nnhp.study.loop import Progress
from optuna_nnhp.study.loop import tidy_interrupts
from optuna_nnhp.templates import Template
from optuna_nnhp.workers.job import SIGNALS
from optuna_nnhp.workers.job import Job
from optuna_nnhp.workers.job import Outcome
from optuna_nnhp.workers.job import work
from optuna_nnhp.workers.watch import INTERRUPT
from optuna_nnhp.workers.watch import RELEASE
from optuna_nnhp.workers.watch import tell

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

MOST_DEATHS = 3  # of one worker, before nobody takes its place any more
LOOK_EVERY = 0.1  # seconds between two looks at the workers
SHOW_EVERY = 1.0  # seconds between two readings of the storage for the progress bar
PATIENCE = 120.0  # seconds for workers elsewhere to end after they were told so
# Read by the libraries of a new process, before anybody could say it to them.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Executor(Protocol):
    """What runs calls elsewhere, as PEP 3148 has it."""

    def submit(self, function: Any, /, *args: Any) -> Any:
        """Begin a call; what is returned has ``done()`` and ``result()``."""


def without_points(sampler: BaseSampler) -> BaseSampler:
    """What a worker asks in a study whose plan is enqueued: nobody, if the plan is a grid."""
    if isinstance(sampler, GridSampler | LevelsSampler):
        return LevelsSampler([], "what was enqueued", is_part=True)
    return sampler


class LocalWorkers:
    """An executor for processes of this machine, each alone in a pool of its own.

    So the death of one is nobody else's. They are not in the terminal's group of processes:
    Ctrl-C reaches them only through `send`.

    Args:
        threads:
            Of each.
    """

    def __init__(self, threads: int) -> None:
        self._environment = dict.fromkeys(THREADS, str(threads))
        self._pools: list[tuple[Any, Future[int], Future[Any]]] = []

    def submit(self, function: Any, /, *args: Any) -> Future[Any]:
        """Run a call in a new process."""
        pool = loky.ProcessPoolExecutor(1, env=self._environment)
        if hasattr(os, "setpgrp"):
            pool.submit(os.setpgrp)
        if hasattr(signal, "pthread_sigmask"):  # they wait until somebody can take them
            pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS)
        number = pool.submit(os.getpid)
        future: Future[Any] = pool.submit(function, *args)
        self._pools.append((pool, number, future))
        return future

    def send(self, what: signal.Signals) -> None:
        """Send a signal to all that are at work."""
        for _, number, future in self._pools:
            if future.done():
                continue
            try:
                os.kill(number.result(), what)
            except (OSError, loky.BrokenProcessPool):
                _logger.debug("A worker is gone already.")

    def close(self, *, kill: bool) -> None:
        """Give the processes back, those at work too if they are to be killed."""
        for pool, _, _ in self._pools:
            pool.shutdown(wait=not kill, kill_workers=kill)
        self._pools = []


@dataclass
class _Place:
    """A worker's place, which another one takes if it dies."""

    job: Job
    future: Any
    deaths: int = 0


@dataclass
class Crew:
    """Starts a study's workers, and waits for them.

    Args:
        job:
            What the first of them does.
        study:
            The opened study.
        problem:
            What is tuned.
        budget:
            The caller's; signals are noted in it.
        executor:
            Where they run; None for this machine.

    Attributes:
        errors: What some of them ended with.
    """

    job: Job
    study: Study
    problem: Template
    budget: Budget
    executor: Executor | None
    errors: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._places = list[_Place]()
        self._local = None if self.executor is not None else LocalWorkers(self.job.threads or 1)
        self._is_ending, self._ended = False, 0
        self._patience = math.inf
        self._last_death: Exception | None = None

    def run(self, *, show_progress_bar: bool = False) -> None:
        """Run all workers to their end.

        Raises:
            Exception: What a worker of this machine ended with, or all workers elsewhere.
            RuntimeError: If all workers died, again and again.
        """
        is_killed = True
        try:
            with tidy_interrupts(self.budget), self._progress(show_progress_bar) as show:
                for worker in range(self.job.workers):
                    job = self._numbered(worker)
                    self._places.append(_Place(job, self._submit(job)))
                while self._places:
                    time.sleep(LOOK_EVERY)
                    self._look()
                    show(bool(self._places))
            is_killed = False
        finally:
            if self._local is not None:
                self._local.close(kill=is_killed)
        if self.errors and (self._local is not None or not self._ended):
            raise self.errors[0]
        if not (self._ended or self._is_over()):
            raise RuntimeError(
                "A worker must come to its end, but all have died; the log says of what. The "
                "same call again goes on with the study."
            ) from self._last_death

    def _numbered(self, worker: int, *, is_first: bool = True) -> Job:
        """The job of one worker, with random numbers of its own; the first has the study's."""
        sampler = self.study.sampler
        if worker or not is_first:
            few = self.problem.one_by_one
            sampler = self.job.wish.for_study(self.study, few=few, worker=worker)
        return replace(self.job, worker=worker, sampler=without_points(sampler))

    def _submit(self, job: Job) -> Any:
        executor = self._local or self.executor
        assert executor is not None
        return executor.submit(work, job)

    def _look(self) -> None:
        """Take in who has ended, and tell the others if they are to end too."""
        for place in [place for place in self._places if place.future.done()]:
            self._places.remove(place)
            self._take(place)
        if self.budget.interrupted or self.budget.released:
            self._end(signal.SIGINT if self.budget.interrupted else signal.SIGTERM)
        if time.monotonic() > self._patience:
            _logger.warning(f"{len(self._places)} workers have not ended, nobody waits for them.")
            for place in self._places:
                place.future.cancel()
            self._places.clear()

    def _take(self, place: _Place) -> None:
        """Note how a worker ended; if it died, another one takes its place."""
        try:
            outcome: Outcome = place.future.result()
        except CancelledError:
            return
        except Exception as error:  # each executor has types of its own for a death
            self._last_death = error
            self._replace(place, f"died: {first_line(error, self.job.storage)}")
            return
        if outcome.error is not None:
            self.errors.append(outcome.error)
            if self._local is not None:
                self._end(signal.SIGTERM)
            elif self._places:
                _logger.warning(f"Worker {outcome.worker} cannot go on: {outcome.error}")
        elif outcome.ended is not None and not self._is_ending:
            self._replace(place, "was told to end")  # a machine that somebody else needs
        else:
            self._ended += 1

    def _replace(self, place: _Place, reason: str) -> None:
        """Have another worker take the place of one that is no more."""
        worker, deaths = place.job.worker, place.deaths + 1
        text = f"Worker {worker} {reason}"
        if self._is_over():
            _logger.warning(text)
            return
        if deaths > MOST_DEATHS:
            _logger.warning(f"{text} (the {deaths}th time: nobody takes its place)")
            return
        _logger.warning(f"{text} (another one takes its place, and its trials)")
        job = self._numbered(worker, is_first=False)
        try:
            self._places.append(_Place(job, self._submit(job), deaths))
        except Exception as refusal:  # a pool of concurrent.futures never recovers
            _logger.warning(f"No other worker can take its place: {refusal}")

    def _is_over(self) -> bool:
        """Whether no worker is to come to its end any more."""
        if self._is_ending or self.budget.interrupted or self.budget.released:
            return True
        # Elsewhere each worker's time begins when it does, which nobody here knows.
        return self._local is not None and self.budget.out_of_time()

    def _end(self, what: signal.Signals) -> None:
        """Have all workers end tidily, once."""
        if self._is_ending:
            return
        self._is_ending = True
        if self._local is not None:
            self._local.send(what)
            return
        tell(self.study, INTERRUPT if what == signal.SIGINT else RELEASE)
        for place in self._places:
            if isinstance(place.future, Future):  # only those that have not begun
                place.future.cancel()
        self._patience = time.monotonic() + PATIENCE

    @contextmanager
    def _progress(self, is_shown: bool) -> Iterator[Callable[[bool], None]]:
        """Within, what shows how far all workers have come: now and then while they work."""
        if not is_shown:
            yield lambda is_going_on: None
            return
        storage, shown = self.study._storage, 0.0
        assert isinstance(storage, DeferredStorage)

        def show(is_going_on: bool) -> None:
            nonlocal shown
            if is_going_on and time.monotonic() - shown < SHOW_EVERY:
                return
            storage.refresh()
            trials = self.study.get_trials(deepcopy=False)
            complete = [t for t in trials if t.state == TrialState.COMPLETE]
            values = [t.value for t in complete if t.value is not None]
            best = (max if self.problem.maximize else min)(values, default=None)
            running = sum(trial.state == TrialState.RUNNING for trial in trials)
            bar.show(sum(t.state.is_finished() for t in trials), running, best)
            shown = time.monotonic()

        with Progress(True, self.budget, 0) as bar:
            yield show
