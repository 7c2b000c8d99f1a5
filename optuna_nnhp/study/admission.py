"""Decide which trials start, in which cohort, and when another leader is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math
import time

import optuna

from optuna_nnhp.study.autotune import Throughput
from optuna_nnhp.study.autotune import measure_throughput
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.failures import UNLIMITED
from optuna_nnhp.study.failures import FailureBisector
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import FairQueue
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.training.cohort import Member

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

GENERATIONS = 5  # a study of n trials learns from its results at least this often
# A cohort asks for this many times its slots before another leader is asked for.
QUOTA_PER_SLOT = 3
# Shares of the timeout: a leader's time slice; the first round of its cohort; and, if that is
# longer, the whole budgets of its trials if nothing else were trained. A cohort of slow networks
# is smaller, so that one signature cannot use up the budget, every first rung is cheap, and good
# trials finish in time.
TIME_SLICE_SHARE, ROUND_SHARE, COHORT_SHARE = 0.04, 0.002, 0.1
# Early time slices are shorter, so that several leaders are evaluated before one of them has used
# much of the time: shares of the timeout, and of the time that the study has taken so far.
FIRST_TIME_SLICE_SHARE, TIME_SLICE_OF_ELAPSED = 0.005, 0.1
# The default configuration is the baseline for all other trials: it and the template's portfolio
# are trained first, without other trials, for at most this share of the timeout.
BASELINE_SHARE = 0.1
# A very expensive leader is deferred: it starts once a round of one member takes at most this
# share of the time so far, or if it is the fastest of `MAX_DEFERRED` deferred leaders.
AFFORDABLE_SHARE, MAX_DEFERRED = 0.02, 4
# The part of a cohort's slots (1 / n) that is asked for while cohorts train, and the part that is
# asked for before its next round.
PREPARED_PART, STARTED_PART = 4, 2
MAX_STARTED_FULL = 16  # slots: cohorts up to this size are filled before their first round
REFILL_PART = 16  # a cohort is refilled when 1 / n of its slots are free
MAX_PLANNED = 32  # trials that are asked for at once if the sampler sets every value


@dataclass
class Admission:
    """Start trials, and decide which cohort each one joins.

    Args:
        source:
            What asks the sampler for trials.
        queue:
            The cohorts in training.
        bisector:
            Handles cohorts that cannot be built.
        problem:
            What is tuned.
        budget:
            How long.
        cohort_size:
            Trials in a cohort; None to choose it by memory and measurement.

    Attributes:
        active_run: The cohort that is being filled.
        time_slices: Number of time slices so far.
        asking: Seconds that the proposals of the latest new cohort took.
        first_round: Seconds that the latest new cohort took for its first scores.
        portfolio_runs: The baseline and the portfolio with their cohorts, while only they train.
        waiting: Followers of `active_run` that were asked for while a cohort trained.
        deferred: Leaders that are too expensive so far.
    """

    source: TrialSource
    queue: FairQueue
    bisector: FailureBisector
    problem: Problem
    budget: Budget
    cohort_size: int | None = None
    active_run: CohortRun | None = None
    time_slices: int = 0
    asking: float = 0.0
    first_round: float = 0.0
    portfolio_runs: list[tuple[RunningTrial, CohortRun]] = field(default_factory=list)
    waiting: list[RunningTrial] = field(default_factory=list)
    deferred: list[RunningTrial] = field(default_factory=list)

    def admit(self) -> None:
        """Fill the cohorts: with followers while a leader's turn lasts, else with a new leader."""
        if self._is_too_late_to_start() or any(run.is_quarantined for run in self.queue.training):
            return
        if self.source.sampler_fixes_all_values:
            self._admit_grid_points()
            return
        run = self.active_run
        if run is not None and self.portfolio_runs:
            if self._portfolio_has_priority(run):
                return
            self.active_run = run = self._begin_turn_of_best_opener()
        is_over = run is None or time.monotonic() > run.deadline
        if run is not None and not is_over and run.n_free_slots < max(1, run.slots // REFILL_PART):
            return
        if run is None or is_over or not (run.quota or self.waiting):
            if self.problem.sequential and self.queue.n_training_trials:
                return
            if run is not None:
                self._add_followers(run, self.waiting)
                self.waiting = []
            self.active_run = run = self._next_cohort_to_fill()
        for other in self.queue.runs:
            other.refills = other is run
        if run is not None:
            self._fill_with_followers(run)

    def ask_followers_ahead(self, is_over: Callable[[], bool]) -> None:
        """Ask for followers while a cohort trains; they wait until slots are free.

        The sampler sees the results before this round. With a timeout, which makes a study depend
        on the clock anyway, no more are asked for once the round is over.
        """
        run = self.active_run
        if (
            run is None
            or not self._asks_ahead(run)
            or self.source.sampler_fixes_all_values
            or self._is_too_late_to_start()
        ):
            return
        count = self._count_followers_to_ask(
            run, max(1, run.slots // PREPARED_PART) - len(self.waiting)
        )
        if count and not self.portfolio_runs:
            stop = is_over if self.budget.timeout is not None else None
            self.waiting += self._ask_trials(run, count, stop)

    def _asks_ahead(self, run: CohortRun) -> bool:
        """Whether followers are asked for while cohorts train: not where both need Python."""
        if self.cohort_size is not None:  # the user has fixed the cohort size
            return False
        return run.cohort.compiled_mlp is not None and run.cohort.can_append

    def _is_too_late_to_start(self) -> bool:
        """Whether no more trials start: there would be no time to learn anything from one."""
        if self.budget.is_over() or self.source.is_stopped:
            return True
        return self.budget.seconds_left < self.asking + self.first_round

    def record_first_round_seconds(self, run: CohortRun) -> None:
        """Record how long a new cohort trained for its first scores."""
        if not run.is_scored:
            self.first_round, run.is_scored = run.seconds, True

    def has_more_trials(self) -> bool:
        """Return whether trials can still start, also if all that were just asked for failed."""
        asked = self.waiting or self.deferred
        return not self._is_too_late_to_start() and (
            bool(asked) or self.source.n_trials_left() != 0
        )

    def _next_cohort_to_fill(self) -> CohortRun | None:
        """Return the cohort to fill: by turns a new leader's, and the best existing one.

        This is a new leader's cohort, or every second time the best existing one.
        """
        if self.active_run is not None:
            self.active_run.quota = 0
        self.time_slices += 1
        run = self._best_cohort_with_room() if self.time_slices % 2 == 0 else None
        run = run or self._new_leader()
        if run is not None and not self.portfolio_runs:
            self._begin_turn(run)
        return run

    def _start_baseline_and_portfolio(self, baseline: RunningTrial) -> CohortRun | None:
        """Start the default configuration and the portfolio, and nothing else."""
        trials = [baseline, *self.source.ask_portfolio()]
        self._group_by_signature(trials)
        for trial in trials:
            trial.is_portfolio = trial is not baseline
            runs = (one for one in self.queue.runs if trial.member.number in one.running)
            self.portfolio_runs += [(trial, run) for run in runs]
        if not self.portfolio_runs:  # none could be built
            return None
        run = self.portfolio_runs[0][1]
        if self.budget.timeout is not None:
            run.deadline = time.monotonic() + BASELINE_SHARE * self.budget.timeout
        return run

    def _portfolio_has_priority(self, run: CohortRun) -> bool:
        """Return whether the first trials still train alone: until their share of time is used."""
        if time.monotonic() > run.deadline:
            return False
        return any(
            opener.member.number in self.source.running for opener, _ in self.portfolio_runs
        )

    def _begin_turn_of_best_opener(self) -> CohortRun:
        """Begin a turn of the cohort that has the best of the first trials."""
        best, run = self.portfolio_runs[0]
        for opener, other in self.portfolio_runs[1:]:
            if opener.best is not None and opener.is_better(opener.best, best.best):
                best, run = opener, other
        self.portfolio_runs, run.slots = [], self._count_slots(run.leader, run.signature)
        run.quota = -1  # the leader itself uses one place of the quota
        self._begin_turn(run, TIME_SLICE_SHARE)
        return run

    def _begin_turn(self, run: CohortRun, least: float = FIRST_TIME_SLICE_SHARE) -> None:
        """Begin a cohort's turn, of at least this share of the timeout."""
        if self.problem.sequential and run.slots == 1:
            run.quota = 0
            return  # no follower can join, so it needs no quota
        run.quota += max(run.slots, self._limit_by_generations(QUOTA_PER_SLOT * run.slots))
        if self.budget.timeout is not None:
            turn = max(least * self.budget.timeout, TIME_SLICE_OF_ELAPSED * self.budget.seconds)
            run.deadline = time.monotonic() + min(turn, TIME_SLICE_SHARE * self.budget.timeout)

    def _best_cohort_with_room(self) -> CohortRun | None:
        """The cohort with the best member, of those that are not half full any more."""
        runs = [
            run
            for run in self.queue.runs
            if run.running and run.cohort.can_append and 2 * run.n_free_slots > run.slots
        ]
        better = max if self.problem.maximize else min
        return better(runs, key=lambda run: run.cohort.best, default=None)

    def _next_leader(self) -> RunningTrial | None:
        """Return a leader, deferred or new; no other trial fixes any of its values."""
        while len(self.deferred) < MAX_DEFERRED:
            affordable = [leader for leader in self.deferred if self._can_afford(leader)]
            if affordable:
                self.deferred.remove(affordable[0])
                return affordable[0]
            if self.source.n_trials_left() == 0 or self.budget.is_over() or self.source.is_stopped:
                break
            asked = self.source.ask(1)
            self.deferred += asked
            if not asked and self.source.ask_failed:
                break
        if not self.deferred:
            return None
        leader = min(
            self.deferred, key=lambda parked: self._measure_throughput(parked.member).round
        )
        self.deferred.remove(leader)
        return leader

    def _can_afford(self, leader: RunningTrial) -> bool:
        """Whether a leader's round is short beside what the study has taken so far."""
        if self.budget.timeout is None or self.cohort_size is not None or leader.is_enqueued:
            return True
        if self.problem.sequential:
            return True
        return (
            self._measure_throughput(leader.member).round <= AFFORDABLE_SHARE * self.budget.seconds
        )

    def _new_leader(self) -> CohortRun | None:
        """Start a cohort for a new leader, or let it join one with its signature."""
        leader = self._next_leader()
        if leader is None:
            return None
        signature, most = leader.signature, self._memory_limit(leader.signature)
        run = self.queue.with_signature(signature, most)
        if leader.is_baseline and self.cohort_size is None:
            return self._start_baseline_and_portfolio(leader)
        size = self._count_slots(leader.member, signature)
        if run is None:
            run = self._start_cohort(signature, [leader], size)
        else:
            self._append_trials(run, [leader])
            run.slots = max(run.slots, size)
        if run is not None:
            run.quota = -1
        return run

    def _fill_with_followers(self, run: CohortRun) -> None:
        """Fill a cohort with followers: those that wait, and new ones."""
        if run.rounds and run.running and not run.cohort.can_append:
            run.quota = 0
        free, started = run.n_free_slots, time.monotonic()
        trials, self.waiting = self.waiting[:free], self.waiting[free:]
        wanted = free - len(trials)
        if self._asks_ahead(run):  # and asks for the rest while the others train
            wanted -= run.slots - min(run.slots, max(MAX_STARTED_FULL, run.slots // STARTED_PART))
        if count := self._count_followers_to_ask(run, wanted):
            trials += self._ask_trials(run, count)
        self._add_followers(run, trials)
        if not run.rounds:
            self.asking = time.monotonic() - started

    def _count_followers_to_ask(self, run: CohortRun, wanted: int) -> int:
        """Return how many of the wanted followers can be asked for."""
        left = self.source.n_trials_left() if wanted > 0 else 0
        return int(max(0, min(wanted, run.quota, math.inf if left is None else left)))

    def _ask_trials(
        self, run: CohortRun, count: int, stop: Callable[[], bool] | None = None
    ) -> list[RunningTrial]:
        trials = self.source.ask(count, run.leader, stop)
        run.quota -= len(trials)
        return trials

    def _add_followers(self, run: CohortRun, trials: Sequence[RunningTrial]) -> None:
        """Add followers to their leader's cohort, or to others with their signature.

        It differs for enqueued trials, whose values are fixed, and for some users' networks.
        """
        self._append_trials(run, [trial for trial in trials if trial.signature == run.signature])
        self._group_by_signature([trial for trial in trials if trial.signature != run.signature])

    def _admit_grid_points(self) -> None:
        """Ask for the next points of a plan, and group them as they come."""
        if self._baseline_trains_alone() or (
            self.problem.sequential and self.queue.n_training_trials
        ):
            return
        planned = 1 if self.problem.sequential else self._limit_by_generations(MAX_PLANNED)
        most, left = self.cohort_size or planned, self.source.n_trials_left()
        count = (
            most - self.queue.n_training_trials
            if left is None
            else min(most - self.queue.n_training_trials, left)
        )
        if (count < max(1, most // REFILL_PART) and count != left) or count < 1:
            return
        self._group_by_signature(self.source.ask(count))
        for run in self.queue.runs:  # all of them, by those who fit
            run.refills = True

    def _baseline_trains_alone(self) -> bool:
        """Whether the default configuration has the machine for itself, also before a plan."""
        if self.time_slices == 0 and self.cohort_size is None:
            self.time_slices = 1
            trials = self.source.ask(1)
            if not (trials and trials[0].is_baseline):
                self._group_by_signature(trials)
                return False
            self._start_baseline_and_portfolio(trials[0])
        if self.portfolio_runs and not self._portfolio_has_priority(self.portfolio_runs[0][1]):
            self.portfolio_runs = []
        return bool(self.portfolio_runs)

    def _group_by_signature(self, trials: Sequence[RunningTrial]) -> None:
        """Let trials join cohorts of their signature, or begin new ones."""
        groups: dict[Hashable, list[RunningTrial]] = defaultdict(list)
        for running in trials:
            groups[running.signature].append(running)
        for signature, group in groups.items():
            most = self.cohort_size or self.problem.cohort_size(group[0].member)
            most = min(most, self._memory_limit(signature))
            run = self.queue.with_signature(signature)
            if run is not None and len(run.running) + len(group) <= most:
                self._append_trials(run, group)
                run.slots = max(run.slots, len(run.running))
                continue
            for start in range(0, len(group), most):
                part = group[start : start + most]
                self._start_cohort(signature, part, len(part))

    def _start_cohort(
        self, signature: Hashable, group: list[RunningTrial], slots: int
    ) -> CohortRun | None:
        """Start a new cohort; more than one if memory has no room for it, none if none can."""
        try:
            cohort = self.problem.cohort([running.member for running in group])
        except Exception as error:  # whatever it is, it becomes an outcome
            runs = self.bisector.bisect(group, error)
        else:
            running = {trial.member.number: trial for trial in group}
            runs = [CohortRun(cohort, signature, group[0].member, running, slots)]
        for run in runs:
            self.queue.add(run)
            _logger.debug(f"A cohort of {run.slots}: {signature}.")
        return runs[0] if runs else None

    def _append_trials(self, run: CohortRun, trials: Sequence[RunningTrial]) -> None:
        if not trials:
            return
        members, is_empty = [trial.member for trial in trials], not run.running
        run.running |= {trial.member.number: trial for trial in trials}
        try:
            if not is_empty:
                run.cohort.append(members)
                return
            run.cohort, run.rounds = self.problem.cohort(members), 0
        except Exception as error:  # the stack may be half of each by now
            self.replace_cohort(run, self.bisector.bisect(run.dissolve(), error))
            return
        if run not in self.queue.runs:
            self.queue.add(run)

    def add_recovered_cohort(self, run: CohortRun) -> None:
        """Add a cohort of trials that were taken over, or merge it with one of its signature."""
        if any(run.cohort.iterations) or run.is_quarantined:
            self.queue.add(run)
        else:
            self._group_by_signature(list(run.running.values()))

    def replace_cohort(self, old: CohortRun, new: Sequence[CohortRun]) -> None:
        """Replace a cohort whose training raised an error by smaller cohorts."""
        for run in new:
            self.queue.add(run)
        self.portfolio_runs = [
            (trial, run)
            for trial, _ in self.portfolio_runs
            for run in self.queue.training
            if trial.member.number in run.running
        ]
        if self.active_run is old:
            self.active_run = None
            waiting, self.waiting = self.waiting, []
            self._group_by_signature(waiting)  # they train without the cohort that failed

    def _count_slots(self, leader: Member, signature: Hashable) -> int:
        """Return the number of slots of a leader's cohort."""
        return min(self._count_wanted_slots(leader), self._memory_limit(signature))

    def _memory_limit(self, signature: Hashable) -> int:
        """Return how many trials with a signature may be tried together."""
        return self.bisector.memory_limits.get(signature, UNLIMITED)

    def _count_wanted_slots(self, leader: Member) -> int:
        """Return the number of slots of a leader's cohort before the limit of memory."""
        if self.cohort_size is not None:
            return self.cohort_size
        pace = self._measure_throughput(leader)
        most = self._limit_by_generations(pace.size)
        if self.budget.timeout is None:
            return most
        rounds = self.problem.rounds_per_epoch * int(leader.params.get("epochs") or 1)
        share = max(ROUND_SHARE, COHORT_SHARE / rounds)
        return max(1, min(most, int(share * self.budget.timeout / pace.round)))

    def _measure_throughput(self, leader: Member) -> Throughput:
        return measure_throughput(self.problem, leader, self.problem.cohort_size(leader))

    def _limit_by_generations(self, most: int) -> int:
        """Limit a number of trials so that the sampler learns from results in between."""
        trials = self.budget.n_trials
        return most if trials is None else min(most, math.ceil(trials / GENERATIONS))
