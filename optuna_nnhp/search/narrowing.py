"""Narrow a search space: to an interval of each number's range, and some choices of a category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING
from decimal import ROUND_FLOOR
from decimal import Decimal
from functools import cached_property
import math
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_nnhp.search._optuna_internals import SearchSpaceTransform

MARGIN_RATIO = 0.1  # margin around the best trials, relative to the width that they span
EDGE_FRACTION = 0.1  # a trial nearer to an end, in interval widths, lies on that end
MIN_TRIALS_PER_CHOICE = 4  # before a choice can be dropped
MIN_INTERVAL_WIDTH = 0.01  # on the unit scale
SIGNIFICANT_DIGITS = 3  # of the bounds of a proposed range


@dataclass(frozen=True)
class Interval:
    """A region of a number's range, on its unit scale.

    Args:
        low:
            Lower end.
        high:
            Upper end.
    """

    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Choices:
    """Some of the choices of a categorical parameter.

    Args:
        indices:
            Indices of the choices, ascending.
    """

    indices: tuple[int, ...]


Region = Interval | Choices


@dataclass(frozen=True, kw_only=True)
class NarrowingConfig:
    """How much evidence narrowing needs, and how far it goes.

    Args:
        min_width_ratio:
            The new interval's least width, relative to the old one.
        trim_fraction:
            Share of the best trials that may lie beyond each end of the new interval.
        cut_p_value:
            An end is cut only if the probability that so few of the best trials lie there by
            chance is below this.
        drop_p_value:
            A choice is dropped only if the probability that its trials rank so far behind the
            others by chance is below this.
    """

    min_width_ratio: float
    trim_fraction: float
    cut_p_value: float
    drop_p_value: float


@dataclass(frozen=True, eq=False)
class ParameterAxis:
    """One parameter of a search space, with a position for each of its values.

    The position of a number lies between 0 and 1, the ends of its range, on a logarithmic scale
    if the range is logarithmic. Integers and steps lie in the middle of equal shares. The position
    of a choice is its index.

    Args:
        name:
            The parameter's name.
        distribution:
            The parameter's distribution.

    Example:
        >>> axis = ParameterAxis("rate", FloatDistribution(1e-4, 1.0, log=True))
        >>> round(axis.position(1e-2), 6), round(axis.value(0.25), 6)
        (0.5, 0.001)
    """

    name: str
    distribution: BaseDistribution

    @cached_property
    def _transform(self) -> SearchSpaceTransform:
        return SearchSpaceTransform({self.name: self.distribution})

    @cached_property
    def _transformed_bounds(self) -> tuple[float, float]:
        low, high = self._transform.bounds[0]
        return float(low), float(high)

    def position(self, value: Any) -> float:
        """Return the position of a value."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return float(distribution.to_internal_repr(value))
        low, high = self._transformed_bounds
        if low == high:
            return 0.5
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return ((math.log(value) if distribution.log else value) - low) / (high - low)

    def value(self, position: float) -> Any:
        """Return the value at a position."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[int(position)]
        low, high = self._transformed_bounds
        at = np.array([low + position * (high - low)])
        value = self._transform.untransform(at)[self.name]
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return min(max(value, distribution.low), distribution.high)

    def full_range(self) -> Region:
        """Return the region that holds all values."""
        if isinstance(self.distribution, CategoricalDistribution):
            return Choices(tuple(range(len(self.distribution.choices))))
        return Interval()

    def sample(self, region: Region, rng: np.random.RandomState) -> Any:
        """Draw a value of a region uniformly.

        Args:
            region:
                The region.
            rng:
                Source of random numbers.
        """
        if isinstance(region, Choices):
            return self.value(region.indices[rng.randint(len(region.indices))])
        return self.value(rng.uniform(region.low, region.high))

    def neighbours(self, position: float) -> tuple[float, float]:
        """Return the positions one step below and above; the position itself without steps.

        Example:
            >>> ParameterAxis("depth", IntDistribution(1, 4)).neighbours(0.125)
            (0.125, 0.375)
        """
        distribution = self.distribution
        step = getattr(distribution, "step", None)
        if step is None:
            return position, position
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        value = self.value(position)
        below, above = max(value - step, distribution.low), min(value + step, distribution.high)
        return self.position(below), self.position(above)


def narrow(
    axis: ParameterAxis,
    region: Region,
    best: Sequence[float],
    ranked: Sequence[float],
    config: NarrowingConfig,
) -> Region:
    """Narrow a region of a parameter's range to where the best trials are.

    Only values that were tried and found worse are cut. Values that no trial had, such as those
    that followers of a cohort never get, stay.

    Args:
        axis:
            The parameter.
        region:
            The region so far.
        best:
            Positions of the best trials, the best one first.
        ranked:
            Positions of recent trials, from the best to the worst.
        config:
            How much evidence is needed.

    Returns:
        A region that holds the best trial's value. It may reach beyond the old one.

    Example:
        >>> axis = ParameterAxis("x", FloatDistribution(0.0, 1.0))
        >>> tried = [(7 * i % 20) / 20 for i in range(20)]
        >>> ranked = sorted(tried, key=lambda x: abs(x - 0.3))
        >>> config = NarrowingConfig(
        ...     min_width_ratio=0.5, trim_fraction=0.0, cut_p_value=0.1, drop_p_value=0.05
        ... )
        >>> region = narrow(axis, Interval(), ranked[:6], ranked, config)
        >>> region.low < 0.3 < region.high, round(region.high - region.low, 3)
        (True, 0.5)
    """
    if not best:
        return region
    if isinstance(region, Choices):
        return _narrow_choices(region, best, ranked, config.drop_p_value)
    return _narrow_interval(axis, region, best, ranked, config)


def _narrow_choices(
    region: Choices, best: Sequence[float], ranked: Sequence[float], worse: float
) -> Choices:
    """Keep the choices of the best trials, and those that are not clearly worse."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]  # takes half a second

    positions = np.array(ranked)
    order = np.arange(len(positions))
    # Trials of dropped choices are rare and old.
    was_active = np.isin(positions, region.indices)

    def is_clearly_worse(choice: int) -> bool:
        mine, others = order[positions == choice], order[was_active & (positions != choice)]
        if min(len(mine), len(others)) < MIN_TRIALS_PER_CHOICE:
            return False
        test = mannwhitneyu(mine, others, alternative="greater", method="asymptotic")
        return bool(test.pvalue < worse)

    of_the_best = {int(position) for position in best}
    kept = of_the_best | {c for c in region.indices if c in of_the_best or not is_clearly_worse(c)}
    return Choices(tuple(sorted(kept)))


