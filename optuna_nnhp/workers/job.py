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
from optuna_nnhp.storages.lease import machine
from optuna_nnhp.storages.lease import process
from optuna_nnhp.storages.opening import open_storage
from optuna_nnhp.study.loop import Budget
from optuna_nnhp.study.loop import tidy_interrupts
from optuna_nnhp.study.opening import MODELS
from optuna_nnhp.study.opening import open_study
from optuna_nnhp.study.scheduler import Callback
from optuna_nnhp.study.wish import Wish
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.recipe import Recipe
from optuna_nnhp.training.checkpoint import BestWeights
from optuna_nnhp.training.gpus import free_device
from optuna_nnhp.training.gpus import gpus
from optuna_nnhp.workers.watch import INTERRUPT
from optuna_nnhp.workers.watch import RELEASE
from optuna_nnhp.workers.watch import TICK
from optuna_nnhp.workers.watch import Watch

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, eq=False)
class Job:
    """All that a worker must know; it can be sent to any process.

    Args:
        recipe:
            How the problem is made.
        storage:
            Where the study is.
        study_name:
            Its name; empty for the problem's, as long as the study is not opened.
        wish:
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
        caller:
            Machine and process that must not do the work; see `storages.lease`.
        told:
            What workers had been told before.
        verbosity:
            Of Optuna's log; as its process has it if None.
    """

    recipe: Recipe
    storage: str | Path | BaseStorage | None = field(repr=False)
    study_name: str
    wish: Wish
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
    caller: tuple[str, str] | None = None
    told: str | None = None
    verbosity: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions of scripts and notebooks too, whatever pickle the executor uses.
        return _made, (cloudpickle.dumps(vars(self)),)


@dataclass(frozen=True)
class Outcome:
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


def _made(data: bytes) -> Job:
    return Job(**cloudpickle.loads(data))


def work(job: Job, problem: Template | None = None) -> Outcome:
    """Train trials of a study until there are no more, time is over, or somebody says so.

    Whatever goes wrong is in the outcome: what this function raises comes from elsewhere, and
    means that its process is no more.

    Args:
        job:
            What to do.
        problem:
            What is tuned, if it is here already.
    """
    try:
        with _not_orphaned(job.parent), _as_worker(job):
            return Outcome(job.worker, ended=_work(job, problem))
    except KeyboardInterrupt:
        return Outcome(job.worker, ended=INTERRUPT)
    except Exception as error:
        return Outcome(job.worker, _portable(error))


def run(
    job: Job,
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
        job:
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
    job.wish.scheduler(
        study=study,
        problem=problem,
        budget=budget,
        weights=weights,
        callbacks=callbacks,
        show_progress_bar=show_progress_bar,
        **job.options,
    ).run()


def planned(recipe: Recipe) -> Template:
    """A problem before it is known where it will be trained, which its study decides.

    Args:
        recipe:
            How it is made.
    """
    is_open = recipe.device is None and gpus()
    return (replace(recipe, device="cpu") if is_open else recipe).problem()


def settled(recipe: Recipe, study: Study, problem: Template | None = None) -> Template:
    """A problem on the device where this process trains it: no worker of a study has its GPU.

    Args:
        recipe:
            How it is made.
        study:
            The opened study.
        problem:
            The same, on another device perhaps.
    """
    if recipe.device is None and gpus():
        recipe = replace(recipe, device=free_device(study.user_attrs[MODELS]))
        if recipe.device != getattr(problem, "device", None):
            problem = None
    return problem or recipe.problem()


@contextmanager
def quietly() -> Iterator[None]:
    """Within, Optuna's log has warnings only: what else there is to say has been said."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _work(job: Job, problem: Template | None) -> str | None:
    """Join the study and train; what ended it before its time."""
    if job.caller == (machine(), process()):
        raise ValueError(
            "`executor` must run its calls in other processes, but this one is the caller's: "
            "threads of one process would only wait for each other."
        )
    timeout = job.timeout if job.deadline is None else job.deadline - time.time()
    budget = Budget(job.n_trials, timeout, workers=job.workers)
    with _signals(job, budget):
        with quietly():
            study, problem = _join(job, problem)
        weights = _OwnWeights(job.folder)
        with Watch(study, budget, job.told, job.workers, job.parent) as watch:
            if not budget.is_over():
                run(job, study, problem, budget, weights, [*job.callbacks, watch])
    if budget.interrupted:
        return INTERRUPT
    return RELEASE if budget.released else None


def _join(job: Job, problem: Template | None) -> tuple[Study, Template]:
    """The study, which exists, and its problem, with a GPU of this process's own."""
    storage = open_storage(job.storage)
    study = optuna.load_study(study_name=job.study_name, storage=storage)
    problem = problem or settled(job.recipe, study)
    sampler = job.sampler or job.wish.sampler
    pruner = job.pruner or CohortHalvingPruner(first_rung=problem.first_rung)
    return open_study(problem, storage, job.study_name, sampler, pruner), problem


@contextmanager
def _not_orphaned(parent: int | None) -> Iterator[None]:
    """Afterwards this process ends if its parent is gone: it would wait for work for ever."""
    if parent is None:
        yield
        return
    at_work = threading.Lock()

    def end() -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        with at_work:
            os._exit(0)

    with at_work:
        threading.Thread(target=end, name="optuna_nnhp-orphan", daemon=True).start()
        yield


@contextmanager
def _as_worker(job: Job) -> Iterator[None]:
    """Within, this process has the job's threads and verbosity."""
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.verbosity is not None:
        optuna.logging.set_verbosity(job.verbosity)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def _signals(job: Job, budget: Budget) -> Iterator[None]:
    """Within, signals end the work tidily; those that came while it was being prepared too."""
    with tidy_interrupts(budget):
        if job.parent is not None and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield


def _portable(error: Exception) -> Exception:
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


class _OwnWeights(BestWeights):
    """Forgets what this process kept only: what lies there may be another worker's best."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self._files.clear()
