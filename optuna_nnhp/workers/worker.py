"""Run one worker of a study, in any process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import signal
import threading
import time
import traceback

import cloudpickle
import optuna
from optuna import Study
import torch

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.study.open_study import open_study
from optuna_nnhp.templates import Template
from optuna_nnhp.training.weight_files import BestWeights
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.config import WorkerResult
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import PARENT_CHECK_INTERVAL
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import ShutdownWatcher

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_worker(config: WorkerConfig, problem: Template | None = None) -> WorkerResult:
    """Train trials of a study until it is complete, the time is over, or a shutdown is asked for.

    Errors are returned in the result. If a call in another process raises an error instead, the
    error comes from the executor, and the worker's process has died.

    Args:
        config:
            Configuration of the worker.
        problem:
            Problem to tune, if this process has already built it.
    """
    try:
        with _exit_with_parent(config.parent), _worker_settings(config):
            return WorkerResult(config.worker, stopped_by=_train_until_stopped(config, problem))
    except KeyboardInterrupt:
        return WorkerResult(config.worker, stopped_by=INTERRUPT)
    except Exception as error:
        return WorkerResult(config.worker, _picklable_error(error))


def _train_until_stopped(config: WorkerConfig, problem: Template | None) -> str | None:
    """Open the study and run its tuner.

    Returns:
        `INTERRUPT` or `RELEASE` if a signal or a control message ended it early, else None.
    """
    if config.caller_process == (machine_id(), process_id()):
        raise ValueError(
            "`executor` must run its calls in other processes, but this one runs them in the "
            "caller's, where threads would only wait for each other."
        )
    timeout = config.timeout if config.deadline is None else config.deadline - time.time()
    budget = Budget(config.n_trials, timeout, workers=config.n_workers)
    with _unblocked_signals(config, budget):
        with _only_warnings():
            study, problem = _open_study_and_problem(config, problem)
        weights = _WeightsOfThisWorker(config.weights_folder)
        watcher = ShutdownWatcher(
            study, budget, config.last_message_id, config.n_workers, config.parent
        )
        with watcher:
            if not budget.is_over():
                config.make_tuner(
                    study, problem, budget, weights, [*config.callbacks, watcher]
                ).run()
    if budget.interrupted:
        return INTERRUPT
    return RELEASE if budget.released else None


def _open_study_and_problem(
    config: WorkerConfig, problem: Template | None
) -> tuple[Study, Template]:
    """Open the study, which must exist, and build its problem on a free device."""
    storage = open_storage(config.storage)
    study = optuna.load_study(study_name=config.study_name, storage=storage)
    problem = problem or config.problem_spec.problem_on_free_device(study)
    sampler = config.sampler or config.method_config.sampler
    pruner = config.pruner or CohortHalvingPruner(min_resource=problem.min_resource)
    return open_study(problem, storage, config.study_name, sampler, pruner), problem


@contextmanager
def _only_warnings() -> Iterator[None]:
    """Limit Optuna's log to warnings: the caller has logged everything else already."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def _exit_with_parent(parent: int | None) -> Iterator[None]:
    """Exit this process once its parent is gone and the block has ended.

    Without this an idle process would wait for new calls forever.
    """
    if parent is None:
        yield
        return
    working = threading.Lock()

    def exit_when_orphaned() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_INTERVAL)
        with working:
            os._exit(0)

    with working:
        threading.Thread(
            target=exit_when_orphaned, name="optuna_nnhp-parent-check", daemon=True
        ).start()
        yield


@contextmanager
def _worker_settings(config: WorkerConfig) -> Iterator[None]:
    """Set the number of threads and the log level of the configuration."""
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.verbosity is not None:
        optuna.logging.set_verbosity(config.verbosity)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def _unblocked_signals(config: WorkerConfig, budget: Budget) -> Iterator[None]:
    """Handle SIGINT and SIGTERM, also those that arrived while the process started."""
    with graceful_shutdown(budget):
        if config.parent is not None and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SHUTDOWN_SIGNALS)
        yield


def _picklable_error(error: Exception) -> Exception:
    """Return an error that can be sent to another process, with its traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    for candidate in (error, RuntimeError(f"{type(error).__name__}: {error}")):
        try:
            cloudpickle.loads(cloudpickle.dumps(candidate))
        except Exception as reason:  # the class of a user's error can raise anything
            _logger.debug(f"{type(candidate).__name__} cannot be pickled: {reason}")
            continue
        candidate.add_note(f"It was raised in a worker:\n{trace}")
        return candidate
    raise AssertionError("a RuntimeError with a text can be pickled")


class _WeightsOfThisWorker(BestWeights):
    """Best weights that delete only files of this process.

    Other files in the folder may be the best weights of another worker.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self._files.clear()
