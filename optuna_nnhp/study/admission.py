"""Admission: which trials start, in which cohort, and when another leader has its turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from collections.abc import Sequence
from dataclasses import dataclass
import math
import time

import optuna

from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.pool import Pool
from optuna_nnhp.study.sizes import measured_pace
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.machine import full_threads

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

GENERATIONS = 5  # a study of n trials learns from its results at least this often
TURN = 3  # times its slots that a leader's cohort is filled before another leader is asked
# Of the timeout: a leader's turn; its cohort's first round, or, if that is more, the whole budgets
# of its trials if nothing else were trained. A cohort of slow networks is smaller, so that one
# signature cannot eat the budget, a first rung is cheap for everybody, and good trials come to
# their end while it matters.
TURN_SHARE, ROUND_SHARE, COHORT_SHARE = 0.04, 0.002, 0.1
# The default configuration comes early and is what all others must beat: its cohort has a member
# for each thread, and for this share of the timeout at most nobody else leads.
BASELINE_SHARE = 0.1
REFILL = 16  # a cohort is refilled when a part of its slots is free: one of so many
PLANNED = 32  # trials that are asked at once of a sampler that fixes everything


@dataclass
class Admission:
    """Starts trials.

    Args:
        asker:
            Asks for them.
        pool:
            Where their cohorts are trained.
        cohort_size:
            Trials in a cohort; None to choose it by memory and measurement.

    Attributes:
        turn: The cohort that is filled.
        turns: How many there were.
        asking: Seconds that a new cohort's proposals took.
        baseline: Number of the trial with the default configuration, while it leads.
        first_round: Seconds that a new cohort took to its first scores.
    """

    asker: Asker
    pool: Pool
    cohort_size: int | None = None
    turn: Live | None = None
    turns: int = 0
    asking: float = 0.0
    first_round: float = 0.0
    baseline: int | None = None

    def __post_init__(self) -> None:
        self.study, self.problem = self.asker.study, self.asker.problem
        self.budget = self.asker.budget

    def admit(self) -> None:
        """Fill the cohorts: with followers while a leader's turn lasts, else with a new leader."""
        if self._must_end():
            return
        if self.asker.plans:
            self._admit_planned()
            return
        live = self.turn
        is_over = live is None or time.monotonic() > live.until or self._baseline_is_over(live)
        if live is not None and not is_over and live.free < max(1, live.slots // REFILL):
            return
        if live is None or is_over or not live.invited:
            self.turn = live = self._lead()
        if live is not None:
            self._follow(live)

    def _must_end(self) -> bool:
        """Whether no more trials start: there would be no time to learn anything from one."""
        if self.budget.out_of_time() or self.study._stop_flag:
            return True
        return self.budget.seconds_left < self.asking + self.first_round

    def has_more(self) -> bool:
        """Whether trials can start although none runs: those just asked have all failed."""
        return not self._must_end() and self.asker.left() != 0

    def _lead(self) -> Live | None:
        """Who is filled next: a new leader's cohort, or every other time the best of those there.

        None if there are no more trials.
        """
        if self.turn is not None:
            self.turn.invited = 0
        self.turns += 1
        live = self._proven() if self.turns % 2 == 0 else None
        live = live or self._new_leader()
        if live is None:
            return None
        is_baseline = self.baseline is not None
        live.invited += max(live.slots, self._generation(TURN * live.slots))
        live.invited = math.inf if is_baseline else live.invited
        if self.budget.timeout is not None:
            share = BASELINE_SHARE if is_baseline else TURN_SHARE
            live.until = time.monotonic() + share * self.budget.timeout
        return live

    def _baseline_is_over(self, live: Live) -> bool:
        """Whether the baseline led, and has ended."""
        if self.baseline is None or self.baseline in live.running:
            return False
        self.baseline, live.invited = None, 0
        return True

    def _proven(self) -> Live | None:
        """The cohort with the best member, of those that are not half full any more."""
        lives = [
            live
            for live in self.pool.lives
            if live.running and live.cohort.joinable and 2 * live.free > live.slots
        ]
        better = max if self.problem.maximize else min
        return better(lives, key=lambda live: live.cohort.best, default=None)

    def _new_leader(self) -> Live | None:
        """Ask for a trial that is free in everything."""
        asked: list[RunningTrial] = []
        while not asked:
            if self.asker.left() == 0 or self.budget.out_of_time() or self.study._stop_flag:
                return None
            asked = self.asker.ask(1)
        leader, signature = asked[0], asked[0].signature
        live, size = self.pool.with_signature(signature), self._size(leader)
        if live is None:
            live = self._open(signature, [leader], size)
        else:
            self._join(live, [leader])
            live.slots = max(live.slots, size)
        if leader.is_baseline:
            self.baseline = leader.member.number
        live.invited = -1
        return live

    def _follow(self, live: Live) -> None:
        """Fill a cohort with followers."""
        left = self.asker.left()
        count = min(live.free, live.invited, math.inf if left is None else left)
        if live.rounds and live.running and not live.cohort.joinable:
            live.invited = 0
        if count < 1 or not live.invited:
            return
        started = time.monotonic()
        trials = self.asker.ask(int(count), live.leader)
        live.invited -= len(trials)
        # Enqueued trials have values of their own, and a user's network may be built otherwise.
        self._join(live, [trial for trial in trials if trial.signature == live.signature])
        self._group([trial for trial in trials if trial.signature != live.signature])
        if not live.rounds:
            self.asking = time.monotonic() - started

    def _admit_planned(self) -> None:
        """Ask for the next points of a plan, and group them as they come."""
        most, left = self.cohort_size or self._generation(PLANNED), self.asker.left()
        count = most - self.pool.alive if left is None else min(most - self.pool.alive, left)
        if (count < max(1, most // REFILL) and count != left) or count < 1:
            return
        self._group(self.asker.ask(count))

    def _group(self, trials: Sequence[RunningTrial]) -> None:
        """Let trials join cohorts of their signature, or begin new ones."""
        groups: dict[Hashable, list[RunningTrial]] = defaultdict(list)
        for running in trials:
            groups[running.signature].append(running)
        for signature, group in groups.items():
            most = self.cohort_size or self.problem.cohort_size(group[0].member)
            live = self.pool.with_signature(signature)
            if live is not None and len(live.running) + len(group) <= most:
                self._join(live, group)
                live.slots = max(live.slots, len(live.running))
                continue
            for start in range(0, len(group), most):
                part = group[start : start + most]
                self._open(signature, part, len(part))

    def _open(self, signature: Hashable, group: list[RunningTrial], slots: int) -> Live:
        """Start a new cohort."""
        cohort = self.problem.cohort([running.member for running in group])
        running = {trial.member.number: trial for trial in group}
        live = Live(cohort, signature, group[0].member, running, slots)
        self.pool.add(live)
        _logger.debug(f"A cohort of {slots}: {signature}.")
        return live

    def _join(self, live: Live, trials: Sequence[RunningTrial]) -> None:
        if not trials:
            return
        members, is_empty = [trial.member for trial in trials], not live.running
        live.running |= {trial.member.number: trial for trial in trials}
        if not is_empty:
            live.cohort.join(members)
            return
        live.cohort, live.rounds = self.problem.cohort(members), 0
        if live not in self.pool.lives:
            self.pool.add(live)

    def _size(self, leader: RunningTrial) -> int:
        """Slots of a leader's cohort."""
        if self.cohort_size is not None:
            return self.cohort_size
        most = self._generation(self.problem.cohort_size(leader.member))
        if most == 1:
            return 1
        pace = measured_pace(self.problem, leader.member, most)
        if leader.is_baseline:
            return min(pace.size, full_threads())
        if self.budget.timeout is None:
            return pace.size
        rounds = self.problem.rounds_per_epoch * int(leader.member.params["epochs"] or 1)
        share = max(ROUND_SHARE, COHORT_SHARE / rounds)
        return max(1, min(pace.size, int(share * self.budget.timeout / pace.round)))

    def _generation(self, most: int) -> int:
        """So many trials, or fewer so that the study learns from its results now and then."""
        trials = self.budget.n_trials
        return most if trials is None else min(most, math.ceil(trials / GENERATIONS))
