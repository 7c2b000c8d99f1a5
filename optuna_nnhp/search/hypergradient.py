"""Gradient-based search: move values against the gradient of a trial's result."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import math
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search._optuna_internals import all_trials
from optuna_nnhp.search._optuna_internals import set_user_attr
from optuna_nnhp.search._optuna_internals import trial_id
from optuna_nnhp.search.unit_scale import from_unit
from optuna_nnhp.search.unit_scale import is_in_distribution
from optuna_nnhp.search.unit_scale import to_unit

# Attributes of a trial: the gradient that the objective stores, and the first trial of its path.
HYPERGRADIENT, ORIGIN = "hypergradient", "origin"
MAX_STEP = 0.05  # in widths of the range
BETA1, BETA2 = 0.5, 0.8
EPS = 1e-12


@dataclass
class AdamOnUnitScale:
    """Adam on the unit scale of search ranges.

    Args:
        distributions:
            Distributions of the parameters that move, by name.
        rate:
            Longest step, in widths of the range.

    Attributes:
        steps: The number of steps so far.
        exp_avg: Running averages of the gradients, by name.
        exp_avg_sq: Running averages of their squares, by name.

    Example:
        >>> adam = AdamOnUnitScale({"x": FloatDistribution(0.0, 1.0)}, rate=0.1)
        >>> round(adam.step({"x": 0.5}, {"x": 3.0})["x"], 6)
        0.4

    Source:
        Kingma and Ba 2015 (arXiv:1412.6980); on hyperparameters e.g. Chandra et al. 2022,
        "Gradient descent: the ultimate optimizer" (arXiv:1909.13371).
    """

    distributions: Mapping[str, FloatDistribution]
    rate: float = MAX_STEP
    steps: int = 0
    exp_avg: dict[str, float] = field(default_factory=dict)
    exp_avg_sq: dict[str, float] = field(default_factory=dict)

    def step(
        self, values: Mapping[str, float], slopes: Mapping[str, float], scale: float = 1.0
    ) -> dict[str, float]:
        """Return the values after one step against the gradient.

        Args:
            values:
                The current values.
            slopes:
                Derivatives of what is minimized, by each value on its unit scale. Values without a
                finite derivative stay.
            scale:
                Factor of the step length.
        """
        self.steps += 1
        moved = dict(values)
        for name, slope in slopes.items():
            if not math.isfinite(slope) or name not in self.distributions:
                continue
            mean = BETA1 * self.exp_avg.get(name, 0.0) + (1 - BETA1) * slope
            square = BETA2 * self.exp_avg_sq.get(name, 0.0) + (1 - BETA2) * slope**2
            self.exp_avg[name], self.exp_avg_sq[name] = mean, square
            mean /= 1 - BETA1**self.steps
            square /= 1 - BETA2**self.steps
            step = scale * self.rate * mean / (math.sqrt(square) + EPS)
            distribution = self.distributions[name]
            step = max(-self.rate, min(self.rate, step))
            moved[name] = float(
                from_unit(distribution, to_unit(distribution, values[name]) - step)
            )
        return moved


def slope_on_unit_scale(distribution: FloatDistribution, value: float, slope: float) -> float:
    """Convert a derivative by a value into one by its position on the unit scale.

    Example:
        >>> slope_on_unit_scale(FloatDistribution(0.0, 4.0), 1.0, 0.5)
        2.0
    """
    if distribution.log:
        return slope * value * math.log(distribution.high / distribution.low)
    return slope * (distribution.high - distribution.low)


class HypergradientSampler(BaseSampler):
    """Move continuous parameters against the gradient that the objective function stores.

    There are ``starts`` paths. Another sampler proposes the first trial of each. Every later trial
    moves the continuous parameters by a step of gradient descent and keeps the others. The
    objective function stores the derivative of its value by each continuous parameter, in the
    parameter's own units, as the trial's user attribute ``"hypergradient"``, a mapping. It may
    compute it in any way: autograd through training, forward mode, finite differences. Parameters
    without a derivative keep their values. If a trial is pruned or fails, its path ends and a new
    one begins.

    The trials hold all of the sampler's state, so a study can be continued, also by several
    workers.

    Args:
        starts:
            The number of paths, which take turns.
        base:
            Sampler that proposes where they begin; random if None.
        names:
            Names of the parameters to move; all continuous ones if None.
        rate:
            Longest step, in widths of a parameter's range.
        seed:
            Seed of the random numbers.

    Raises:
        ValueError: If ``starts`` is below 1, or ``rate`` is not positive.

    Example:
        >>> import optuna
        >>> def objective(trial):
        ...     x = trial.suggest_float("x", -1, 1)
        ...     trial.set_user_attr("hypergradient", {"x": 2 * x})
        ...     return x**2
        >>> study = optuna.create_study(sampler=HypergradientSampler(starts=1, seed=0))
        >>> study.optimize(objective, n_trials=30)
        >>> study.best_value < 0.001
        True

    Source:
        Maclaurin et al. 2015 (arXiv:1502.03492), Franceschi et al. 2017 (arXiv:1703.01785) on how
        such derivatives are computed.
    """

    def __init__(
        self,
        *,
        starts: int = 4,
        base: BaseSampler | None = None,
        names: Collection[str] | None = None,
        rate: float = MAX_STEP,
        seed: int | None = None,
    ) -> None:
        if starts < 1:
            raise ValueError(f"`starts` must be at least 1, but got {starts}.")
        if not rate > 0:
            raise ValueError(f"`rate` must be above 0, but got {rate}.")
        self._starts, self._rate = starts, rate
        self._names = None if names is None else frozenset(names)
        self._base = base if base is not None else RandomSampler(seed=seed)
        self._values: dict[int, dict[str, Any]] = {}  # by trial id

    def reseed_rng(self) -> None:
        """Reseed the base sampler."""
        self._base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the trial's path, and store it as the trial's attribute ``origin``."""
        self._base.before_trial(study, trial)
        path = self._finished_trials_of_path(study, trial.number)
        origin = path[0].number if path else trial.number
        set_user_attr(study, trial, ORIGIN, origin)
        if path:
            self._values[trial_id(trial)] = self._next_values(study, path)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the base sampler's space for the first trial of a path, else no space."""
        if trial_id(trial) in self._values:
            return {}
        return self._base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose by the base sampler for the first trial of a path, else nothing."""
        if trial_id(trial) in self._values:
            return {}
        return self._base.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the path's value, or the base sampler's proposal if there is none."""
        values = self._values.get(trial_id(trial), {})
        if param_name in values and is_in_distribution(param_distribution, values[param_name]):
            return values[param_name]
        return self._base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Forget the trial's values, which are its parameters now."""
        self._values.pop(trial_id(trial), None)
        self._base.after_trial(study, trial, state, values)

    def _finished_trials_of_path(self, study: Study, number: int) -> list[FrozenTrial]:
        """Return the finished trials of the path whose turn it is; none for a new path."""
        paths: dict[int, list[FrozenTrial]] = {}
        busy, ended = set[int](), set[int]()
        for trial in all_trials(study):
            origin = trial.user_attrs.get(ORIGIN)
            if origin is None or trial.number == number:
                continue
            path = paths.setdefault(origin, [])
            if trial.state == TrialState.RUNNING:
                busy.add(origin)
            elif trial.state == TrialState.COMPLETE:
                path.append(trial)
            else:  # pruned or failed: there is no gradient to follow
                ended.add(origin)
        live = {origin: path for origin, path in paths.items() if origin not in ended}
        free = {origin: path for origin, path in live.items() if origin not in busy and path}
        if len(live) < self._starts:
            return []
        return min(free.values(), key=lambda path: (len(path), path[0].number), default=[])

    def _next_values(self, study: Study, path: list[FrozenTrial]) -> dict[str, Any]:
        """Return the values that follow a path's last trial; all its trials give Adam's state."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        adam, values = AdamOnUnitScale({}, self._rate), dict(path[0].params)
        for trial in path:
            adam.distributions = {
                name: d
                for name, d in trial.distributions.items()
                if isinstance(d, FloatDistribution)
                and (self._names is None or name in self._names)
                and not d.single()
            }
            known = trial.user_attrs.get(HYPERGRADIENT, {})
            slopes = {
                name: sign * slope_on_unit_scale(d, trial.params[name], float(known[name]))
                for name, d in adam.distributions.items()
                if name in known
            }
            values = dict(trial.params) | adam.step(
                {name: trial.params[name] for name in slopes}, slopes
            )
        return values
