"""Replicates: the best configurations, trained again with other seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp import rng
from optuna_nnhp.engine.library import single_threaded_blas
from optuna_nnhp.study.autotune import seconds_per_step
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.study.failures import error_line
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.study.running import SCHEDULE
from optuna_nnhp.study.running import params_for_retraining
from optuna_nnhp.study.running import schedule_of
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import ended_members
from optuna_nnhp.training.cohort import run_to_end
from optuna_nnhp.training.retrain import retrain

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

REPLICATES = "replicates"  # attribute of the study: what each trial came to with other seeds
MAX_CONFIGURATIONS = 5  # so many of the best are trained again
MIN_CONFIGURATIONS = 2  # where time is short: one alone would have nothing to be compared with
MAX_TIMEOUT_SHARE = 0.25  # of the timeout, that replicates may take
PREDICT_AFTER = 0.5  # of the timeout: then the best networks' kind is known
MARGIN = 1.5  # times what is predicted: the best trials may still become longer ones

Record = dict[str, dict[str, list[Any]]]  # by trial number, as text: seeds, and values


@dataclass
class ReplicateTrainer:
    """Trains a study's best configurations again, each ``count`` times, with other seeds.

    Other first weights, another order of the data and other noise, but the same data. These are
    no trials: they are kept as the study's attribute `REPLICATES`, so that the same call again
    trains only what is missing. A timeout is shared: this object takes a quarter of it from the
    budget when it is made, and as a callback of the study gives back what it will not need, once
    half of the time is over and the best configurations can be measured.

    Args:
        problem:
            What is tuned.
        count:
            Replicates of each configuration.
        budget:
            The study's; call `run` after it.

    Attributes:
        timeout: Seconds for the study and its replicates together.
        predicted: Whether the budget is final.
    """

    problem: Problem
    count: int
    budget: Budget
    timeout: float | None = field(init=False)
    predicted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.timeout = self.budget.timeout
        if self.timeout is not None:
            self.budget.timeout = self.timeout * (1 - MAX_TIMEOUT_SHARE)

    def use_problem(self, problem: Problem) -> None:
        """Train the same problem on another device.

        Args:
            problem:
                The problem on the device of this process, which is known after the study is open.
        """
        self.problem = problem

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Give back what is not needed; a callback of the study."""
        if self.predicted or self.timeout is None:
            return
        if self.budget.seconds < PREDICT_AFTER * self.timeout:
            return
        if not (trials := _best_configurations(study, self.problem)):
            return
        try:
            self.predicted, needed = True, MARGIN * self._estimate_seconds(trials)
        except Exception as error:  # as when they are trained
            _logger.warning(f"The replicates' time could not be measured: {error_line(error)}")
            return
        self.budget.timeout = self.timeout - min(needed, self.timeout * MAX_TIMEOUT_SHARE)
        _logger.debug(f"Up to {needed:.2f} s are kept for replicates.")

    def run(self, study: Study, *, is_late: bool = False) -> None:
        """Train what is missing, one seed after the other, until the timeout or Ctrl-C.

        What is not trained to its end is left out.

        Args:
            study:
                The study.
            is_late:
                Whether its end may have come late, by workers that had to wait: then replicates
                have their share of the timeout from now on.
        """
        self.budget.timeout = self.timeout
        if is_late and self.timeout is not None:
            until = self.budget.seconds + MAX_TIMEOUT_SHARE * self.timeout
            self.budget.timeout = max(self.timeout, until)
        with single_threaded_blas, graceful_shutdown(self.budget):
            trials = self._affordable_configurations(study)
            for seed in (_replicate_seed(self.problem.seed, place) for place in range(self.count)):
                record = study.user_attrs.get(REPLICATES, {})
                missing = [t for t in trials if self._needs_replicate(record, t.number, seed)]
                problem = self.problem.with_seed(seed)
                if not self._train_all(study, problem, seed, missing):
                    _logger.info("There was no time for all replicates.")
                    return

    def _train_all(
        self, study: Study, problem: Problem, seed: int, trials: Sequence[FrozenTrial]
    ) -> bool:
        """Train some trials with another seed, and keep their values; whether there was time."""
        out_of_time = self.budget.is_over
        plain = [trial for trial in trials if SCHEDULE not in trial.user_attrs]
        try:
            for group in _group_into_cohorts(problem, plain):
                if not out_of_time():
                    _store_values(
                        study, seed, dict(_train_to_end(problem.cohort(group), out_of_time))
                    )
            for trial in trials:
                if SCHEDULE in trial.user_attrs and not out_of_time():
                    _store_values(study, seed, _train_along_schedule(problem, trial, out_of_time))
        except Exception as error:  # no room, or a user's network: the study is complete
            _logger.warning(f"Not all replicates could be trained: {error_line(error)}")
        return not out_of_time()

    def _affordable_configurations(self, study: Study) -> list[FrozenTrial]:
        """The best configurations: rather few of them than few replicates of each."""
        trials = _best_configurations(study, self.problem)
        if self.timeout is None or self.budget.is_over():
            return trials
        try:
            while (
                len(trials) > MIN_CONFIGURATIONS
                and self._estimate_seconds(trials) > self.budget.seconds_left
            ):
                trials.pop()
        except Exception as error:  # no room, or a user's network: the study is complete
            _logger.warning(f"The replicates' time could not be measured: {error_line(error)}")
            return trials[:MIN_CONFIGURATIONS]
        return trials

    def _needs_replicate(self, record: Record, number: int, seed: int) -> bool:
        """Whether a trial has not enough replicates, and none with this seed."""
        known = record.get(str(number), {}).get("seeds", [])
        return len(known) < self.count and seed not in known

    def _estimate_seconds(self, trials: Sequence[FrozenTrial]) -> float:
        """Seconds that the replicates of some trials take, by a few steps of each cohort."""
        steps = {t.number: int(t.user_attrs.get("iterations", 0)) for t in trials}
        return self.count * sum(
            max(steps[m.number] for m in group) * seconds_per_step(self.problem.cohort(group))
            for group in _group_into_cohorts(self.problem, trials)
        )


