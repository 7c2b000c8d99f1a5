"""Optuna's TPE with a time per proposal that does not grow with the study."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search._optuna_internals import ParzenEstimator
from optuna_nnhp.search._optuna_internals import TPESamplerHooks
from optuna_nnhp.search._optuna_internals import all_trials
from optuna_nnhp.search._optuna_internals import hides_trials
from optuna_nnhp.search._optuna_internals import study_key
from optuna_nnhp.search.ordering import sort_key
from optuna_nnhp.search.parzen import VectorizedParzenEstimator

Space = dict[str, BaseDistribution]
Rows = dict[int, NDArray[Any]]

# The density of the other trials is fitted again after (finished trials / this) proposals. Until
# then it lacks the trials that were proposed meanwhile and are running.
REFIT_INTERVAL = 128
MAX_TRIALS = 1000  # with 500, studies of 2048 trials over the catalogue ended worse
MIN_MAX_TRIALS = 100  # the least that `max_trials` may be


class BoundedTPESampler(TPESamplerHooks):
    """TPE that learns from a bounded number of trials.

    TPE's densities have one kernel for each known trial. This sampler uses the good trials (25 at
    most), the running ones and, once there are more than ``max_trials``, an evenly spaced part of
    the other finished trials. While there are fewer, it proposes what Optuna's sampler does.

    In a study of several objectives, or one with a `HyperbandPruner`, it uses Optuna's own method.

    Args:
        max_trials:
            The number of finished trials to learn from, at least 100.
        seed:
            Seed of the random numbers.
        options:
            Options of `optuna.samplers.TPESampler`.

    Raises:
        ValueError: If ``max_trials`` is below 100.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(sampler=BoundedTPESampler(seed=0))
        >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=30)
        >>> study.best_value < 0.01
        True

    Source:
        Watanabe 2023 (arXiv:2304.11127) on what the parts of TPE do.
    """

    def __init__(
        self, *, max_trials: int = MAX_TRIALS, seed: int | None = None, **options: Any
    ) -> None:
        if max_trials < MIN_MAX_TRIALS:
            raise ValueError(
                f"`max_trials` must be at least {MIN_MAX_TRIALS}, but got {max_trials}."
            )
        super().__init__(VectorizedParzenEstimator, seed=seed, **options)
        self._max_trials, self._trial_history = max_trials, _TrialHistory()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        """Return the parameters that all finished trials have in common.

        Optuna's own method compares all trials since the oldest running one, at every proposal.
        """
        if hides_trials(study) or not self.is_joint(study):
            return super().infer_relative_search_space(study, trial)
        space = self._trial_history.refresh(study).space or {}
        self._trial_history.last_asked = trial.number
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def sample_jointly(self, study: Study, trial: FrozenTrial, space: Space) -> dict[str, Any]:
        """Propose all values jointly, or none while there are too few finished trials."""
        if not _is_single_objective_study(study):
            return super().sample_jointly(study, trial, space)
        history = self._trial_history.refresh(study, trial.number)
        if not space or history.n_finished < self.n_startup_trials:
            return {}
        return self.sample_values(study, trial, space)

    def sample_values(self, study: Study, trial: FrozenTrial, space: Space) -> dict[str, Any]:
        """Propose values by Optuna's method, from the trials that the history selects."""
        if not _is_single_objective_study(study):
            return super().sample_values(study, trial, space)
        history = self._trial_history.refresh(study, trial.number)
        numbers, rest = history.split_good_and_rest(
            self.count_good(history.n_finished), self._max_trials
        )
        if self.counts_running_trials:
            rest = sorted({*rest, *history.running} - {trial.number})
        good, others = ([history.trials[n] for n in some] for some in (numbers, rest))
        key, fitted = (numbers, space), history.fitted_good
        if fitted is None or fitted[0] != key:  # the same for all trials of a cohort
            fitted = key, self.fit_density(study, space, good, good=True)
            history.fitted_good = fitted
        other = history.fitted_rest
        if other is None or other.key != key or other.proposals >= history.n_finished:
            density = self.fit_density(study, space, others, good=False)
            other = history.fitted_rest = _FittedRestDensity(key, density)
        other.proposals += REFIT_INTERVAL
        return self.propose(fitted[1], other.estimator, space)

    def internal_values(
        self, study: Study, trials: list[FrozenTrial], space: Space
    ) -> dict[str, NDArray[Any]]:
        """Return Optuna's internal values of the trials that have all parameters.

        The values of finished and running trials are computed once and kept.
        """
        if hides_trials(study):
            return super().internal_values(study, trials, space)
        known = self._trial_history.encoded_rows(space)
        rows = [known.get(trial.number) for trial in trials]
        for i in [i for i, row in enumerate(rows) if row is None]:
            params = trials[i].params
            is_complete = space.keys() <= params.keys()
            params = params if is_complete else self.params_of(study, trials[i])
            if space.keys() <= params.keys():
                values = (d.to_internal_repr(params[name]) for name, d in space.items())
                row = rows[i] = np.fromiter(values, float, len(space))
                if is_complete:
                    known[trials[i].number] = row
        present = [row for row in rows if row is not None]
        columns = np.concatenate([[], *present]).reshape(-1, len(space)).T
        return dict(zip(space, columns, strict=True))


