"""The scheduler: ask for trials, train them as cohorts, report, prune, tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math
import time
from typing import Any

import optuna
from optuna import Study
from optuna.samplers import BruteForceSampler
from optuna.samplers import GridSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.follower import FollowerSampler
from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.study.grid import enqueue_grid
from optuna_nnhp.study.grid import points_left
from optuna_nnhp.study.loop import Budget
from optuna_nnhp.study.loop import Progress
from optuna_nnhp.study.loop import inside_optimize
from optuna_nnhp.study.loop import tidy_interrupts
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.storage import WORKER
from optuna_nnhp.study.storage import worker_name
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.study.trials import suggest
from optuna_nnhp.training.checkpoint import BestWeights
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Scores

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

Callback = Callable[[Study, FrozenTrial], None]

# These decide every value themselves: trials are grouped as they come.
PLANNERS = (QMCSampler, BruteForceSampler, PartialFixedSampler)
REPORT_EVERY = 2.0  # seconds between reports of running trials, unless a pruner reads them
GENERATIONS = 5  # a study of n trials learns from its results at least this often
CUT_SHORT = ("timeout", "interrupted")  # trials that ended before their time


@dataclass
class Scheduler:
    """Runs a study.

    Args:
        study:
            The opened study.
        problem:
            What is tuned.
        budget:
            How long.
        weights:
            Where the best trials' weights go.
        callbacks:
            Called after every trial with the study and the trial, as by Optuna.
        cohort_size:
            Trials in a cohort; None to let the problem choose.
        show_progress_bar:
            Whether to draw a progress bar.

    Attributes:
        history: Best value so far of every trial, by round and trial number, of the whole study.
        finished: Number of trials that have ended.
        best: Best value of the study.
        leader: Number of the trial that has it.
        asking: Seconds that the last cohort's proposals took.
        first_round: Seconds from there to its first scores.
        is_grid: Whether the points of a grid are enqueued.
    """

    study: Study
    problem: Problem
    budget: Budget
    weights: BestWeights
    callbacks: Sequence[Callback] = ()
    cohort_size: int | None = None
    show_progress_bar: bool = False
    history: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    finished: int = 0
    best: float | None = None
    reported_at: float = 0.0
    asking: float = 0.0
    first_round: float = 0.0
    is_grid: bool = False
    leader: int | None = None

    def run(self) -> None:
        """Train cohort after cohort until the budget is spent, or somebody stops the study."""
        sampler = self.study.sampler
        self._recall()
        if self._left() == 0:
            _logger.info(f"The study has its {self.finished} trials already: nothing to do.")
        with (
            inside_optimize(self.study),
            tidy_interrupts(self.budget),
            Progress(self.show_progress_bar, self.budget, self.finished) as self.progress,
        ):
            try:
                while not self._must_end():
                    started = time.monotonic()
                    trials = self._ask()
                    self.asking = time.monotonic() - started
                    if not trials:
                        break
                    self._train_all(trials)
            finally:
                self.study.sampler = sampler  # a grid's points were asked through another one

    def _train_all(self, trials: list[RunningTrial]) -> None:
        """Train trials as cohorts, those that can be stacked together."""
        groups: dict[Hashable, list[RunningTrial]] = defaultdict(list)
        for running in trials:
            groups[self.problem.signature(running.member)].append(running)
        try:
            for group in groups.values():
                self._train(group)
        except BaseException:
            self._end_all(trials, "error")
            raise

    def _must_end(self) -> bool:
        """Whether no more cohorts start: there would be no time to learn anything from one."""
        if self.budget.out_of_time() or self.study._stop_flag:
            return True
        return self.budget.seconds_left < self.asking + self.first_round

    def _recall(self) -> None:
        """Take in what the study holds already; begin a new one with the defaults."""
        trials = self.study.get_trials(deepcopy=False)
        defaults, sampler = self.problem.defaults(), self.study.sampler
        if isinstance(sampler, GridSampler):
            enqueue_grid(self.study, sampler, defaults)
            self.is_grid, self.study.sampler = True, RandomSampler()
        elif not trials:
            self.study.enqueue_trial(defaults)
        for trial in trials:
            best: float | None = None
            for step, value in sorted(trial.intermediate_values.items()):
                best = value if best is None or self._is_better(value, best) else best
                self.history[step][trial.number] = best
            if trial.state == TrialState.COMPLETE and self._leads(trial.value, trial.number):
                self.best, self.leader = trial.value, trial.number

    def _ask(self) -> list[RunningTrial]:
        """The next trials: a leader, and followers that can be stacked with it."""
        left = self._left()
        if left == 0:
            return []
        leader = self._ask_one()
        size = self.cohort_size or self._default_size(leader)
        size = size if left is None else min(size, left)
        sampler = self.study.sampler
        trials = [leader]
        try:
            if not isinstance(sampler, PLANNERS):
                self.study.sampler = FollowerSampler(sampler, self.problem.pin(leader.member))
            while len(trials) < size and not self.budget.out_of_time():
                trials.append(self._ask_one())
        except BaseException:
            self._end_all(trials, "error")
            raise
        finally:
            self.study.sampler = sampler
        return trials

    def _ask_one(self) -> RunningTrial:
        trial = self.study.ask()
        try:
            trial.set_user_attr(WORKER, worker_name())
            member = self.problem.member(trial.number, suggest(trial, self.problem.space))
        except BaseException:
            trial.set_user_attr("cause", "error")
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        return RunningTrial(trial, member, self.problem.maximize)

    def _default_size(self, leader: RunningTrial) -> int:
        size = self.problem.cohort_size(leader.member)
        if self.budget.n_trials is None:
            return size
        return min(size, math.ceil(self.budget.n_trials / GENERATIONS))

    def _left(self) -> int | None:
        """Trials still to start, those of other workers counted; a grid ends by itself."""
        trials = self.study.get_trials(deepcopy=False)
        self.finished = sum(t.state.is_finished() and not _never_trained(t) for t in trials)
        running = sum(t.state == TrialState.RUNNING for t in trials)
        left = self.budget.left(self.finished + running)
        if self.is_grid:
            rest = points_left(self.study)
            return rest if left is None else min(left, rest)
        return left

    def _train(self, group: list[RunningTrial]) -> None:
        """Train one cohort to its end."""
        running = {r.member.number: r for r in group}
        started = time.monotonic()
        for trial in group:
            trial.started = started
        cohort = self.problem.cohort([r.member for r in group])
        _logger.debug(f"A cohort of {len(group)}: {self.problem.signature(group[0].member)}.")
        while running:
            before = cohort.round
            scores = cohort.train_round(self.budget.out_of_time)
            if scores is None:
                cause = "interrupted" if self.budget.interrupted else "timeout"
                self._end_cohort(cohort, running, [cause] * len(running))
            else:
                if before == 0:
                    self.first_round = time.monotonic() - started
                self._end_cohort(cohort, running, self._judge(cohort, running, scores, before))
            self.progress.show(self.finished, len(running), self.best)

    def _judge(
        self, cohort: Cohort, running: dict[int, RunningTrial], scores: Scores, before: int
    ) -> list[str | None]:
        """Note one evaluation's scores; say who ends, and why."""
        order = [running[m.number] for m in cohort.members]
        for place, trial in enumerate(order):
            trial.take(scores, place, cohort.round)
            if trial.best is not None:
                self.history[cohort.round][trial.member.number] = trial.best
        now = time.monotonic()
        by_rule = isinstance(self.study.pruner, CohortHalvingPruner)
        if not by_rule or now - self.reported_at > REPORT_EVERY:
            self.reported_at = now
            for trial in order:
                trial.report()
        kept = self._kept(before, cohort.round, order)
        return [
            ended or (None if trial.member.number in kept else "pruned")
            for ended, trial in zip(scores.ended, order, strict=True)
        ]

    def _kept(self, before: int, done: int, order: list[RunningTrial]) -> set[int]:
        """Numbers of the trials that the pruner lets go on, after this round."""
        pruner = self.study.pruner
        if isinstance(pruner, CohortHalvingPruner):
            if pruner.is_rung(done, before):
                return pruner.keep(self.history[done], maximize=self.problem.maximize)
            return {t.member.number for t in order}
        return {t.member.number for t in order if not t.trial.should_prune()}

    def _end_cohort(
        self, cohort: Cohort, running: dict[int, RunningTrial], causes: Sequence[str | None]
    ) -> None:
        """End the members that have a cause, and shrink the cohort to the others."""
        for place, (member, cause) in enumerate(zip(cohort.members, causes, strict=True)):
            if cause is not None:
                self._end(running[member.number], cause, cohort, place)
                del running[member.number]
        stay = [place for place, cause in enumerate(causes) if cause is None]
        if stay and len(stay) < len(causes):
            cohort.keep(stay)

    def _end(self, running: RunningTrial, cause: str, cohort: Cohort, place: int) -> None:
        """Tell Optuna of one trial's end, its best weights kept first if it leads."""
        running.describe(self.problem, cohort.iterations, cause)
        state, number = self._state(running, cause), running.member.number
        leads = state == TrialState.COMPLETE and self._leads(running.best, number)
        if leads:
            self._keep_weights(cohort, place)
        self._tell(running, state)
        if leads:  # and only now that Optuna knows of it
            self.best, self.leader = running.best, number
            self.weights.drop_others([number])

    def _leads(self, value: float | None, number: int) -> bool:
        """Whether a trial is the best so far; of equal ones the first is."""
        if value == self.best and self.leader is not None:
            return number < self.leader
        return self._is_better(value, self.best)

    def _keep_weights(self, cohort: Cohort, place: int) -> None:
        number = cohort.members[place].number
        try:
            self.weights.put(number, cohort.best_network(place))
        except OSError as error:  # a full disk: the result can train it again
            _logger.warning(f"The weights of trial {number} could not be kept: {error}")

    def _state(self, running: RunningTrial, cause: str) -> TrialState:
        """What an end means to Optuna."""
        if cause in ("finished", "early stopping"):
            return TrialState.COMPLETE
        if cause in CUT_SHORT:
            # Cut short it says little of its configuration, unless it is the best already.
            if running.best is None:
                return TrialState.FAIL
            if self._is_better(running.best, self.best):
                return TrialState.COMPLETE
        return TrialState.PRUNED

    def _end_all(self, trials: Sequence[RunningTrial], cause: str) -> None:
        """Fail all of these, whatever they have; an error on its way is not for callbacks."""
        for running in trials:
            if running.told:
                continue
            running.describe(self.problem, 0, cause)
            running.tell(self.study, TrialState.FAIL)
            self.finished += 1

    def _tell(self, running: RunningTrial, state: TrialState) -> None:
        running.tell(self.study, state)
        self.finished += 1
        if self.callbacks:
            frozen = self.study.get_trials(deepcopy=False)[running.member.number]
            for callback in self.callbacks:
                callback(self.study, frozen)

    def _is_better(self, value: Any, than: Any) -> bool:
        if value is None or than is None:
            return value is not None
        return bool(value > than if self.problem.maximize else value < than)


def _never_trained(trial: FrozenTrial) -> bool:
    """Whether a trial failed through no fault of its own, and so does not count."""
    cause = trial.user_attrs.get("cause")
    return trial.state == TrialState.FAIL and cause in ("killed", *CUT_SHORT)
