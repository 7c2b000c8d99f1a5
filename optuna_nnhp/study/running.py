"""Trials in training, the cohorts that they form, and the queue of cohorts."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Container
from collections.abc import Hashable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import math
import time
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.study._optuna_internals import known_values
from optuna_nnhp.study.outcomes import CAUSE
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.training.batches import epochs
from optuna_nnhp.training.cohort import NUMERICS_CONTEXT_KEY
from optuna_nnhp.training.cohort import SINGLE
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import NumericsContext
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.retrain import Segment

# Attribute of a trial that its timeout ended: the timeout in seconds.
TRIAL_TIMEOUT = "trial_timeout"
# Attributes of a trial whose values change while it trains: the values from which round on, and
# whether the network began anew then; and the trial whose first weights it descends from.
SCHEDULE, ROOT = "schedule", "root"
# Of a running trial, what a checkpoint keeps as it is.
CURVES = ("train_loss", "validation_loss", "best_round", "trained", "schedule", "root")
KEPT = (*CURVES, "is_baseline", "is_portfolio", "is_enqueued")

Tell = Callable[[Trial, float | None, TrialState], None]  # as `Study.tell`
Schedule = list[list[Any]]  # round, values, whether the network begins anew


def suggest(trial: Trial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Ask a trial for every value of a space, through Optuna's public calls.

    Example:
        >>> import optuna
        >>> trial = optuna.create_study().ask()
        >>> suggest(trial, {"depth": IntDistribution(2, 2)})
        {'depth': 2}
    """
    values: dict[str, Any] = {}
    for name, distribution in space.items():
        match distribution:
            case FloatDistribution(low=low, high=high, step=step, log=log):
                values[name] = trial.suggest_float(name, low, high, step=step, log=log)
            case IntDistribution(low=low, high=high, step=step, log=log):
                values[name] = trial.suggest_int(name, low, high, step=step, log=log)
            case CategoricalDistribution(choices=choices):
                values[name] = trial.suggest_categorical(name, choices)
            case _:
                raise TypeError(f"`{name}` must have a known distribution, not {distribution}.")
    return values


