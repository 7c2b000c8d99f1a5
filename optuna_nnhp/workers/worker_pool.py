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

from optuna_nnhp.errors import first_line
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import ProgressBar
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.templates import Template
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import send_control_message
from optuna_nnhp.workers.worker import SIGNALS
from optuna_nnhp.workers.worker import WorkerConfig
from optuna_nnhp.workers.worker import WorkerResult
from optuna_nnhp.workers.worker import run_worker

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

MAX_WORKER_DEATHS = 3  # of one worker, before nobody takes its place any more
POLL_INTERVAL = 0.1  # seconds between two looks at the workers
PROGRESS_INTERVAL = 1.0  # seconds between two readings of the storage for the progress bar
SHUTDOWN_TIMEOUT = 120.0  # seconds for workers elsewhere to end after they were told so
# Read by the libraries of a new process, before anybody could say it to them.
THREAD_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Executor(Protocol):
    """What runs calls elsewhere, as PEP 3148 has it."""

    def submit(self, function: Any, /, *args: Any) -> Any:
        """Begin a call; what is returned has ``done()`` and ``result()``."""


def without_grid_points(sampler: BaseSampler) -> BaseSampler:
    """What a worker asks in a study whose plan is enqueued: nobody, if the plan is a grid."""
    if isinstance(sampler, GridSampler | GridPointsSampler):
        return GridPointsSampler([], "what was enqueued", is_part=True)
    return sampler


class LocalExecutor:
    """An executor for processes of this machine, each alone in a pool of its own.

    So the death of one is nobody else's. They are not in the terminal's group of processes:
    Ctrl-C reaches them only through `send`.

    Args:
        threads:
            Of each.
    """

    def __init__(self, threads: int) -> None:
        self._environment = dict.fromkeys(THREAD_COUNT_VARIABLES, str(threads))
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
class _WorkerSlot:
    """A worker's place, which another one takes if it dies."""

    config: WorkerConfig
    future: Any
    deaths: int = 0


