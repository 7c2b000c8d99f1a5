"""Gradient-based search: values moved along the slope of what a trial comes to."""

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

from optuna_nnhp.search.unit_scale import from_unit
from optuna_nnhp.search.unit_scale import is_in_distribution
from optuna_nnhp.search.unit_scale import to_unit

# Attributes of a trial: the slopes that the objective notes, and whose path it is on.
HYPERGRADIENT, ORIGIN = "hypergradient", "origin"
MAX_STEP = 0.05  # of a range: the longest step
BETA1, BETA2 = 0.5, 0.8  # of what was known of slopes, that is kept at each step
EPS = 1e-12


@dataclass
class AdamOnUnitScale:
    """Adam on the unit scale of ranges, which are logarithmic where it matters.

    Args:
        distributions:
            What is moved, by name.
        rate:
            Longest step, as a share of the range.

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
        """Values that should be better.

        Args:
            values:
                Those now.
            slopes:
                What is to be made small, by each of them on its unit scale; those without one, or
                with NaN, stay.
            scale:
                Factor of the rate.
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
    """A slope by a value as one by its place on the unit scale.

    Example:
        >>> slope_on_unit_scale(FloatDistribution(0.0, 4.0), 1.0, 0.5)
        2.0
    """
    if distribution.log:
        return slope * value * math.log(distribution.high / distribution.low)
    return slope * (distribution.high - distribution.low)


class HypergradientSampler(BaseSampler):
    """Moves continuous parameters against the slope that the objective function reports.

    There are ``starts`` paths. The first trial of each is proposed by another sampler; every next
    one moves the continuous parameters by a step of gradient descent and keeps the others. The
    objective function notes the derivative of its value by each continuous parameter, in the
    parameter's own units, as the trial's attribute ``"hypergradient"``, a mapping; how it comes
    to know it (autograd through training, forward mode, differences) is its own affair. Parameters
    without a derivative stay as they are. A path whose trial is pruned or fails is given up, and
    another one begins.

    Everything the sampler knows is in the trials, so a study can be continued, by several
    workers too.

    Args:
        starts:
            Paths, which take turns.
        base:
            Proposes where they begin; random if None.
        names:
            What is moved; all continuous parameters if None.
        rate:
            Longest step, as a share of a parameter's range.
        seed:
            Seed.

    Raises:
        ValueError: If ``starts`` is under 1, or ``rate`` not above 0.

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
        """Draw other random numbers, as in a new thread."""
        self._base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the trial's path, and note it as the trial's attribute ``origin``."""
        self._base.before_trial(study, trial)
        path = self._finished_path(study, trial.number)
        origin = path[0].number if path else trial.number
        study._storage.set_trial_user_attr(trial._trial_id, ORIGIN, origin)
        trial.set_user_attr(ORIGIN, origin)  # what the objective function sees
        if path:
            self._values[trial._trial_id] = self._next_values(study, path)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The base's at the beginning of a path; nothing else is proposed jointly."""
        if trial._trial_id in self._values:
            return {}
        return self._base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The base's at the beginning of a path."""
        if trial._trial_id in self._values:
            return {}
        return self._base.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The path's value, or the base's proposal where it has none."""
        values = self._values.get(trial._trial_id, {})
        if param_name in values and is_in_distribution(param_distribution, values[param_name]):
            return values[param_name]
        return self._base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Forget the trial's values; they are its parameters."""
        self._values.pop(trial._trial_id, None)
        self._base.after_trial(study, trial, state, values)

    def _finished_path(self, study: Study, number: int) -> list[FrozenTrial]:
        """The finished trials of the path whose turn it is; empty for a new one."""
        paths: dict[int, list[FrozenTrial]] = {}
        busy, ended = set[int](), set[int]()
        for trial in study._get_trials(deepcopy=False):
            origin = trial.user_attrs.get(ORIGIN)
            if origin is None or trial.number == number:
                continue
            path = paths.setdefault(origin, [])
            if trial.state == TrialState.RUNNING:
                busy.add(origin)
            elif trial.state == TrialState.COMPLETE:
                path.append(trial)
            else:  # without a slope it goes nowhere: another one begins
                ended.add(origin)
        live = {origin: path for origin, path in paths.items() if origin not in ended}
        free = {origin: path for origin, path in live.items() if origin not in busy and path}
        if len(live) < self._starts:
            return []
        return min(free.values(), key=lambda path: (len(path), path[0].number), default=[])

    def _next_values(self, study: Study, path: list[FrozenTrial]) -> dict[str, Any]:
        """The values after a path's last trial: Adam's state follows from all of them."""
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
