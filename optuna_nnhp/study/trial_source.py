"""Ask Optuna for trials: leaders, followers that can be stacked with a leader, grid points."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable

import optuna
from optuna import Study
from optuna import Trial
from optuna.samplers import BaseSampler
from optuna.samplers import BruteForceSampler
from optuna.samplers import GridSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.follower import FollowerSampler
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.operations import TrialLimitReached
from optuna_nnhp.study._optuna_internals import is_stopped
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.study._optuna_internals import with_sampler
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.failures import record_error
from optuna_nnhp.study.grid import FIXED_PARAMS
from optuna_nnhp.study.grid import GridQueue
from optuna_nnhp.study.grid import to_grid_points_sampler
from optuna_nnhp.study.outcomes import CAUSE
from optuna_nnhp.study.outcomes import counts_towards_n_trials
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.running import suggest
from optuna_nnhp.training.cohort import Member

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

EVALUATED = (TrialState.COMPLETE, TrialState.PRUNED)  # states of trials that trained
# These samplers choose every value themselves, so they cannot propose followers.
PLANNERS = (QMCSampler, BruteForceSampler, PartialFixedSampler)
BASELINE = "baseline"  # attribute of the trial with the default configuration
PORTFOLIO = "portfolio"  # attribute of the trials with the template's other first configurations
MAX_REJECTED = 100  # so many trials in a row that cannot be trained end a study
PORTFOLIO_SHARE = 10  # at most one of so many trials is from the portfolio


class TrialSource:
    """Ask a study for trials.

    Args:
        study:
            The opened study.
        problem:
            What is tuned.
        budget:
            How long.
        storage:
            The study's storage.
        sampler:
            Proposes trials; None for the study's sampler.

    Attributes:
        sampler: Proposes trials and learns from their ends; a random sampler on a grid.
        points: The points of a grid; None without a grid.
        finished: Number of trials that have ended and count.
        running: Trials that train here and have not ended, by number; see `start` and `end`.
        ask_failed: Whether the last `ask` was cut short, because the storage was unavailable or
            the study has all its trials.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        budget: Budget,
        storage: BufferedStorage,
        sampler: BaseSampler | None = None,
    ) -> None:
        self.study, self.problem = study, problem
        self.budget, self.storage = budget, storage
        self.proposer = sampler or study.sampler
        self.is_grid = isinstance(self.proposer, GridSampler | GridPointsSampler)
        self.sampler = RandomSampler() if self.is_grid else self.proposer
        self.points = (
            GridQueue(with_sampler(study, self.sampler), storage) if self.is_grid else None
        )
        self.finished, self.ask_failed = 0, False
        self.running: dict[int, RunningTrial] = {}
        self._most: int | None = None  # trials that may have begun
        self._rejected_in_row = 0

    def enqueue_first_trials(self, *, with_portfolio: bool = True) -> None:
        """Enqueue a grid's points, or in a new study the defaults and the portfolio."""
        defaults = self.problem.defaults()
        if self.points is not None:
            assert isinstance(self.proposer, GridSampler | GridPointsSampler)
            plan = to_grid_points_sampler(self.proposer, self.problem)
            self.points.enqueue(plan, self.problem, self.budget)
        elif not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(defaults, user_attrs={BASELINE: True})
            portfolio, left = self.problem.portfolio(), self.budget.n_trials
            if self.sampler_fixes_all_values or not with_portfolio:
                return  # the caller has chosen all other trials
            for params in portfolio[: None if left is None else left // PORTFOLIO_SHARE]:
                self.study.enqueue_trial(params, user_attrs={PORTFOLIO: True})

    @property
    def sampler_fixes_all_values(self) -> bool:
        """Whether the sampler fixes every value, so that there are no followers."""
        return self.points is not None or isinstance(self.sampler, PLANNERS)

    def n_trials_left(self) -> int | None:
        """Return how many trials this worker may still start; None if unlimited."""
        self.storage.refresh()
        trials = self.study.get_trials(deepcopy=False)
        self.finished = sum(
            t.state.is_finished() and counts_towards_n_trials(t, on_grid=self.is_grid)
            for t in trials
        )
        running = sum(t.state == TrialState.RUNNING for t in trials)
        released = sum(is_released(t) for t in trials)
        left = self.budget.n_trials_left(self.finished + running + released)
        if self.budget.n_trials is not None:
            free = sum(t.state.is_finished() for t in trials) - self.finished
            self._most = self.budget.n_trials + free
            self.storage.set_trial_limit(study_id(self.study), max(0, self._most - released))
        if self.points is None:
            return left
        return self.points.n_points_left if left is None else min(left, self.points.n_points_left)

    def reserve_places_for_released(self) -> None:
        """Raise the limit of trials that `n_trials_left` sets by the number of released trials."""
        self.n_trials_left()
        self.storage.set_trial_limit(study_id(self.study), self._most)

    def ask_portfolio(self) -> list[RunningTrial]:
        """Ask for the trials of the portfolio that no worker has started."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return self.ask(sum(bool(trial.user_attrs.get(PORTFOLIO)) for trial in waiting))

    def ask(
        self,
        count: int,
        leader: Member | None = None,
        stop: Callable[[], bool] | None = None,
        sampler: BaseSampler | None = None,
    ) -> list[RunningTrial]:
        """Ask for trials, for fewer if the time is over.

        Args:
            count:
                How many.
            leader:
                A trial whose cohort they must be able to join; None for leaders.
            stop:
                Returns whether to ask for no more, once there is one trial.
            sampler:
                Proposes them; None for the source's sampler.

        Returns:
            The trials that can be trained; the others have failed.
        """
        trials, sampler = list[RunningTrial](), sampler or self.sampler
        self.ask_failed = False
        if leader is not None:
            sampler = FollowerSampler(sampler, self.problem.pin_to_leader(leader))
        study = with_sampler(self.study, sampler)
        try:
            # Trials that are reserved here and not asked for stay WAITING.
            with self.storage.prefetch_trials(count if stop is None else 1):
                for _ in range(count):
                    if trials and (self.budget.is_over() or (stop is not None and stop())):
                        break
                    trials += self._ask_one(study)
        except TrialLimitReached:  # other workers were faster
            self.ask_failed = True
        except StorageUnavailable as error:
            self.ask_failed = True
            _logger.debug(f"No trials can be asked for now: {error}")
        finally:
            self.start(trials)
        return trials

    def start(self, trials: Iterable[RunningTrial]) -> None:
        """Add trials that train here from now on."""
        self.running |= {running.member.number: running for running in trials}

    def end(self, trials: Collection[RunningTrial], *, counts: bool = True) -> None:
        """Remove trials that no longer train here; add them to `finished` if they count."""
        for running in trials:
            del self.running[running.member.number]
        self.finished += len(trials) if counts else 0

    def _ask_one(self, study: Study) -> list[RunningTrial]:
        """Return one trial, or none if its network cannot be built; then it has failed already."""
        trial = study.ask() if self.points is None else self.points.take()
        return [] if trial is None else self.make_running_trial(trial)  # another worker was faster

    def tell(self, trial: Trial, value: float | None, state: TrialState) -> None:
        """End a trial, and have the source's sampler learn from it."""
        with_sampler(self.study, self.sampler).tell(trial, value, state)

    @property
    def is_stopped(self) -> bool:
        """Whether a callback or a sampler has called `Study.stop`."""
        return is_stopped(self.study)

    def make_running_trial(self, trial: Trial) -> list[RunningTrial]:
        """Return a trial with all its values; an empty list if it cannot be trained."""
        try:
            member = self.problem.member(trial.number, suggest(trial, self.problem.space))
            signature = self.problem.signature(member)
        except TrialError as error:
            self._fail_invalid_trial(trial, error)
            return []
        except BaseException as error:
            record_error(trial, error)
            self.tell(trial, None, TrialState.FAIL)
            raise
        self._rejected_in_row = 0
        is_enqueued = FIXED_PARAMS in self.storage.get_trial(id_of(trial)).system_attrs
        running = RunningTrial(trial, member, self.problem.maximize, signature)
        running.is_baseline = is_enqueued and bool(trial.user_attrs.get(BASELINE))
        running.is_enqueued = is_enqueued
        return [running]

    def _fail_invalid_trial(self, trial: Trial, error: TrialError) -> None:
        """End a trial that cannot be trained as it is proposed.

        Raises:
            ValueError: If there are too many of them in a row.
        """
        record_error(trial, error)
        self.tell(trial, None, TrialState.FAIL)
        _logger.warning(f"Trial {trial.number} failed: {error}")
        self._rejected_in_row += 1
        if self._rejected_in_row >= MAX_REJECTED:
            raise ValueError(
                f"One of {MAX_REJECTED} trials in a row must be possible, but the last is not "
                f"either: {error}"
            ) from error

    def any_evaluated(self) -> bool:
        """Return whether any trial of the study has been trained to an evaluation."""
        if any(running.values for running in self.running.values()):
            return True
        return any(
            trial.intermediate_values or (CAUSE in trial.user_attrs and trial.state in EVALUATED)
            for trial in self.study.get_trials(deepcopy=False)  # others may have been added
        )


def is_released(trial: FrozenTrial) -> bool:
    """Return whether a trial was released and waits for another worker."""
    return trial.state == TrialState.WAITING and REQUEUED_BY in trial.user_attrs
