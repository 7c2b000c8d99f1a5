"""Optuna's TPE in time that does not grow with the study."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import default_gamma
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.ordering import sort_key
from optuna_nnhp.search.parzen import VectorizedParzenEstimator

Rows = dict[int, NDArray[Any]]

# A density of the other trials serves for as many proposals as this number goes into the finished
# trials: until it is fitted anew, it lacks the trials that were proposed meanwhile and run.
REFIT_INTERVAL = 128
MAX_TRIALS = 1000  # with 500, studies of 2048 trials over the catalogue ended worse


class BoundedTPESampler(TPESampler):
    """TPE that learns from a bounded number of trials.

    TPE's densities have a kernel for each known trial. This one sees the good ones (which are 25
    at most), those that run, and of the rest, once there are too many, an even part over the
    course of the study. While there are fewer, it proposes what Optuna's sampler does.

    A study of several objectives, or one with a `HyperbandPruner`, is sampled by Optuna's
    own method.

    Args:
        max_trials:
            Finished trials to learn from.
        seed:
            Seed.
        options:
            Of Optuna's sampler.

    Raises:
        ValueError: If ``max_trials`` is under 100.

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
        if max_trials < 100:
            raise ValueError(f"`max_trials` must be at least 100, but got {max_trials}.")
        super().__init__(seed=seed, **options)
        self._parzen_estimator_cls = VectorizedParzenEstimator
        self._max_trials, self._trial_history = max_trials, _TrialHistory()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What all trials have in common; Optuna compares those since the oldest that runs."""
        if type(study) is not Study or self._group or not self._is_multivariate(study):
            return super().infer_relative_search_space(study, trial)
        space = self._trial_history.refresh(study).space or {}
        self._trial_history.last_asked = trial.number
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def _sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose all values jointly, once there are enough finished trials."""
        if type(study) is not Study or study._is_multi_objective():
            return super()._sample_relative(study, trial, search_space)
        history = self._trial_history.refresh(study, trial.number)
        if not search_space or history.n_finished < self._n_startup_trials:
            return {}
        return self._sample(study, trial, search_space)

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose values: Optuna's step, on the trials that the history chooses."""
        if type(study) is not Study or study._is_multi_objective():
            return super()._sample(study, trial, search_space)
        history = self._trial_history.refresh(study, trial.number)
        numbers, rest = history.split_good_and_rest(self._gamma or default_gamma, self._max_trials)
        if self._constant_liar:
            rest = sorted({*rest, *history.running} - {trial.number})
        trials = history.trials
        good, others = ([trials[number] for number in some] for some in (numbers, rest))
        key, fitted_good = (numbers, search_space), history.fitted_good
        if fitted_good is None or fitted_good[0] != key:  # for a whole cohort it is the same
            fitted_good = key, self._build_parzen_estimator(study, search_space, good, True)
            history.fitted_good = fitted_good
        good_density = fitted_good[1]
        fitted_rest = history.fitted_rest
        if (
            fitted_rest is None
            or fitted_rest.key != key
            or fitted_rest.proposals >= history.n_finished
        ):
            estimator = self._build_parzen_estimator(study, search_space, others, False)
            fitted_rest = history.fitted_rest = _FittedRest(key, estimator)
        fitted_rest.proposals += REFIT_INTERVAL
        samples = good_density.sample(self._rng.rng, self._n_ei_candidates)
        values = self._compute_acquisition_func(samples, good_density, fitted_rest.estimator)
        best = self._compare(samples, values)
        return {name: d.to_external_repr(best[name]) for name, d in search_space.items()}

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, NDArray[Any]]:
        """Values of the trials that have them all, as Optuna's; once they are there they stay."""
        if type(study) is not Study:
            return super()._get_internal_repr(trials, search_space, study)
        known = self._trial_history.encoded_rows(search_space)
        encoded_rows = [known.get(trial._number) for trial in trials]
        for place in [place for place, row in enumerate(encoded_rows) if row is None]:
            params = trials[place].params
            is_whole = search_space.keys() <= params.keys()
            params = params if is_whole else self._get_params(trials[place], study)
            if search_space.keys() <= params.keys():
                values = (d.to_internal_repr(params[name]) for name, d in search_space.items())
                row = encoded_rows[place] = np.fromiter(values, float, len(search_space))
                if is_whole:
                    known[trials[place].number] = row
        there = [row for row in encoded_rows if row is not None]
        columns = np.concatenate([[], *there]).reshape(-1, len(search_space)).T
        return dict(zip(search_space, columns, strict=True))


