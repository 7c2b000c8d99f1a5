# Made by hub/build.py from optuna_nnhp/search/boxes.py of optuna_nnhp: edit that.
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
from scipy.special import bdtr  # type: ignore[import-untyped]

MARGIN = 0.1  # around the best trials, in widths of what they span
EDGE = 0.1  # of an interval: whoever is nearer to an end lies on it
FEWEST = 4  # trials of a choice, before it can be dropped
NARROWEST = 0.01  # width of an interval
DIGITS = 3  # that the bounds of a proposed range have


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
        kept:
            Their indices, ascending.
    """

    kept: tuple[int, ...]


Part = Interval | Choices


@dataclass(frozen=True, kw_only=True)
class Caution:
    """How much it takes to cut.

    Args:
        shrink:
            An interval stays at least so many times as wide as it was.
        trimmed:
            Share of the best trials that may lie beyond each end of the new interval.
        chance:
            An end is cut only where less likely than this so few of the best would lie there by
            chance.
        worse:
            A choice is dropped only where less likely than this its trials would rank so far
            behind the others by chance.
    """

    shrink: float
    trimmed: float
    chance: float
    worse: float


@dataclass(frozen=True, eq=False)
class Axis:
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
        >>> axis = Axis("rate", FloatDistribution(1e-4, 1.0, log=True))
        >>> round(axis.place(1e-2), 6), round(axis.value(0.25), 6)
        (0.5, 0.001)
    """

    name: str
    distribution: BaseDistribution

    @cached_property
    def _transform(self) -> _SearchSpaceTransform:
        return _SearchSpaceTransform({self.name: self.distribution})

    @cached_property
    def _ends(self) -> tuple[float, float]:
        low, high = self._transform.bounds[0]
        return float(low), float(high)

    def place(self, value: Any) -> float:
        """Where a value lies."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return float(distribution.to_internal_repr(value))
        low, high = self._ends
        if low == high:
            return 0.5
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return ((math.log(value) if distribution.log else value) - low) / (high - low)

    def value(self, place: float) -> Any:
        """The value at a place."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[int(place)]
        low, high = self._ends
        at = np.array([low + place * (high - low)])
        value = self._transform.untransform(at)[self.name]
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return min(max(value, distribution.low), distribution.high)

    def whole(self) -> Part:
        """All of the range."""
        if isinstance(self.distribution, CategoricalDistribution):
            return Choices(tuple(range(len(self.distribution.choices))))
        return Interval()

    def draw(self, part: Part, rng: np.random.RandomState) -> Any:
        """A random value of a part of the range.

        Args:
            part:
                The part.
            rng:
                Where random numbers come from.
        """
        if isinstance(part, Choices):
            return self.value(part.kept[rng.randint(len(part.kept))])
        return self.value(rng.uniform(part.low, part.high))

    def beside(self, place: float) -> tuple[float, float]:
        """The places of the values one step below and above; the place itself without steps.

        Example:
            >>> Axis("depth", IntDistribution(1, 4)).beside(0.125)
            (0.125, 0.375)
        """
        distribution = self.distribution
        step = getattr(distribution, "step", None)
        if step is None:
            return place, place
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        value = self.value(place)
        below, above = max(value - step, distribution.low), min(value + step, distribution.high)
        return self.place(below), self.place(above)


def narrowed(
    axis: Axis,
    part: Part,
    best: Sequence[float],
    ranked: Sequence[float],
    caution: Caution,
) -> Part:
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
        caution:
            How much it takes to cut.

    Returns:
        A part that holds the best trial's value. It may reach beyond the old one.

    Example:
        >>> axis = Axis("x", FloatDistribution(0.0, 1.0))
        >>> tried = [(7 * i % 20) / 20 for i in range(20)]
        >>> ranked = sorted(tried, key=lambda x: abs(x - 0.3))
        >>> caution = Caution(shrink=0.5, trimmed=0.0, chance=0.1, worse=0.05)
        >>> part = narrowed(axis, Interval(), ranked[:6], ranked, caution)
        >>> part.low < 0.3 < part.high, round(part.high - part.low, 3)
        (True, 0.5)
    """
    if not best:
        return part
    if isinstance(part, Choices):
        return _narrowed_choices(part, best, ranked, caution.worse)
    return _narrowed_interval(axis, part, best, ranked, caution)


def _narrowed_choices(
    part: Choices, best: Sequence[float], ranked: Sequence[float], worse: float
) -> Choices:
    """The choices of the best trials, and those that are not clearly worse."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]  # takes half a second

    places = np.array(ranked)
    order = np.arange(len(places))
    lively = np.isin(places, part.kept)  # what was dropped is tried rarely, and was long ago

    def is_worse(choice: int) -> bool:
        mine, others = order[places == choice], order[lively & (places != choice)]
        if min(len(mine), len(others)) < FEWEST:
            return False
        test = mannwhitneyu(mine, others, alternative="greater", method="asymptotic")
        return bool(test.pvalue < worse)

    of_the_best = {int(place) for place in best}
    kept = of_the_best | {c for c in part.kept if c in of_the_best or not is_worse(c)}
    return Choices(tuple(sorted(kept)))


