# Made by hub/build.py from optuna_nnhp/search/unit_scale.py of optuna_nnhp: edit that.
"""Numbers on the unit scale of their range, logarithmic where the range is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

Number = FloatDistribution | IntDistribution


def to_unit(distribution: Number, value: float) -> float:
    """Where a value lies between the ends of its range.

    Args:
        distribution:
            The range.
        value:
            One of its values.

    Example:
        >>> round(to_unit(FloatDistribution(1e-4, 1.0, log=True), 1e-2), 6)
        0.5
    """
    return float(_transform(distribution).transform({"x": value})[0])


def from_unit(distribution: Number, unit: float) -> float | int:
    """The value at a place of a range; beyond the ends it is the end's.

    Args:
        distribution:
            The range.
        unit:
            0 for its lower end, 1 for its upper one.

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
def _transform(distribution: Number) -> _SearchSpaceTransform:
    return _SearchSpaceTransform({"x": distribution}, transform_0_1=True)


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
    return isinstance(value, int | float) and distribution._contains(value)