@dataclass
class _FittedRest:
    """A density of the trials that are not good, and how long it has served.

    Args:
        key:
            What the good trials were.
        estimator:
            The density.
        proposals:
            `REFIT_INTERVAL` times the proposals made with it.
    """

    key: Any
    estimator: _ParzenEstimator
    proposals: int = 0


class _TrialHistory:
    """The finished trials of one study, ranked as TPE ranks them. A copy of it is empty.

    Attributes:
        trials: All trials of the study.
        running: Numbers of those that run.
        space: The distributions that all finished ones have; None before the first.
        background: The last density of the others.
        asked: Number of the trial whose search space was inferred last.
        fitted: What the last density of good trials was fitted to, and it.
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
        self.last_asked: int | None = None
        self.fitted_rest: _FittedRest | None = None
        self.fitted_good: tuple[Any, _ParzenEstimator] | None = None
        self.space: dict[str, BaseDistribution] | None = None
        self._n_seen = 0  # trials
        self._unfinished: list[int] = []  # numbers of those that had not ended
        self._finished_numbers: list[int] = []  # numbers
        self._ranked: list[tuple[int, float, float, int]] = []  # the last one is the number
        self._encoded: dict[tuple[str, ...], tuple[dict[str, BaseDistribution], Rows]] = {}

    @property
    def n_finished(self) -> int:
        """How many trials have ended otherwise than by failing."""
        return len(self._finished_numbers)

    def refresh(self, study: Study, last_asked: int | None = None) -> _TrialHistory:
        """Itself, with the trials that have ended since, or as it was when a trial was asked."""
        which = study._storage, study._study_id
        if last_asked is not None and last_asked == self.last_asked and self._study == which:
            return self
        with self._lock:
            if self._study != which:
                self._study = which
                self._reset()
            self.trials = study._get_trials(deepcopy=False)
            sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
            # New ones, and those that had not ended: not all of them at every proposal.
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
            for number in ended:
                trial = self.trials[number]
                if trial.state != TrialState.FAIL:
                    self._intersect(trial.distributions)
                    insort(self._finished_numbers, number)
                    insort(self._ranked, (*sort_key(trial, sign), number))
        return self

    def _intersect(self, distributions: dict[str, BaseDistribution]) -> None:
        if self.space is None:
            self.space = dict(distributions)
        elif self.space != distributions:
            self.space = {n: d for n, d in self.space.items() if distributions.get(n) == d}

    def split_good_and_rest(
        self, gamma: Callable[[int], int], max_trials: int
    ) -> tuple[list[int], list[int]]:
        """Numbers of the good trials, and of others spread over the study, both in order."""
        n = len(self._finished_numbers)
        good = {ranked[-1] for ranked in self._ranked[: gamma(n)]}
        others = self._finished_numbers
        if n > max_trials:
            places = max_trials - len(good)
            others = [self._finished_numbers[place * n // places] for place in range(places)]
        return sorted(good), [number for number in others if number not in good]

    def encoded_rows(self, search_space: dict[str, BaseDistribution]) -> Rows:
        """Where the internal values of trials are kept, by number, for one search space."""
        names = tuple(search_space)
        space, encoded_rows = self._encoded.get(names, ({}, {}))
        if space != search_space:
            encoded_rows = {}
            self._encoded[names] = search_space, encoded_rows
        return encoded_rows
