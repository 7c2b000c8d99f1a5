"""Policies: which trials start, and which go on; all else is the same for all methods."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol

from optuna import Study
from optuna.trial import FrozenTrial

from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.failures import FailureBisector
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.recovery import Recovery
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import FairQueue
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_finisher import StudyHistory
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.training.cohort import Scores


@dataclass(frozen=True)
class PolicyContext:
    """What a policy works with.

    Args:
        study:
            The opened study.
        problem:
            What is tuned.
        budget:
            How long.
        source:
            Asks for trials.
        finisher:
            Reports and ends trials.
        history:
            The values of all trials of the study.
        queue:
            The cohorts in training.
        recovery:
            Restores trials from checkpoints.
        bisector:
            Divides cohorts that raise an error.
        cohort_size:
            Trials in a cohort; None to choose the number by memory and measurement.
        worker:
            Name of this worker.
        wait_for_storage:
            Waits while the storage is unavailable; returns whether it is available.
        save:
            Writes a checkpoint.
    """

    study: Study
    problem: Problem
    budget: Budget
    source: TrialSource
    finisher: TrialFinisher
    history: StudyHistory
    queue: FairQueue
    recovery: Recovery
    bisector: FailureBisector
    cohort_size: int | None
    worker: str
    wait_for_storage: Callable[[], bool]
    save: Callable[[], object]


class Policy(Protocol):
    """Decide which trials start, and which go on.

    Attributes:
        separable: Whether trials can be trained without those that they started with. If not,
            trials of dead workers are taken over only while no cohort trains.
    """

    separable: bool

    def admit(self) -> None:
        """Start trials, if there is room for them."""

    def ask_ahead(self, is_over: Callable[[], bool]) -> None:
        """Ask for trials while a cohort trains in the engine, until the round is over."""

    def has_more_trials(self) -> bool:
        """Return whether more trials can start although no cohort is in training."""

    def unstarted_trials(self) -> Sequence[RunningTrial]:
        """Return the trials that were asked for and have not started to train."""

    def before_round(self, run: CohortRun) -> None:
        """Prepare a cohort that trains next."""

    def decide(self, run: CohortRun, scores: Scores) -> Mapping[int, TrialOutcome]:
        """Return which trials of a cohort end after an evaluation, by their numbers."""

    def after_round(self, run: CohortRun) -> None:
        """Continue a cohort whose trials, or some of them, have ended."""

    def on_error(self, run: CohortRun, trials: Sequence[RunningTrial], error: Exception) -> None:
        """Continue without a cohort whose training raised an error, or end its trials."""

    def restore(self, claimed: Mapping[str, Sequence[FrozenTrial]]) -> None:
        """Continue trials that were taken over, by the worker whose checkpoint has them."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the policy, as JSON."""


MakePolicy = Callable[[PolicyContext], Policy]
