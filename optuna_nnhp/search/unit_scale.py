"""Numbers on the unit scale of their range, which is logarithmic if the range is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_nnhp.search._optuna_internals import SearchSpaceTransform
from optuna_nnhp.search._optuna_internals import contains

Number = FloatDistribution | IntDistribution


def to_unit(distribution: Number, value: float) -> float:
    """Return where a value lies between the ends of its range, 0 to 1.

    Args:
        distribution:
            The range.
        value:
            A value of the range.

    Example:
        >>> round(to_unit(FloatDistribution(1e-4, 1.0, log=True), 1e-2), 6)
        0.5
    """
    return float(_transform(distribution).transform({"x": value})[0])


def from_unit(distribution: Number, unit: float) -> float | int:
    """Return the value at a position of a range; positions beyond an end give that end.

    Args:
        distribution:
            The range.
        unit:
            The position: 0 for the lower end, 1 for the upper one.

    Example:
        >>> from_unit(IntDistribution(1, 9), 0.5), from_unit(FloatDistribution(0.0, 2.0), 3.0)
        (5, 2.0)
    """
    if not 0 < unit < 1:
        return distribution.low if unit <= 0 else distribution.high
    value = _transform(distribution).untransform(np.array([unit]))["x"]
    value = min(max(value, distribution.low), distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


@functools.lru_cache(maxsize=256)
def _transform(distribution: Number) -> SearchSpaceTransform:
    return SearchSpaceTransform({"x": distribution}, transform_0_1=True)


def is_in_distribution(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value of an earlier trial is one of a distribution's, which may have changed.

    As `hyperparameters.spec.is_in_distribution`, which a package for OptunaHub cannot import.

    Example:
        >>> (
        ...     is_in_distribution(IntDistribution(1, 9), 3),
        ...     is_in_distribution(IntDistribution(1, 9), 10),
        ... )
        (True, False)
    """
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return isinstance(value, int | float) and contains(distribution, value)
