"""Population-based training in the stacked engine."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import logging
import math
from typing import Any
from typing import ClassVar

import optuna
from optuna.samplers import BaseSampler

from optuna_nnhp.search.population import PARENT
from optuna_nnhp.search.population import POPULATION
from optuna_nnhp.search.population import SLOT
from optuna_nnhp.search.population import PopulationSampler
from optuna_nnhp.study.cohort_runs import CohortRun
from optuna_nnhp.study.lockstep import ROOT
from optuna_nnhp.study.lockstep import SCHEDULE
from optuna_nnhp.study.lockstep import SynchronousTuner
from optuna_nnhp.study.lockstep import noted
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.training.segments import resume_from

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

SIZE, MIN_SIZE, GENERATIONS = 16, 4, 10

Schedule = list[tuple[int, dict[str, Any], bool]]


@dataclass
class PopulationPolicy(SynchronousTuner):
    """Trains one population after the other.

    A population is one cohort. Every generation of every member is a trial; at its end the worst
    members go on from copies of the best, with values that are moved a little. A copy is an index
    into the stack. What cannot change while a network trains is inherited, and what is static all
    members have in common: it comes from the population's leader, which the wrapped sampler
    proposes (the default configuration in a new study).

    Args:
        size:
            Members; if None as many as the budget has room for, 16 at most.
        generations:
            Parts into which a trial's budget is cut.
    """

    size: int | None = None
    generations: int = GENERATIONS
    schedules: dict[int, tuple[int, Schedule]] = field(default_factory=dict)  # root and course
    method: ClassVar[str] = "population"

    def _train_group(self, base: BaseSampler) -> None:
        """Train a population through all its generations."""
        count = len(self.study.get_trials(deepcopy=False))
        self.schedules.clear()
        self._take_up({"name": f"{count}@{self.lease.worker}", "count": count}, base)
        sampler = self.study.sampler
        assert isinstance(sampler, PopulationSampler)
        leader = self._lead()
        if leader is None or not self._stacks(leader):
            return
        sampler.size, self.last = self._shape(leader)
        trials = [leader, *self._follow(leader, sampler.size - 1)]
        sampler.size = self.full = len(trials)
        for slot, trial in enumerate(trials):
            trial.trial.set_user_attr(POPULATION, self.name)  # an enqueued one has it not
            trial.trial.set_user_attr(SLOT, slot)
            self._begin(trial, trial.member.number, [(0, self._values(trial), False)])
        run = self._open(trials, [trial.member for trial in trials])
        self.last = min(self.last, self._rounds(run))
        names, moving = self.problem.space.keys(), self.problem.mutable_names()
        said = ", ".join(sorted(names - moving)) or "nothing"
        _logger.log(
            logging.DEBUG if self.is_logged else logging.INFO,
            f"A population of {len(trials)} trains {self.last} generations; moved are "
            f"{', '.join(sorted(moving)) or 'none'}; inherited: {said}.",
        )
        self.is_logged = True
        self._train_generations(run, 1)

    def _take_up(self, loop: Mapping[str, Any], base: BaseSampler) -> None:
        self.name, self.count = str(loop["name"]), int(loop["count"])
        self.full = int(loop.get("size") or self.size or SIZE)
        self.study.sampler = PopulationSampler(
            size=self.full,
            base=base,
            inherited=self.problem.space.keys() - self.problem.mutable_names(),
            population=self.name,
            seed=(self.problem.seed + self.count + int(loop.get("generation", 0))) % 2**32,
        )

    def _loop_facts(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "name": self.name,
            "count": self.count,
            "size": self.full,
            "generation": self.generation,
            "last": self.last,
            "courses": [[n, root, noted(course)] for n, (root, course) in self.schedules.items()],
        }

    def _resume(
        self, run: CohortRun, others: Sequence[RunningTrial], loop: Mapping[str, Any]
    ) -> None:
        generation, self.last = int(loop["generation"]), int(loop["last"])
        self.schedules = {
            number: (root, [(begin, values, fresh) for begin, values, fresh in course])
            for number, root, course in loop["courses"]
        }
        if run.running:
            numbers = [member.number for member in run.cohort.members]
            run.cohort.select([p for p, number in enumerate(numbers) if number in run.running])
            for trial in others:
                self._refuse(trial, "killed")
        elif generation >= self.last:  # who has begun since is of the next population
            for trial in others:
                self._refuse(trial, "killed")
            return
        else:  # all have ended, and their children have begun
            self.generation = generation
            if not self._next_generation(run, self.full, others):
                return
            generation += 1
        self._train_generations(run, generation)

    def _train_generations(self, run: CohortRun, first: int) -> None:
        """Train a population from the beginning, or the middle, of a generation on."""
        rounds = self._rounds(run)
        for generation in range(first, self.last + 1):
            self.generation = generation
            self._save()
            if not self._train_generation(run, math.ceil(rounds * generation / self.last)):
                return
            if generation == self.last or self._is_over():
                return
            if not self._next_generation(run, self.full):
                return

    def _shape(self, leader: RunningTrial) -> tuple[int, int]:
        """Members and generations, by what is left of the budget."""
        left = self.source.left()
        wanted = self.size or SIZE
        if self.size is None and left is not None:
            wanted = min(SIZE, max(MIN_SIZE, (left + 1) // self.generations))
        fitting = self._that_fit(leader, wanted) if self.size is None else wanted
        size = max(2, fitting)
        if left is None:
            return size, self.generations
        return size, max(1, min(self.generations, (left + 1) // size))

    def _values(self, trial: RunningTrial) -> dict[str, Any]:
        """What can change, as the trial has it."""
        moving = self.problem.mutable_names()
        return {name: v for name, v in trial.trial.params.items() if name in moving}

    def _begin(self, trial: RunningTrial, root: int, course: Schedule) -> None:
        """Note where a trial comes from."""
        number = trial.member.number
        trial.member = replace(trial.member, seed=root)
        self.schedules[number] = root, course
        trial.trial.set_user_attr(ROOT, root)
        trial.trial.set_user_attr(SCHEDULE, noted(course))

    def _train_generation(self, run: CohortRun, end: int) -> bool:
        """Train all members to the end of a generation and tell; whether they can go on."""
        cohort = run.cohort
        # A language model has no epochs, and its evaluation is long.
        stride = self.problem.rounds_per_epoch if cohort.task.can_append else end
        while cohort.rounds_done[0] < end:
            scores = self._train_to(run, min(end, cohort.rounds_done[0] + stride))
            if scores is None:
                if not self.budget.released:
                    self._cut_short(run)
                return False
            evaluated = [run.running[cohort.members[place].number] for place in scores.indices]
            for i, trial in enumerate(evaluated):
                trial.add_scores(scores, i)
            self.judge.report(run, evaluated)
            if self.budget.released:
                return False
            self._save_if_due()
        self._save()  # their children go on from here
        causes = {n: "diverged" if t.has_diverged else "finished" for n, t in run.running.items()}
        self._end_trials(run, causes)
        return "finished" in causes.values()

    def _next_generation(
        self, run: CohortRun, size: int, begun: Sequence[RunningTrial] = ()
    ) -> bool:
        """Ask for the members' next trials and let them go on; whether there are any.

        Some may have begun already, before their worker died.
        """
        cohort, left = run.cohort, self.source.left()
        missing = size - len(begun)
        asked = [*begun, *self._ask(missing if left is None else min(missing, left))]
        places = {member.number: place for place, member in enumerate(cohort.members)}
        trials = list[RunningTrial]()
        for trial in asked:
            if trial.is_enqueued:  # by somebody who wants these values from the beginning
                self.deferred.append(trial)
            elif trial.trial.user_attrs.get(PARENT) in places:
                trials.append(trial)
            else:  # another process has ended the member's last trial
                self._refuse(trial, "interrupted")
        parents = [trial.trial.user_attrs[PARENT] for trial in trials]
        for trial, parent in zip(trials, parents, strict=True):
            root, course = self.schedules[parent]
            values = self._values(trial)
            if values != course[-1][1]:
                course = [*course, (cohort.rounds_done[0], values, False)]
            self._begin(trial, root, course)
        if not trials:
            return False
        with self.timing("bookkeeping"):
            resume_from(cohort, [places[p] for p in parents], [trial.member for trial in trials])
            cohort.reset_best()
        run.running = {trial.member.number: trial for trial in trials}
        return True
