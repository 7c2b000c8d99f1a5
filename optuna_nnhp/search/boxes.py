"""Boxes in a search space: per parameter an interval of its unit scale, or some of its choices."""

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
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

MARGIN_RATIO = 0.1  # around the best trials, in widths of what they span
EDGE_FRACTION = 0.1  # of an interval: whoever is nearer to an end lies on it
MIN_TRIALS_PER_CHOICE = 4  # trials of a choice, before it can be dropped
MIN_INTERVAL_WIDTH = 0.01  # width of an interval
SIGNIFICANT_DIGITS = 3  # that the bounds of a proposed range have


@dataclass(frozen=True)
class Interval:
    """A part of a number's range, as places on its unit scale.

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
    """Some of the choices of a category.

    Args:
        indices:
            Their indices, ascending.
    """

    indices: tuple[int, ...]


Region = Interval | Choices


@dataclass(frozen=True, kw_only=True)
class NarrowingConfig:
    """How much it takes to cut.

    Args:
        min_width_ratio:
            An interval stays at least so many times as wide as it was.
        trim_fraction:
            Share of the best trials that may lie beyond each end of the new interval.
        cut_p_value:
            An end is cut only where less likely than this so few of the best would lie there by
            chance.
        drop_p_value:
            A choice is dropped only where less likely than this its trials would rank so far
            behind the others by chance.
    """

    min_width_ratio: float
    trim_fraction: float
    cut_p_value: float
    drop_p_value: float


@dataclass(frozen=True, eq=False)
class ParameterAxis:
    """One parameter of a space, with places for its values.

    The place of a number is where it lies between the ends of its range, 0 to 1, on a logarithmic
    scale if the range is logarithmic; whole numbers and steps lie in the middle of equal shares.
    The place of a choice is its index.

    Args:
        name:
            The parameter.
        distribution:
            Its range.

    Example:
        >>> axis = ParameterAxis("rate", FloatDistribution(1e-4, 1.0, log=True))
        >>> round(axis.position(1e-2), 6), round(axis.value(0.25), 6)
        (0.5, 0.001)
    """

    name: str
    distribution: BaseDistribution

    @cached_property
    def _transform(self) -> _SearchSpaceTransform:
        return _SearchSpaceTransform({self.name: self.distribution})

    @cached_property
    def _transformed_bounds(self) -> tuple[float, float]:
        low, high = self._transform.bounds[0]
        return float(low), float(high)

    def position(self, value: Any) -> float:
        """Where a value lies."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return float(distribution.to_internal_repr(value))
        low, high = self._transformed_bounds
        if low == high:
            return 0.5
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return ((math.log(value) if distribution.log else value) - low) / (high - low)

    def value(self, position: float) -> Any:
        """The value at a place."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[int(position)]
        low, high = self._transformed_bounds
        at = np.array([low + position * (high - low)])
        value = self._transform.untransform(at)[self.name]
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return min(max(value, distribution.low), distribution.high)

    def full_range(self) -> Region:
        """All of the range."""
        if isinstance(self.distribution, CategoricalDistribution):
            return Choices(tuple(range(len(self.distribution.choices))))
        return Interval()

    def sample(self, part: Region, rng: np.random.RandomState) -> Any:
        """A random value of a part of the range.

        Args:
            part:
                The part.
            rng:
                Where random numbers come from.
        """
        if isinstance(part, Choices):
            return self.value(part.indices[rng.randint(len(part.indices))])
        return self.value(rng.uniform(part.low, part.high))

    def neighbours(self, position: float) -> tuple[float, float]:
        """The places of the values one step below and above; the place itself without steps.

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
    part: Region,
    best: Sequence[float],
    ranked: Sequence[float],
    config: NarrowingConfig,
) -> Region:
    """What is left of a part of a range after a look at trials.

    Only what was tried and found worse is cut: values that no trial had, such as those of
    followers in a cohort, stay.

    Args:
        axis:
            The parameter.
        part:
            What there was.
        best:
            Places of the best trials, the best one first.
        ranked:
            Places of what was tried lately, from the best to the worst.
        config:
            How much it takes to cut.

    Returns:
        A part that holds the best trial's value. It may reach beyond the old one.

    Example:
        >>> axis = ParameterAxis("x", FloatDistribution(0.0, 1.0))
        >>> tried = [(7 * i % 20) / 20 for i in range(20)]
        >>> ranked = sorted(tried, key=lambda x: abs(x - 0.3))
        >>> config = NarrowingConfig(0.5, 0.0, 0.1, 0.05)
        >>> part = narrow(axis, Interval(), ranked[:6], ranked, config)
        >>> part.low < 0.3 < part.high, round(part.high - part.low, 3)
        (True, 0.5)
    """
    if not best:
        return part
    if isinstance(part, Choices):
        return _narrow_choices(part, best, ranked, config.drop_p_value)
    return _narrow_interval(axis, part, best, ranked, config)


