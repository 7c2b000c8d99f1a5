"""Hypergradients: continuous hyperparameters that follow a gradient while a trial trains."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.catalogue import CATALOGUE
from optuna_nnhp.search.hypergradient import MAX_STEP
from optuna_nnhp.search.hypergradient import AdamOnUnitScale
from optuna_nnhp.search.unit_scale import from_unit
from optuna_nnhp.search.unit_scale import to_unit
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.policies import PolicyContext
from optuna_nnhp.study.policies.synchronous import SynchronousPolicy
from optuna_nnhp.study.policies.synchronous import rounds_of
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores

STARTS = 4
STEPS = 50  # of the hyperparameters in a trial's budget, if it has so many rounds
PERTURBATION = 0.02  # of a range: by how much the value of a perturbed copy differs
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
    """A trial whose hyperparameters are adjusted while it trains.

    Args:
        trial:
            The trial; its parameters are the values that it started with.
        values:
            The adjusted hyperparameters, as they are now.
        adam:
            Makes the steps.
        loss:
            Validation loss at the last step.
        from_scratch:
            Whether the network begins anew with the next step.
    """

    trial: RunningTrial
    values: dict[str, float]
    adam: AdamOnUnitScale
    loss: float = math.inf
    from_scratch: bool = False

    @property
    def number(self) -> int:
        """Number of its trial."""
        return self.trial.member.number

    def state_dict(self) -> dict[str, Any]:
        """Return what `from_state_dict` needs besides the trial, as JSON."""
        adam = self.adam
        return {
            "number": self.number,
            "values": self.values,
            "loss": self.loss,
            "from_scratch": self.from_scratch,
            "adam": [adam.steps, adam.exp_avg, adam.exp_avg_sq],
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        trial: RunningTrial,
        distributions: Mapping[str, FloatDistribution],
        rate: float,
    ) -> HypergradientTrial:
        """Return a trial as it was when its state was taken."""
        adam = AdamOnUnitScale(distributions, rate, *state["adam"])
        return cls(trial, state["values"], adam, state["loss"], state["from_scratch"])

    def perturbed_copies(self) -> dict[int, str]:
        """Return the perturbed copies: a number that no trial has, and the perturbed name."""
        names = list(self.adam.distributions)
        return {-1 - i - len(names) * self.number: name for i, name in enumerate(names)}

    def perturbed_value_of(self, name: str) -> float:
        """Return the value of a hyperparameter in its perturbed copy."""
        return perturbed_value(name, self.adam.distributions[name], self.values[name])

    def members(self, problem: Problem) -> list[Member]:
        """Return the trial with its present values, and its perturbed copies."""
        params, known = self.trial.trial.params, self.trial.member
        values = [self.values]
        values += [
            {**self.values, name: self.perturbed_value_of(name)}
            for name in self.adam.distributions
        ]
        made = (problem.member(self.number, {**params, **v}) for v in values)
        numbers = [self.number, *self.perturbed_copies()]
        return [Member(n, known.seed, m.params) for n, m in zip(numbers, made, strict=True)]

    def begin_step(self, rounds: int, step: int) -> None:
        """Add the present values to the trial's schedule, unless the step has begun."""
        if len(self.trial.schedule) < step:
            schedule = [*self.trial.schedule, [rounds, dict(self.values), self.from_scratch]]
            self.trial.schedule = schedule

    def step(self, losses: Mapping[int, float], scale: float, untrained: float) -> int:
        """Adjust the values by the validation losses after a stretch of training.

        Args:
            losses:
                Validation losses of the trial and its perturbed copies, by number.
            scale:
                Factor of the rate.
            untrained:
                Loss at which a network has learnt nothing.

        Returns:
            The number whose state the trial continues from: its own, or that of a copy if it
            has diverged.
        """
        copies, chosen = self.perturbed_copies(), self.number
        losses = {n: losses[n] for n in (self.number, *copies)}
        if not math.isfinite(losses[chosen]):
            chosen = min(losses, key=lambda n: (not math.isfinite(losses[n]), losses[n]))
        loss, self.from_scratch = losses[chosen], False
        if chosen != self.number:  # the copy's stretch becomes the trial's
            name = copies[chosen]
            self.values = {**self.values, name: self.perturbed_value_of(name)}
            *before, (begin, _, from_scratch) = self.trial.schedule
            self.trial.schedule = [*before, [begin, dict(self.values), from_scratch]]
        slopes = self._slopes({copies[n]: losses[n] for n in copies}, loss)
        is_stuck = loss >= max(untrained, (1 - MIN_PROGRESS) * self.loss)
        wants_more = any(
            slopes.get(name, 0.0) < -MIN_PROGRESS * loss / PERTURBATION for name in LEARNING_RATES
        )
        if not math.isfinite(loss) or (is_stuck and not wants_more):
            self._restart_with_smaller_rates()
        else:
            self.loss = loss
            if chosen == self.number:
                self.values = self.adam.step(self.values, slopes, scale)
        return chosen

    def _slopes(self, losses: Mapping[str, float], loss: float) -> dict[str, float]:
        """Return the slope of the validation loss by each value on its unit scale."""
        slopes = {}
        for name, distribution in self.adam.distributions.items():
            there, here = self.perturbed_value_of(name), self.values[name]
            distance = to_unit(distribution, there) - to_unit(distribution, here)
            slopes[name] = (losses[name] - loss) / distance
        steepest = max((abs(s) for s in slopes.values() if math.isfinite(s)), default=1.0)
        for name, slope in slopes.items():
            if not math.isfinite(slope):  # the copy has diverged: away from it
                is_above = self.perturbed_value_of(name) > self.values[name]
                slopes[name] = steepest if is_above else -steepest
        return slopes

    def _restart_with_smaller_rates(self) -> None:
        """Begin anew with smaller learning rates."""
        for name in LEARNING_RATES:
            if distribution := self.adam.distributions.get(name):
                unit = to_unit(distribution, self.values[name]) - RATE_RETREAT
                self.values = {**self.values, name: float(from_unit(distribution, unit))}
        self.adam = AdamOnUnitScale(self.adam.distributions, self.adam.rate)
        self.from_scratch, self.loss = True, math.inf


