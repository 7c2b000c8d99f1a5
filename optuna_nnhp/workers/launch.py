"""Share a study among several workers: check the arguments, start the workers, clean up."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from dataclasses import replace
import functools
import os
from pathlib import Path
import re
import time
from typing import Any

import cloudpickle
import optuna
from optuna import Study
from optuna.samplers import BaseSampler
from optuna.samplers import GridSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
import torch

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.open_storage import is_in_memory
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import ProgressBar
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.templates import Template
from optuna_nnhp.training.weight_files import BestWeights
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.control import last_control_message_id
from optuna_nnhp.workers.control import send_control_message
from optuna_nnhp.workers.worker_pool import Executor
from optuna_nnhp.workers.worker_pool import LocalExecutor
from optuna_nnhp.workers.worker_pool import WorkerPool

PROGRESS_INTERVAL = 1.0  # seconds between two reads of the storage for the progress bar


def check_workers(executor: object, storage: str | Path | BaseStorage | None) -> None:
    """Raise unless several workers can run and can share the study.

    Args:
        executor:
            Where they run; None for this machine.
        storage:
            Storage as the user gave it.

    Raises:
        ValueError: If the executor or the storage is not valid.

    Example:
        >>> check_workers(None, None)
        Traceback (most recent call last):
        ValueError: `storage` must be one that several processes can open, a path or a URL, but \