@dataclass
class RunningTrial:
    """A trial while it trains.

    Args:
        trial:
            Optuna's trial.
        member:
            The same trial as the cohort knows it.
        maximize:
            Whether a greater metric is better.
        signature:
            Equal for trials that can be stacked.
        is_baseline:
            Whether it has the default configuration, which is what others must beat.
        is_portfolio:
            Whether it is of the template's portfolio, and begins beside the baseline.
        is_enqueued:
            Whether a user enqueued its values, so that no sampler proposed them.
        train_loss:
            One number per evaluation.
        validation_loss:
            One number per evaluation.
        values:
            The metric, by round: what Optuna calls a step.
        best_round:
            Round of the best value, 0 before the first.
        reported:
            How many of `values` the storage has seen.
        started:
            Clock at the start, seconds.
        trained:
            Seconds that its cohorts have trained.
        is_finished:
            Whether Optuna knows its end.
        ended_elsewhere:
            Whether another process has ended it.
        exact_value:
            Its best value as that of its weights alone, once that is known.
        numerics_context:
            What it was trained in, see `training.cohort`.
        schedule:
            Its hyperparameter schedule, if values change while it trains, see `SCHEDULE`.
        root:
            Number of the trial whose first weights it descends from; None if it is this one.
    """

    trial: Trial
    member: Member
    maximize: bool
    signature: Hashable = None
    is_baseline: bool = False
    is_portfolio: bool = False
    is_enqueued: bool = False
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    values: dict[int, float] = field(default_factory=dict)
    best_round: int = 0
    reported: int = 0
    started: float = field(default_factory=time.monotonic)
    trained: float = 0.0
    is_finished: bool = False
    ended_elsewhere: bool = False
    exact_value: float | None = None
    numerics_context: NumericsContext = ()
    schedule: Schedule = field(default_factory=list)
    root: int | None = None

    def add_scores(self, scores: Scores, i: int) -> None:
        """Append one evaluation; `i` is the trial's index in the scores."""
        self.train_loss.append(scores.train_loss[i])
        self.validation_loss.append(scores.validation_loss[i])
        self.values[scores.rounds[i]] = scores.value[i]
        self.best_round = scores.best_round[i]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {
            "number": self.member.number,
            "values": list(self.values.items()),
            "seconds": time.monotonic() - self.started,
            **{name: getattr(self, name) for name in KEPT},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load a state from `state_dict`; None resets the trial to its start."""
        if state is None:
            new = RunningTrial(self.trial, self.member, self.maximize).state_dict()
            state = {**new, **{name: getattr(self, name) for name in KEPT[len(CURVES) :]}}
        for name in KEPT:
            setattr(self, name, state[name])
        self.values = {int(number): float(value) for number, value in state["values"]}
        self.started, self.reported = time.monotonic() - state["seconds"], 0

    @property
    def last_round(self) -> int:
        """Round of the last evaluation, 0 before the first."""
        return max(self.values, default=0)

    @property
    def has_diverged(self) -> bool:
        """Return whether any loss or value was not finite."""
        return not all(map(math.isfinite, [*self.values.values(), *self.train_loss]))

    @property
    def best_so_far(self) -> float | None:
        """Return the best value of all evaluations, partial ones included; pruners use it
        of the validation data only; None before the first."""
        values = [value for value in self.values.values() if math.isfinite(value)]
        return (max if self.maximize else min)(values, default=None)

    @property
    def best(self) -> float | None:
        """Best value so far, None before the first."""
        return self.values.get(self.best_round) if self.exact_value is None else self.exact_value

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value beats another one."""
        return than is None or (value > than if self.maximize else value < than)

    def report(self) -> None:
        """Report new finite values to the storage.

        A resumed trial may repeat values that the storage already has; those are skipped.
        """
        known = known_values(self.trial)
        for step, value in list(self.values.items())[self.reported :]:
            if math.isfinite(value) and step not in known:
                self.trial.report(value, step)
        self.reported = len(self.values)

    def describe(self, problem: Problem, iterations: int, outcome: TrialOutcome) -> None:
        """Store the trial's curves and numbers as attributes."""
        rounds = problem.rounds_per_epoch
        attributes: dict[str, Any] = {
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "epochs": epochs(self.last_round, rounds),
            "iterations": iterations,
            "seconds": round(time.monotonic() - self.started, 3),
            "weights": problem.count_weights(self.member),
            **problem.attributes(self.member),
            CAUSE: outcome.value,
        }
        if self.best_round:
            best_epoch = epochs(self.best_round, rounds)
            attributes |= {"best_epoch": best_epoch, "best_value": self.best}
        if any(kind != SINGLE for _, kind in self.numerics_context):
            attributes[NUMERICS_CONTEXT_KEY] = self.numerics_context
        if self.schedule:
            attributes[SCHEDULE] = self.schedule
        if self.root is not None:
            attributes[ROOT] = self.root
        for name, value in attributes.items():
            self.trial.set_user_attr(name, value)

    def tell(self, tell: Tell, state: TrialState) -> None:
        """End the trial: with its best value if COMPLETE, with the last one if PRUNED."""
        self.report()
        tell(self.trial, self.best if state == TrialState.COMPLETE else None, state)
        self.is_finished = True

    def fail(self, tell: Tell, problem: Problem, outcome: TrialOutcome) -> None:
        """End the trial as FAIL, unless it has ended."""
        if not self.is_finished:
            self.describe(problem, 0, outcome)
            self.tell(tell, TrialState.FAIL)


def params_for_retraining(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters for retraining; a budget in seconds becomes one in steps.

    Example:
        >>> import optuna
        >>> trial = optuna.trial.create_trial(value=1.0, user_attrs={"budget_iterations": 90})
        >>> params_for_retraining(trial)
        {'iterations': 90}
    """
    params = dict(trial.params)
    if steps := trial.user_attrs.get(
        "budget_iterations"
    ):  # a budget in seconds that was converted on another machine
        params["iterations"] = steps
    return params


def schedule_of(problem: Problem, trial: FrozenTrial) -> list[Segment]:
    """Return the hyperparameter schedule of a trial; empty if its values did not change.

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
    """Return a trial with the values of its best round; those decide what its network has.

    Args:
        problem:
            What was tuned.
        trial:
            A trial of its study that has a value.
    """
    best = round(trial.user_attrs.get("best_epoch", 0) * problem.rounds_per_epoch)
    segments = [segment for segment in schedule_of(problem, trial) if segment.begin < best]
    return segments[-1].member if segments else problem.member(trial.number, trial.params)


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
            Clock at which it asks for no more followers, seconds, so that one signature cannot
            take the whole time.
        virtual_time:
            Work so far, in proportion to its members' claims; the cohort with the least is next.
        rounds:
            Turns it has had.
        last_report:
            When its running trials were last reported, seconds.
        refills:
            Whether new members fill its free slots; if not, free slots do not count as unused.
        quarantined_until:
            Number of rounds up to which it may raise the error of the cohort that it was a part
            of.
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
        """Free the cohort's memory, which smaller cohorts need, and return its trials."""
        trials, self.running = list(self.running.values()), {}
        del self.cohort
        return trials

    def add_scores(self, scores: Scores) -> list[RunningTrial]:
        """Add an evaluation to the trials that it is of, and return these."""
        evaluated = [self.running[self.cohort.members[i].number] for i in scores.indices]
        for place, trial in enumerate(evaluated):
            trial.add_scores(scores, place)
        return evaluated

    def select(self, numbers: Container[int]) -> None:
        """Shrink the cohort to the members with these numbers."""
        members = self.cohort.members
        self.cohort.select([i for i, member in enumerate(members) if member.number in numbers])

    @property
    def is_quarantined(self) -> bool:
        """Return whether it may still raise the error of the cohort that it was split from."""
        return (
            bool(self.running) and max(self.cohort.rounds_done, default=0) < self.quarantined_until
        )

    @property
    def n_free_slots(self) -> int:
        """Slots without a member."""
        return max(0, self.slots - len(self.running))


@dataclass
class FairQueue:
    """The cohorts in training.

    Attributes:
        runs: The cohorts.
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
        """Add a new cohort, with the least virtual time of the others."""
        run.virtual_time = min((other.virtual_time for other in self.runs), default=0.0)
        self.runs.append(run)

    def next(self) -> CohortRun | None:
        """Return the cohort with the least virtual time, quarantined ones first; None if empty."""
        self.runs = [run for run in self.runs if run.running]
        return min(
            self.runs, key=lambda run: (not run.is_quarantined, run.virtual_time), default=None
        )

    def record_turn(self, run: CohortRun, members: int, seconds: float, work: float) -> None:
        """Record that a cohort has trained.

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
        # A trial's share of time grows with the rounds that it has survived, so that every rung of
        # successive halving has about the same time, and good trials come to their end.
        run.virtual_time += work / sum(1 + done for done in run.cohort.rounds_done)
        run.rounds += 1
        slots = max(members, run.slots) if run.refills else members
        self.used += seconds * members
        self.offered += seconds * slots

    def with_signature(self, signature: Hashable, most: float = math.inf) -> CohortRun | None:
        """Return the cohort that trials with this signature can join, with fewer than `most`."""
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
    def n_training_trials(self) -> int:
        """Trials in training."""
        return sum(len(run.running) for run in self.runs)

    @property
    def occupancy(self) -> float:
        """Members over slots, the mean over the time of training."""
        return self.used / self.offered if self.offered else 1.0
