"""Population-based training in the stacked engine."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import logging
import math
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from optuna_nnhp.search.population import PARENT
from optuna_nnhp.search.population import POPULATION
from optuna_nnhp.search.population import SLOT
from optuna_nnhp.search.population import PopulationSampler
from optuna_nnhp.study.lockstep import COURSE
from optuna_nnhp.study.lockstep import ROOT
from optuna_nnhp.study.lockstep import LockstepScheduler
from optuna_nnhp.study.lockstep import noted
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.storage import worker_name
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.course import go_on

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

SIZE, SMALLEST, GENERATIONS = 16, 4, 10

Course = list[tuple[int, dict[str, Any], bool]]


@dataclass
class PopulationScheduler(LockstepScheduler):
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
    courses: dict[int, tuple[int, Course]] = field(default_factory=dict)  # root and course

    def _train_group(self, base: BaseSampler) -> None:
        """Train a population through all its generations."""
        count = len(self.study.get_trials(deepcopy=False))
        names, moving = self.problem.space.keys(), self.problem.changeable()
        name = f"{count}@{worker_name()}"
        self.courses.clear()
        self.study.sampler = sampler = PopulationSampler(
            size=self.size or SIZE,
            base=base,
            inherited=names - moving,
            population=name,
            seed=(self.problem.seed + count) % 2**32,
        )
        leader = self._lead()
        if leader is None:
            return
        if not self._stacks(leader):
            return
        sampler.size, generations = self._shape(leader)
        trials = [leader, *self._follow(leader, sampler.size - 1)]
        sampler.size = len(trials)
        for slot, trial in enumerate(trials):
            trial.trial.set_user_attr(POPULATION, name)  # an enqueued one comes from elsewhere
            trial.trial.set_user_attr(SLOT, slot)
            self._begin(trial, trial.member.number, [(0, self._values(trial), False)])
        live = self._open(trials, [trial.member for trial in trials])
        rounds = self._rounds(live)
        generations = min(generations, rounds)
        said = ", ".join(sorted(names - moving)) or "nothing"
        _logger.log(
            logging.DEBUG if self.is_said else logging.INFO,
            f"A population of {len(trials)} trains {generations} generations; moved are "
            f"{', '.join(sorted(moving)) or 'none'}; inherited: {said}.",
        )
        self.is_said = True
        for generation in range(1, generations + 1):
            if not self._train_generation(live, math.ceil(rounds * generation / generations)):
                return
            if generation == generations or self._is_over():
                return
            if not self._next_generation(live, sampler.size):
                return

    def _shape(self, leader: RunningTrial) -> tuple[int, int]:
        """Members and generations, by what is left of the budget."""
        left = self.asker.left()
        wanted = self.size or SIZE
        if self.size is None and left is not None:
            wanted = min(SIZE, max(SMALLEST, (left + 1) // self.generations))
        fitting = self._that_fit(leader, wanted) if self.size is None else wanted
        size = max(2, fitting)
        if left is None:
            return size, self.generations
        return size, max(1, min(self.generations, (left + 1) // size))

    def _values(self, trial: RunningTrial) -> dict[str, Any]:
        """What can change, as the trial has it."""
        moving = self.problem.changeable()
        return {name: v for name, v in trial.trial.params.items() if name in moving}

    def _begin(self, trial: RunningTrial, root: int, course: Course) -> None:
        """Note where a trial comes from."""
        number = trial.member.number
        trial.member = replace(trial.member, seed=root)
        self.courses[number] = root, course
        trial.trial.set_user_attr(ROOT, root)
        trial.trial.set_user_attr(COURSE, noted(course))

    def _train_generation(self, live: Live, end: int) -> bool:
        """Train all members to the end of a generation and tell; whether they can go on."""
        cohort, diverged = live.cohort, set[int]()
        # A language model has no epochs, and its evaluation is long.
        stride = self.problem.rounds_per_epoch if cohort.task.joinable else end
        while cohort.done[0] < end:
            scores = self._train_to(live, min(end, cohort.done[0] + stride))
            if scores is None:
                self._cut_short(live)
                return False
            evaluated = [live.running[cohort.members[place].number] for place in scores.places]
            for i, trial in enumerate(evaluated):
                trial.take(scores, i)
                if scores.ended[i] == "diverged":
                    diverged.add(trial.member.number)
            self._report(live, evaluated)
        causes = {n: "diverged" if n in diverged else "finished" for n in live.running}
        self._end_trials(live, causes)
        return len(diverged) < len(causes)

    def _next_generation(self, live: Live, size: int) -> bool:
        """Ask for the members' next trials and let them go on; whether there are any."""
        cohort, left = live.cohort, self.asker.left()
        with self.timing("asking"):
            asked = self.asker.ask(size if left is None else min(size, left))
        places = {member.number: place for place, member in enumerate(cohort.members)}
        trials = list[RunningTrial]()
        for trial in asked:
            if trial.is_enqueued:  # by somebody who wants these values from the beginning
                self.parked.append(trial)
            elif trial.trial.user_attrs[PARENT] in places:
                trials.append(trial)
            else:  # another process has ended the member's last trial
                self._refuse(trial, "interrupted")
        parents = [trial.trial.user_attrs[PARENT] for trial in trials]
        for trial, parent in zip(trials, parents, strict=True):
            root, course = self.courses[parent]
            values = self._values(trial)
            if values != course[-1][1]:
                course = [*course, (cohort.done[0], values, False)]
            self._begin(trial, root, course)
        if not trials:
            return False
        with self.timing("bookkeeping"):
            go_on(cohort, [places[p] for p in parents], [trial.member for trial in trials])
            cohort.forget_best()
        live.running = {trial.member.number: trial for trial in trials}
        return True