@dataclass
class WorkerPool:
    """Starts a study's workers, and waits for them.

    Args:
        config:
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

    config: WorkerConfig
    study: Study
    problem: Template
    budget: Budget
    executor: Executor | None
    errors: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._slots = list[_WorkerSlot]()
        self._local = (
            None if self.executor is not None else LocalExecutor(self.config.threads or 1)
        )
        self._is_ending, self._ended = False, 0
        self._shutdown_deadline = math.inf
        self._last_death: Exception | None = None

    def run(self, *, show_progress_bar: bool = False) -> None:
        """Run all workers to their end.

        Raises:
            Exception: What a worker of this machine ended with, or all workers elsewhere.
            RuntimeError: If all workers died, again and again.
        """
        is_killed = True
        try:
            with graceful_shutdown(self.budget), self._progress(show_progress_bar) as show:
                for worker in range(self.config.workers):
                    config = self._config_of_worker(worker)
                    self._slots.append(_WorkerSlot(config, self._submit(config)))
                while self._slots:
                    time.sleep(POLL_INTERVAL)
                    self._check()
                    show(bool(self._slots))
            is_killed = False
        finally:
            if self._local is not None:
                self._local.close(kill=is_killed)
        if self.errors and (self._local is not None or not self._ended):
            raise self.errors[0]
        if not (self._ended or self._is_shutting_down()):
            raise RuntimeError(
                "A worker must come to its end, but all have died; the log says of what. The "
                "same call again goes on with the study."
            ) from self._last_death

    def _config_of_worker(self, worker: int, *, is_first: bool = True) -> WorkerConfig:
        """The job of one worker, with random numbers of its own; the first has the study's."""
        sampler = self.study.sampler
        if worker or not is_first:
            few = self.problem.sequential
            sampler = self.config.method_config.sampler_for(self.study, few=few, worker=worker)
        return replace(self.config, worker=worker, sampler=without_grid_points(sampler))

    def _submit(self, config: WorkerConfig) -> Any:
        executor = self._local or self.executor
        assert executor is not None
        return executor.submit(run_worker, config)

    def _check(self) -> None:
        """Take in who has ended, and tell the others if they are to end too."""
        for place in [place for place in self._slots if place.future.done()]:
            self._slots.remove(place)
            self._handle_finished(place)
        if self.budget.interrupted or self.budget.released:
            self._request_shutdown(signal.SIGINT if self.budget.interrupted else signal.SIGTERM)
        if time.monotonic() > self._shutdown_deadline:
            _logger.warning(f"{len(self._slots)} workers have not ended, nobody waits for them.")
            for place in self._slots:
                place.future.cancel()
            self._slots.clear()

    def _handle_finished(self, place: _WorkerSlot) -> None:
        """Note how a worker ended; if it died, another one takes its place."""
        try:
            outcome: WorkerResult = place.future.result()
        except CancelledError:
            return
        except Exception as error:  # each executor has types of its own for a death
            self._last_death = error
            self._replace(place, f"died: {first_line(error, self.config.storage)}")
            return
        if outcome.error is not None:
            self.errors.append(outcome.error)
            if self._local is not None:
                self._request_shutdown(signal.SIGTERM)
            elif self._slots:
                _logger.warning(f"Worker {outcome.worker} cannot go on: {outcome.error}")
        elif outcome.ended is not None and not self._is_ending:
            self._replace(place, "was told to end")  # a machine that somebody else needs
        else:
            self._ended += 1

    def _replace(self, place: _WorkerSlot, reason: str) -> None:
        """Have another worker take the place of one that is no more."""
        worker, deaths = place.config.worker, place.deaths + 1
        text = f"Worker {worker} {reason}"
        if self._is_shutting_down():
            _logger.warning(text)
            return
        if deaths > MAX_WORKER_DEATHS:
            _logger.warning(f"{text} (the {deaths}th time: nobody takes its place)")
            return
        _logger.warning(f"{text} (another one takes its place, and its trials)")
        config = self._config_of_worker(worker, is_first=False)
        try:
            self._slots.append(_WorkerSlot(config, self._submit(config), deaths))
        except Exception as refusal:  # a pool of concurrent.futures never recovers
            _logger.warning(f"No other worker can take its place: {refusal}")

    def _is_shutting_down(self) -> bool:
        """Whether no worker is to come to its end any more."""
        if self._is_ending or self.budget.interrupted or self.budget.released:
            return True
        # Elsewhere each worker's time begins when it does, which nobody here knows.
        return self._local is not None and self.budget.out_of_time()

    def _request_shutdown(self, what: signal.Signals) -> None:
        """Have all workers end tidily, once."""
        if self._is_ending:
            return
        self._is_ending = True
        if self._local is not None:
            self._local.send(what)
            return
        send_control_message(self.study, INTERRUPT if what == signal.SIGINT else RELEASE)
        for place in self._slots:
            if isinstance(place.future, Future):  # only those that have not begun
                place.future.cancel()
        self._shutdown_deadline = time.monotonic() + SHUTDOWN_TIMEOUT

    @contextmanager
    def _progress(self, is_shown: bool) -> Iterator[Callable[[bool], None]]:
        """Within, what shows how far all workers have come: now and then while they work."""
        if not is_shown:
            yield lambda is_going_on: None
            return
        storage, shown = self.study._storage, 0.0
        assert isinstance(storage, BufferedStorage)

        def show(is_going_on: bool) -> None:
            nonlocal shown
            if is_going_on and time.monotonic() - shown < PROGRESS_INTERVAL:
                return
            storage.refresh()
            trials = self.study.get_trials(deepcopy=False)
            complete = [t for t in trials if t.state == TrialState.COMPLETE]
            values = [t.value for t in complete if t.value is not None]
            best = (max if self.problem.maximize else min)(values, default=None)
            running = sum(trial.state == TrialState.RUNNING for trial in trials)
            bar.show(sum(t.state.is_finished() for t in trials), running, best)
            shown = time.monotonic()

        with ProgressBar(True, self.budget, 0) as bar:
            yield show
