"""Grids: the levels of a space, the points that differ in effect, an order that spreads them."""

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

MAX_GRID_POINTS = 100_000  # that are ever listed
SOBOL_EXPONENT = 14  # two to this power: points drawn for the beginning of the order
MAX_SOBOL_EXPONENT = 20  # the same where only the beginning of a huge grid is wanted
MIN_VALUES_IN_RANGE = (
    2  # of a record's levels must lie in a user's range, or its ends and middle are better
)


def default_grid_values(
    distribution: BaseDistribution, spec: Hyperparameter | None = None
) -> tuple[Value, ...]:
    """The values that a grid visits where the user names none.

    Those of the catalogue, as far as they lie in the range; all choices that a user gives
    himself; and of another range its ends and its middle.

    Args:
        distribution:
            The range.
        spec:
            What the catalogue knows of the hyperparameter, if it does.

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
    """Levels that a user names, as trials will hold them, each once.

    Args:
        levels:
            Lists of values by name.
        space:
            What is tuned.
        specs:
            What the catalogue knows of it.

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
        held = [_checked(name, value, space[name], spec) for value in values]
        checked[name] = _without_equivalents(held, spec)
    return checked


def _checked(
    name: str, value: Any, distribution: BaseDistribution, spec: Hyperparameter | None
) -> Value:
    """One level as trials will hold it."""
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
    """For a value such as 0, which is on no logarithmic range, the end that is "off" as well."""
    for end in (distribution.low, distribution.high):
        if spec.effective_value(end) == spec.effective_value(value):
            return end
    return value


def to_stored_value(value: Value, distribution: BaseDistribution) -> Value:
    """A value as the trials of a study hold it, so that equal points are found equal.

    Example:
        >>> to_stored_value(1, FloatDistribution(0, 9))
        1.0
    """
    held: Value = distribution.to_external_repr(distribution.to_internal_repr(value))
    return held


def _without_equivalents(
    values: Iterable[Value], spec: Hyperparameter | None
) -> tuple[Value, ...]:
    """Values without those whose effect an earlier one has; of two that are "off" one is left."""
    by_effect: dict[str, Value] = {}
    for value in values:
        effect = value if spec is None else spec.effective_value(value)
        by_effect.setdefault(repr(effect), value)
    return tuple(by_effect.values())


