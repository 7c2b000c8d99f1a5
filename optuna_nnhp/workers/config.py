"""What a worker gets and what it returns.

Both can be sent to any process. A study stores the part of it that can be stored, for workers that
join it from the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import cloudpickle
from optuna import Study
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.method_config import MethodConfig
from optuna_nnhp.study.method_config import parse_method
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.trial_finisher import Callback
from optuna_nnhp.study.tuner import Tuner
from optuna_nnhp.templates.base import NOT_SAVED
from optuna_nnhp.templates.problem_spec import PROBLEM_SPEC
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.weight_files import BestWeights

SEARCH_KEY = "search"  # study attribute: how the last call of `optimize` tuned the study
HALVING, NO_PRUNER = "halving", "none"


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

    def store_in(self, study: Study) -> None:
        """Store in an opened study how its problem is built and how it is tuned."""
        if PROBLEM_SPEC not in study.user_attrs:
            study.set_user_attr(PROBLEM_SPEC, self.problem_spec.attributes())
        method = self.method_config
        sampler_name = {NOT_SAVED: type(method.sampler).__name__}
        search = {
            "method": sampler_name if method.is_user_sampler else method.method,
            "options": {**method.options, **method.policy_options},
            "pruner": _pruner_metadata(self.pruner),
            "n_trials": self.n_trials,
            "tuner_options": dict(self.tuner_options),
        }
        if study.user_attrs.get(SEARCH_KEY) != search:
            study.set_user_attr(SEARCH_KEY, search)

    def make_tuner(
        self,
        study: Study,
        problem: Problem,
        budget: Budget,
        weights: BestWeights,
        callbacks: Sequence[Callback],
        *,
        show_progress_bar: bool = False,
    ) -> Tuner:
        """Make the tuner that trains the study's trials in this process.

        Args:
            study:
                The opened study.
            problem:
                Problem to tune.
            budget:
                Limits on trials and time.
            weights:
                Receives the weights of the best trials.
            callbacks:
                Functions called after each trial, instead of those of this configuration.
            show_progress_bar:
                Whether to show a progress bar.
        """
        return Tuner(
            study,
            problem,
            budget,
            weights,
            callbacks,
            make_policy=self.method_config.make_policy,
            uses_portfolio=self.method_config.uses_portfolio,
            show_progress_bar=show_progress_bar,
            **self.tuner_options,
        )

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


# --- What a study stores ---


def _pruner_metadata(pruner: BasePruner | None) -> str | dict[str, str]:
    """Return what is stored of a pruner: of a user's own only its name."""
    if isinstance(pruner, NopPruner):
        return NO_PRUNER
    return HALVING if pruner is None else {NOT_SAVED: type(pruner).__name__}


def stored_method_config(study: Study, method: str | None, seed: int) -> MethodConfig:
    """Return the search method of a study.

    Args:
        study:
            A study that `optimize` created.
        method:
            Another method to use instead; None for the study's.
        seed:
            Seed of the sampler.

    Raises:
        ValueError: If the study was tuned with a user's sampler, or only one of the two methods
            is a grid.
    """
    search = _stored_search_config(study)
    stored = search["method"]
    if method == "grid" != stored:
        raise ValueError(
            "`method` must be 'grid' from the beginning of a study, when the points of the grid "
            "are enqueued, but this study began with another method."
        )
    if method is None and isinstance(stored, dict):
        raise ValueError(
            f"`method` must be given, but is missing: the study's sampler, {stored[NOT_SAVED]}, "
            "is not stored in it."
        )
    is_stored = method is None or method == stored
    return parse_method(
        stored if method is None else method,
        None,
        search["options"] if is_stored else None,
        None,
        seed,
    )


def stored_pruner(study: Study) -> BasePruner | None:
    """Return the pruner of a study; None for successive halving of whole cohorts.

    Args:
        study:
            A study that `optimize` created.

    Raises:
        ValueError: If the pruner is a user's own.
    """
    pruner = _stored_search_config(study)["pruner"]
    if isinstance(pruner, dict):
        raise ValueError(
            f"The study's pruner must be the default one or none, but it is {pruner[NOT_SAVED]}, "
            "which is not stored in it: give `optimize` an `executor` instead."
        )
    return NopPruner() if pruner == NO_PRUNER else None


def stored_n_trials(study: Study) -> int | None:
    """Return the number of trials that a study should have; None if there is no limit."""
    count = _stored_search_config(study)["n_trials"]
    return None if count is None else int(count)


def stored_tuner_options(study: Study) -> dict[str, Any]:
    """Return the tuner options of a study, such as ``trial_timeout``."""
    return dict(_stored_search_config(study)["tuner_options"])


def _stored_search_config(study: Study) -> dict[str, Any]:
    """Return what `WorkerConfig.store_in` stored, or raise if there is nothing."""
    search = study.user_attrs.get(SEARCH_KEY)
    if search is None:
        raise ValueError(
            f"The study must be one that `optimize` started, but {study.study_name!r} is not: it "
            "stores no search configuration."
        )
    return dict(search)
