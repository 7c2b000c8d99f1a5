"""What one worker of a study does, in whatever process it finds itself."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import os
from pathlib import Path
import signal
import threading
import time
import traceback
from typing import Any

import cloudpickle
import optuna
from optuna import Study
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
import torch

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.study.method_config import MethodConfig
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.study.open_study import open_study
from optuna_nnhp.study.trial_finisher import Callback
from optuna_nnhp.study.tuner import Tuner
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.training.gpu_locks import claim_device
from optuna_nnhp.training.gpu_locks import gpu_uuids
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import PARENT_CHECK_INTERVAL
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import ShutdownWatcher

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, eq=False)
class WorkerConfig:
    """All that a worker must know; it can be sent to any process.

    Args:
        problem_spec:
            How the problem is made.
        storage:
            Where the study is.
        study_name:
            Its name; empty for the problem's, as long as the study is not opened.
        method_config:
            How to tune.
        pruner:
            What ends trials; halving of whole cohorts if None.
        n_trials:
            Trials of the whole study; None for no bound.
        timeout:
            Seconds from this worker's start; None for no bound.
        sampler:
            What proposes here; that of the wish if None.
        options:
            Of the study's loop, such as ``cohort_size``.
        callbacks:
            Called after every trial that this worker ends.
        folder:
            Where the best trials' weights are kept; None for memory.
        worker:
            Its place among the workers.
        workers:
            How many there are, at most.
        threads:
            Of this worker; as many as its process has if None.
        deadline:
            Time of day, in seconds, when the study ends; instead of ``timeout`` on one machine.
        parent:
            Number of the process without which it ends, if it is one of this machine.
        caller_process:
            Machine and process that must not do the work; see `storages.lease`.
        last_message_id:
            What workers had been told before.
        verbosity:
            Of Optuna's log; as its process has it if None.
    """

    problem_spec: ProblemSpec
    storage: str | Path | BaseStorage | None = field(repr=False)
    study_name: str
    method_config: MethodConfig
    pruner: BasePruner | None = None
    n_trials: int | None = None
    timeout: float | None = None
    sampler: BaseSampler | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()
    folder: Path | None = None
    worker: int = 0
    workers: int = 1
    threads: int | None = None
    deadline: float | None = None
    parent: int | None = None
    caller_process: tuple[str, str] | None = None
    last_message_id: str | None = None
    verbosity: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions of scripts and notebooks too, whatever pickle the executor uses.
        return _unpickle_config, (cloudpickle.dumps(vars(self)),)


@dataclass(frozen=True)
class WorkerResult:
    """How a worker's work ended.

    Args:
        worker:
            Its place among the workers.
        error:
            What kept it from going on.
        ended:
            `INTERRUPT` or `RELEASE` if somebody told this process, or all workers.
    """

    worker: int
    error: Exception | None = None
    ended: str | None = None


def _unpickle_config(data: bytes) -> WorkerConfig:
    return WorkerConfig(**cloudpickle.loads(data))


def run_worker(config: WorkerConfig, problem: Template | None = None) -> WorkerResult:
    """Train trials of a study until there are no more, time is over, or somebody says so.

    Whatever goes wrong is in the outcome: what this function raises comes from elsewhere, and
    means that its process is no more.

    Args:
        config:
            What to do.
        problem:
            What is tuned, if it is here already.
    """
    try:
        with _exit_with_parent(config.parent), _worker_settings(config):
            return WorkerResult(config.worker, ended=_train_until_stopped(config, problem))
    except KeyboardInterrupt:
        return WorkerResult(config.worker, ended=INTERRUPT)
    except Exception as error:
        return WorkerResult(config.worker, _picklable_error(error))


def run_tuner(
    config: WorkerConfig,
    study: Study,
    problem: Template,
    budget: Budget,
    weights: BestWeights,
    callbacks: Sequence[Callback] = (),
    *,
    show_progress_bar: bool = False,
) -> None:
    """Run a study's loop here.

    Args:
        config:
            Its method and options.
        study:
            The opened study.
        problem:
            What is tuned.
        budget:
            How long.
        weights:
            Where the best trials' weights go.
        callbacks:
            Called after every trial.
        show_progress_bar:
            Whether to draw one.
    """
    Tuner(
        study,
        problem,
        budget,
        weights,
        make_policy=config.method_config.make_policy,
        uses_portfolio=config.method_config.uses_portfolio,
        callbacks=callbacks,
        show_progress_bar=show_progress_bar,
        **config.options,
    ).run()


def build_problem(problem_spec: ProblemSpec) -> Template:
    """A problem before it is known where it will be trained, which its study decides.

    Args:
        problem_spec:
            How it is made.
    """
    is_open = problem_spec.device is None and gpu_uuids()
    return (replace(problem_spec, device="cpu") if is_open else problem_spec).problem()


def build_problem_on_free_device(
    problem_spec: ProblemSpec, study: Study, problem: Template | None = None
) -> Template:
    """A problem on the device where this process trains it: no worker of a study has its GPU.

    Args:
        problem_spec:
            How it is made.
        study:
            The opened study.
        problem:
            The same, on another device perhaps.
    """
    if problem_spec.device is None and gpu_uuids():
        problem_spec = replace(problem_spec, device=claim_device(study.user_attrs[MODELS]))
        if problem_spec.device != getattr(problem, "device", None):
            problem = None
    return problem or problem_spec.problem()


@contextmanager
def warnings_only_log() -> Iterator[None]:
    """Within, Optuna's log has warnings only: what else there is to say has been said."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _train_until_stopped(config: WorkerConfig, problem: Template | None) -> str | None:
    """Join the study and train; what ended it before its time."""
    if config.caller_process == (machine_id(), process_id()):
        raise ValueError(
            "`executor` must run its calls in other processes, but this one is the caller's: "
            "threads of one process would only wait for each other."
        )
    timeout = config.timeout if config.deadline is None else config.deadline - time.time()
    budget = Budget(config.n_trials, timeout, workers=config.workers)
    with _deferred_signals(config, budget):
        with warnings_only_log():
            study, problem = _open_study_and_problem(config, problem)
        weights = _WorkerWeights(config.folder)
        with ShutdownWatcher(
            study, budget, config.last_message_id, config.workers, config.parent
        ) as watch:
            if not budget.is_over():
                run_tuner(config, study, problem, budget, weights, [*config.callbacks, watch])
    if budget.interrupted:
        return INTERRUPT
    return RELEASE if budget.released else None