def _narrowed_interval(
    axis: Axis,
    part: Interval,
    best: Sequence[float],
    ranked: Sequence[float],
    caution: Caution,
) -> Interval:
    """What the best trials span, with a margin, where there is evidence."""
    places, first = sorted(best), best[0]
    count, trimmed = len(places), int(caution.trimmed * len(places))
    low, high = min(places[trimmed], first), max(places[count - 1 - trimmed], first)
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    inside = [place for place in ranked if part.low <= place <= part.high]
    below = sum(place < low for place in inside) / max(1, len(inside))
    above = sum(place > high for place in inside) / max(1, len(inside))
    # How likely it is that so few of the best lie there, if being there is no worse.
    if low > part.low and bdtr(trimmed, count, below) >= caution.chance:
        low = part.low
    if high < part.high and bdtr(trimmed, count, above) >= caution.chance:
        high = part.high
    width = part.high - part.low
    if first - part.low < EDGE * width:  # on the bound: what is beyond may be better still
        low = min(low, first - width / 2)
    if part.high - first < EDGE * width:
        high = max(high, first + width / 2)
    below_first, above_first = axis.beside(first)
    low, high = min(low, below_first), max(high, above_first)
    return _wide_enough(low, high, max(caution.shrink * width, NARROWEST))


def _wide_enough(low: float, high: float, least: float) -> Interval:
    """An interval of at least some width, around the same middle, within 0 to 1."""
    lacking = max(0.0, least - (high - low)) / 2
    low, high = low - lacking, high + lacking
    if low < 0:
        low, high = 0.0, max(high, min(least, 1.0))
    if high > 1:
        low, high = min(low, max(0.0, 1.0 - least)), 1.0
    return Interval(low, high)


def restricted(axis: Axis, part: Part) -> BaseDistribution:
    """The distribution of a part of a range: of the same kind, with bounds that read well.

    Args:
        axis:
            The parameter.
        part:
            What is left of it.

    Example:
        >>> axis = Axis("rate", FloatDistribution(1e-4, 1.0, log=True))
        >>> restricted(axis, Interval(0.2512, 0.5))
        FloatDistribution(high=0.01, log=True, low=0.00101, step=None)
        >>> restricted(Axis("loss", CategoricalDistribution(("a", "b", "c"))), Choices((0, 2)))
        CategoricalDistribution(choices=('a', 'c'))
    """
    distribution = axis.distribution
    if part == axis.whole():
        return distribution
    if isinstance(part, Choices):
        assert isinstance(distribution, CategoricalDistribution)
        return CategoricalDistribution([distribution.choices[i] for i in part.kept])
    low, high = axis.value(part.low), axis.value(part.high)
    if isinstance(distribution, IntDistribution):
        return IntDistribution(low, high, log=distribution.log, step=distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        low = max(_rounded(low, up=False), distribution.low)
        high = min(_rounded(high, up=True), distribution.high)
    else:
        low, high = (_on_grid(end, distribution.low, distribution.step) for end in (low, high))
    return FloatDistribution(low, high, log=distribution.log, step=distribution.step)


def _rounded(value: float, *, up: bool) -> float:
    """A value with few digits, not above it, or not below it.

    Example:
        >>> _rounded(0.00123456, up=False), _rounded(-0.00123456, up=False), _rounded(0.0, up=True)
        (0.00123, -0.00124, 0.0)
    """
    number = Decimal(f"{value:.12g}")  # the noise of exp(log(x)) is nothing to round up for
    if number == 0:
        return 0.0
    exponent = Decimal(1).scaleb(number.adjusted() - DIGITS + 1)
    return float(number.quantize(exponent, rounding=ROUND_CEILING if up else ROUND_FLOOR))


def _on_grid(value: float, low: float, step: float) -> float:
    """A value of a grid without the errors of binary fractions, which Optuna warns of.

    Example:
        >>> _on_grid(0.1 + 0.1 + 0.1, 0.0, 0.1)
        0.3
    """
    return float(Decimal(repr(low)) + round((value - low) / step) * Decimal(repr(step)))