class HypergradientPolicy(SynchronousPolicy):
    """Adjust continuous hyperparameters along the gradient of the validation loss.

    Beside each trial a perturbed copy for every adjusted hyperparameter trains in the same stack,
    from the same state, with the same batches and noise, and a slightly larger value. After a
    stretch (an epoch, or a fiftieth of the budget) the differences of their validation losses are
    the gradient through that stretch, a truncated unroll; the hyperparameters take a step of Adam
    on the unit scale of their ranges, and the copies begin again from the trial's state. So there
    is no second implementation of any update rule, whatever can be stacked can be tuned, and what
    has no derivative in autograd's sense (dropout's rate) has one too. It costs one network for
    each adjusted hyperparameter; forward-mode differentiation costs at least two.

    Static hyperparameters and all that cannot change come from the study's sampler.

    Args:
        context:
            What it works with.
        starts:
            Trials of a group, from different beginnings.
        rate:
            Longest step of a hyperparameter, as a share of its range.

    Source:
        Franceschi et al. 2017 (arXiv:1703.01785): hypergradients during training; Baydin et al.
        2018 (arXiv:1703.04782) and Chandra et al. 2022 (arXiv:1909.13371): their short horizon.
    """

    method = "gradient"

    def __init__(
        self, context: PolicyContext, *, starts: int = STARTS, rate: float = MAX_STEP
    ) -> None:
        super().__init__(context)
        self.starts, self.rate = starts, rate
        self.distributions = gradient_space(self.problem)
        self.group: list[HypergradientTrial] = []
        self.states: Sequence[Mapping[str, Any]] = ()  # of trials that are restored
        self.step, self.steps = 1, STEPS

    def _begin_group(self) -> BaseSampler:
        self.step = 1
        return self.base

    def _start_group(self, leader: RunningTrial) -> CohortRun | None:
        each = 1 + len(self.distributions)
        count = max(1, self._max_group_size(leader, each * self.starts) // each)
        trials = [leader, *self._ask_followers(leader, count - 1)]
        self.group = [
            HypergradientTrial(
                trial,
                {name: trial.trial.params[name] for name in self.distributions},
                AdamOnUnitScale(self.distributions, self.rate),
            )
            for trial in trials
        ]
        others = ", ".join(sorted(self.problem.space.keys() - self.distributions)) or "nothing"
        self._log_group(
            f"The gradient moves {', '.join(self.distributions)} of {len(trials)} trials; from "
            f"{type(self.base).__name__} and unmoved: {others}."
        )
        members = [member for start in self.group for member in start.members(self.problem)]
        if (run := self._build_cohort(trials, members)) is None:
            return None
        untrained = _validation_losses(run.cohort)
        for start in self.group:
            start.loss, start.trial.root = untrained[start.number], start.number
        return self._begin_step(run)

    def _begin_step(self, run: CohortRun) -> CohortRun:
        """Begin a step of a group."""
        self.steps = min(STEPS, rounds_of(run.cohort))
        for start in self.group:
            start.begin_step(run.cohort.rounds_done[0], self.step)
        return run

    def before_round(self, run: CohortRun) -> None:
        """Have all members evaluated at the end of the step."""
        end = math.ceil(rounds_of(run.cohort) * self.step / self.steps)
        run.cohort.set_next_evaluation(end)

    def decide(self, run: CohortRun, scores: Scores) -> dict[int, TrialOutcome]:
        """Adjust the hyperparameters, and end all trials after the last step."""
        cohort = run.cohort
        index = {cohort.members[i].number: place for place, i in enumerate(scores.indices)}
        losses = {number: scores.validation_loss[place] for number, place in index.items()}
        scale = 1 - (1 - FINAL_RATE_SHARE) * self.step / self.steps
        untrained = UNTRAINED_SHARE * loss_of_best_constant(cohort.task.arrays.valid_y)
        chosen = list[int]()
        for start in self.group:
            chosen.append(start.step(losses, scale, untrained))
            start.trial.add_scores(scores, index[chosen[-1]])
        self.finisher.report(run, [start.trial for start in self.group])
        self._continue(cohort, chosen)  # at the end too: these weights are the trials'
        if self.step < self.steps:
            self.step += 1
            self._begin_step(run)
            return {}
        return {
            start.number: TrialOutcome.DIVERGED
            if start.trial.best is None
            else TrialOutcome.FINISHED
            for start in self.group
        }

    def _continue(self, cohort: Cohort, chosen: Sequence[int]) -> None:
        """Let trials and copies continue from the chosen states, with the new values."""
        places = {member.number: i for i, member in enumerate(cohort.members)}
        members, sources, fresh = list[Member](), list[int](), set[int]()
        for start, number in zip(self.group, chosen, strict=True):
            for member in start.members(self.problem):
                if start.from_scratch:
                    fresh.add(len(members))
                members.append(member)
                sources.append(places[number])
        cohort.resume_from(sources, members, fresh)

    # --- Checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the group in training, as JSON."""
        states = [start.state_dict() for start in self.group]
        return {"method": self.method, "step": self.step, "trials": states}

    def _load_state_dict(self, state: Mapping[str, Any]) -> BaseSampler:
        self.step, self.states = int(state["step"]), state["trials"]
        return self.base

    def _resume(self, run: CohortRun, others: Sequence[RunningTrial]) -> CohortRun | None:
        self._end_untrained(others, TrialOutcome.KILLED)
        self.group = [
            HypergradientTrial.from_state_dict(state, running, self.distributions, self.rate)
            for state in self.states
            if (running := run.running.get(state["number"]))
        ]
        if not self.group:  # they have ended, and those of the next group had hardly begun
            return None
        wanted = {m.number for start in self.group for m in start.members(self.problem)}
        run.select(wanted)
        return self._begin_step(run)


def gradient_space(problem: Problem) -> dict[str, FloatDistribution]:
    """Return the part of a problem's space that follows the gradient.

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
    """Return a value a little above another one, or below it at the upper end of the range.

    If the value is below the smallest one that has an effect, the result is that one.

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


def loss_of_best_constant(target: Tensor) -> float:
    """Return the loss of the best constant prediction: entropy of labels, variance of numbers.

    Shape:
        - target: ``(n,)``.

    Example:
        >>> (
        ...     loss_of_best_constant(torch.tensor([0, 1])),
        ...     loss_of_best_constant(torch.tensor([1.0, 3.0])),
        ... )
        (0.6931..., 1.0)
    """
    if target.is_floating_point():
        return float(target.double().var(correction=0))
    share = target.flatten().bincount().double() / target.numel()
    return float(-torch.xlogy(share, share).sum())


@torch.no_grad()
def _validation_losses(cohort: Cohort) -> dict[int, float]:
    """Return the validation loss of every member, by its number."""
    everybody = torch.arange(len(cohort.members))
    loss, _, _ = cohort.task.evaluate(cohort.apply(everybody), cohort.members, True)
    return dict(zip((m.number for m in cohort.members), loss.tolist(), strict=True))
