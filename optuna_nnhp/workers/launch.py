"""Sharing a study among several workers: whether it can be, how it begins, and what is left."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from dataclasses import replace
from numbers import Integral
import os
from pathlib import Path
import re
import time
from typing import Any

import cloudpickle
import optuna
from optuna import Study
from optuna.storages import BaseStorage
from optuna.storages import RDBStorage
from optuna.trial import TrialState
import torch

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.templates import Template
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.workers.control import last_control_message_id
from optuna_nnhp.workers.worker import WorkerConfig
from optuna_nnhp.workers.worker_pool import Executor
from optuna_nnhp.workers.worker_pool import WorkerPool


def check_workers(
    workers: Any, executor: object, storage: str | Path | BaseStorage | None
) -> None:
    """Raise unless workers can be had, and share the study.

    Args:
        workers:
            How many.
        executor:
            Where they run; None for this machine.
        storage:
            As the user named it.

    Raises:
        ValueError: If the number, the executor or the storage makes no sense.

    Example:
        >>> check_workers(2, None, None)
        Traceback (most recent call last):
        ValueError: `storage` must be one that several processes can open, a path or a URL, but \
got None.
    """
    if isinstance(workers, bool) or not isinstance(workers, Integral) or workers < 1:
        raise ValueError(f"`workers` must be at least 1, but got {workers!r}.")
    if executor is not None:
        _check_executor(executor)
    if (workers == 1 and executor is None) or not _is_in_memory(storage):
        return
    given = hide_passwords(storage if isinstance(storage, str) else repr(storage), storage)
    raise ValueError(
        f"`storage` must be one that several processes can open, a path or a URL, but got {given}."
    )


def _is_in_memory(storage: str | Path | BaseStorage | None) -> bool:
    """Whether only this process can see a storage."""
    if isinstance(storage, BufferedStorage):
        storage = storage.backend
    storage = getattr(storage, "_backend", storage)  # Optuna caches databases
    if isinstance(storage, RDBStorage):
        storage = storage.url
    if isinstance(storage, str):
        return re.fullmatch(r"sqlite(\+\w+)?://(/(:memory:)?)?(\?.*)?", storage) is not None
    return storage is None or isinstance(storage, optuna.storages.InMemoryStorage)


def _check_executor(executor: object) -> None:
    if not callable(getattr(executor, "submit", None)):
        raise ValueError(
            "`executor` must have a method `submit`, as those of concurrent.futures do, but got "
            f"{executor!r}."
        )
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError(
            "`executor` must run its calls in other processes, but got a ThreadPoolExecutor: "
            "threads of one process would only wait for each other."
        )
    context = getattr(executor, "_mp_context", None)
    if isinstance(executor, ProcessPoolExecutor) and context and _uses_fork(context):
        raise ValueError(
            "`executor` must start new processes, but this ProcessPoolExecutor forks the caller, "
            "whose threads a copy has not: give it "
            "`mp_context=multiprocessing.get_context('spawn')`."
        )


def _uses_fork(context: Any) -> bool:
    return bool(context.get_start_method() == "fork")


def absolute_storage(storage: str | Path | BaseStorage) -> str | Path | BaseStorage:
    """A storage by a name that means the same in every folder of a machine.

    Example:
        >>> absolute_storage("postgresql://host/db")
        'postgresql://host/db'
        >>> absolute_storage("sqlite:///study.db") == f"sqlite:///{os.path.abspath('study.db')}"
        True
    """
    if isinstance(storage, BufferedStorage):  # each process has its own around the same one
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
    """Run a study by several workers, until all have ended.

    Args:
        config:
            What each of them does.
        study:
            The opened study, with the sampler of a single worker.
        problem:
            What is tuned.
        budget:
            How long; signals to this process are noted in it.
        executor:
            Where they run; None for this machine.
        show_progress_bar:
            Whether to show how far all of them have come.

    Raises:
        ValueError: If something cannot be sent to another process.
        Exception: What a worker of this machine ended with, or all workers elsewhere.
        RuntimeError: If all workers died, again and again.
    """
    config = _complete_config(config, study, budget, executor)
    _check_picklable(config)
    crew = WorkerPool(config, study, problem, budget, executor)
    _enqueue_initial_trials(config, study, problem, budget)
    crew.run(show_progress_bar=show_progress_bar)


def _enqueue_initial_trials(
    config: WorkerConfig, study: Study, problem: Template, budget: Budget
) -> None:
    """Enqueue what comes first in a study: once, before there are workers."""
    storage = study._storage
    assert isinstance(storage, BufferedStorage)
    timeout = None if budget.timeout is None else budget.timeout * config.workers
    source = TrialSource(study, problem, Budget(budget.n_trials, timeout), storage)
    try:
        source.begin(with_portfolio=config.method_config.uses_portfolio)
    finally:
        storage.flush()


def _complete_config(
    config: WorkerConfig, study: Study, budget: Budget, executor: Executor | None
) -> WorkerConfig:
    """A job with what only the workers' caller knows."""
    is_here = executor is None
    is_near = is_here or isinstance(executor, ProcessPoolExecutor)
    timed = budget.timeout is not None and is_here
    return replace(
        config,
        storage=None if config.storage is None else absolute_storage(config.storage),
        folder=None if config.folder is None else config.folder.resolve(),
        timeout=budget.timeout,
        threads=max(1, torch.get_num_threads() // config.workers) if is_near else None,
        deadline=time.time() + budget.seconds_left if timed else None,
        parent=os.getpid() if is_here else None,
        caller_process=(machine_id(), process_id()),
        last_message_id=last_control_message_id(study),
        verbosity=optuna.logging.get_verbosity(),
    )


def delete_other_weights(study: Study, weights: BestWeights, count: int, maximize: bool) -> None:
    """Forget all weights but those of the best trials, and of trials that have not ended.

    Args:
        study:
            The study.
        weights:
            What all workers kept.
        count:
            How many are the best.
        maximize:
            Whether a greater value is better.
    """
    trials = study.get_trials(deepcopy=False)
    sign = -1.0 if maximize else 1.0
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    complete.sort(key=lambda t: (sign * (t.value or 0.0), t.number))
    running = [t.number for t in trials if not t.state.is_finished()]
    weights.delete_others([*(t.number for t in complete[:count]), *running])


def _check_picklable(config: WorkerConfig) -> None:
    """Raise if another process cannot have something, and say what."""
    try:
        cloudpickle.dumps(config)
        return
    except Exception as error:  # whatever a type raises
        cause = error
    for owner in (config, config.problem_spec):
        for name in (f.name for f in fields(owner)):
            try:
                cloudpickle.dumps(getattr(owner, name))
            except Exception as error:
                if name == "problem_spec":
                    continue
                raise ValueError(
                    f"`{name}` must be something that can be sent to another process, but: {error}"
                ) from error
    raise ValueError("All must be something that can be sent to another process.") from cause
