"""Evolutionary search: CMA-ES for numbers only, a genetic algorithm with categories."""

from __future__ import annotations

from collections.abc import Container
import copy
from heapq import nsmallest
from typing import Any
from typing import cast
import warnings

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import RandomSampler
from optuna.samplers.nsgaii import BLXAlphaCrossover
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search._optuna_internals import all_trials
from optuna_nnhp.search._optuna_internals import check_single_objective
from optuna_nnhp.search.cma import SafeCmaEsSampler
from optuna_nnhp.search.ordering import sort_key

# Optuna's 50 is meant for the fronts of several objectives. In synthetic studies of 512 trials
# over 18 parameters, 64 at once and pruned, 12, 16, 20 and 24 parents reached a mean cost of 3.5,
# 3.6, 4.0 and 4.6 over eight seeds, and random search 8.4. The smallest is not taken, because that
# cost was smooth and the cost of networks is not.
POPULATION_SIZE = 16
FINISHED_STATES = (TrialState.COMPLETE, TrialState.PRUNED)


class EvolutionSampler(BaseSampler):
    """Propose offspring of the best trials, by one of Optuna's evolutionary samplers.

    If all parameters of the study's first trial are numbers, `optuna.samplers.CmaEsSampler`
    proposes, else the genetic algorithm of `optuna.samplers.NSGAIISampler`. Optuna's samplers
    learn from COMPLETE trials only, of which successive halving leaves few. Here pruned trials
    count too: they rank behind all COMPLETE ones, by their last step.

    Args:
        seed:
            Seed of the random numbers.
        population_size:
            The number of parents of the genetic algorithm, and of its random trials before them;
            or the size of a generation of CMA-ES.

    Raises:
        ValueError: If ``population_size`` is below 2.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(sampler=EvolutionSampler(seed=0))
        >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=60)
        >>> study.best_value < 0.001
        True

    Source:
        Hansen 2016 (arXiv:1604.00772) on CMA-ES; Deb et al. 2002 (doi:10.1109/4235.996017) on
        NSGA-II, here of a single objective.
    """

    def __init__(self, *, seed: int | None = None, population_size: int = POPULATION_SIZE) -> None:
        if population_size < 2:
            raise ValueError(f"`population_size` must be at least 2, but got {population_size}.")
        self._search_space = IntersectionSearchSpace(include_pruned=True)
        self._random_sampler = RandomSampler(seed=seed)
        with warnings.catch_warnings():
            # The warning concerns Optuna's class, not a choice of the user.
            warnings.simplefilter("ignore", ExperimentalWarning)
            crossover = _ClippedBLXAlphaCrossover()
        self._nsga2_sampler = _BestTrialsNSGAIISampler(
            population_size=population_size, seed=seed, crossover=crossover
        )
        self._cma_es_sampler = SafeCmaEsSampler(
            seed=seed, popsize=max(population_size, 5), warn_independent_sampling=False
        )

    def reseed_rng(self) -> None:
        """Reseed the random numbers of all samplers used here."""
        for sampler in (self._random_sampler, self._nsga2_sampler, self._cma_es_sampler):
            sampler.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that all finished trials have and that can vary."""
        space = self._search_space.calculate(study, use_cache=True)
        return {name: d for name, d in space.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose values by CMA-ES or by the genetic algorithm.

        Raises:
            ValueError: If the study has several objectives.
        """
        check_single_objective(self, study)
        first = next(iter(all_trials(study, FINISHED_STATES, cached=True)), None)
        if first is None or not search_space:
            return {}
        if _has_categories(first.distributions):
            return self._nsga2_sampler.sample_relative(study, trial, search_space)
        return self._cma_es_sampler.sample_relative(
            cast(Study, _RankedStudyView(study)), trial, search_space
        )

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a random value: for first trials, mutations, and parameters not in all trials.

        Raises:
            ValueError: If the study has several objectives.
        """
        check_single_objective(self, study)
        return self._random_sampler.sample_independent(
            study, trial, param_name, param_distribution
        )


class _ClippedBLXAlphaCrossover(BLXAlphaCrossover):
    """BLX-alpha crossover whose children are clipped to the search space.

    Optuna draws again until a child lies inside. That takes long if many parameters of the parents
    lie at the ends of their ranges, as parameters that are off do.
    """

    def crossover(
        self,
        parents_params: NDArray[Any],
        rng: np.random.RandomState,
        study: Study,
        search_space_bounds: NDArray[Any],
    ) -> NDArray[Any]:
        """Return the numbers of a child.

        Shape:
            - parents_params: ``(2, d)``; search_space_bounds: ``(d, 2)``; output: ``(d,)``.
        """
        child = super().crossover(parents_params, rng, study, search_space_bounds)
        low, high = search_space_bounds.T
        inside: NDArray[Any] = np.clip(child, low, high)
        return inside


class _BestTrialsNSGAIISampler(NSGAIISampler):
    """Optuna's genetic algorithm with the best of all finished trials as parents.

    Optuna's generations fit neither pruning nor cohorts: they count COMPLETE trials, and their
    parents are chosen once, when the next generation's first trial is asked. The trials of a
    cohort that end first are the worst, so the results of the others would never be used. With one
    objective, the best trials of a generation and its parents are the best of all trials.
    """

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        """Return 1 if there are enough finished trials to be parents, else 0."""
        ended = all_trials(study, FINISHED_STATES, cached=True)
        return int(len(ended) >= (self.population_size or 0))

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Return the best finished trials."""
        if generation == 0:
            return []
        ended = all_trials(study, FINISHED_STATES, cached=True)
        sign = _direction_sign(study)
        return nsmallest(self.population_size or 0, ended, key=lambda t: sort_key(t, sign))


class _RankedStudyView:
    """A view of a study for CMA-ES: pruned trials are COMPLETE, and values are ranks.

    CMA-ES uses only the order of values, so it loses nothing.
    """

    direction = StudyDirection.MINIMIZE

    def __init__(self, study: Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        """Return the finished trials in the order of their numbers."""
        ended = all_trials(self._study, FINISHED_STATES, cached=use_cache)
        sign = _direction_sign(self._study)
        seen: dict[int, FrozenTrial] = {}
        for place, trial in enumerate(sorted(ended, key=lambda t: sort_key(t, sign))):
            seen[trial.number] = changed = copy.copy(trial)
            changed.state, changed.values = TrialState.COMPLETE, [float(place)]
        return [seen[trial.number] for trial in ended]


def _has_categories(space: dict[str, BaseDistribution]) -> bool:
    return any(isinstance(d, CategoricalDistribution) and not d.single() for d in space.values())


def _direction_sign(study: Study) -> float:
    return -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
