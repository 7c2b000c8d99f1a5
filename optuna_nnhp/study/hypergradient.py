"""Hypergradients in the stacked engine: continuous hyperparameters that learn while they train."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import logging
import math
from typing import Any
from typing import ClassVar

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.catalogue import CATALOGUE
from optuna_nnhp.search.hypergradient import MAX_STEP
from optuna_nnhp.search.hypergradient import AdamOnUnitScale
from optuna_nnhp.search.unit_scale import from_unit
from optuna_nnhp.search.unit_scale import to_unit
from optuna_nnhp.study.cohort_runs import CohortRun
from optuna_nnhp.study.lockstep import ROOT
from optuna_nnhp.study.lockstep import SCHEDULE
from optuna_nnhp.study.lockstep import SynchronousTuner
from optuna_nnhp.study.lockstep import noted
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.segments import resume_from

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

STARTS = 4
STEPS = 50  # of the hyperparameters in a trial's budget, if it has so many rounds
PERTURBATION = 0.02  # of a range, between a network and its twin
FINAL_RATE_SHARE = 0.1  # of the rate of the steps, at the end of a budget: they decay linearly
LEARNING_RATES = ("learning_rate", "muon_learning_rate", "embedding_rate")
ADJUSTED = (*LEARNING_RATES, "momentum", "weight_decay", "l1", "dropout", "label_smoothing")
# A network that has learnt nothing yet and does not go on learning has rates that are too large:
# it begins anew with smaller ones.
# Shares of the best constant prediction's loss, of the loss before, of a rate's range.
UNTRAINED_SHARE, MIN_PROGRESS, RATE_RETREAT = 0.95, 1e-4, 0.1
ZERO_BELOW = {h.name: h.zero_below for h in CATALOGUE}


@dataclass
class HypergradientTrial:
    """One trial whose hyperparameters move.

    Args:
        trial:
            The trial; its parameters are where it began.
        values:
            What is moved, as it is now.
        adam:
            Who moves it.
        schedule:
            Which values it had from which round on, and whether it began anew then.
        loss:
            Validation loss at the last step.
        from_scratch:
            Whether it begins anew.
    """

    trial: RunningTrial
    values: dict[str, float]
    adam: AdamOnUnitScale
    loss: float
    schedule: list[tuple[int, dict[str, float], bool]] = field(default_factory=list)
    from_scratch: bool = False

    @property
    def number(self) -> int:
        """Number of its trial."""
        return self.trial.member.number

    @property
    def facts(self) -> dict[str, Any]:
        """What `from_facts` needs, as JSON can keep it."""
        adam = self.adam
        return {
            "number": self.number,
            "values": self.values,
            "loss": self.loss,
            "schedule": noted(self.schedule),
            "is_fresh": self.from_scratch,
            "descent": [adam.steps, adam.exp_avg, adam.exp_avg_sq],
        }

    @classmethod
    def from_facts(
        cls,
        facts: Mapping[str, Any],
        trial: RunningTrial,
        moved: Mapping[str, FloatDistribution],
        rate: float,
    ) -> HypergradientTrial:
        """One as it was when its facts were taken."""
        course = [(begin, values, fresh) for begin, values, fresh in facts["schedule"]]
        adam = AdamOnUnitScale(moved, rate, *facts["descent"])
        return cls(trial, facts["values"], adam, facts["loss"], course, facts["is_fresh"])

    def perturbed_number(self, place: int) -> int:
        """A number for its twin, that no trial has."""
        return -1 - place - len(self.adam.distributions) * self.number


@dataclass
class HypergradientPolicy(SynchronousTuner):
    """Trains trials whose continuous hyperparameters follow the gradient of the validation loss.

    Beside each trial a twin for every moved hyperparameter trains in the same stack, from the same
    state, with the same batches and noise, and a slightly larger value. After a stretch (an epoch,
    or a fiftieth of the budget) the differences of their validation losses are the gradient
    through that stretch, a truncated unroll; the hyperparameters take a step of Adam on the unit
    scale of their ranges, and the twins begin again from the trial's state. So there is no second
    implementation of any update rule, whatever can be stacked can be tuned, and what has no
    derivative in autograd's sense (dropout's rate) has one too. It costs one network for each
    moved hyperparameter; forward-mode differentiation costs at least two.

    Static hyperparameters and all that cannot change come from the wrapped sampler.

    Args:
        starts:
            Trials of a group, from different beginnings.
        rate:
            Longest step of a hyperparameter, as a share of its range.

    Source:
        Franceschi et al. 2017 (arXiv:1703.01785): hypergradients during training; Baydin et al.
        2018 (arXiv:1703.04782) and Chandra et al. 2022 (arXiv:1909.13371): their short horizon.
    """

    starts: int = STARTS
    rate: float = MAX_STEP
    method: ClassVar[str] = "gradient"

    def _train_group(self, base: BaseSampler) -> None:
        moved = gradient_space(self.problem)
        leader = self._lead()
        if leader is None or not self._stacks(leader):
            return
        each = 1 + len(moved)
        count = max(1, self._that_fit(leader, each * self.starts) // each)
        trials = [leader, *self._follow(leader, count - 1)]
        starts = [
            HypergradientTrial(
                trial,
                {name: trial.trial.params[name] for name in moved},
                AdamOnUnitScale(moved, self.rate),
                math.inf,
            )
            for trial in trials
        ]
        others = ", ".join(sorted(self.problem.space.keys() - moved)) or "nothing"
        _logger.log(
            logging.DEBUG if self.is_logged else logging.INFO,
            f"The gradient moves {', '.join(moved)} of {len(trials)} trials; from "
            f"{type(base).__name__} and unmoved: {others}.",
        )
        self.is_logged = True
        run = self._open(trials, [m for start in starts for m in self._members(start)])
        untrained = _losses(run.cohort)
        for start in starts:
            start.loss = untrained[start.number]
            start.trial.trial.set_user_attr(ROOT, start.number)
        self._descend(run, starts, 1)

    def _take_up(self, loop: Mapping[str, Any], base: BaseSampler) -> None:
        pass  # all it has to know is of the trials

    def _loop_facts(self) -> dict[str, Any]:
        starts = [start.facts for start in self.group]
        return {"method": self.method, "step": self.step, "starts": starts}

    def _resume(
        self, run: CohortRun, others: Sequence[RunningTrial], loop: Mapping[str, Any]
    ) -> None:
        moved, starts = gradient_space(self.problem), list[HypergradientTrial]()
        for facts in loop["starts"]:
            if running := run.running.get(facts["number"]):
                starts.append(HypergradientTrial.from_facts(facts, running, moved, self.rate))
        for trial in others:
            self._refuse(trial, "killed")
        if not starts:  # they have ended, and those of the next group had hardly begun
            return
        wanted = {m.number for start in starts for m in self._members(start)}
        numbers = [member.number for member in run.cohort.members]
        run.cohort.select([place for place, n in enumerate(numbers) if n in wanted])
        self._descend(run, starts, int(loop["step"]))

    def _descend(self, run: CohortRun, starts: list[HypergradientTrial], first: int) -> None:
        """Train, move, and train on, until the budget is spent."""
        cohort, rounds, scores = run.cohort, self._rounds(run), None
        lost = UNTRAINED_SHARE * constant_loss(cohort.task.arrays.valid_y)
        steps, self.group, self.step = min(STEPS, rounds), starts, first
        for step in range(first, steps + 1):
            self._begin_step(cohort, starts, step)
            if step == first:
                self._save()
            self._save_if_due()
            scores = self._train_to(run, math.ceil(rounds * step / steps))
            if scores is None:
                break
            scale = 1 - (1 - FINAL_RATE_SHARE) * step / steps
            states = [self._move(start, cohort, scores, scale, lost) for start in starts]
            self.judge.report(run, [start.trial for start in starts])
            self._go_on(cohort, starts, states)  # at the end too: whose weights are the trial's
            if self.budget.released and step < steps:
                self._begin_step(cohort, starts, step + 1)
                return
        if self.budget.released and scores is None:
            return
        for start in starts:
            start.trial.trial.set_user_attr(SCHEDULE, noted(start.schedule))
        if scores is None:
            self._cut_short(run)
        else:
            self._end_trials(run, {start.number: _cause(start) for start in starts})

    def _begin_step(self, cohort: Cohort, starts: Sequence[HypergradientTrial], step: int) -> None:
        """Note the values that a step begins with, unless it has begun."""
        self.step = step
        for start in starts:
            if len(start.schedule) < step:
                start.schedule.append(
                    (cohort.rounds_done[0], dict(start.values), start.from_scratch)
                )

    def _move(
        self, start: HypergradientTrial, cohort: Cohort, scores: Scores, scale: float, lost: float
    ) -> int:
        """Take in what a stretch has brought and move the values; whose state to go on from."""
        index = {cohort.members[place].number: i for i, place in enumerate(scores.indices)}
        twins = {
            start.perturbed_number(i): name for i, name in enumerate(start.adam.distributions)
        }
        losses = {n: scores.validation_loss[index[n]] for n in (start.number, *twins)}
        chosen = start.number
        if not math.isfinite(losses[chosen]):
            chosen = min(losses, key=lambda n: (not math.isfinite(losses[n]), losses[n]))
        start.trial.add_scores(scores, index[chosen])
        loss, start.from_scratch = losses[chosen], False
        began = start.values
        if chosen != start.number:  # a twin's stretch becomes the trial's
            name = twins[chosen]
            start.values = {**began, name: self._twin_value(start, name)}
            begin, _, from_scratch = start.schedule[-1]
            start.schedule[-1] = begin, dict(start.values), from_scratch
        slopes = self._slopes(start, {twins[n]: losses[n] for n in twins}, loss)
        is_stuck = loss >= max(lost, (1 - MIN_PROGRESS) * start.loss)
        wants_more = any(
            slopes.get(name, 0.0) < -MIN_PROGRESS * loss / PERTURBATION for name in LEARNING_RATES
        )
        if not math.isfinite(loss) or (is_stuck and not wants_more):
            self._retreat(start)
        else:
            start.loss = loss
            if chosen == start.number:
                start.values = start.adam.step(start.values, slopes, scale)
        return chosen

    def _slopes(
        self, start: HypergradientTrial, losses: Mapping[str, float], loss: float
    ) -> dict[str, float]:
        """Of the validation loss, by each value on its unit scale."""
        slopes = {}
        for name, distribution in start.adam.distributions.items():
            there, here = self._twin_value(start, name), start.values[name]
            distance = to_unit(distribution, there) - to_unit(distribution, here)
            slopes[name] = (losses[name] - loss) / distance
        steepest = max((abs(s) for s in slopes.values() if math.isfinite(s)), default=1.0)
        for name, slope in slopes.items():
            if not math.isfinite(slope):  # the twin has diverged: away from it
                slopes[name] = (
                    steepest if self._twin_value(start, name) > start.values[name] else -steepest
                )
        return slopes

    @staticmethod
    def _retreat(start: HypergradientTrial) -> None:
        """Begin anew with smaller rates."""
        for name in LEARNING_RATES:
            if distribution := start.adam.distributions.get(name):
                unit = to_unit(distribution, start.values[name]) - RATE_RETREAT
                start.values = {**start.values, name: float(from_unit(distribution, unit))}
        start.adam = AdamOnUnitScale(start.adam.distributions, start.adam.rate)
        start.from_scratch, start.loss = True, math.inf

    def _go_on(self, cohort: Cohort, starts: list[HypergradientTrial], chosen: list[int]) -> None:
        """Let trials and twins go on from the trials' states, with the new values."""
        places = {member.number: place for place, member in enumerate(cohort.members)}
        members, sources, fresh = list[Member](), list[int](), set[int]()
        for start, number in zip(starts, chosen, strict=True):
            for member in self._members(start):
                if start.from_scratch:
                    fresh.add(len(members))
                members.append(member)
                sources.append(places[number])
        resume_from(cohort, sources, members, fresh)

    def _members(self, start: HypergradientTrial) -> list[Member]:
        """A trial with its present values, and its twins."""
        params, names = start.trial.trial.params, list(start.adam.distributions)
        values = [start.values]
        values += [{**start.values, name: self._twin_value(start, name)} for name in names]
        numbers = [start.number, *(start.perturbed_number(i) for i in range(len(names)))]
        made = (self.problem.member(start.number, {**params, **v}) for v in values)
        return [
            Member(n, start.trial.member.seed, m.params)
            for n, m in zip(numbers, made, strict=True)
        ]

    @staticmethod
    def _twin_value(start: HypergradientTrial, name: str) -> float:
        return perturbed_value(name, start.adam.distributions[name], start.values[name])


