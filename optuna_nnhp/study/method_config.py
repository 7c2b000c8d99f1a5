"""The tuning method of a study: its sampler, its policy and their options."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import copy
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from numbers import Integral
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import BruteForceSampler
from optuna.samplers import GridSampler
from optuna.samplers import QMCSampler

from optuna_nnhp import rng
from optuna_nnhp.errors import short_repr
from optuna_nnhp.hyperparameters.catalogue import nearest_value
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.spec import is_in_distribution
from optuna_nnhp.search.methods import make_sampler
from optuna_nnhp.search.methods import split_options
from optuna_nnhp.search.zoomed_space import ZoomedSpace
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.grid import check_grid
from optuna_nnhp.study.grid import make_grid
from optuna_nnhp.study.policies import Policy
from optuna_nnhp.study.policies import PolicyContext
from optuna_nnhp.study.policies.halving import HalvingPolicy
from optuna_nnhp.study.policies.hypergradient import HypergradientPolicy
from optuna_nnhp.study.policies.hypergradient import gradient_space
from optuna_nnhp.study.policies.population import PopulationPolicy
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.trial_source import BASELINE

ZOOMED_FROM = "zoomed_from"  # study attribute: the study whose trials `zoom` made its space from
POLICIES: dict[str | None, Callable[..., Policy]] = {
    "population": PopulationPolicy,
    "gradient": HypergradientPolicy,
}
# Least values of options that are whole numbers; 1 for all others.
LEAST = {"size": 2, "population_size": 2, "round_size": 5, "n_startup_trials": 0}


@dataclass
class MethodConfig:
    """A method with its options.

    Args:
        method:
            Its name; None for a user's own sampler.
        sampler:
            Proposes the trials.
        is_user_sampler:
            Whether the user gave the sampler.
        options:
            Options of the method's sampler.
        policy_options:
            Options of the method's policy.
        levels:
            Values by name, for a grid.
        seed:
            Seed of the study.
    """

    method: str | None
    sampler: BaseSampler
    is_user_sampler: bool
    options: dict[str, Any] = field(default_factory=dict)
    policy_options: dict[str, Any] = field(default_factory=dict)
    levels: Mapping[str, Sequence[Value]] | None = None
    seed: int = 0

    def reject_options(self, **given: object) -> None:
        """Raise if an argument was given that the method's policy does not use."""
        for name, value in given.items():
            if value is not None and self.method in POLICIES:
                raise ValueError(
                    f"`{name}` must not be given with the method {self.method!r}, which has its "
                    f"own way, but got {short_repr(value)}."
                )

    def check(self, problem: Problem, budget: Budget) -> None:
        """Plan a grid, and raise if the method cannot tune a problem.

        Raises:
            ValueError: If a grid does not fit, or no tuned parameter has a gradient.
        """
        if self.method == "grid":
            partial = self.policy_options.get("partial", False)
            self.sampler = make_grid(problem, budget, self.levels, partial, self.seed)
        elif isinstance(self.sampler, GridSampler):
            check_grid(self.sampler, problem.space)
        if self.method == "gradient":
            gradient_space(problem)

    def sampler_for(self, study: Study, *, few: bool, worker: int = 0) -> BaseSampler:
        """Return the sampler, with other random numbers for a continued study and each worker.

        With the same ones it would repeat the study's first trials, or those of the first worker.
        """
        sampler_fixes_all_values = self.method == "grid" or isinstance(self.sampler, QMCSampler)
        if sampler_fixes_all_values:  # all workers share one sequence
            return self.sampler
        if self.method is None or self.is_user_sampler:
            return _with_new_seed(self.sampler) if worker else self.sampler
        seed = (self.seed + 1_000_003 * len(study.get_trials(deepcopy=False))) % 2**32
        if worker:
            seed = rng.mix_keys(seed, rng.WORKERS, worker) % 2**32
        return make_sampler(self.method, seed, few=few, options=self.options)

    @property
    def uses_portfolio(self) -> bool:
        """Return whether the template's portfolio is tried besides the default configuration."""
        return self.method not in POLICIES

    def make_policy(self, context: PolicyContext) -> Policy:
        """Make the policy of the method, with its options."""
        options = {} if self.method == "grid" else self.policy_options
        return POLICIES.get(self.method, HalvingPolicy)(context, **options)


