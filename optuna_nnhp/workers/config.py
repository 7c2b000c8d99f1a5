"""What a worker gets and what it returns; both can be sent to any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import cloudpickle
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

from optuna_nnhp.study.method_config import MethodConfig
from optuna_nnhp.study.trial_finisher import Callback
from optuna_nnhp.templates.problem_spec import ProblemSpec


@dataclass(frozen=True, eq=False)
class WorkerConfig:
    """Everything that a worker needs. It can be pickled.

    Args:
        problem_spec:
            Specification from which the worker builds the problem.
        storage:
            Storage of the study.
        study_name:
            Name of the study; empty for the problem's default name.
        method_config:
            Search method.
        pruner:
            Optuna pruner; successive halving of whole cohorts if None.
        n_trials:
            Trials of the whole study; None for no limit.
        timeout:
            Seconds from this worker's start; None for no limit.
        sampler:
            Sampler of this worker; that of the method if None.
        tuner_options:
            Options of the tuner, such as ``cohort_size``.
        callbacks:
            Functions called after each trial that this worker finishes.
        weights_folder:
            Folder for the weights of the best trials; None to keep them in memory.
        worker:
            Number of this worker, from 0.
        n_workers:
            Largest number of workers.
        threads:
            CPU threads of this worker; those of its process if None.
        deadline:
            Unix time at which the study ends; replaces ``timeout`` for workers on one machine.
        parent:
            Process id of the parent; the worker ends when that process is gone. None elsewhere.
        caller_process:
            Machine and process of the caller, which must not run the worker itself; see
            `storages.lease`.
        last_message_id:
            Id of the last control message that was sent before this worker started.
        verbosity:
            Level of Optuna's log; that of the process if None.
    """

    problem_spec: ProblemSpec
    storage: str | Path | BaseStorage | None = field(repr=False)
    study_name: str
    method_config: MethodConfig
    pruner: BasePruner | None = None
    n_trials: int | None = None
    timeout: float | None = None
    sampler: BaseSampler | None = None
    tuner_options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()
    weights_folder: Path | None = None
    worker: int = 0
    n_workers: int = 1
    threads: int | None = None
    deadline: float | None = None
    parent: int | None = None
    caller_process: tuple[str, str] | None = None
    last_message_id: str | None = None
    verbosity: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # cloudpickle also sends functions of scripts and notebooks, whatever the executor uses.
        return _unpickle_config, (cloudpickle.dumps(vars(self)),)


def _unpickle_config(data: bytes) -> WorkerConfig:
    """Restore a configuration from the bytes that `WorkerConfig.__reduce__` made."""
    return WorkerConfig(**cloudpickle.loads(data))


@dataclass(frozen=True)
class WorkerResult:
    """How a worker ended.

    Args:
        worker:
            Number of the worker.
        error:
            Error that stopped it, if any.
        stopped_by:
            `INTERRUPT` or `RELEASE` if a signal or a control message stopped it; None if it
            finished.
    """

    worker: int
    error: Exception | None = None
    stopped_by: str | None = None
