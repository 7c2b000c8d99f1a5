"""A sampler for followers: trials that share the static values of a leader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

Pin = Callable[[str, Any], Any]


class FollowerSampler(BaseSampler):
    """Propose values by another sampler, then change some so that trials can be stacked.

    The other sampler sees the whole search space, unlike with Optuna's `PartialFixedSampler`, so
    its joint model and its population stay complete. It learns from the values that were trained.

    Args:
        base:
            The sampler that proposes.
        pin:
            Function that maps a parameter's name and proposed value to the value to use.

    Example:
        >>> import optuna
        >>> base = optuna.samplers.RandomSampler(seed=0)
        >>> sampler = FollowerSampler(base, lambda name, v: 3 if name == "depth" else v)
        >>> study = optuna.create_study(sampler=sampler)
        >>> study.ask({"depth": optuna.distributions.IntDistribution(1, 8)}).params
        {'depth': 3}
    """

    def __init__(self, base: BaseSampler, pin: Pin) -> None:
        self._base, self._pin = base, pin

    def reseed_rng(self) -> None:
        """Reseed the other sampler."""
        self._base.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the search space of the other sampler."""
        return self._base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose the joint part by the other sampler, and pin it."""
        proposed = self._base.sample_relative(study, trial, search_space)
        return {name: self._pin(name, value) for name, value in proposed.items()}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Propose one parameter by the other sampler, and pin it."""
        proposed = self._base.sample_independent(study, trial, param_name, param_distribution)
        return self._pin(param_name, proposed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Call the other sampler."""
        self._base.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Call the other sampler."""
        self._base.after_trial(study, trial, state, values)