def _open_study_and_problem(
    config: WorkerConfig, problem: Template | None
) -> tuple[Study, Template]:
    """The study, which exists, and its problem, with a GPU of this process's own."""
    storage = open_storage(config.storage)
    study = optuna.load_study(study_name=config.study_name, storage=storage)
    problem = problem or build_problem_on_free_device(config.problem_spec, study)
    sampler = config.sampler or config.method_config.sampler
    pruner = config.pruner or CohortHalvingPruner(min_resource=problem.min_resource)
    return open_study(problem, storage, config.study_name, sampler, pruner), problem


@contextmanager
def _exit_with_parent(parent: int | None) -> Iterator[None]:
    """Afterwards this process ends if its parent is gone: it would wait for work for ever."""
    if parent is None:
        yield
        return
    at_work = threading.Lock()

    def end() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_INTERVAL)
        with at_work:
            os._exit(0)

    with at_work:
        threading.Thread(target=end, name="optuna_nnhp-orphan", daemon=True).start()
        yield


@contextmanager
def _worker_settings(config: WorkerConfig) -> Iterator[None]:
    """Within, this process has the job's threads and verbosity."""
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
def _deferred_signals(config: WorkerConfig, budget: Budget) -> Iterator[None]:
    """Within, signals end the work tidily; those that came while it was being prepared too."""
    with graceful_shutdown(budget):
        if config.parent is not None and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield


def _picklable_error(error: Exception) -> Exception:
    """An error that another process can show, with where it was raised."""
    trace = "".join(traceback.format_exception(error))
    for candidate in (error, RuntimeError(f"{type(error).__name__}: {error}")):
        try:
            cloudpickle.loads(cloudpickle.dumps(candidate))
        except Exception as reason:  # whatever a user's type raises
            _logger.debug(f"{type(candidate).__name__} cannot be sent: {reason}")
            continue
        candidate.add_note(f"It was raised in a worker:\n{trace}")
        return candidate
    raise AssertionError("a RuntimeError of one text can be sent")


class _WorkerWeights(BestWeights):
    """Forgets what this process kept only: what lies there may be another worker's best."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self._files.clear()
