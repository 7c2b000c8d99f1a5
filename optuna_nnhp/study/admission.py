"""Admission: which trials start, in which cohort, and when another leader has its turn."""

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

from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.breakage import Breakage
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.pool import Pool
from optuna_nnhp.study.sizes import Pace
from optuna_nnhp.study.sizes import measured_pace
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.cohort import Member

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

GENERATIONS = 5  # a study of n trials learns from its results at least this often
TURN = 3  # times its slots that a leader's cohort is filled before another leader is asked
# Of the timeout: a leader's turn; its cohort's first round, or, if that is more, the whole budgets
# of its trials if nothing else were trained. A cohort of slow networks is smaller, so that one
# signature cannot eat the budget, a first rung is cheap for everybody, and good trials come to
# their end while it matters.
TURN_SHARE, ROUND_SHARE, COHORT_SHARE = 0.04, 0.002, 0.1
# Early turns are shorter, so that several leaders are known before one of them has eaten much:
# shares of the timeout, and of the time that the study has taken so far.
FIRST_TURN, TURN_OF_PAST = 0.005, 0.1
# The default configuration comes early and is what all others must beat: it and the template's
# portfolio have the machine for themselves, for this share of the timeout at most.
BASELINE_SHARE = 0.1
# What costs a hundred times as much as others must wait: a leader begins once a round of a member
# takes at most this share of the time so far, or if so many wait and it is the quickest of them.
AFFORDED, PARKED = 0.02, 4
# Of a cohort's slots: one of so many is asked for while cohorts train, and up to one of so many is
# asked for before it trains on.
PREPARED, STARTED = 4, 2
MANY = 16  # slots: cohorts up to this size begin full
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
        breakage:
            What becomes of cohorts that cannot be built.
        cohort_size:
            Trials in a cohort; None to choose it by memory and measurement.

    Attributes:
        turn: The cohort that is filled.
        turns: How many there were.
        asking: Seconds that a new cohort's proposals took.
        openers: The default configuration and the portfolio, while they have the machine.
        waiting: Followers of `turn` that were asked for while a cohort trained.
        parked: Leaders that cannot be afforded yet.
        first_round: Seconds that a new cohort took to its first scores.
    """

    asker: Asker
    pool: Pool
    breakage: Breakage
    cohort_size: int | None = None
    turn: Live | None = None
    turns: int = 0
    asking: float = 0.0
    first_round: float = 0.0
    openers: list[tuple[RunningTrial, Live]] = field(default_factory=list)
    waiting: list[RunningTrial] = field(default_factory=list)
    parked: list[RunningTrial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.study, self.problem = self.asker.study, self.asker.problem
        self.budget = self.asker.budget

    def admit(self) -> None:
        """Fill the cohorts: with followers while a leader's turn lasts, else with a new leader."""
        if self._must_end() or any(live.is_suspect for live in self.pool.training):
            return
        if self.asker.plans:
            self._admit_planned()
            return
        live = self.turn
        if live is not None and self.openers:
            if self._openers_run(live):
                return
            self.turn = live = self._follow_openers()
        is_over = live is None or time.monotonic() > live.until
        if live is not None and not is_over and live.free < max(1, live.slots // REFILL):
            return
        if live is None or is_over or not (live.invited or self.waiting):
            if self.problem.one_by_one and self.pool.alive:
                return
            if live is not None:
                self._take_in(live, self.waiting)
                self.waiting = []
            self.turn = live = self._lead()
        for other in self.pool.lives:
            other.is_filled = other is live
        if live is not None:
            self._follow(live)

    def prepare(self, is_over: Callable[[], bool]) -> None:
        """Ask for followers while a cohort trains; they wait until slots are free.

        What the sampler knows is the state before this round. With a timeout, which makes a study
        depend on the clock anyway, no more are asked for once the round is over.
        """
        live = self.turn
        if live is None or not self._prepares(live) or self.asker.plans or self._must_end():
            return
        count = self._may_ask(live, max(1, live.slots // PREPARED) - len(self.waiting))
        if count and not self.openers:
            stop = is_over if self.budget.timeout is not None else None
            self.waiting += self._ask(live, count, stop)

    def _prepares(self, live: Live) -> bool:
        """Whether followers are asked for while cohorts train: not where both need Python."""
        if self.cohort_size is not None:  # somebody wants to know who trains with whom
            return False
        return live.cohort.native is not None and live.cohort.joinable

    def _must_end(self) -> bool:
        """Whether no more trials start: there would be no time to learn anything from one."""
        if self.budget.is_over() or self.study._stop_flag:
            return True
        return self.budget.seconds_left < self.asking + self.first_round

    def has_more(self) -> bool:
        """Whether trials can start although none runs: those just asked have all failed."""
        asked = self.waiting or self.parked
        return not self._must_end() and (bool(asked) or self.asker.left() != 0)

    def _lead(self) -> Live | None:
        """Who is filled next: a new leader's cohort, or every other time the best of those there.

        None if there are no more trials.
        """
        if self.turn is not None:
            self.turn.invited = 0
        self.turns += 1
        live = self._proven() if self.turns % 2 == 0 else None
        live = live or self._new_leader()
        if live is not None and not self.openers:
            self._invite(live)
        return live

    def _open_with(self, baseline: RunningTrial) -> Live | None:
        """The default configuration and the portfolio begin, and nothing else beside them."""
        trials = [baseline, *self.asker.ask_portfolio()]
        self._group(trials)
        for trial in trials:
            trial.is_opener = trial is not baseline
            lives = (one for one in self.pool.lives if trial.member.number in one.running)
            self.openers += [(trial, live) for live in lives]
        if not self.openers:  # none could be built
            return None
        live = self.openers[0][1]
        if self.budget.timeout is not None:
            live.until = time.monotonic() + BASELINE_SHARE * self.budget.timeout
        return live

    def _openers_run(self, live: Live) -> bool:
        """Whether they still have the machine; after their share they go on beside others."""
        if time.monotonic() > live.until:
            return False
        return any(opener.member.number in self.asker.running for opener, _ in self.openers)

    def _follow_openers(self) -> Live:
        """The best opener's shape is a good one to begin with, for a whole turn."""
        best, live = self.openers[0]
        for opener, other in self.openers[1:]:
            if opener.best is not None and opener.is_better(opener.best, best.best):
                best, live = opener, other
        self.openers, live.slots = [], self._size(live.leader, live.signature)
        live.invited = -1  # its leader is the first of them
        self._invite(live, TURN_SHARE)
        return live

    def _invite(self, live: Live, least: float = FIRST_TURN) -> None:
        """Begin a cohort's turn, of at least this share of the timeout."""
        if self.problem.one_by_one and live.slots == 1:
            live.invited = 0
            return  # whom nobody joins, nobody must follow
        live.invited += max(live.slots, self._generation(TURN * live.slots))
        if self.budget.timeout is not None:
            turn = max(least * self.budget.timeout, TURN_OF_PAST * self.budget.seconds)
            live.until = time.monotonic() + min(turn, TURN_SHARE * self.budget.timeout)

    def _proven(self) -> Live | None:
        """The cohort with the best member, of those that are not half full any more."""
        lives = [
            live
            for live in self.pool.lives
            if live.running and live.cohort.joinable and 2 * live.free > live.slots
        ]
        better = max if self.problem.maximize else min
        return better(lives, key=lambda live: live.cohort.best, default=None)

    def _next_leader(self) -> RunningTrial | None:
        """A trial that is free in everything: one that waited until it can be afforded, or new."""
        while len(self.parked) < PARKED:
            affordable = [leader for leader in self.parked if self._affords(leader)]
            if affordable:
                self.parked.remove(affordable[0])
                return affordable[0]
            if self.asker.left() == 0 or self.budget.is_over() or self.study._stop_flag:
                break
            asked = self.asker.ask(1)
            self.parked += asked
            if not asked and self.asker.is_refused:
                break
        if not self.parked:
            return None
        leader = min(self.parked, key=lambda parked: self._pace(parked.member).round)
        self.parked.remove(leader)
        return leader

    def _affords(self, leader: RunningTrial) -> bool:
        """Whether a leader's round is short beside what the study has taken so far."""
        if self.budget.timeout is None or self.cohort_size is not None or leader.is_enqueued:
            return True
        if self.problem.one_by_one:
            return True
        return self._pace(leader.member).round <= AFFORDED * self.budget.seconds

    def _new_leader(self) -> Live | None:
        """Have a new leader begin a cohort, or join one of its kind."""
        leader = self._next_leader()
        if leader is None:
            return None
        signature, most = leader.signature, self.breakage.most(leader.signature)
        live = self.pool.with_signature(signature, most)
        if leader.is_baseline and self.cohort_size is None:
            return self._open_with(leader)
        size = self._size(leader.member, signature)
        if live is None:
            live = self._open(signature, [leader], size)
        else:
            self._join(live, [leader])
            live.slots = max(live.slots, size)
        if live is not None:
            live.invited = -1
        return live

    def _follow(self, live: Live) -> None:
        """Fill a cohort with followers: those that wait, and new ones."""
        if live.rounds and live.running and not live.cohort.joinable:
            live.invited = 0
        free, started = live.free, time.monotonic()
        trials, self.waiting = self.waiting[:free], self.waiting[free:]
        wanted = free - len(trials)
        if self._prepares(live):  # and asks for the rest while the others train
            wanted -= live.slots - min(live.slots, max(MANY, live.slots // STARTED))
        if count := self._may_ask(live, wanted):
            trials += self._ask(live, count)
        self._take_in(live, trials)
        if not live.rounds:
            self.asking = time.monotonic() - started

    def _may_ask(self, live: Live, wanted: int) -> int:
        """How many followers can be asked for, of so many."""
        left = self.asker.left() if wanted > 0 else 0
        return int(max(0, min(wanted, live.invited, math.inf if left is None else left)))

    def _ask(
        self, live: Live, count: int, stop: Callable[[], bool] | None = None
    ) -> list[RunningTrial]:
        trials = self.asker.ask(count, live.leader, stop)
        live.invited -= len(trials)
        return trials

    def _take_in(self, live: Live, trials: Sequence[RunningTrial]) -> None:
        """Have followers join their leader's cohort, or others of their own kind.

        Enqueued trials have values of their own, and a user's network may be built otherwise.
        """
        self._join(live, [trial for trial in trials if trial.signature == live.signature])
        self._group([trial for trial in trials if trial.signature != live.signature])

    def _admit_planned(self) -> None:
        """Ask for the next points of a plan, and group them as they come."""
        if self._baseline_first() or (self.problem.one_by_one and self.pool.alive):
            return
        planned = 1 if self.problem.one_by_one else self._generation(PLANNED)
        most, left = self.cohort_size or planned, self.asker.left()
        count = most - self.pool.alive if left is None else min(most - self.pool.alive, left)
        if (count < max(1, most // REFILL) and count != left) or count < 1:
            return
        self._group(self.asker.ask(count))
        for live in self.pool.lives:  # all of them, by those who fit
            live.is_filled = True

    def _baseline_first(self) -> bool:
        """Whether the default configuration has the machine for itself, also before a plan."""
        if self.turns == 0 and self.cohort_size is None:
            self.turns = 1
            trials = self.asker.ask(1)
            if not (trials and trials[0].is_baseline):
                self._group(trials)
                return False
            self._open_with(trials[0])
        if self.openers and not self._openers_run(self.openers[0][1]):
            self.openers = []
        return bool(self.openers)

    def _group(self, trials: Sequence[RunningTrial]) -> None:
        """Let trials join cohorts of their signature, or begin new ones."""
        groups: dict[Hashable, list[RunningTrial]] = defaultdict(list)
        for running in trials:
            groups[running.signature].append(running)
        for signature, group in groups.items():
            most = self.cohort_size or self.problem.cohort_size(group[0].member)
            most = min(most, self.breakage.most(signature))
            live = self.pool.with_signature(signature)
            if live is not None and len(live.running) + len(group) <= most:
                self._join(live, group)
                live.slots = max(live.slots, len(live.running))
                continue
            for start in range(0, len(group), most):
                part = group[start : start + most]
                self._open(signature, part, len(part))

    def _open(self, signature: Hashable, group: list[RunningTrial], slots: int) -> Live | None:
        """Start a new cohort; more than one if memory has no room for it, none if none can."""
        try:
            cohort = self.problem.cohort([running.member for running in group])
        except Exception as error:  # whatever it is, it becomes an outcome
            lives = self.breakage.halve(group, error)
        else:
            running = {trial.member.number: trial for trial in group}
            lives = [Live(cohort, signature, group[0].member, running, slots)]
        for live in lives:
            self.pool.add(live)
            _logger.debug(f"A cohort of {live.slots}: {signature}.")
        return lives[0] if lives else None

    def _join(self, live: Live, trials: Sequence[RunningTrial]) -> None:
        if not trials:
            return
        members, is_empty = [trial.member for trial in trials], not live.running
        live.running |= {trial.member.number: trial for trial in trials}
        try:
            if not is_empty:
                live.cohort.join(members)
                return
            live.cohort, live.rounds = self.problem.cohort(members), 0
        except Exception as error:  # the stack may be half of each by now
            group, live.running = list(live.running.values()), {}
            vars(live.cohort).clear()  # what had no room must go before its halves come
            self.replace(live, self.breakage.halve(group, error))
            return
        if live not in self.pool.lives:
            self.pool.add(live)

    def take_in_again(self, live: Live) -> None:
        """Let a cohort of trials that others have left train here; a new one may join its kind."""
        if any(live.cohort.iterations) or live.is_suspect:
            self.pool.add(live)
        else:
            self._group(list(live.running.values()))

    def replace(self, old: Live, new: Sequence[Live]) -> None:
        """Put cohorts in the place of one that has raised; those who fit no more have ended."""
        for live in new:
            self.pool.add(live)
        self.openers = [
            (trial, live)
            for trial, _ in self.openers
            for live in self.pool.training
            if trial.member.number in live.running
        ]
        if self.turn is old:
            self.turn = None
            self._leave(self.waiting)

    def _leave(self, trials: list[RunningTrial]) -> None:
        """Let trials that waited for a cohort be trained without it."""
        self.waiting = []
        self._group(trials)

    def _size(self, leader: Member, signature: Hashable) -> int:
        """Slots of a leader's cohort."""
        return min(self._wanted(leader), self.breakage.most(signature))

    def _wanted(self, leader: Member) -> int:
        """The same if there is room for it."""
        if self.cohort_size is not None:
            return self.cohort_size
        pace = self._pace(leader)
        most = self._generation(pace.size)
        if self.budget.timeout is None:
            return most
        rounds = self.problem.rounds_per_epoch * int(leader.params.get("epochs") or 1)
        share = max(ROUND_SHARE, COHORT_SHARE / rounds)
        return max(1, min(most, int(share * self.budget.timeout / pace.round)))

    def _pace(self, leader: Member) -> Pace:
        return measured_pace(self.problem, leader, self.problem.cohort_size(leader))

    def _generation(self, most: int) -> int:
        """So many trials, or fewer so that the study learns from its results now and then."""
        trials = self.budget.n_trials
        return most if trials is None else min(most, math.ceil(trials / GENERATIONS))