got None.
    """
    if executor is not None:
        _check_executor(executor)
    if not is_in_memory(storage):
        return
    shown = hide_passwords(storage if isinstance(storage, str) else repr(storage), storage)
    raise ValueError(
        f"`storage` must be one that several processes can open, a path or a URL, but got {shown}."
    )


def _check_executor(executor: object) -> None:
    """Raise unless an executor starts new processes."""
    if not callable(getattr(executor, "submit", None)):
        raise ValueError(
            "`executor` must have a method `submit`, as those of concurrent.futures do, but got "
            f"{executor!r}."
        )
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError(
            "`executor` must run its calls in other processes, but got a ThreadPoolExecutor, "
            "whose threads would only wait for each other."
        )
    context: Any = getattr(executor, "_mp_context", None)
    uses_fork = context is not None and context.get_start_method() == "fork"
    if isinstance(executor, ProcessPoolExecutor) and uses_fork:
        raise ValueError(
            "`executor` must start new processes, but this ProcessPoolExecutor forks the caller, "
            "whose threads are missing in the copy: give it "
            "`mp_context=multiprocessing.get_context('spawn')`."
        )


def absolute_storage(storage: str | Path | BaseStorage) -> str | Path | BaseStorage:
    """Return a storage with an absolute path, so that it is the same from every folder.

    Example:
        >>> absolute_storage("postgresql://host/db")
        'postgresql://host/db'
        >>> absolute_storage("sqlite:///study.db") == f"sqlite:///{os.path.abspath('study.db')}"
        True
    """
    if isinstance(storage, BufferedStorage):  # each process wraps the backend in a buffer itself
        return storage.backend
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage)
    if match := re.match(r"(sqlite(?:\+\w+)?:///)([^?]+)(.*)", text, re.DOTALL):
        return f"{match[1]}{os.path.abspath(match[2])}{match[3]}"
    return text if "://" in text else os.path.abspath(text)


def run_workers(
    config: WorkerConfig,
    study: Study,
    problem: Template,
    budget: Budget,
    executor: Executor | None,
    *,
    show_progress_bar: bool = False,
) -> None:
    """Run a study by several workers until all of them have ended.

    Args:
        config:
            Configuration of the workers, without what differs between them.
        study:
            The opened study, with the sampler of a single worker.
        problem:
            Problem to tune.
        budget:
            Limits on trials and time; signals to this process set its flags.
        executor:
            Where the workers run; None for this machine.
        show_progress_bar:
            Whether to show the progress of all workers together.

    Raises:
        ValueError: If something cannot be sent to another process.
        Exception: The error of a worker of this machine, or of a remote one if none finished.
        RuntimeError: If all workers died and none could be replaced.
    """
    config = _add_runtime_settings(config, study, budget, executor)
    _check_picklable(config)

    def make_config(worker: int, is_replacement: bool) -> WorkerConfig:
        sampler = study.sampler  # the first worker proposes what a single one would
        if worker or is_replacement:
            method = config.method_config
            sampler = method.sampler_for(study, few=problem.sequential, worker=worker)
        return replace(config, worker=worker, sampler=without_grid_points(sampler))

    pool = WorkerPool(
        make_config,
        config.n_workers,
        budget,
        LocalExecutor(config.threads or 1) if executor is None else executor,
        functools.partial(send_control_message, study),
    )
    _enqueue_initial_trials(config, study, problem, budget)
    if not show_progress_bar:
        pool.run()
        return
    with _progress_bar(study, problem, budget) as show_progress:
        pool.run(show_progress)


def without_grid_points(sampler: BaseSampler) -> BaseSampler:
    """Return the sampler of a worker: of a grid only the trials that are enqueued already."""
    if isinstance(sampler, GridSampler | GridPointsSampler):
        return GridPointsSampler([], "enqueued trials", is_part=True)
    return sampler


def _add_runtime_settings(
    config: WorkerConfig, study: Study, budget: Budget, executor: Executor | None
) -> WorkerConfig:
    """Add what only the process that starts the workers knows."""
    is_local = executor is None
    shares_cores = is_local or isinstance(executor, ProcessPoolExecutor)
    has_deadline = budget.timeout is not None and is_local
    folder = config.weights_folder
    return replace(
        config,
        storage=None if config.storage is None else absolute_storage(config.storage),
        weights_folder=None if folder is None else folder.resolve(),
        timeout=budget.timeout,
        threads=max(1, torch.get_num_threads() // config.n_workers) if shares_cores else None,
        deadline=time.time() + budget.seconds_left if has_deadline else None,
        parent=os.getpid() if is_local else None,
        caller_process=(machine_id(), process_id()),
        last_message_id=last_control_message_id(study),
        verbosity=optuna.logging.get_verbosity(),
    )


def _check_picklable(config: WorkerConfig) -> None:
    """Raise if a configuration cannot be sent to another process, and name the argument."""
    try:
        cloudpickle.dumps(config)
        return
    except Exception as error:  # pickling calls methods of users' classes
        cause = error
    for owner in (config, config.problem_spec):
        for name in (field.name for field in fields(owner)):
            try:
                cloudpickle.dumps(getattr(owner, name))
            except Exception as error:
                if name == "problem_spec":  # its own fields are checked next
                    continue
                raise ValueError(
                    f"`{name}` must be something that can be sent to another process, but: {error}"
                ) from error
    raise ValueError(
        f"All arguments must be something that can be sent to another process, but: {cause}"
    ) from cause


def _enqueue_initial_trials(
    config: WorkerConfig, study: Study, problem: Template, budget: Budget
) -> None:
    """Enqueue the first trials of a study once, before workers start."""
    storage = storage_of(study)
    assert isinstance(storage, BufferedStorage)
    timeout = None if budget.timeout is None else budget.timeout * config.n_workers
    source = TrialSource(study, problem, Budget(budget.n_trials, timeout), storage)
    try:
        source.enqueue_first_trials(with_portfolio=config.method_config.uses_portfolio)
    finally:
        storage.flush()


@contextmanager
def _progress_bar(
    study: Study, problem: Template, budget: Budget
) -> Iterator[Callable[[bool], None]]:
    """Yield a function that shows the progress of all workers, at most once per second."""
    storage, last_shown = storage_of(study), 0.0
    assert isinstance(storage, BufferedStorage)

    def show_progress(is_running: bool) -> None:
        nonlocal last_shown
        if is_running and time.monotonic() - last_shown < PROGRESS_INTERVAL:
            return
        storage.refresh()
        trials = study.get_trials(deepcopy=False)
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        values = [t.value for t in complete if t.value is not None]
        best = (max if problem.maximize else min)(values, default=None)
        n_running = sum(trial.state == TrialState.RUNNING for trial in trials)
        bar.show(sum(t.state.is_finished() for t in trials), n_running, best)
        last_shown = time.monotonic()

    with ProgressBar(True, budget, 0) as bar:
        yield show_progress


def keep_best_weights(study: Study, weights: BestWeights, n_best: int, maximize: bool) -> None:
    """Delete all weights except those of the best trials and of unfinished ones.

    Args:
        study:
            The study.
        weights:
            The weights of all workers.
        n_best:
            Number of best trials to keep.
        maximize:
            Whether a larger value is better.
    """
    trials = study.get_trials(deepcopy=False)
    sign = -1.0 if maximize else 1.0
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    complete.sort(key=lambda t: (sign * (t.value or 0.0), t.number))
    unfinished = [t.number for t in trials if not t.state.is_finished()]
    weights.delete_others([*(t.number for t in complete[:n_best]), *unfinished])