def _narrow_interval(
    axis: ParameterAxis,
    region: Interval,
    best: Sequence[float],
    ranked: Sequence[float],
    config: NarrowingConfig,
) -> Interval:
    """Return the interval that the best trials span, with a margin, if there is evidence."""
    from scipy.special import bdtr  # type: ignore[import-untyped]  # slow to import

    positions, first = sorted(best), best[0]
    count, trimmed = len(positions), int(config.trim_fraction * len(positions))
    low, high = min(positions[trimmed], first), max(positions[count - 1 - trimmed], first)
    margin = MARGIN_RATIO * (high - low)
    low, high = low - margin, high + margin
    inside = [position for position in ranked if region.low <= position <= region.high]
    below = sum(position < low for position in inside) / max(1, len(inside))
    above = sum(position > high for position in inside) / max(1, len(inside))
    # The probability that so few of the best trials lie there if that region is no worse.
    if low > region.low and bdtr(trimmed, count, below) >= config.cut_p_value:
        low = region.low
    if high < region.high and bdtr(trimmed, count, above) >= config.cut_p_value:
        high = region.high
    width = region.high - region.low
    # If the best trial lies on a bound, values beyond it may be better still.
    if first - region.low < EDGE_FRACTION * width:
        low = min(low, first - width / 2)
    if region.high - first < EDGE_FRACTION * width:
        high = max(high, first + width / 2)
    below_first, above_first = axis.neighbours(first)
    low, high = min(low, below_first), max(high, above_first)
    return _widen(low, high, max(config.min_width_ratio * width, MIN_INTERVAL_WIDTH))


def _widen(low: float, high: float, least: float) -> Interval:
    """Widen an interval to at least some width, around the same middle, within 0 and 1."""
    lacking = max(0.0, least - (high - low)) / 2
    low, high = low - lacking, high + lacking
    if low < 0:
        low, high = 0.0, max(high, min(least, 1.0))
    if high > 1:
        low, high = min(low, max(0.0, 1.0 - least)), 1.0
    return Interval(low, high)


def restrict_distribution(axis: ParameterAxis, region: Region) -> BaseDistribution:
    """Return a distribution of the same kind for a region, with bounds of few digits.

    Args:
        axis:
            The parameter.
        region:
            The region.

    Example:
        >>> axis = ParameterAxis("rate", FloatDistribution(1e-4, 1.0, log=True))
        >>> restrict_distribution(axis, Interval(0.2512, 0.5))
        FloatDistribution(high=0.01, log=True, low=0.00101, step=None)
        >>> restrict_distribution(
        ...     ParameterAxis("loss", CategoricalDistribution(("a", "b", "c"))), Choices((0, 2))
        ... )
        CategoricalDistribution(choices=('a', 'c'))
    """
    distribution = axis.distribution
    if region == axis.full_range():
        return distribution
    if isinstance(region, Choices):
        assert isinstance(distribution, CategoricalDistribution)
        return CategoricalDistribution([distribution.choices[i] for i in region.indices])
    low, high = axis.value(region.low), axis.value(region.high)
    if isinstance(distribution, IntDistribution):
        return IntDistribution(low, high, log=distribution.log, step=distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        low = max(_round_significant(low, up=False), distribution.low)
        high = min(_round_significant(high, up=True), distribution.high)
    else:
        low, high = (
            _snap_to_step(end, distribution.low, distribution.step) for end in (low, high)
        )
    return FloatDistribution(low, high, log=distribution.log, step=distribution.step)


def _round_significant(value: float, *, up: bool) -> float:
    """Round a value to few significant digits, up or down.

    Example:
        >>> (
        ...     _round_significant(0.00123456, up=False),
        ...     _round_significant(-0.00123456, up=False),
        ...     _round_significant(0.0, up=True),
        ... )
        (0.00123, -0.00124, 0.0)
    """
    number = Decimal(f"{value:.12g}")  # rounding errors of exp(log(x)) must not count
    if number == 0:
        return 0.0
    exponent = Decimal(1).scaleb(number.adjusted() - SIGNIFICANT_DIGITS + 1)
    return float(number.quantize(exponent, rounding=ROUND_CEILING if up else ROUND_FLOOR))


def _snap_to_step(value: float, low: float, step: float) -> float:
    """Return the nearest step without binary rounding errors, which Optuna warns about.

    Example:
        >>> _snap_to_step(0.1 + 0.1 + 0.1, 0.0, 0.1)
        0.3
    """
    return float(Decimal(repr(low)) + round((value - low) / step) * Decimal(repr(step)))
