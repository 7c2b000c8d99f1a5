"""Every use that `search` makes of Optuna's private parts, under public names.

No other module of `search` touches a private name of Optuna (a test checks it). Each name below
has a test in ``tests/search/test_optuna_internals.py`` that fails when Optuna changes the part.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from numpy.typing import NDArray
from optuna import Study
from optuna._transform import _SearchSpaceTransform as SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import TPESampler
from optuna.samplers._lazy_random_state import LazyRandomState as LazyRandomState
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator as ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedCategoricalDistributions
from optuna.samplers._tpe.sampler import default_gamma
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

__all__ = [
    "CmaEsSamplerHooks",
    "LazyRandomState",
    "ParzenEstimator",
    "SearchSpaceTransform",
    "TPESamplerHooks",
    "all_trials",
    "check_single_objective",
    "contains",
    "hides_trials",
    "is_categorical_kernel",
    "kernels_of",
    "set_user_attr",
    "study_key",
    "trial_id",
]

Space = dict[str, BaseDistribution]


def all_trials(
    study: Study, states: Container[TrialState] | None = None, *, cached: bool = False
) -> list[FrozenTrial]:
    """Return a study's trials without copying them, also where `HyperbandPruner` hides some.

    Args:
        study:
            The study.
        states:
            The states to return; all if None.
        cached:
            Whether the trials that Optuna read when the trial was asked are recent enough.
    """
    return study._get_trials(deepcopy=False, states=states, use_cache=cached)


def hides_trials(study: Study) -> bool:
    """Return whether a study is a `HyperbandPruner`'s view of it, which has not all trials."""
    return hasattr(study, "_bracket_id")


def study_key(study: Study) -> tuple[BaseStorage, int]:
    """Return what identifies a study: its storage and its number there."""
    return study._storage, study._study_id


def trial_id(trial: FrozenTrial) -> int:
    """Return the number by which the storage knows a trial."""
    return trial._trial_id


def set_user_attr(study: Study, trial: FrozenTrial, name: str, value: Any) -> None:
    """Write a user attribute of a trial that was just asked, to the storage and to the object."""
    study._storage.set_trial_user_attr(trial._trial_id, name, value)
    trial.set_user_attr(name, value)


def check_single_objective(sampler: BaseSampler, study: Study) -> None:
    """Raise if a study has several objectives.

    Raises:
        ValueError: If it has.
    """
    sampler._raise_error_if_multi_objective(study)


def contains(distribution: BaseDistribution, value: float) -> bool:
    """Return whether a distribution contains a number."""
    return distribution._contains(value)


def kernels_of(estimator: ParzenEstimator) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return the weights of a Parzen estimator's kernels, and the kernels of each parameter.

    Shape:
        - Weights: ``(observations + 1,)``.
    """
    mixture = estimator._mixture_distribution
    return mixture.weights, dict(zip(estimator._search_space, mixture.distributions, strict=True))


def is_categorical_kernel(kernels: Any) -> bool:
    """Return whether kernels are those of a categorical parameter."""
    return isinstance(kernels, _BatchedCategoricalDistributions)


class TPESamplerHooks(TPESampler):
    """Optuna's `TPESampler` with its private steps under public names, to call or to override.

    Args:
        estimator_class:
            The class of both densities.
        options:
            Options of Optuna's sampler.
    """

    def __init__(self, estimator_class: type[ParzenEstimator], **options: Any) -> None:
        super().__init__(**options)
        self._parzen_estimator_cls = estimator_class

    @property
    def n_startup_trials(self) -> int:
        """The number of finished trials before the sampler learns from them."""
        return self._n_startup_trials

    @property
    def counts_running_trials(self) -> bool:
        """Whether running trials count as bad ones (constant liar)."""
        return self._constant_liar

    def is_joint(self, study: Study) -> bool:
        """Return whether all parameters are proposed together, in one group."""
        return not self._group and self._is_multivariate(study)

    def count_good(self, n: int) -> int:
        """Return how many of ``n`` finished trials count as good."""
        return (self._gamma or default_gamma)(n)

    def fit_density(
        self, study: Study, space: Space, trials: list[FrozenTrial], *, good: bool
    ) -> ParzenEstimator:
        """Fit the density of the good trials, or that of the others."""
        return self._build_parzen_estimator(study, space, trials, good)

    def propose(
        self, good: ParzenEstimator, others: ParzenEstimator, space: Space
    ) -> dict[str, Any]:
        """Draw candidates from the density of the good trials and return the best one."""
        samples = good.sample(self._rng.rng, self._n_ei_candidates)
        values = self._compute_acquisition_func(samples, good, others)
        best = self._compare(samples, values)
        return {name: d.to_external_repr(best[name]) for name, d in space.items()}

    def params_of(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """Return a trial's parameters, those included that are only proposed yet."""
        return self._get_params(trial, study)

    def sample_jointly(self, study: Study, trial: FrozenTrial, space: Space) -> dict[str, Any]:
        """Propose values, or nothing while there are too few trials; may be overridden."""
        return super()._sample_relative(study, trial, space)

    def sample_values(self, study: Study, trial: FrozenTrial, space: Space) -> dict[str, Any]:
        """Propose values of some parameters, jointly; may be overridden."""
        return super()._sample(study, trial, space)

    def internal_values(
        self, study: Study, trials: list[FrozenTrial], space: Space
    ) -> dict[str, NDArray[Any]]:
        """Return the internal values of the trials that have all parameters; may be overridden."""
        return super()._get_internal_repr(trials, space, study)

    def _sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        return self.sample_jointly(study, trial, search_space)

    def _sample(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        return self.sample_values(study, trial, search_space)

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: Space, study: Study
    ) -> dict[str, NDArray[Any]]:
        return self.internal_values(study, trials, search_space)


class CmaEsSamplerHooks(CmaEsSampler):
    """Optuna's `CmaEsSampler` with the reading of its stored state as a public method."""

    def stored_optimizer(self, trial: FrozenTrial) -> bytes | None:
        """Return the pickled optimizer that a trial holds, or None.

        Raises:
            ValueError: If it is not written as hexadecimal digits.
            KeyError: If a part of it is missing.
        """
        attrs = trial.system_attrs
        parts = {n: attrs[n] for n in attrs if n.startswith(self._attr_key_optimizer)}
        return bytes.fromhex(self._concat_optimizer_attrs(parts)) if parts else None

    def restore_optimizer(self, trials: list[FrozenTrial]) -> Any:
        """Return the optimizer of the latest trial that holds one, or None; to be overridden."""
        return super()._restore_optimizer(trials)

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        return self.restore_optimizer(completed_trials)
