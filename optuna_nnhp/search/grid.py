"""Grids: the values of a grid, its points that differ in effect, and an order of trying them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
import itertools
import math
from numbers import Real
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from optuna_nnhp.errors import short_repr
from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.catalogue import nearest_value
from optuna_nnhp.hyperparameters.spec import Hyperparameter
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.spec import is_in_distribution

Point = dict[str, Value]

MAX_GRID_POINTS = 100_000  # the most points that are ever listed
SOBOL_EXPONENT = 14  # 2 ** this many Sobol points are drawn for the beginning of the order
MAX_SOBOL_EXPONENT = 20  # the same for a grid of more than `MAX_GRID_POINTS` points
MIN_VALUES_IN_RANGE = 2  # if fewer of the catalogue's values lie in a range, its ends are used


def default_grid_values(
    distribution: BaseDistribution, spec: Hyperparameter | None = None
) -> tuple[Value, ...]:
    """Return the grid values of a parameter for which the user names none.

    They are the catalogue's values that lie in the range, all choices that the user gives, or the
    ends and the middle of any other range.

    Args:
        distribution:
            The parameter's distribution.
        spec:
            The catalogue's entry of the hyperparameter; None for the user's own parameters.

    Example:
        >>> (
        ...     default_grid_values(FloatDistribution(0.01, 1.0, log=True)),
        ...     default_grid_values(IntDistribution(1, 2)),
        ... )
        ((0.01, 0.1, 1.0), (1, 2))
    """
    known: Sequence[Value] = () if spec is None else spec.grid_values
    if isinstance(distribution, CategoricalDistribution):
        is_own = spec is None or distribution != spec.distribution
        return _without_equivalents(distribution.choices if is_own else known, spec)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    inside = [
        to_stored_value(level, distribution)
        for level in known
        if is_in_distribution(distribution, level)
    ]
    if len(inside) < MIN_VALUES_IN_RANGE:
        low, high = distribution.low, distribution.high
        middle = math.sqrt(low * high) if distribution.log else (low + high) / 2
        inside = [low, nearest_value(middle, distribution), high]
    return _without_equivalents(inside, spec)


def check_grid_values(
    levels: Any,
    space: Mapping[str, BaseDistribution],
    specs: Mapping[str, Hyperparameter],
) -> dict[str, tuple[Value, ...]]:
    """Check the grid values that a user names, and return them as trials will store them.

    Args:
        levels:
            Lists of values by name.
        space:
            The distributions of the tuned parameters.
        specs:
            The catalogue's entries, by name.

    Returns:
        The values by name, each once.

    Raises:
        ValueError: If a name is not tuned, or a value does not lie in its range.

    Example:
        >>> check_grid_values({"width": [16, 64.0, 16]}, {"width": IntDistribution(1, 99)}, {})
        {'width': (16, 64)}
    """
    if not isinstance(levels, Mapping) or not levels:
        raise ValueError(
            "`levels` must name hyperparameters and lists of their values, but got "
            f"{short_repr(levels)}."
        )
    checked: dict[str, tuple[Value, ...]] = {}
    for name, values in levels.items():
        if name not in space:
            raise unknown_name("a hyperparameter that is tuned", name, space)
        is_list = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
        if not is_list or len(values) == 0:
            raise ValueError(
                f"`levels[{name!r}]` must be a list with a value or more, but got "
                f"{short_repr(values)}."
            )
        spec = specs.get(name)
        stored = [_check_grid_value(name, value, space[name], spec) for value in values]
        checked[name] = _without_equivalents(stored, spec)
    return checked


def _check_grid_value(
    name: str, value: Any, distribution: BaseDistribution, spec: Hyperparameter | None
) -> Value:
    """Check one grid value and return it as trials will store it."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(distribution, CategoricalDistribution):
        if value not in distribution.choices:
            raise unknown_name(f"a choice of `{name}`", value, map(str, distribution.choices))
        return to_stored_value(value, distribution)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and spec is not None and not is_in_distribution(distribution, value):
        value = _equivalent_bound(value, distribution, spec)
    if not is_number or not is_in_distribution(distribution, value):
        low, high, step = distribution.low, distribution.high, distribution.step
        whole = isinstance(distribution, IntDistribution)
        kind = "a whole number" if whole and step == 1 else "a number"
        steps = f" in steps of {step:g}" if step not in (None, 1) else ""
        raise ValueError(
            f"A level of `{name}` must be {kind} from {low:g} to {high:g}{steps}, "
            f"but got {short_repr(value)}."
        )
    return to_stored_value(value, distribution)


