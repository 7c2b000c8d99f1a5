"""Asking Optuna for trials: leaders, followers that can be stacked with one, points of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field

import optuna
from optuna import Study
from optuna import Trial
from optuna.samplers import BruteForceSampler
from optuna.samplers import GridSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.follower import FollowerSampler
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.starting import TrialLimitReached
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.failures import FailurePolicy
from optuna_nnhp.study.failures import record_error
from optuna_nnhp.study.grid import CUT_SHORT as CUT_SHORT
from optuna_nnhp.study.grid import DUPLICATE
from optuna_nnhp.study.grid import FIXED_PARAMS
from optuna_nnhp.study.grid import GridQueue
from optuna_nnhp.study.grid import as_levels
from optuna_nnhp.study.grid import is_cut_short
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.study.running_trial import TRIAL_TIMEOUT
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.study.running_trial import suggest
from optuna_nnhp.training.cohort import Member

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# These decide every value themselves: trials are grouped as they come.
PLANNERS = (QMCSampler, BruteForceSampler, PartialFixedSampler)
BASELINE = "baseline"  # attribute of the trial with the default configuration
PORTFOLIO = "portfolio"  # attribute of the trials with the template's other first configurations
PORTFOLIO_SHARE = 10  # of a number of trials, at most one of so many is from the portfolio


@dataclass
class TrialSource:
    """Asks a study for trials.

    Args:
        study:
            The opened study.
        problem:
            What is tuned.
        budget:
            How long.
        storage:
            The study's storage.

    Attributes:
        points: Those of a grid, if there is one.
        outcomes: What becomes of those that cannot be trained.
        finished: Number of trials that have ended.
        running: Trials that were asked here and have not ended, by number.
        is_refused: Whether the last one asked for could not begin: the storage was away, or there
            are as many as may be.
    """

    study: Study
    problem: Problem
    budget: Budget
    storage: BufferedStorage
    points: GridQueue | None = None
    finished: int = 0
    running: dict[int, RunningTrial] = field(default_factory=dict)
    ask_failed: bool = False
    _most: int | None = None  # trials that may have begun

    def __post_init__(self) -> None:
        self.failures = FailurePolicy(self.study, self.problem)

    def begin(self, *, with_portfolio: bool = True) -> None:
        """Enqueue what comes first: the defaults in a new study, the points of a grid."""
        defaults, sampler = self.problem.defaults(), self.study.sampler
        if isinstance(sampler, GridSampler | GridPointsSampler):
            self.points = GridQueue(self.study, self.storage)
            self.points.enqueue(as_levels(sampler, self.problem), self.problem, self.budget)
            self.study.sampler = RandomSampler()
        elif not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(defaults, user_attrs={BASELINE: True})
            portfolio, left = self.problem.portfolio(), self.budget.n_trials
            if self.is_planned or not with_portfolio:
                return  # there are other wishes, of all trials
            for params in portfolio[: None if left is None else left // PORTFOLIO_SHARE]:
                self.study.enqueue_trial(params, user_attrs={PORTFOLIO: True})

    @property
    def is_planned(self) -> bool:
        """Whether the sampler fixes every value, so that there are no followers."""
        return self.points is not None or isinstance(self.study.sampler, PLANNERS)

    def left(self) -> int | None:
        """Trials still to start, those of other workers counted; a grid ends by itself."""
        self.storage.refresh()
        trials = self.study.get_trials(deepcopy=False)
        is_free = _never_trained if self.points is None else is_cut_short
        self.finished = sum(t.state.is_finished() and not is_free(t) for t in trials)
        running = sum(t.state == TrialState.RUNNING for t in trials)
        released = sum(is_released(t) for t in trials)
        left = self.budget.left(self.finished + running + released)
        if self.budget.n_trials is not None:
            free = sum(t.state.is_finished() for t in trials) - self.finished
            self._most = self.budget.n_trials + free
            self.storage.set_trial_limit(self.study._study_id, max(0, self._most - released))
        if self.points is None:
            return left
        return self.points.left if left is None else min(left, self.points.left)

    def make_room_for_released(self) -> None:
        """Let released trials begin again: nobody else has their place, see `left`."""
        self.left()
        self.storage.set_trial_limit(self.study._study_id, self._most)

    def ask_portfolio(self) -> list[RunningTrial]:
        """The template's first configurations, of those that nobody has taken yet."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return self.ask(sum(bool(trial.user_attrs.get(PORTFOLIO)) for trial in waiting))

    def ask(
        self,
        count: int,
        leader: Member | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[RunningTrial]:
        """Ask for trials, fewer if the time is over.

        Args:
            count:
                How many.
            leader:
                A trial that they must be able to join; None if they are free.
            stop:
                Once it says yes, those asked for so far are enough.

        Returns:
            Those that can be trained.
        """
        sampler, trials = self.study.sampler, list[RunningTrial]()
        self.ask_failed = False
        if leader is not None:
            self.study.sampler = FollowerSampler(sampler, self.problem.pin(leader))
        try:
            # What is reserved and not asked for would be left waiting.
            with self.storage.prefetch_trials(count if stop is None else 1):
                for _ in range(count):
                    if trials and (self.budget.is_over() or (stop is not None and stop())):
                        break
                    trials += self._ask_one()
        except TrialLimitReached:  # other workers were faster
            self.ask_failed = True
        except StorageUnavailable as error:
            self.ask_failed = True
            _logger.debug(f"No trials can be asked for now: {error}")
        finally:
            self.study.sampler = sampler
            self.running |= {running.member.number: running for running in trials}
        return trials

    def _ask_one(self) -> list[RunningTrial]:
        """One trial, or none if its network cannot be built; then it has failed already."""
        trial = self.study.ask() if self.points is None else self.points.take()
        return [] if trial is None else self.begin_trial(trial)  # another worker was faster

    def begin_trial(self, trial: Trial) -> list[RunningTrial]:
        """A trial that runs here, once it has all its values; none if it cannot be trained."""
        try:
            member = self.problem.member(trial.number, suggest(trial, self.problem.space))
            signature = self.problem.signature(member)
        except TrialError as error:
            self.failures.refuse(trial, error)
            return []
        except BaseException as error:
            record_error(trial, error)
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.failures.rejected_in_row = 0
        is_enqueued = FIXED_PARAMS in self.storage.get_trial(trial._trial_id).system_attrs
        running = RunningTrial(trial, member, self.problem.maximize, signature)
        running.is_baseline = is_enqueued and bool(trial.user_attrs.get(BASELINE))
        running.is_enqueued = is_enqueued
        return [running]


def is_released(trial: FrozenTrial) -> bool:
    """Whether a trial waits for a worker that goes on with it: it has its place in the study."""
    return trial.state == TrialState.WAITING and REQUEUED_BY in trial.user_attrs


def _never_trained(trial: FrozenTrial) -> bool:
    """Whether a trial failed through no fault of its own, and so does not count."""
    cause = trial.user_attrs.get("cause")
    is_own = TRIAL_TIMEOUT in trial.user_attrs  # its own time was over, not the study's
    is_free = cause in ("killed", DUPLICATE, *CUT_SHORT) and not is_own
    return trial.state == TrialState.FAIL and is_free
