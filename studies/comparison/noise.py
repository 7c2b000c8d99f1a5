"""Decide whether a difference is larger than noise."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RULE = (
    "Values are compared for equal seeds, which have the same rows. A mean difference is larger "
    f"than noise if the paired t test over the seeds says so ({CONFIDENCE:.0%}, two-sided). Of 20 "
    "comparisons of equally good methods, one will be called different."
)


@dataclass(frozen=True)
class Difference:
    """How much better one method is than another.

    Args:
        mean:
            Mean gain over the seeds; a positive one is better, whatever the metric's direction.
        noise:
            A mean whose absolute value is not larger may be chance; NaN if unknown.
        seeds:
            Number of seeds that were compared.
    """

    mean: float
    noise: float
    seeds: int

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"``, ``"equal"`` or ``"unknown"``.

        Example:
            >>> Difference(0.3, 0.1, 3).verdict, Difference(0.3, math.nan, 1).verdict
            ('better', 'unknown')
        """
        if math.isnan(self.mean) or math.isnan(self.noise):
            return "unknown"
        if abs(self.mean) <= self.noise:
            return "equal"
        return "better" if self.mean > 0 else "worse"


def differences(
    values: Mapping[str, Sequence[float]], baseline: str, *, maximize: bool
) -> dict[str, Difference]:
    """Compare several methods with one of them, seed by seed.

    Args:
        values:
            By method, one value per seed; seeds without a value (NaN) are left out.
        baseline:
            The method that the others are compared with.
        maximize:
            Whether a greater value is better.

    Example:
        >>> found = differences(
        ...     {"random": [0.8, 0.7, 0.9], "zoom": [0.9, 0.8, 1.0]}, "random", maximize=True
        ... )
        >>> round(found["zoom"].mean, 6), found["zoom"].verdict
        (0.1, 'better')
    """
    found = {}
    for name in values.keys() - {baseline}:
        gain = np.array(values[name]) - np.array(values[baseline])
        gain = gain[np.isfinite(gain)] * (1 if maximize else -1)
        found[name] = _difference(gain)
    return {name: found[name] for name in values if name in found}


def _difference(gain: NDArray[np.float64]) -> Difference:
    """Return the mean gain over the seeds and its noise, which differs from method to method."""
    seeds = len(gain)
    mean = float(gain.mean()) if seeds else math.nan
    if seeds < 2:
        return Difference(mean, math.nan, seeds)
    critical = stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1)
    return Difference(mean, float(critical * gain.std(ddof=1) / math.sqrt(seeds)), seeds)