def _replicate_seed(seed: int, place: int) -> int:
    """The seed of the replicates at one place; all configurations have the same ones.

    Example:
        >>> len({_replicate_seed(study, place) for study in range(3) for place in range(3)})
        9
    """
    return rng.mix_keys(seed, rng.REPLICATES, place) % 2**32


def _best_configurations(study: Study, problem: Problem) -> list[FrozenTrial]:
    """The best few COMPLETE trials, best first, without those that repeat another's values."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1.0 if problem.maximize else 1.0
    distinct: dict[tuple[Any, ...], FrozenTrial] = {}
    for trial in sorted(complete, key=lambda t: (sign * (t.value or 0.0), t.number)):
        if len(distinct) < MAX_CONFIGURATIONS:
            distinct.setdefault(tuple(sorted(trial.params.items())), trial)
    return list(distinct.values())


def _group_into_cohorts(problem: Problem, trials: Sequence[FrozenTrial]) -> list[list[Member]]:
    """Trials that can be trained as one cohort each."""
    groups: dict[Hashable, list[Member]] = defaultdict(list)
    for trial in trials:
        try:
            member = problem.member(trial.number, params_for_retraining(trial))
            groups[problem.signature(member)].append(member)
        except TrialError as error:
            _logger.warning(f"Trial {trial.number} cannot be trained again: {error}")
    parts = list[list[Member]]()
    for group in groups.values():
        most = problem.cohort_size(group[0])
        parts += [group[start : start + most] for start in range(0, len(group), most)]
    return parts


def _train_to_end(
    cohort: Cohort, out_of_time: Callable[[], bool]
) -> Iterator[tuple[int, float | None]]:
    """Train a cohort to its members' ends: trial numbers and best values, None if diverged.

    Those whose time ran out are left out.
    """
    for _, scores in run_to_end([cohort], out_of_time):
        for i in ended_members(scores):
            value = cohort.best_value(i)
            diverged = scores.ended[scores.indices.index(i)] == "diverged"
            yield (
                cohort.members[i].number,
                value if math.isfinite(value) and not diverged else None,
            )


def _train_along_schedule(
    problem: Problem, trial: FrozenTrial, out_of_time: Callable[[], bool]
) -> dict[int, float | None]:
    """Train a network along a trial's course, up to the round where the trial was at its best."""
    course = schedule_of(problem, trial)
    until = round(trial.user_attrs["best_epoch"] * problem.rounds_per_epoch)
    again = retrain(
        problem.cohort, course, until, 0, evaluation_rounds=(), out_of_time=out_of_time
    )
    value = again.values.get(until)
    if value is None:
        return {}
    return {trial.number: value if math.isfinite(value) else None}


def _store_values(study: Study, seed: int, found: dict[int, float | None]) -> None:
    """Add values to the study's record, which other processes may have added to meanwhile."""
    if not found:
        return
    record = study.user_attrs.get(REPLICATES, {})
    for number, value in found.items():
        entry = record.setdefault(str(number), {"seeds": [], "values": []})
        if seed not in entry["seeds"]:
            entry["seeds"].append(seed)
            entry["values"].append(value)
    study.set_user_attr(REPLICATES, record)