def _is_single_objective_study(study: Study) -> bool:
    """Return whether a study has one objective and is not a view made by `HyperbandPruner`."""
    return not hides_trials(study) and len(study.directions) == 1


@dataclass
class _FittedRestDensity:
    """The density of the trials that are not good, and how often it was used.

    Args:
        key:
            The numbers of the good trials, and the search space.
        estimator:
            The density.
        proposals:
            The number of proposals made with it, times `REFIT_INTERVAL`.
    """

    key: Any
    estimator: ParzenEstimator
    proposals: int = 0


class _TrialHistory:
    """The finished trials of one study, sorted as TPE sorts them. A copy of it is empty.

    Attributes:
        trials: All trials of the study.
        running: Numbers of the running trials.
        space: The distributions that all finished trials have; None before the first.
        fitted_rest: The last density of the trials that are not good.
        fitted_good: The last density of the good trials, after the key it was fitted for.
        last_asked: Number of the trial whose search space was inferred last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._study: tuple[BaseStorage, int] | None = None
        self._reset()

    def __reduce__(self) -> tuple[type[_TrialHistory], tuple[()]]:
        return _TrialHistory, ()

    def _reset(self) -> None:
        self.trials: list[FrozenTrial] = []
        self.running: list[int] = []
        self.space: Space | None = None
        self.fitted_rest: _FittedRestDensity | None = None
        self.fitted_good: tuple[Any, ParzenEstimator] | None = None
        self.last_asked: int | None = None
        self._n_seen = 0  # number of trials at the last refresh
        self._unfinished: list[int] = []  # trial numbers
        self._finished_numbers: list[int] = []  # ascending, without failed trials
        self._ranked: list[tuple[int, float, float, int]] = []  # sort key and trial number
        self._encoded: dict[tuple[str, ...], tuple[Space, Rows]] = {}

    @property
    def n_finished(self) -> int:
        """The number of trials that finished without failing."""
        return len(self._finished_numbers)

    def refresh(self, study: Study, last_asked: int | None = None) -> _TrialHistory:
        """Add the trials that finished since the last call, and return this object.

        Args:
            study:
                The study; another one than before starts a new history.
            last_asked:
                Number of the trial that is proposed: if its search space was inferred last, the
                trials of that moment are used.
        """
        which = study_key(study)
        if last_asked is not None and last_asked == self.last_asked and self._study == which:
            return self
        with self._lock:
            if self._study != which:
                self._study = which
                self._reset()
            self.trials = all_trials(study)
            # Only new trials and those that were unfinished, not all of them at every proposal.
            self._unfinished += range(self._n_seen, len(self.trials))
            self._n_seen = len(self.trials)
            ended = [n for n in self._unfinished if self.trials[n].state.is_finished()]
            if ended:
                self._unfinished = [
                    n for n in self._unfinished if not self.trials[n].state.is_finished()
                ]
            self.running = [
                n for n in self._unfinished if self.trials[n].state == TrialState.RUNNING
            ]
            self._add(ended, -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0)
        return self

    def _add(self, ended: list[int], sign: float) -> None:
        """Add finished trials, by number; failed ones are left out."""
        for number in ended:
            trial = self.trials[number]
            if trial.state != TrialState.FAIL:
                self._keep_common_params(trial.distributions)
                insort(self._finished_numbers, number)
                insort(self._ranked, (*sort_key(trial, sign), number))

    def _keep_common_params(self, distributions: Space) -> None:
        """Keep the parameters of the space that another trial has with the same distribution."""
        if self.space is None:
            self.space = dict(distributions)
        elif self.space != distributions:
            self.space = {n: d for n, d in self.space.items() if distributions.get(n) == d}

    def split_good_and_rest(self, n_good: int, max_trials: int) -> tuple[list[int], list[int]]:
        """Return the numbers of the good trials, and of others spread over the study, ascending.

        Args:
            n_good:
                How many trials are good.
            max_trials:
                The most trials to return in all.
        """
        n = len(self._finished_numbers)
        good = {ranked[-1] for ranked in self._ranked[:n_good]}
        others = self._finished_numbers
        if n > max_trials:
            count = max_trials - len(good)
            others = [self._finished_numbers[i * n // count] for i in range(count)]
        return sorted(good), [number for number in others if number not in good]

    def encoded_rows(self, space: Space) -> Rows:
        """Return the stored internal values of trials, by trial number, for one search space."""
        names = tuple(space)
        known, rows = self._encoded.get(names, ({}, {}))
        if known != space:
            rows = {}
            self._encoded[names] = space, rows
        return rows