def _equivalent_bound(
    value: Value, distribution: IntDistribution | FloatDistribution, spec: Hyperparameter
) -> Value:
    """Return the end of the range with the same effect as a value outside, such as 0 for "off"."""
    for end in (distribution.low, distribution.high):
        if spec.effective_value(end) == spec.effective_value(value):
            return end
    return value


def to_stored_value(value: Value, distribution: BaseDistribution) -> Value:
    """Return a value as a study's trials store it, so that equal points compare equal.

    Example:
        >>> to_stored_value(1, FloatDistribution(0, 9))
        1.0
    """
    stored: Value = distribution.to_external_repr(distribution.to_internal_repr(value))
    return stored


def _without_equivalents(
    values: Iterable[Value], spec: Hyperparameter | None
) -> tuple[Value, ...]:
    """Drop values that have the same effect as an earlier one, such as a second "off"."""
    by_effect: dict[str, Value] = {}
    for value in values:
        effect = value if spec is None else spec.effective_value(value)
        by_effect.setdefault(repr(effect), value)
    return tuple(by_effect.values())


@dataclass(frozen=True)
class Grid:
    """All combinations of grid values that differ in effect.

    Args:
        levels:
            The grid values of each parameter that varies, by name.
        other_values:
            The values of all other tuned parameters.
        fixed:
            The values of what is not tuned.
        inactive_values:
            The value that a varying parameter takes where it has no effect.
        specs:
            The catalogue's entries, by name.

    Example:
        >>> from optuna_nnhp.hyperparameters.catalogue import specs
        >>> levels = {"loss": ("mse", "huber"), "huber_delta": (0.1, 1.0)}
        >>> grid = Grid(levels, {}, {}, {"huber_delta": 1.0}, specs("regression"))
        >>> grid.count, str(grid)
        (3, '3 points: loss 2 x huber_delta 2, less those without a difference')
    """

    levels: Mapping[str, tuple[Value, ...]]
    other_values: Mapping[str, Value]
    fixed: Mapping[str, Value]
    inactive_values: Mapping[str, Value]
    specs: Mapping[str, Hyperparameter]

    def __str__(self) -> str:
        sizes = {name: len(values) for name, values in self.levels.items() if len(values) > 1}
        text = f"{self.count:,} point{'s' * (self.count != 1)}"
        text += f": {' x '.join(f'{n} {k}' for n, k in sizes.items())}" if sizes else ""
        is_less = self.count < math.prod(sizes.values())
        return text + (", less those without a difference" if is_less else "")

    @cached_property
    def count(self) -> int:
        """The number of points, computed without listing them."""
        return sum(math.prod(map(len, block.values())) for block in self._blocks_by_condition())

    @cached_property
    def _conditional_names(self) -> tuple[str, ...]:
        """Parameters whose effect depends on others; those that others depend on come first."""
        known = (name for name in self.levels if name in self.specs)
        conditional = [n for n in known if self.specs[n].active_if or self.specs[n].inactive_if]
        conditions = {other for name in conditional for other in self._conditions_of(name)}
        return tuple(sorted(conditional, key=lambda name: name not in conditions))

    @cached_property
    def _condition_names(self) -> tuple[str, ...]:
        """Parameters that the effects of others depend on."""
        conditions = {
            other for name in self._conditional_names for other in self._conditions_of(name)
        }
        return tuple(name for name in self.levels if name in conditions)

    def _conditions_of(self, name: str) -> set[str]:
        return {*self.specs[name].active_if, *self.specs[name].inactive_if}

    def canonical(self, values: Mapping[str, Value]) -> Point:
        """Replace the values that have no effect beside the others by their inactive values."""
        canonical = dict(values)
        context = {**self.fixed, **self.other_values, **canonical}
        for name in self._conditional_names:
            if name in canonical and not self.specs[name].is_active(context):
                canonical[name] = context[name] = self.inactive_values[name]
        return canonical

    def _blocks_by_condition(self) -> Iterator[dict[str, tuple[Value, ...]]]:
        """Yield parts of the grid in each of which the same hyperparameters have an effect."""
        known = set[str]()
        for values in itertools.product(*(self.levels[name] for name in self._condition_names)):
            conditions = self.canonical(dict(zip(self._condition_names, values, strict=True)))
            if repr(conditions) in known:
                continue
            known.add(repr(conditions))
            context = {**self.fixed, **self.other_values, **conditions}
            inactive = {n for n in self._conditional_names if not self.specs[n].is_active(context)}
            yield {
                name: (conditions[name],)
                if name in conditions
                else (self.inactive_values[name],)
                if name in inactive
                else levels
                for name, levels in self.levels.items()
            }

    def contains(self, point: Mapping[str, Value]) -> bool:
        """Return whether a point lies on the grid."""
        canonical = self.canonical({name: point[name] for name in self.levels})
        context = {**self.fixed, **self.other_values, **canonical}
        free = (
            n
            for n in self.levels
            if n not in self._conditional_names or self.specs[n].is_active(context)
        )
        return all(canonical[name] in self.levels[name] for name in free)

    def points(self) -> Iterator[Point]:
        """Yield every point once; the last parameter changes fastest."""
        for block in self._blocks_by_condition():
            for values in itertools.product(*block.values()):
                yield dict(zip(block, values, strict=True))

    def sobol_order(self, seed: int, most: int = MAX_GRID_POINTS) -> list[Point]:
        """Return complete points in an order whose beginning covers each parameter evenly.

        The points are ordered by when a sequence of scrambled Sobol points first falls on them;
        those on which none falls come last, in a random order.

        Args:
            seed:
                Seed of the scrambling.
            most:
                The number of points wanted.

        Source:
            Owen 1998, "Scrambling Sobol' and Niederreiter-Xing points".
        """
        is_huge, wanted = self.count > MAX_GRID_POINTS, min(most, self.count, MAX_GRID_POINTS)
        order: dict[str, Point] = {}
        for point in self._sobol_points(seed, MAX_SOBOL_EXPONENT if is_huge else SOBOL_EXPONENT):
            if len(order) == wanted:
                break
            order.setdefault(point_key(point), point)
        if len(order) < wanted and not is_huge:
            others = [point for point in self.points() if point_key(point) not in order]
            turns = np.random.default_rng(seed).permutation(len(others))
            late = (others[turn] for turn in turns[: wanted - len(order)])
            return [{**self.other_values, **point} for point in (*order.values(), *late)]
        return [{**self.other_values, **point} for point in order.values()]

    def _sobol_points(self, seed: int, power: int) -> Iterator[Point]:
        """Yield the points on which Sobol points fall, with repeats."""
        from scipy.stats.qmc import Sobol  # type: ignore[import-untyped]  # takes half a second

        names, sobol = list(self.levels), Sobol(len(self.levels), scramble=True, seed=seed)
        sizes = np.array([len(self.levels[name]) for name in names])
        first = min(power, 10)  # begin with few, because few may be wanted
        for exponent in (first, *range(first, power)):
            places = np.floor(sobol.random_base2(exponent) * sizes).astype(int).tolist()
            for row in places:
                values = (self.levels[n][place] for n, place in zip(names, row, strict=True))
                yield self.canonical(dict(zip(names, values, strict=True)))