@dataclass(frozen=True)
class Grid:
    """All combinations of some levels that differ in effect.

    Args:
        levels:
            Values of what varies, by name.
        other_values:
            Values of all else that is tuned.
        fixed:
            Values of what is not tuned.
        inactive_values:
            Values of what varies, where they have no effect.
        specs:
            What the catalogue knows of the hyperparameters.

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
        """Number of points; not one of them is listed for it."""
        return sum(math.prod(map(len, box.values())) for box in self._blocks())

    @cached_property
    def _conditional_names(self) -> tuple[str, ...]:
        """Names of those whose effect may depend on others; who rules others comes first."""
        known = (name for name in self.levels if name in self.specs)
        ruled = [n for n in known if self.specs[n].active_if or self.specs[n].inactive_if]
        rulers = {other for name in ruled for other in self._conditions_of(name)}
        return tuple(sorted(ruled, key=lambda name: name not in rulers))

    @cached_property
    def _condition_names(self) -> tuple[str, ...]:
        """Names of those that others' effects depend on."""
        rulers = {other for name in self._conditional_names for other in self._conditions_of(name)}
        return tuple(name for name in self.levels if name in rulers)

    def _conditions_of(self, name: str) -> set[str]:
        return {*self.specs[name].active_if, *self.specs[name].inactive_if}

    def canonical(self, values: Mapping[str, Value]) -> Point:
        """Some levels, those without effect beside the others at rest."""
        canonical = dict(values)
        around = {**self.fixed, **self.other_values, **canonical}
        for name in self._conditional_names:
            if name in canonical and not self.specs[name].is_active(around):
                canonical[name] = around[name] = self.inactive_values[name]
        return canonical

    def _blocks(self) -> Iterator[dict[str, tuple[Value, ...]]]:
        """The grid in parts, in each of which the same hyperparameters have an effect."""
        known = set[str]()
        for values in itertools.product(*(self.levels[name] for name in self._condition_names)):
            rulers = self.canonical(dict(zip(self._condition_names, values, strict=True)))
            if repr(rulers) in known:
                continue
            known.add(repr(rulers))
            around = {**self.fixed, **self.other_values, **rulers}
            at_rest = {n for n in self._conditional_names if not self.specs[n].is_active(around)}
            yield {
                name: (rulers[name],)
                if name in rulers
                else (self.inactive_values[name],)
                if name in at_rest
                else levels
                for name, levels in self.levels.items()
            }

    def contains(self, point: Mapping[str, Value]) -> bool:
        """Whether a point is on the grid."""
        canonical = self.canonical({name: point[name] for name in self.levels})
        around = {**self.fixed, **self.other_values, **canonical}
        free = (
            n
            for n in self.levels
            if n not in self._conditional_names or self.specs[n].is_active(around)
        )
        return all(canonical[name] in self.levels[name] for name in free)

    def points(self) -> Iterator[Point]:
        """Every point once, the last name's level changing fastest."""
        for box in self._blocks():
            for values in itertools.product(*box.values()):
                yield dict(zip(box, values, strict=True))

    def sobol_order(self, seed: int, most: int = MAX_GRID_POINTS) -> list[Point]:
        """Complete points, in an order whose beginning has the levels of each name alike.

        It is that in which scrambled Sobol points first fall on them; who comes after the last of
        these is in a random order.

        Args:
            seed:
                Of the scrambling.
            most:
                How many points are wanted.

        Source:
            Owen 1998, "Scrambling Sobol' and Niederreiter-Xing points".
        """
        is_huge, wanted = self.count > MAX_GRID_POINTS, min(most, self.count, MAX_GRID_POINTS)
        order: dict[str, Point] = {}
        for point in self._sobol_points(seed, MAX_SOBOL_EXPONENT if is_huge else SOBOL_EXPONENT):
            if len(order) == wanted:
                break
            order.setdefault(key(point), point)
        if len(order) < wanted and not is_huge:
            others = [point for point in self.points() if key(point) not in order]
            turns = np.random.default_rng(seed).permutation(len(others))
            late = (others[turn] for turn in turns[: wanted - len(order)])
            return [{**self.other_values, **point} for point in (*order.values(), *late)]
        return [{**self.other_values, **point} for point in order.values()]

    def _sobol_points(self, seed: int, power: int) -> Iterator[Point]:
        """The points that Sobol numbers fall on, not all of them new."""
        from scipy.stats.qmc import Sobol  # type: ignore[import-untyped]  # takes half a second

        names, sobol = list(self.levels), Sobol(len(self.levels), scramble=True, seed=seed)
        sizes = np.array([len(self.levels[name]) for name in names])
        first = min(power, 10)  # few numbers at first: few may be wanted
        for exponent in (first, *range(first, power)):
            places = np.floor(sobol.random_base2(exponent) * sizes).astype(int).tolist()
            for row in places:
                values = (self.levels[n][place] for n, place in zip(names, row, strict=True))
                yield self.canonical(dict(zip(names, values, strict=True)))


def key(point: Mapping[str, Value]) -> str:
    """What equal points have in common, whatever the order of their names.

    Example:
        >>> key({"a": 1, "b": 2.0}) == key({"b": 2.0, "a": 1})
        True
    """
    return repr(sorted(point.items()))


class GridPointsSampler(BaseSampler):
    """A grid's points, for a scheduler that enqueues them.

    Each is enqueued once, and asked for by whoever is free, so that several workers share a grid,
    and one that was interrupted goes on. Asked as an ordinary sampler it proposes at random.

    Args:
        points:
            Complete configurations, in the order in which they are tried.
        text:
            Words on its size.
        is_part:
            Whether it may end before it has been visited wholly.

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
        """As a random sampler."""
        self._random.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing: what is enqueued is asked of no sampler."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """As a random sampler."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)
