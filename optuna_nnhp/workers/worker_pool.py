"""Start the workers of a study, wait for them, and replace those that die."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import Future
from dataclasses import dataclass
import math
import os
import signal
import time
from typing import Any
from typing import Protocol

from joblib.externals import loky
import optuna

from optuna_nnhp.errors import first_line
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.config import WorkerResult
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.worker import SHUTDOWN_SIGNALS
from optuna_nnhp.workers.worker import run_worker

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

MAX_WORKER_DEATHS = 3  # of one worker; after one more it is not replaced
POLL_INTERVAL = 0.1  # seconds between two checks of the workers
SHUTDOWN_TIMEOUT = 120.0  # seconds that remote workers have to end after a shutdown message
# Numerical libraries read these when they are imported, before `torch.set_num_threads`.
THREAD_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Executor(Protocol):
    """Runs calls in other processes, as PEP 3148 describes."""

    def submit(self, function: Any, /, *args: Any) -> Any:
        """Start a call and return its future, which has ``done()`` and ``result()``."""


class LocalExecutor:
    """Runs each call in a new process of this machine.

    Each process has a pool of its own, so the death of one does not affect the others. The
    processes are not in the terminal's process group: Ctrl-C reaches them only through `send`.

    Args:
        threads:
            CPU threads of each process.
    """

    def __init__(self, threads: int) -> None:
        self._environment = dict.fromkeys(THREAD_COUNT_VARIABLES, str(threads))
        self._pools: list[tuple[Any, Future[int], Future[Any]]] = []

    def submit(self, function: Any, /, *args: Any) -> Future[Any]:
        """Start a call in a new process and return its future."""
        pool = loky.ProcessPoolExecutor(1, env=self._environment)
        if hasattr(os, "setpgrp"):
            pool.submit(os.setpgrp)
        if hasattr(signal, "pthread_sigmask"):  # blocked until the worker handles them
            pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, SHUTDOWN_SIGNALS)
        process_id = pool.submit(os.getpid)
        future: Future[Any] = pool.submit(function, *args)
        self._pools.append((pool, process_id, future))
        return future

    def send(self, signal_number: signal.Signals) -> None:
        """Send a signal to all processes whose call still runs."""
        for _, process_id, future in self._pools:
            if future.done():
                continue
            try:
                os.kill(process_id.result(), signal_number)
            except (OSError, loky.BrokenProcessPool):
                _logger.debug("A worker process ended before the signal reached it.")

    def close(self, *, kill: bool) -> None:
        """Shut down all processes.

        Args:
            kill:
                Whether to kill processes whose call still runs instead of waiting for them.
        """
        for pool, _, _ in self._pools:
            pool.shutdown(wait=not kill, kill_workers=kill)
        self._pools = []


@dataclass(frozen=True)
class _RunningWorker:
    """A worker that has been started.

    Args:
        config:
            Its configuration.
        future:
            Future of its result.
        deaths:
            How often a worker of this number has died before.
    """

    config: WorkerConfig
    future: Any
    deaths: int = 0


class WorkerPool:
    """Starts the workers of a study, waits for them, and replaces those that die.

    Args:
        make_config:
            Returns the configuration of a worker, from its number and whether it replaces one.
        n_workers:
            Number of workers.
        budget:
            Budget of the caller; its signal handlers set the flags that end the workers.
        executor:
            Where workers run: a `LocalExecutor`, or an executor for other processes or machines.
        send_message:
            Sends `INTERRUPT` or `RELEASE` to all workers that are not run by a `LocalExecutor`.
    """

    def __init__(
        self,
        make_config: Callable[[int, bool], WorkerConfig],
        n_workers: int,
        budget: Budget,
        executor: Executor,
        send_message: Callable[[str], object],
    ) -> None:
        self._make_config, self._n_workers, self._budget = make_config, n_workers, budget
        self._executor, self._send_message = executor, send_message
        self._local = executor if isinstance(executor, LocalExecutor) else None
        self._running: list[_RunningWorker] = []
        self._errors: list[Exception] = []
        self._last_death: Exception | None = None
        self._n_finished = 0
        self._is_shutting_down = False
        self._shutdown_deadline = math.inf

    def run(self, on_poll: Callable[[bool], None] = lambda is_running: None) -> None:
        """Run all workers until they end.

        Args:
            on_poll:
                Called after each check of the workers with whether any of them still runs.

        Raises:
            Exception: The error of a local worker, or of a remote one if no worker finished.
            RuntimeError: If all workers died and none could be replaced.
        """
        completed = False
        try:
            with graceful_shutdown(self._budget):
                for worker in range(self._n_workers):
                    self._start_worker(self._make_config(worker, False))
                while self._running:
                    time.sleep(POLL_INTERVAL)
                    self._check_workers()
                    on_poll(bool(self._running))
            completed = True
        finally:
            if self._local is not None:
                self._local.close(kill=not completed)
        if self._errors and (self._local is not None or not self._n_finished):
            raise self._errors[0]
        if not self._n_finished and not self._is_ending():
            raise RuntimeError(
                "At least one worker must finish, but all have died; the log says why. The same "
                "call again resumes the study."
            ) from self._last_death

    def _start_worker(self, config: WorkerConfig, deaths: int = 0) -> None:
        """Start a worker."""
        future = self._executor.submit(run_worker, config)
        self._running.append(_RunningWorker(config, future, deaths))

    def _check_workers(self) -> None:
        """Handle workers that have ended, and shut down the others if the budget asks for it."""
        for worker in [worker for worker in self._running if worker.future.done()]:
            self._running.remove(worker)
            self._handle_ended(worker)
        if self._budget.interrupted or self._budget.released:
            self._shut_down(INTERRUPT if self._budget.interrupted else RELEASE)
        if time.monotonic() > self._shutdown_deadline:
            _logger.warning(
                f"Stopped waiting for {len(self._running)} workers, which have not ended within "
                f"{SHUTDOWN_TIMEOUT:.0f} s."
            )
            for worker in self._running:
                worker.future.cancel()
            self._running.clear()

    def _handle_ended(self, worker: _RunningWorker) -> None:
        """Record how a worker ended, and replace it if it died or its machine was taken away."""
        number = worker.config.worker
        try:
            result: WorkerResult = worker.future.result()
        except CancelledError:
            return
        except Exception as error:  # each executor has its own exception for a dead process
            self._last_death = error
            self._replace_worker(worker, f"died: {first_line(error, worker.config.storage)}")
            return
        if result.error is not None:
            self._errors.append(result.error)
            if self._local is not None:
                self._shut_down(RELEASE)
            elif self._running:
                _logger.warning(f"Worker {number} failed, the others continue: {result.error}")
        elif result.stopped_by is not None and not self._is_shutting_down:
            self._replace_worker(worker, "was shut down")  # as by a cluster that needs the machine
        else:
            self._n_finished += 1

    def _replace_worker(self, worker: _RunningWorker, reason: str) -> None:
        """Start a new worker in place of one that has ended early."""
        number, deaths = worker.config.worker, worker.deaths + 1
        text = f"Worker {number} {reason}"
        if self._is_ending():
            _logger.warning(text)
            return
        if deaths > MAX_WORKER_DEATHS:
            _logger.warning(f"{text} (not replaced: this was its death number {deaths})")
            return
        _logger.warning(f"{text} (a new worker takes over its trials)")
        try:
            self._start_worker(self._make_config(number, True), deaths)
        except Exception as error:  # a broken pool of concurrent.futures refuses new calls
            _logger.warning(f"Worker {number} could not be replaced: {error}")

    def _is_ending(self) -> bool:
        """Return whether workers that end are not replaced any more."""
        if self._is_shutting_down or self._budget.interrupted or self._budget.released:
            return True
        # The time of remote workers begins when they start, which is not known here.
        return self._local is not None and self._budget.out_of_time()

    def _shut_down(self, command: str) -> None:
        """Tell all workers to end, once.

        Args:
            command:
                `INTERRUPT` or `RELEASE`.
        """
        if self._is_shutting_down:
            return
        self._is_shutting_down = True
        if self._local is not None:
            self._local.send(signal.SIGINT if command == INTERRUPT else signal.SIGTERM)
            return
        self._send_message(command)
        for worker in self._running:
            if isinstance(worker.future, Future):  # this cancels only calls that have not begun
                worker.future.cancel()
        self._shutdown_deadline = time.monotonic() + SHUTDOWN_TIMEOUT