def _with_new_seed(sampler: BaseSampler) -> BaseSampler:
    """Return a copy of a user's sampler with other random numbers."""
    other = copy.deepcopy(sampler)
    other.reseed_rng()
    return other


def parse_method(
    method: str | BaseSampler,
    sampler: BaseSampler | None,
    options: Mapping[str, Any] | None,
    levels: Mapping[str, Sequence[Value]] | None,
    seed: int,
) -> MethodConfig:
    """Convert the user's arguments to a method configuration.

    Raises:
        ValueError: If they contradict each other, or name something unknown.

    Example:
        >>> parse_method("random", None, None, None, seed=0).method
        'random'
    """
    if isinstance(method, BaseSampler):
        if sampler is not None:
            raise ValueError("The sampler must be given once, as `method` or as `sampler`.")
        if options:
            raise ValueError(
                f"`method_options` must come with the name of a method, but it is {method!r}."
            )
        return parse_method("bayes", method, None, levels, seed)
    mine, loops = (
        {name: _checked_option(name, value) for name, value in part.items()}
        for part in split_options(method, options)
    )
    if levels is not None and method != "grid":
        raise ValueError(f"`levels` must come with the method 'grid', but it is {method!r}.")
    if sampler is None:
        method_config = MethodConfig(
            method, make_sampler(method, seed, options=mine), False, mine, loops
        )
        return replace(method_config, levels=levels, seed=seed)
    if not isinstance(sampler, BaseSampler):
        raise ValueError(f"`sampler` must be an Optuna sampler, but got {short_repr(sampler)}.")
    if mine or (method != "bayes" and method not in POLICIES):
        raise ValueError(
            f"`sampler` must stand alone, or with the methods {', '.join(map(str, POLICIES))}, "
            f"but came with {method!r}{' and its options' if mine else ''}."
        )
    if method in POLICIES and isinstance(sampler, GridSampler | BruteForceSampler):
        raise ValueError(
            f"`sampler` must be one that proposes any values beside {method!r}, but is a grid: "
            f"{sampler!r}."
        )
    return MethodConfig(
        method if method in POLICIES else None, sampler, True, {}, loops, seed=seed
    )


def _checked_option(name: str, value: Any) -> Any:
    """Return an option of a method as a plain number or bool; raise if it makes no sense."""
    if name == "partial":
        if not isinstance(value, bool):
            raise ValueError(f"`partial` must be True or False, but got {short_repr(value)}.")
        return value
    if name == "rate":
        if type(value) is bool or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"`rate` must be a number above 0, but got {short_repr(value)}.")
        return float(value)
    if name == "patience" and value is None:
        return None
    least = LEAST.get(name, 1)
    if type(value) is bool or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}, but got {short_repr(value)}."
        )
    return int(value)


def enqueue_best_of_source_study(
    study: Study, space: Mapping[str, BaseDistribution] | None, problem: Problem
) -> None:
    """Enqueue the source study's best configuration, if a study is new and its space is zoomed."""
    if not isinstance(space, ZoomedSpace) or study.get_trials(deepcopy=False):
        return
    study.set_user_attr(ZOOMED_FROM, space.source)
    best = {
        name: nearest_value(space.best[name], d)
        for name, d in problem.space.items()
        if name in space.best
    }
    best = {
        name: value
        for name, value in best.items()
        if is_in_distribution(problem.space[name], value)
    }
    study.enqueue_trial({**problem.defaults(), **best}, user_attrs={BASELINE: True})
