"""Trials in lockstep: groups that share a leader's static values, begin and go on together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import functools
import math
from typing import Any
from typing import ClassVar

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from optuna_nnhp.search.follower import FollowerSampler
from optuna_nnhp.study.checkpoints import Checkpoint
from optuna_nnhp.study.cohort_runs import CohortRun
from optuna_nnhp.study.failure_bisector import UNLIMITED
from optuna_nnhp.study.failures import CohortError
from optuna_nnhp.study.failures import free_frames
from optuna_nnhp.study.grid import estimate_seconds
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.study.running_trial import params_for_retraining
from optuna_nnhp.study.tuner import MAX_STORAGE_WAIT
from optuna_nnhp.study.tuner import Tuner
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.device import is_out_of_memory
from optuna_nnhp.training.segments import Segment

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

SCHEDULE, ROOT = (
    "schedule",
    "root",
)  # attributes: see `noted`; whose first weights a trial began with
TIME_SHARE = 0.8  # of the seconds that are left: what a group may be expected to take


@dataclass
class SynchronousTuner(Tuner):
    """Runs a study group after group, each of them one cohort from beginning to end.

    Nothing is pruned: who is no good is replaced, or moved, by the method itself.

    Attributes:
        is_said: Whether the log says already what is moved and what is not.
        parked: Trials that were enqueued by somebody and lead the next groups.
        largest: Members that a group may have, once memory had no room for more.
        gave_up: Whether the storage has been waited for in vain, and not answered since.
        method: Its name.
    """

    is_logged: bool = False
    deferred: list[RunningTrial] = field(default_factory=list)
    max_members: int = UNLIMITED
    storage_lost: bool = False
    uses_portfolio: ClassVar[bool] = False
    separable: ClassVar[bool] = False
    method: ClassVar[str]

    def _train_all(self) -> None:
        sampler = self.study.sampler
        try:
            self._go_on_with_groups(sampler)
            while not self._is_over() and self._answers():
                if self.recovery.released():
                    self._go_on_with_groups(sampler)
                    continue
                self._train_one(lambda: self._train_group(sampler), sampler)
        finally:
            cause = "interrupted" if self.budget.interrupted else "timeout"
            for trial in [] if self.budget.released else self.deferred:
                self._refuse(trial, cause)

    def _train_one(self, train: Callable[[], None], base: BaseSampler) -> None:
        """Train a group; those whose cohort raises fail together, and the next one is smaller."""
        try:
            train()
        except CohortError as error:
            assert isinstance(error.__cause__, Exception)
            self._break_group(error.__cause__)
        finally:
            self.study.sampler = base
            if not self.budget.released:
                self.queue.runs.clear()  # a group's stack is needed no more

    def _enter(self, run: CohortRun) -> None:
        """Let a group train: alone, for a checkpoint has the loop's facts of one group."""
        self.queue.runs.clear()
        self.queue.add(run)

    def _break_group(self, error: Exception) -> None:
        free_frames(error)
        if is_out_of_memory(error):
            self.max_members = max(1, self.tried // 2)
        group = [running for run in self.queue.runs for running in run.running.values()]
        self._fail_group(group, error)

    def _fail_group(self, group: Sequence[RunningTrial], error: Exception) -> None:
        """End trials whose cohort raises; it is one failure."""
        for place, running in enumerate(group):
            self.ends.fail(running, error, counts=place == len(group) - 1)

    def _go_on_with_groups(self, base: BaseSampler) -> None:
        """Go on with the groups of dead workers, of which there are checkpoints."""
        for worker, trials in self.recovery.claim().items():
            if self.budget.released:  # the group that was cut short has the checkpoint
                break  # the others' trials are found by their attribute CHECKPOINT again
            checkpoint = self.recovery.checkpoint(worker)
            if checkpoint and checkpoint.cohorts and checkpoint.loop.get("method") == self.method:
                resume_from = functools.partial(self._go_on_with, checkpoint, trials, base)
                self._train_one(resume_from, base)
                continue
            for trial in trials:  # of a group that had hardly begun
                for running in self.recovery.begun(trial, 0):
                    self._refuse(running, "killed")
        self.recovery.forget()

    def _go_on_with(
        self, checkpoint: Checkpoint, trials: Sequence[FrozenTrial], base: BaseSampler
    ) -> None:
        """Train a group to its end from a checkpoint."""
        kept, loop = checkpoint.cohorts[0], checkpoint.loop
        known = {facts["number"]: facts for facts in kept.facts["running"]}
        self._take_up(loop, base)
        steps = kept.steps
        begun = [r for t in trials for r in self.recovery.begun(t, steps.get(t.number, 0))]
        try:
            cohort = self.recovery.cohort(kept)
        except ValueError as error:
            _logger.warning(f"A group ends, its checkpoint is of no use: {error}")
            for running in begun:
                self._refuse(running, "killed")
            return
        except Exception as error:  # whatever it is, it becomes an outcome
            self.tried = len(kept.steps)
            self._fail_group(begun, error)
            raise CohortError from error
        if not begun:
            return
        members = {member.number: member for member in cohort.members}
        own = {r.member.number: r for r in begun if r.member.number in known}
        for number, running in own.items():
            running.load_state_dict(known[number])
            running.member = members[number]
        run = CohortRun(cohort, begun[0].signature, cohort.members[0], own, len(members))
        self._enter(run)
        self._resume(run, [r for r in begun if r.member.number not in own], loop)

    @abstractmethod
    def _take_up(self, loop: Mapping[str, Any], base: BaseSampler) -> None:
        """Be the loop whose facts a checkpoint has."""

    @abstractmethod
    def _resume(
        self, run: CohortRun, others: Sequence[RunningTrial], loop: Mapping[str, Any]
    ) -> None:
        """Train a group to its end.

        Args:
            run:
                As its checkpoint has it; its trials that have not ended run here.
            others:
                Trials that had begun since.
            loop:
                What the loop noted.
        """

    @abstractmethod
    def _train_group(self, base: BaseSampler) -> None:
        """Ask for a group and train it; `base` proposes what the method leaves to others."""

    def _is_over(self) -> bool:
        stopped = self.budget.is_over() or self.study._stop_flag
        return stopped or (self.source.left() == 0 and not self.deferred)

    def _lead(self) -> RunningTrial | None:
        """Ask for a trial that is free in everything."""
        if self.deferred:
            return self.deferred.pop(0)
        asked = self._ask(1)
        return asked[0] if asked else None

    def _ask(self, count: int, leader: Member | None = None) -> list[RunningTrial]:
        """Ask for trials; while the storage is away wait for it, and ask for the rest.

        A group goes on with all its members, or it is another one.
        """
        trials = list[RunningTrial]()
        while True:
            with self.timing("asking"):
                trials += self.source.ask(max(0, count - len(trials)), leader)
            if not self.source.ask_failed or self.storage.is_available or not self._answers():
                return trials

    def _answers(self) -> bool:
        """Wait until the storage answers; whether it does. In vain it is waited for once only."""
        if self.storage.is_available:
            self.storage_lost = False
        elif not self.storage_lost:
            self.storage_lost = not self.storage.wait_until_available(
                MAX_STORAGE_WAIT, self.budget.is_over
            )
        return not self.storage_lost

    def _follow(self, leader: RunningTrial, count: int) -> list[RunningTrial]:
        """Ask for trials with a leader's static values and budget."""
        left = self.source.left()
        count = count if left is None else min(count, left)
        sampler, epochs = self.study.sampler, leader.trial.params.get("epochs")
        self.study.sampler = FollowerSampler(
            sampler, lambda name, value: epochs if name == "epochs" else value
        )
        try:
            asked = self._ask(count, leader.member)
        finally:
            self.study.sampler = sampler
        fitting = [trial for trial in asked if trial.signature == leader.signature]
        self.deferred += [trial for trial in asked if trial.signature != leader.signature]
        return fitting

    def _refuse(self, trial: RunningTrial, cause: str) -> None:
        """End a trial that has not trained."""
        trial.fail(self.study, self.problem, cause)
        self.source.running.pop(trial.member.number, None)

    def _stacks(self, leader: RunningTrial) -> bool:
        """Whether a leader's network can be trained in a group; else its trial fails.

        Raises:
            ValueError: If no network could so far.
        """
        if self.problem.is_stackable(leader.member):
            return True
        text = (
            "The methods 'gradient' and 'population' must have networks that can be trained as "
            "one stack, but this one can only train alone; the log says why."
        )
        if not self.is_logged:
            raise ValueError(text)
        _logger.warning(f"Trial {leader.member.number} failed: {text}")
        self._refuse(leader, "error")
        return False

    def _open(self, trials: Sequence[RunningTrial], members: Sequence[Member]) -> CohortRun:
        """Begin a cohort of these members, some of which may be no trials."""
        running = {trial.member.number: trial for trial in trials}
        self.tried = len(members)
        try:
            cohort = self.problem.cohort(members)
        except Exception as error:  # whatever it is, it becomes an outcome
            self._fail_group(trials, error)
            raise CohortError from error
        run = CohortRun(cohort, trials[0].signature, trials[0].member, running, len(members))
        self._enter(run)
        return run

    @staticmethod
    def _rounds(run: CohortRun) -> int:
        """Rounds of the whole budget."""
        return math.ceil(max(run.cohort.total_steps) / run.cohort.batches.per_round)

    def _that_fit(self, leader: RunningTrial, most: int) -> int:
        """How many members a group may have by memory and time."""
        fitting = min(most, self.max_members, self.problem.cohort_size(leader.member))
        if self.budget.timeout is None:
            return fitting
        each = estimate_seconds(self.problem, leader.member)
        return min(fitting, int(TIME_SHARE * self.budget.seconds_left / each))

    def _train_to(self, run: CohortRun, end: int) -> Scores | None:
        """Train everybody to a round and evaluate; None if time ran out."""
        cohort, members = run.cohort, len(run.cohort.members)
        while True:
            cohort.set_next_evaluation(end)
            before, work = cohort.iterations[0], cohort.step_flops
            scores, seconds = self._train_round(run)
            for running in run.running.values():
                running.trained += seconds
            self.queue.note(run, members, seconds, work * (cohort.iterations[0] - before))
            self.progress.show(self.source.finished, len(run.running), self.best_trials.best)
            if scores is not None or self.budget.is_over():
                return scores
            self._save_if_due()

    def _cut_short(self, run: CohortRun) -> None:
        """End all trials of a group as they stand."""
        cause = "interrupted" if self.budget.interrupted else "timeout"
        self._end_trials(run, dict.fromkeys(run.running, cause))

    def _end_trials(self, run: CohortRun, causes: Mapping[int, str]) -> None:
        with self.timing("bookkeeping"):
            super()._end_trials(run, causes)
            self.storage.flush_if_due()


def noted(course: Sequence[tuple[int, Mapping[str, Any], bool]]) -> list[list[Any]]:
    """A course as an attribute of a trial.

    Args:
        schedule:
            From which round on which values held, and whether the network began anew then.

    Example:
        >>> noted([(0, {"dropout": 0.1}, False)])
        [[0, {'dropout': 0.1}, False]]
    """
    return [[begin, dict(params), from_scratch] for begin, params, from_scratch in course]


def schedule_of(problem: Problem, trial: FrozenTrial) -> list[Segment]:
    """The course of a trial whose values changed while it trained; empty for all others.

    Args:
        problem:
            What was tuned.
        trial:
            A trial of its study.
    """
    attributes = trial.user_attrs
    params, root = params_for_retraining(trial), attributes.get(ROOT, trial.number)
    return [
        Segment(begin, problem.member(root, {**params, **changed}), from_scratch)
        for begin, changed, from_scratch in attributes.get(SCHEDULE, [])
    ]


def member_at_best_round(problem: Problem, trial: FrozenTrial) -> Member:
    """A trial with the values that it had at its best round; those decide what its network has.

    Args:
        problem:
            What was tuned.
        trial:
            A trial of its study that has a value.
    """
    best = round(trial.user_attrs.get("best_epoch", 0) * problem.rounds_per_epoch)
    stages = [stage for stage in schedule_of(problem, trial) if stage.begin < best]
    return stages[-1].member if stages else problem.member(trial.number, trial.params)
