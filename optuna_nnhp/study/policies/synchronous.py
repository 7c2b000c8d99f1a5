"""Synchronous groups: trials that share a leader's static values, and start and fail together."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import logging
import math
from typing import Any
from typing import ClassVar

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from optuna_nnhp.search.follower import FollowerSampler
from optuna_nnhp.study.checkpoints import Checkpoint
from optuna_nnhp.study.failures import UNLIMITED
from optuna_nnhp.study.failures import free_frames
from optuna_nnhp.study.grid import estimate_seconds
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.policies import PolicyContext
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.device import is_out_of_memory

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

TIME_SHARE = 0.8  # a group may be expected to take this share of the seconds that are left


class SynchronousPolicy(ABC):
    """Train one group of trials after the other, each as one cohort from its start to its end.

    Nothing is pruned: the method itself replaces bad trials, or moves their values. A cohort that
    raises an error fails as a whole, and the next one is smaller if memory was short.

    Args:
        context:
            What it works with.

    Attributes:
        deferred: Trials that somebody enqueued; each leads a group of its own.
        method: Name of the method.
    """

    separable = False
    method: ClassVar[str]

    def __init__(self, context: PolicyContext) -> None:
        self.source, self.finisher = context.source, context.finisher
        self.queue, self.recovery = context.queue, context.recovery
        self.study, self.problem, self.budget = context.study, context.problem, context.budget
        self.base = self.source.sampler
        self.wait_for_storage, self.save = context.wait_for_storage, context.save
        self.sampler = self.base  # of the group in training
        self.deferred: list[RunningTrial] = []
        self.claimed: dict[str, Sequence[FrozenTrial]] = {}
        self.max_members = UNLIMITED  # of a group, once memory had no room for more
        self.is_logged = False  # whether a group has started

    # --- What each method does ---

    @abstractmethod
    def _begin_group(self) -> BaseSampler:
        """Forget the group before; return the sampler of the next group's trials."""

    @abstractmethod
    def _start_group(self, leader: RunningTrial) -> CohortRun | None:
        """Ask for the other trials of a leader's group and build its cohort."""

    @abstractmethod
    def _load_state_dict(self, state: Mapping[str, Any]) -> BaseSampler:
        """Load the state of a group; return the sampler of its trials."""

    @abstractmethod
    def _resume(self, run: CohortRun, others: Sequence[RunningTrial]) -> CohortRun | None:
        """Continue a group from its checkpoint.

        Args:
            run:
                The group; those of its trials that have not ended run here.
            others:
                Trials that have started since the checkpoint.

        Returns:
            The group; None if there is nothing left to train.
        """

    @abstractmethod
    def before_round(self, run: CohortRun) -> None:
        """Set the next evaluation of a group."""

    @abstractmethod
    def decide(self, run: CohortRun, scores: Scores) -> Mapping[int, TrialOutcome]:
        """Return which trials of a group end after an evaluation, by their numbers."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the group in training, as JSON."""

    def after_round(self, run: CohortRun) -> None:  # noqa: B027
        """Do nothing, unless a method continues a group with new trials."""

    # --- What all have in common ---

    def admit(self) -> None:
        """Continue a group that was taken over, or start a new one, if none is in training."""
        if self.queue.training or self.budget.is_over() or not self.wait_for_storage():
            return
        while self.claimed and not self.queue.training:
            worker = next(iter(self.claimed))
            self._add_group(self._restore_group(worker, self.claimed.pop(worker)))
        if not self.queue.training and self.has_more_trials():
            self.sampler = self._begin_group()
            if leader := self._ask_leader():
                self._add_group(self._start_group(leader))

    def _add_group(self, run: CohortRun | None) -> None:
        """Start to train a group, and write a checkpoint."""
        if run is not None:
            self.queue.add(run)
            self.save()

    def ask_ahead(self, is_over: Callable[[], bool]) -> None:  # noqa: B027
        """Do nothing: a group starts with all its members."""

    def has_more_trials(self) -> bool:
        """Return whether another group can start."""
        if self.budget.is_over() or self.source.is_stopped:
            return False
        return bool(self.claimed or self.deferred) or self.source.n_trials_left() != 0

    def unstarted_trials(self) -> Sequence[RunningTrial]:
        """Return the trials that were to lead groups."""
        return self.deferred

    def on_error(self, run: CohortRun, trials: Sequence[RunningTrial], error: Exception) -> None:
        """Fail all trials of a group whose training raised an error."""
        self._fail_group(trials, error, run.slots)

    def _fail_group(self, trials: Sequence[RunningTrial], error: Exception, members: int) -> None:
        """End trials whose cohort raised an error; it is one failure."""
        if is_out_of_memory(error):
            self.max_members = max(1, members // 2)
        for i, running in enumerate(trials):
            self.finisher.fail(running, error, counts=i == len(trials) - 1)
        free_frames(error)

    def restore(self, claimed: Mapping[str, Sequence[FrozenTrial]]) -> None:
        """Remember groups that were taken over; `admit` continues one after the other."""
        for worker, trials in claimed.items():
            self.claimed[worker] = [*self.claimed.get(worker, ()), *trials]

    def _restore_group(self, worker: str, trials: Sequence[FrozenTrial]) -> CohortRun | None:
        """Return a group as a worker's checkpoint has it."""
        checkpoint = self.recovery.checkpoint(worker)
        if checkpoint and checkpoint.cohorts and checkpoint.loop.get("method") == self.method:
            return self._from_checkpoint(checkpoint, trials)
        for trial in trials:  # of a group that had hardly begun
            self._end_untrained(self.recovery.resume_trial(trial, 0), TrialOutcome.KILLED)
        return None

    def _from_checkpoint(
        self, checkpoint: Checkpoint, trials: Sequence[FrozenTrial]
    ) -> CohortRun | None:
        kept = checkpoint.cohorts[0]
        known = {facts["number"]: facts for facts in kept.facts["running"]}
        self.sampler, steps = self._load_state_dict(checkpoint.loop), kept.steps_done
        begun = [
            running
            for trial in trials
            for running in self.recovery.resume_trial(
                trial, steps.get(trial.number, 0), self.sampler
            )
        ]
        try:
            cohort = self.recovery.cohort(kept)
        except ValueError as error:
            _logger.warning(f"A group ends, because its checkpoint cannot be used: {error}")
            self._end_untrained(begun, TrialOutcome.KILLED)
            return None
        except Exception as error:  # whatever it is, it becomes an outcome
            self._fail_group(begun, error, len(kept.steps_done))
            return None
        if not begun:
            return None
        members = {member.number: member for member in cohort.members}
        own = {r.member.number: r for r in begun if r.member.number in known}
        for number, running in own.items():
            running.load_state_dict(known[number])
            running.member = members[number]
        run = CohortRun(cohort, begun[0].signature, cohort.members[0], own, len(members))
        return self._resume(run, [r for r in begun if r.member.number not in own])

    def _ask_leader(self) -> RunningTrial | None:
        """Ask for a leader; return None if it cannot lead a group.

        Raises:
            ValueError: If no network so far can be trained in a group.
        """
        asked = [self.deferred.pop(0)] if self.deferred else self._ask_trials(1)
        if not asked or self.problem.is_stackable(asked[0].member):
            return asked[0] if asked else None
        text = (
            "The methods 'gradient' and 'population' must have networks that can be trained as "
            "one stack, but this one can only train alone; the log says why."
        )
        if not self.is_logged:
            raise ValueError(text)
        _logger.warning(f"Trial {asked[0].member.number} failed: {text}")
        self._end_untrained(asked, TrialOutcome.ERROR)
        return None

    def _ask_trials(
        self, count: int, leader: Member | None = None, sampler: BaseSampler | None = None
    ) -> list[RunningTrial]:
        """Ask for trials; wait while the storage is unavailable, and ask for the rest.

        A group must have all its members to continue.
        """
        trials = list[RunningTrial]()
        while True:
            wanted = max(0, count - len(trials))
            trials += self.source.ask(wanted, leader, sampler=sampler or self.sampler)
            if not self.source.ask_failed or self.source.storage.is_available:
                return trials
            if not self.wait_for_storage():
                return trials

    def _ask_followers(self, leader: RunningTrial, count: int) -> list[RunningTrial]:
        """Ask for trials with a leader's static values and budget."""
        left, epochs = self.source.n_trials_left(), leader.trial.params.get("epochs")
        pinned = FollowerSampler(self.sampler, lambda n, value: epochs if n == "epochs" else value)
        asked = self._ask_trials(
            count if left is None else min(count, left), leader.member, pinned
        )
        self.deferred += [trial for trial in asked if trial.signature != leader.signature]
        return [trial for trial in asked if trial.signature == leader.signature]

    def _end_untrained(self, trials: Iterable[RunningTrial], outcome: TrialOutcome) -> None:
        """End trials that have not trained."""
        self.finisher.fail_unstarted(list(trials), outcome)

    def _build_cohort(
        self, trials: Sequence[RunningTrial], members: Sequence[Member]
    ) -> CohortRun | None:
        """Build a cohort of these members, some of which may be no trials; None if it raises."""
        running = {trial.member.number: trial for trial in trials}
        try:
            cohort = self.problem.cohort(members)
        except Exception as error:  # whatever it is, it becomes an outcome
            self._fail_group(trials, error, len(members))
            return None
        return CohortRun(cohort, trials[0].signature, trials[0].member, running, len(members))

    def _log_group(self, text: str) -> None:
        """Log what a group does: as information for the first group, else for debugging."""
        _logger.log(logging.DEBUG if self.is_logged else logging.INFO, text)
        self.is_logged = True

    def _max_group_size(self, leader: RunningTrial, most: int) -> int:
        """Return how many members a group may have by memory and time."""
        fitting = min(most, self.max_members, self.problem.cohort_size(leader.member))
        if self.budget.timeout is None:
            return fitting
        each = estimate_seconds(self.problem, leader.member)
        return min(fitting, int(TIME_SHARE * self.budget.seconds_left / each))


def rounds_of(cohort: Cohort) -> int:
    """Return the rounds of a cohort's whole budget."""
    return math.ceil(max(cohort.total_steps) / cohort.batches.per_round)
