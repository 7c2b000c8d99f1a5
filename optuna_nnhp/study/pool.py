"""The cohorts that are being trained, and who is next: time is shared fairly between them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from dataclasses import field
import math

from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member


@dataclass(eq=False)
class Live:
    """A cohort in training with the trials that are its members.

    Args:
        cohort:
            The cohort.
        signature:
            What its trials have in common.
        leader:
            The first of them.
        running:
            The trials by number.
        slots:
            How many members it has when it is full.
        invited:
            Followers that it may still ask for, until another leader is asked.
        until:
            Clock at which it asks for no more, seconds; so that one signature cannot eat the
            whole time.
        clock:
            Work so far, in proportion to its members' claims; the cohort with the least is next.
        rounds:
            Turns it has had.
        reported_at:
            When its running trials were last reported, seconds.
        is_filled:
            Whether free slots are filled with new members; else its stack is what its members
            take, and no more.
        suspect_until:
            Rounds after which it is beyond what a cohort that it was a part of has raised at.
        seconds:
            How long it has trained.
        is_scored:
            Whether it has been evaluated.
    """

    cohort: Cohort
    signature: Hashable
    leader: Member
    running: dict[int, RunningTrial]
    slots: int
    invited: float = 0
    until: float = math.inf
    clock: float = 0.0
    rounds: int = 0
    reported_at: float = 0.0
    is_filled: bool = False
    suspect_until: int = 0
    seconds: float = 0.0
    is_scored: bool = False

    @property
    def is_suspect(self) -> bool:
        """Whether it may raise what a larger cohort has raised."""
        return bool(self.running) and max(self.cohort.done, default=0) < self.suspect_until

    @property
    def free(self) -> int:
        """Slots without a member."""
        return max(0, self.slots - len(self.running))


@dataclass
class Pool:
    """The cohorts in training.

    Attributes:
        lives: They.
        used: Seconds times members, of all training so far.
        offered: Seconds times slots.

    Example:
        >>> Pool().occupancy
        1.0
    """

    lives: list[Live] = field(default_factory=list)
    used: float = 0.0
    offered: float = 0.0

    def add(self, live: Live) -> None:
        """Let a new cohort take part, from now on."""
        live.clock = min((other.clock for other in self.lives), default=0.0)
        self.lives.append(live)

    def next(self) -> Live | None:
        """The cohort that has had the least time, suspects first; None if there is none."""
        self.lives = [live for live in self.lives if live.running]
        return min(self.lives, key=lambda live: (not live.is_suspect, live.clock), default=None)

    def note(self, live: Live, members: int, seconds: float, work: float) -> None:
        """Note that a cohort has trained.

        Args:
            live:
                The cohort.
            members:
                How many members it had.
            seconds:
                How long.
            work:
                How much it computed. It is charged for this and not for seconds, so that the
                same seed gives the same study.
        """
        # A trial's claim grows with the rounds that it has survived, so that every rung of
        # successive halving has about the same time, and good trials come to their end.
        live.clock += work / sum(1 + done for done in live.cohort.done)
        live.rounds += 1
        slots = max(members, live.slots) if live.is_filled else members
        self.used += seconds * members
        self.offered += seconds * slots

    def with_signature(self, signature: Hashable, most: float = math.inf) -> Live | None:
        """The cohort that trials with this signature can join, if it has fewer than `most`."""
        for live in self.lives:
            can_join = live.running and live.cohort.joinable and not live.is_suspect
            if live.signature == signature and can_join and len(live.running) < most:
                return live
        return None

    @property
    def training(self) -> list[Live]:
        """The cohorts that have members."""
        return [live for live in self.lives if live.running]

    @property
    def alive(self) -> int:
        """Trials in training."""
        return sum(len(live.running) for live in self.lives)

    @property
    def occupancy(self) -> float:
        """Members over slots, the mean over the time of training."""
        return self.used / self.offered if self.offered else 1.0
