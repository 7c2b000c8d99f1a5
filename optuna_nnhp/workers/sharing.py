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

from optuna_nnhp.messages import without_password
from optuna_nnhp.storages.deferred import DeferredStorage
from optuna_nnhp.storages.lease import machine
from optuna_nnhp.storages.lease import process
from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.loop import Budget
from optuna_nnhp.templates import Template
from optuna_nnhp.training.checkpoint import BestWeights
from optuna_nnhp.workers.crew import Crew
from optuna_nnhp.workers.crew import Executor
from optuna_nnhp.workers.job import Job
from optuna_nnhp.workers.watch import last_told


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
    given = without_password(storage if isinstance(storage, str) else repr(storage), storage)
    raise ValueError(
        f"`storage` must be one that several processes can open, a path or a URL, but got {given}."
    )


def _is_in_memory(storage: str | Path | BaseStorage | None) -> bool:
    """Whether only this process can see a storage."""
    if isinstance(storage, DeferredStorage):
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
    if isinstance(executor, ProcessPoolExecutor) and context and _forks(context):
        raise ValueError(
            "`executor` must start new processes, but this ProcessPoolExecutor forks the caller, "
            "whose threads a copy has not: give it "
            "`mp_context=multiprocessing.get_context('spawn')`."
        )


def _forks(context: Any) -> bool:
    return bool(context.get_start_method() == "fork")


def absolute(storage: str | Path | BaseStorage) -> str | Path | BaseStorage:
    """A storage by a name that means the same in every folder of a machine.

    Example:
        >>> absolute("postgresql://host/db")
        'postgresql://host/db'
        >>> absolute("sqlite:///study.db") == f"sqlite:///{os.path.abspath('study.db')}"
        True
    """
    if isinstance(storage, DeferredStorage):  # each process has its own around the same one
        return storage.backend
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage)
    if match := re.match(r"(sqlite(?:\+\w+)?:///)([^?]+)(.*)", text, re.DOTALL):
        return f"{match[1]}{os.path.abspath(match[2])}{match[3]}"
    return text if "://" in text else os.path.abspath(text)


def run_workers(
    job: Job,
    study: Study,
    problem: Template,
    budget: Budget,
    executor: Executor | None,
    *,
    show_progress_bar: bool = False,
) -> None:
    """Run a study by several workers, until all have ended.

    Args:
        job:
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
    job = _complete(job, study, budget, executor)
    _check_sendable(job)
    crew = Crew(job, study, problem, budget, executor)
    _begin(job, study, problem, budget)
    crew.run(show_progress_bar=show_progress_bar)


def _begin(job: Job, study: Study, problem: Template, budget: Budget) -> None:
    """Enqueue what comes first in a study: once, before there are workers."""
    storage = study._storage
    assert isinstance(storage, DeferredStorage)
    timeout = None if budget.timeout is None else budget.timeout * job.workers
    shared, sampler = Budget(budget.n_trials, timeout), study.sampler
    try:
        asker = Asker(study, problem, shared, storage)
        asker.begin(with_portfolio=job.wish.has_portfolio)
    finally:
        study.sampler = sampler
        storage.flush()


def _complete(job: Job, study: Study, budget: Budget, executor: Executor | None) -> Job:
    """A job with what only the workers' caller knows."""
    is_here = executor is None
    is_near = is_here or isinstance(executor, ProcessPoolExecutor)
    timed = budget.timeout is not None and is_here
    return replace(
        job,
        storage=None if job.storage is None else absolute(job.storage),
        folder=None if job.folder is None else job.folder.resolve(),
        timeout=budget.timeout,
        threads=max(1, torch.get_num_threads() // job.workers) if is_near else None,
        deadline=time.time() + budget.seconds_left if timed else None,
        parent=os.getpid() if is_here else None,
        caller=(machine(), process()),
        told=last_told(study),
        verbosity=optuna.logging.get_verbosity(),
    )


def keep_best(study: Study, weights: BestWeights, count: int, maximize: bool) -> None:
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
    weights.drop_others([*(t.number for t in complete[:count]), *running])


def _check_sendable(job: Job) -> None:
    """Raise if another process cannot have something, and say what."""
    try:
        cloudpickle.dumps(job)
        return
    except Exception as error:  # whatever a type raises
        cause = error
    for owner in (job, job.recipe):
        for name in (f.name for f in fields(owner)):
            try:
                cloudpickle.dumps(getattr(owner, name))
            except Exception as error:
                if name == "recipe":
                    continue
                raise ValueError(
                    f"`{name}` must be something that can be sent to another process, but: {error}"
                ) from error
    raise ValueError("All must be something that can be sent to another process.") from cause