def gradient_space(problem: Problem) -> dict[str, FloatDistribution]:
    """What of a problem's space follows the gradient.

    Raises:
        ValueError: If there is nothing.
    """
    space, mutable_names = problem.space, problem.mutable_names()
    moved = {
        name: d
        for name, d in space.items()
        if name in ADJUSTED
        and name in mutable_names
        and isinstance(d, FloatDistribution)
        and d.step is None
        and not d.single()
    }
    if not moved:
        raise ValueError(
            "The method 'gradient' must have a continuous hyperparameter to move "
            f"({', '.join(ADJUSTED)}), but what is tuned is: {', '.join(space) or 'nothing'}."
        )
    return moved


def perturbed_value(name: str, distribution: FloatDistribution, value: float) -> float:
    """A value a little above another one, or below at the upper end of the range.

    Where the value is off, the twin's is the smallest that is on.

    Example:
        >>> round(perturbed_value("momentum", FloatDistribution(0.5, 1.0), 0.8), 6)
        0.81
        >>> perturbed_value("dropout", FloatDistribution(0.005, 0.6, log=True), 0.01)
        0.04
    """
    unit = to_unit(distribution, value)
    if unit + PERTURBATION > 1:
        return float(from_unit(distribution, unit - PERTURBATION))
    above = float(from_unit(distribution, unit + PERTURBATION))
    zero_below = ZERO_BELOW.get(name) or 0.0
    return max(above, zero_below) if value < zero_below <= distribution.high else above


def constant_loss(target: Tensor) -> float:
    """Loss of the best constant prediction: entropy of labels, variance of numbers.

    Shape:
        - target: ``(n,)``.

    Example:
        >>> constant_loss(torch.tensor([0, 1])), constant_loss(torch.tensor([1.0, 3.0]))
        (0.6931..., 1.0)
    """
    if target.is_floating_point():
        return float(target.double().var(correction=0))
    share = target.flatten().bincount().double() / target.numel()
    return float(-torch.xlogy(share, share).sum())


@torch.no_grad()
def _losses(cohort: Cohort) -> dict[int, float]:
    """Validation loss of every member, by its number."""
    everybody = torch.arange(len(cohort.members))
    loss, _, _ = cohort.task.evaluate(cohort.apply(everybody), cohort.members, True)
    return dict(zip((m.number for m in cohort.members), loss.tolist(), strict=True))


def _cause(start: HypergradientTrial) -> str:
    return "diverged" if start.trial.best is None else "finished"