def _narrow_choices(
    part: Choices, best: Sequence[float], ranked: Sequence[float], worse: float
) -> Choices:
    """The choices of the best trials, and those that are not clearly worse."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]  # takes half a second

    positions = np.array(ranked)
    order = np.arange(len(positions))
    was_active = np.isin(
        positions, part.indices
    )  # what was dropped is tried rarely, and was long ago

    def is_clearly_worse(choice: int) -> bool:
        mine, others = order[positions == choice], order[was_active & (positions != choice)]
        if min(len(mine), len(others)) < MIN_TRIALS_PER_CHOICE:
            return False
        test = mannwhitneyu(mine, others, alternative="greater", method="asymptotic")
        return bool(test.pvalue < worse)

    of_the_best = {int(position) for position in best}
    kept = of_the_best | {c for c in part.indices if c in of_the_best or not is_clearly_worse(c)}
    return Choices(tuple(sorted(kept)))


def _narrow_interval(
    axis: ParameterAxis,
    part: Interval,
    best: Sequence[float],
    ranked: Sequence[float],
    config: NarrowingConfig,
) -> Interval:
    """What the best trials span, with a margin, where there is evidence."""
    from scipy.special import bdtr  # type: ignore[import-untyped]  # slow to import

    positions, first = sorted(best), best[0]
    count, trimmed = len(positions), int(config.trim_fraction * len(positions))
    low, high = min(positions[trimmed], first), max(positions[count - 1 - trimmed], first)
    margin = MARGIN_RATIO * (high - low)
    low, high = low - margin, high + margin
    inside = [position for position in ranked if part.low <= position <= part.high]
    below = sum(position < low for position in inside) / max(1, len(inside))
    above = sum(position > high for position in inside) / max(1, len(inside))
    # How likely it is that so few of the best lie there, if being there is no worse.
    if low > part.low and bdtr(trimmed, count, below) >= config.cut_p_value:
        low = part.low
    if high < part.high and bdtr(trimmed, count, above) >= config.cut_p_value:
        high = part.high
    width = part.high - part.low
    if (
        first - part.low < EDGE_FRACTION * width
    ):  # on the bound: what is beyond may be better still
        low = min(low, first - width / 2)
    if part.high - first < EDGE_FRACTION * width:
        high = max(high, first + width / 2)
    below_first, above_first = axis.neighbours(first)
    low, high = min(low, below_first), max(high, above_first)
    return _widen(low, high, max(config.min_width_ratio * width, MIN_INTERVAL_WIDTH))


def _widen(low: float, high: float, least: float) -> Interval:
    """An interval of at least some width, around the same middle, within 0 to 1."""
    lacking = max(0.0, least - (high - low)) / 2
    low, high = low - lacking, high + lacking
    if low < 0:
        low, high = 0.0, max(high, min(least, 1.0))
    if high > 1:
        low, high = min(low, max(0.0, 1.0 - least)), 1.0
    return Interval(low, high)


def restrict_distribution(axis: ParameterAxis, part: Region) -> BaseDistribution:
    """The distribution of a part of a range: of the same kind, with bounds that read well.

    Args:
        axis:
            The parameter.
        part:
            What is left of it.

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
    if part == axis.full_range():
        return distribution
    if isinstance(part, Choices):
        assert isinstance(distribution, CategoricalDistribution)
        return CategoricalDistribution([distribution.choices[i] for i in part.indices])
    low, high = axis.value(part.low), axis.value(part.high)
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
    """A value with few digits, not above it, or not below it.

    Example:
        >>> (
        ...     _round_significant(0.00123456, up=False),
        ...     _round_significant(-0.00123456, up=False),
        ...     _round_significant(0.0, up=True),
        ... )
        (0.00123, -0.00124, 0.0)
    """
    number = Decimal(f"{value:.12g}")  # the noise of exp(log(x)) is nothing to round up for
    if number == 0:
        return 0.0
    exponent = Decimal(1).scaleb(number.adjusted() - SIGNIFICANT_DIGITS + 1)
    return float(number.quantize(exponent, rounding=ROUND_CEILING if up else ROUND_FLOOR))


def _snap_to_step(value: float, low: float, step: float) -> float:
    """A value of a grid without the errors of binary fractions, which Optuna warns of.

    Example:
        >>> _snap_to_step(0.1 + 0.1 + 0.1, 0.0, 0.1)
        0.3
    """
    return float(Decimal(repr(low)) + round((value - low) / step) * Decimal(repr(step)))
