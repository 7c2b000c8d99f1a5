"""The cohorts that are being trained, and who is next: time is shared fairly between them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from dataclasses import field
import math

from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member


@dataclass(eq=False)
class CohortRun:
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
        quota:
            Followers that it may still ask for, until another leader is asked.
        deadline:
            Clock at which it asks for no more, seconds; so that one signature cannot eat the
            whole time.
        virtual_time:
            Work so far, in proportion to its members' claims; the cohort with the least is next.
        rounds:
            Turns it has had.
        last_report:
            When its running trials were last reported, seconds.
        refills:
            Whether free slots are filled with new members; else its stack is what its members
            take, and no more.
        quarantined_until:
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
    quota: float = 0
    deadline: float = math.inf
    virtual_time: float = 0.0
    rounds: int = 0
    last_report: float = 0.0
    refills: bool = False
    quarantined_until: int = 0
    seconds: float = 0.0
    is_scored: bool = False

    def dissolve(self) -> list[RunningTrial]:
        """Give up the cohort and return its trials: its memory is needed for smaller ones."""
        trials, self.running = list(self.running.values()), {}
        del self.cohort
        return trials

    @property
    def is_quarantined(self) -> bool:
        """Whether it may raise what a larger cohort has raised."""
        return (
            bool(self.running) and max(self.cohort.rounds_done, default=0) < self.quarantined_until
        )

    @property
    def free(self) -> int:
        """Slots without a member."""
        return max(0, self.slots - len(self.running))


@dataclass
class FairQueue:
    """The cohorts in training.

    Attributes:
        lives: They.
        used: Seconds times members, of all training so far.
        offered: Seconds times slots.

    Example:
        >>> FairQueue().occupancy
        1.0
    """

    runs: list[CohortRun] = field(default_factory=list)
    used: float = 0.0
    offered: float = 0.0

    def add(self, run: CohortRun) -> None:
        """Let a new cohort take part, from now on."""
        run.virtual_time = min((other.virtual_time for other in self.runs), default=0.0)
        self.runs.append(run)

    def next(self) -> CohortRun | None:
        """The cohort that has had the least time, suspects first; None if there is none."""
        self.runs = [run for run in self.runs if run.running]
        return min(
            self.runs, key=lambda run: (not run.is_quarantined, run.virtual_time), default=None
        )

    def note(self, run: CohortRun, members: int, seconds: float, work: float) -> None:
        """Note that a cohort has trained.

        Args:
            run:
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
        run.virtual_time += work / sum(1 + done for done in run.cohort.rounds_done)
        run.rounds += 1
        slots = max(members, run.slots) if run.refills else members
        self.used += seconds * members
        self.offered += seconds * slots

    def with_signature(self, signature: Hashable, most: float = math.inf) -> CohortRun | None:
        """The cohort that trials with this signature can join, if it has fewer than `most`."""
        for run in self.runs:
            can_join = run.running and run.cohort.can_append and not run.is_quarantined
            if run.signature == signature and can_join and len(run.running) < most:
                return run
        return None

    @property
    def training(self) -> list[CohortRun]:
        """The cohorts that have members."""
        return [run for run in self.runs if run.running]

    @property
    def alive(self) -> int:
        """Trials in training."""
        return sum(len(run.running) for run in self.runs)

    @property
    def occupancy(self) -> float:
        """Members over slots, the mean over the time of training."""
        return self.used / self.offered if self.offered else 1.0
