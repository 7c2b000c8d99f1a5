"""Population-based training: bad trials continue from copies of good ones, with other values."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import math
from typing import Any

from optuna.samplers import BaseSampler

from optuna_nnhp.search.population import PARENT
from optuna_nnhp.search.population import POPULATION
from optuna_nnhp.search.population import SLOT
from optuna_nnhp.search.population import PopulationSampler
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.policies import PolicyContext
from optuna_nnhp.study.policies.synchronous import SynchronousPolicy
from optuna_nnhp.study.policies.synchronous import rounds_of
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.running import Schedule
from optuna_nnhp.training.cohort import Scores

SIZE, MIN_SIZE, GENERATIONS = 16, 4, 10


class PopulationPolicy(SynchronousPolicy):
    """Train one population after the other.

    A population is one cohort. Every generation of every member is a trial; at its end the worst
    members continue from copies of the best, with values that are moved a little. A copy is an
    index into the stack. Members inherit the values that cannot change while a network trains.
    All members have the static values of the population's leader, which the study's sampler
    proposes (the default configuration in a new study).

    Args:
        context:
            What it works with.
        size:
            Members; if None as many as the budget has room for, 16 at most.
        generations:
            Parts into which a trial's budget is cut.
    """

    method = "population"

    def __init__(
        self, context: PolicyContext, *, size: int | None = None, generations: int = GENERATIONS
    ) -> None:
        super().__init__(context)
        self.size, self.generations, self.worker = size, generations, context.worker
        # Of the population in training: its name, trials before it, members, generations, ...
        self.name, self.count, self.members = "", 0, size or SIZE
        self.generation, self.last_generation = 1, generations
        self.next_evaluation = 0  # round
        self.has_survivors = True  # whether a trial of this generation can be continued
        self.schedules: dict[int, tuple[int, Schedule]] = {}  # root and schedule, by number

    def _begin_group(self) -> BaseSampler:
        self.count = len(self.study.get_trials(deepcopy=False))
        self.name, self.members = f"{self.count}@{self.worker}", self.size or SIZE
        self.generation, self.next_evaluation, self.schedules = 1, 0, {}
        return self._make_sampler(self.members, 0)

    def _make_sampler(self, size: int, generation: int) -> PopulationSampler:
        return PopulationSampler(
            size=size,
            base=self.base,
            inherited=self.problem.space.keys() - self.problem.mutable_names(),
            population=self.name,
            seed=(self.problem.seed + self.count + generation) % 2**32,
        )

    def _start_group(self, leader: RunningTrial) -> CohortRun | None:
        sampler = self.sampler
        assert isinstance(sampler, PopulationSampler)
        members, self.last_generation = self._size_and_generations(leader)
        sampler.set_size(members)
        trials = [leader, *self._ask_followers(leader, members - 1)]
        self.members = len(trials)
        sampler.set_size(self.members)
        for slot, trial in enumerate(trials):
            trial.trial.set_user_attr(POPULATION, self.name)  # an enqueued trial lacks it
            trial.trial.set_user_attr(SLOT, slot)
            self._set_origin(trial, trial.member.number, [[0, self._mutable_values(trial), False]])
        run = self._build_cohort(trials, [trial.member for trial in trials])
        if run is None:
            return None
        self.last_generation = min(self.last_generation, rounds_of(run.cohort))
        names, moving = self.problem.space.keys(), self.problem.mutable_names()
        inherited = ", ".join(sorted(names - moving)) or "nothing"
        self._log_group(
            f"A population of {len(trials)} trains {self.last_generation} generations; moved are "
            f"{', '.join(sorted(moving)) or 'none'}; inherited: {inherited}."
        )
        return run

    def _size_and_generations(self, leader: RunningTrial) -> tuple[int, int]:
        """Return members and generations, by what is left of the budget."""
        left = self.source.n_trials_left()
        wanted = self.size or SIZE
        if self.size is None and left is not None:
            wanted = min(SIZE, max(MIN_SIZE, (left + 1) // self.generations))
        fitting = self._max_group_size(leader, wanted) if self.size is None else wanted
        size = max(2, fitting)
        if left is None:
            return size, self.generations
        return size, max(1, min(self.generations, (left + 1) // size))

    def _mutable_values(self, trial: RunningTrial) -> dict[str, Any]:
        """Return a trial's values of what can change while a network trains."""
        moving = self.problem.mutable_names()
        return {name: v for name, v in trial.trial.params.items() if name in moving}

    def _set_origin(self, trial: RunningTrial, root: int, schedule: Schedule) -> None:
        """Give a trial the first weights that it descends from, and the values since then."""
        trial.member = replace(trial.member, seed=root)
        trial.root, trial.schedule = root, schedule
        self.schedules[trial.member.number] = root, schedule

    # --- Training ---

    def _end_of_generation(self, run: CohortRun) -> int:
        """Return the round at which the present generation ends."""
        return math.ceil(rounds_of(run.cohort) * self.generation / self.last_generation)

    def before_round(self, run: CohortRun) -> None:
        """Have all members evaluated after an epoch, or at the generation's end."""
        cohort, end = run.cohort, self._end_of_generation(run)
        if cohort.rounds_done[0] >= self.next_evaluation:
            # A language model has no epochs, and its evaluation is long.
            stride = self.problem.rounds_per_epoch if cohort.task.can_append else end
            self.next_evaluation = min(end, cohort.rounds_done[0] + stride)
        cohort.set_next_evaluation(self.next_evaluation)

    def decide(self, run: CohortRun, scores: Scores) -> dict[int, TrialOutcome]:
        """End all trials when their generation is over."""
        self.finisher.report(run, run.add_scores(scores))
        is_over = run.cohort.rounds_done[0] >= self._end_of_generation(run)
        return self._generation_outcomes(run) if is_over and not self.budget.released else {}

    def _generation_outcomes(self, run: CohortRun) -> dict[int, TrialOutcome]:
        """Return the outcomes of a generation that is over."""
        self.save()  # the next generation continues from here
        outcomes = {
            number: TrialOutcome.DIVERGED if trial.has_diverged else TrialOutcome.FINISHED
            for number, trial in run.running.items()
        }
        self.has_survivors = TrialOutcome.FINISHED in outcomes.values()
        return outcomes

    def after_round(self, run: CohortRun) -> None:
        """Start the next generation when all trials of one have ended."""
        if not run.running and self.has_survivors and self._start_generation(run):
            self.save()

    def _start_generation(self, run: CohortRun, begun: Sequence[RunningTrial] = ()) -> bool:
        """Ask for the members' next trials and continue with them; return whether there are any.

        Args:
            run:
                The population, whose trials have ended.
            begun:
                Trials of the next generation that had started when their worker died.
        """
        if self.generation == self.last_generation or (not begun and not self.has_more_trials()):
            return False
        trials = self._trials_of_next_generation(run, begun)
        if not trials:
            return False
        cohort = run.cohort
        index = {member.number: i for i, member in enumerate(cohort.members)}
        parents = [trial.trial.user_attrs[PARENT] for trial in trials]
        for trial, parent in zip(trials, parents, strict=True):
            root, schedule = self.schedules[parent]
            values = self._mutable_values(trial)
            if values != schedule[-1][1]:
                schedule = [*schedule, [cohort.rounds_done[0], values, False]]
            self._set_origin(trial, root, schedule)
        cohort.resume_from([index[p] for p in parents], [trial.member for trial in trials])
        cohort.reset_best()
        run.running = {trial.member.number: trial for trial in trials}
        self.generation += 1
        return True

    def _trials_of_next_generation(
        self, run: CohortRun, begun: Sequence[RunningTrial]
    ) -> list[RunningTrial]:
        """Return the trials of the next generation whose parents are in the cohort."""
        left, missing = self.source.n_trials_left(), self.members - len(begun)
        count = missing if left is None else min(missing, left)
        numbers, trials = {member.number for member in run.cohort.members}, list[RunningTrial]()
        for trial in [*begun, *self._ask_trials(count)]:
            if trial.is_enqueued:  # its values hold from its first step
                self.deferred.append(trial)
            elif trial.trial.user_attrs.get(PARENT) in numbers:
                trials.append(trial)
            else:  # another process has ended the member's last trial
                self._end_untrained([trial], TrialOutcome.INTERRUPTED)
        return trials

    # --- Checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the population in training, as JSON."""
        return {
            "method": self.method,
            "name": self.name,
            "count": self.count,
            "size": self.members,
            "generation": self.generation,
            "last_generation": self.last_generation,
            "schedules": [[n, root, schedule] for n, (root, schedule) in self.schedules.items()],
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> BaseSampler:
        self.name, self.count = str(state["name"]), int(state["count"])
        self.members, self.generation = int(state["size"]), int(state["generation"])
        self.last_generation = int(state["last_generation"])
        self.schedules = {number: (root, known) for number, root, known in state["schedules"]}
        self.next_evaluation = 0
        return self._make_sampler(self.members, self.generation)

    def _resume(self, run: CohortRun, others: Sequence[RunningTrial]) -> CohortRun | None:
        if run.running:
            run.select(run.running)
            self._end_untrained(others, TrialOutcome.KILLED)
            if run.cohort.rounds_done[0] < self._end_of_generation(run):
                return run
            self.finisher.end(run, self._generation_outcomes(run))  # the worker died just before
            others = []
        elif self.generation >= self.last_generation:
            self._end_untrained(others, TrialOutcome.KILLED)  # they are of the next population
            return None
        is_continued = self.has_survivors and self._start_generation(run, others)
        return run if is_continued else None
