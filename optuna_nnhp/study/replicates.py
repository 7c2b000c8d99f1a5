"""Replicates: retrain the best configurations with other seeds."""

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

REPLICATES = "replicates"  # study attribute: the values of trials with other seeds, a `Record`
MAX_CONFIGURATIONS = 5  # that are retrained
MIN_CONFIGURATIONS = 2  # where time is short; one could not be compared
MAX_TIMEOUT_SHARE = 0.25  # of the timeout, for replicates
PREDICT_AFTER = 0.5  # of the timeout: later the best trials change little
MARGIN = 1.5  # on the predicted seconds: the best trials may still become longer

Record = dict[str, dict[str, list[Any]]]  # seeds and values, by trial number as text


@dataclass
class ReplicateTrainer:
    """Retrains a study's best configurations, each ``count`` times with other seeds.

    The seeds change the first weights, the order of the data and the noise, but not the data.
    Replicates are not trials: their values are the study's attribute `REPLICATES`, so that the
    same call again trains only what is missing. The constructor reserves a quarter of the timeout
    for them. As a callback of the study, this object returns what it does not need of it, once
    half of the time is over and the best configurations can be measured.

    Args:
        problem:
            Problem that is tuned.
        count:
            Replicates of each configuration.
        budget:
            Budget of the study; call `run` when the study has ended.

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
            self.budget.set_timeout(self.timeout * (1 - MAX_TIMEOUT_SHARE))

    def set_problem(self, problem: Problem) -> None:
        """Set the problem on the device of this process, known once the study is open."""
        self.problem = problem

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Return the reserved time that is not needed; a callback of the study."""
        if self.predicted or self.timeout is None:
            return
        if self.budget.seconds < PREDICT_AFTER * self.timeout:
            return
        if not (trials := _best_configurations(study, self.problem)):
            return
        try:
            self.predicted, needed = True, MARGIN * self._estimate_seconds(trials)
        except Exception as error:  # building a user's network may fail, as in `run`
            _logger.warning(f"The replicates' time could not be measured: {error_line(error)}")
            return
        self.budget.set_timeout(self.timeout - min(needed, self.timeout * MAX_TIMEOUT_SHARE))
        _logger.debug(f"Up to {needed:.2f} s are kept for replicates.")

    def run(self, study: Study, *, is_late: bool = False) -> None:
        """Train what is missing, one seed after the other, until the timeout or Ctrl-C.

        Args:
            study:
                The study; it gets the values of networks that were trained to their end.
            is_late:
                Whether workers may have started late, so that the study ended late. Replicates
                then have their share of the timeout from now on.
        """
        self.budget.set_timeout(self.timeout)
        if is_late and self.timeout is not None:
            until = self.budget.seconds + MAX_TIMEOUT_SHARE * self.timeout
            self.budget.set_timeout(max(self.timeout, until))
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
        """Retrain trials with another seed; return whether there was time for all."""
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
        except (
            Exception
        ) as error:  # out of memory, or an error of a user's network; the study itself is complete
            _logger.warning(f"Not all replicates could be trained: {error_line(error)}")
        return not out_of_time()

    def _affordable_configurations(self, study: Study) -> list[FrozenTrial]:
        """Return as many of the best configurations as there is time to replicate."""
        trials = _best_configurations(study, self.problem)
        if self.timeout is None or self.budget.is_over():
            return trials
        try:
            while (
                len(trials) > MIN_CONFIGURATIONS
                and self._estimate_seconds(trials) > self.budget.seconds_left
            ):
                trials.pop()
        except (
            Exception
        ) as error:  # out of memory, or an error of a user's network; the study itself is complete
            _logger.warning(f"The replicates' time could not be measured: {error_line(error)}")
            return trials[:MIN_CONFIGURATIONS]
        return trials

    def _needs_replicate(self, record: Record, number: int, seed: int) -> bool:
        """Return whether a trial has too few replicates, and none with this seed."""
        known = record.get(str(number), {}).get("seeds", [])
        return len(known) < self.count and seed not in known

    def _estimate_seconds(self, trials: Sequence[FrozenTrial]) -> float:
        """Estimate the seconds for the replicates of trials, by a few steps of each cohort."""
        steps = {t.number: int(t.user_attrs.get("iterations", 0)) for t in trials}
        return self.count * sum(
            max(steps[m.number] for m in group) * seconds_per_step(self.problem.cohort(group))
            for group in _group_into_cohorts(self.problem, trials)
        )


def _replicate_seed(seed: int, place: int) -> int:
    """Return the seed of the replicates at one place, the same for all configurations.

    Example:
        >>> len({_replicate_seed(study, place) for study in range(3) for place in range(3)})
        9
    """
    return rng.mix_keys(seed, rng.REPLICATES, place) % 2**32


def _best_configurations(study: Study, problem: Problem) -> list[FrozenTrial]:
    """Return the best few COMPLETE trials, best first, without repeated configurations."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1.0 if problem.maximize else 1.0
    distinct: dict[tuple[Any, ...], FrozenTrial] = {}
    for trial in sorted(complete, key=lambda t: (sign * (t.value or 0.0), t.number)):
        if len(distinct) < MAX_CONFIGURATIONS:
            distinct.setdefault(tuple(sorted(trial.params.items())), trial)
    return list(distinct.values())


def _group_into_cohorts(problem: Problem, trials: Sequence[FrozenTrial]) -> list[list[Member]]:
    """Group trials that can be trained as one cohort."""
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
    """Train a cohort and yield trial numbers and best values, None if a network diverged.

    Networks that are not trained to their end in time are left out.
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
    """Retrain a network by a trial's schedule, up to the trial's best round."""
    schedule = schedule_of(problem, trial)
    until = round(trial.user_attrs["best_epoch"] * problem.rounds_per_epoch)
    retrained = retrain(
        problem.cohort, schedule, until, 0, evaluation_rounds=(), out_of_time=out_of_time
    )
    value = retrained.values.get(until)
    if value is None:
        return {}
    return {trial.number: value if math.isfinite(value) else None}


def _store_values(study: Study, seed: int, found: dict[int, float | None]) -> None:
    """Add values to the study's record, as it is in the storage now."""
    if not found:
        return
    record = study.user_attrs.get(REPLICATES, {})
    for number, value in found.items():
        entry = record.setdefault(str(number), {"seeds": [], "values": []})
        if seed not in entry["seeds"]:
            entry["seeds"].append(seed)
            entry["values"].append(value)
    study.set_user_attr(REPLICATES, record)