def point_key(point: Mapping[str, Value]) -> str:
    """Return a key that is the same for equal points, whatever the order of their names.

    Example:
        >>> point_key({"a": 1, "b": 2.0}) == point_key({"b": 2.0, "a": 1})
        True
    """
    return repr(sorted(point.items()))


class GridPointsSampler(BaseSampler):
    """The points of a grid, for a study that enqueues them; as a sampler it proposes at random.

    The study enqueues each point once. Any worker may take an enqueued point, so several workers
    share a grid, and an interrupted study continues it.

    Args:
        points:
            Complete configurations, in the order in which they are tried.
        text:
            The size of the grid in words.
        is_part:
            Whether the study may end before all points have been tried.

    Example:
        >>> GridPointsSampler([{"depth": 1}, {"depth": 2}]).points[0]
        {'depth': 1}
    """

    def __init__(
        self, points: Sequence[Point], text: str | None = None, *, is_part: bool = False
    ) -> None:
        self.points, self.is_part = list(points), is_part
        self.text = f"{len(self.points):,} points" if text is None else text
        self._random = RandomSampler()

    def reseed_rng(self) -> None:
        """Reseed the random numbers."""
        self._random.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return no space; the study enqueues the points."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return no values; the study enqueues the points."""
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a random value."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)
