from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import pytest

from optuna_nnhp.search.narrowing import Choices
from optuna_nnhp.search.narrowing import Interval
from optuna_nnhp.search.narrowing import NarrowingConfig
from optuna_nnhp.search.narrowing import ParameterAxis
from optuna_nnhp.search.narrowing import Region
from optuna_nnhp.search.narrowing import narrow
from optuna_nnhp.search.narrowing import restrict_distribution

NARROWING = NarrowingConfig(
    min_width_ratio=0.5, trim_fraction=0.2, cut_p_value=0.4, drop_p_value=0.05
)
NUMBERS = [
    FloatDistribution(-3.0, 5.0),
    FloatDistribution(1e-7, 0.5, log=True),
    FloatDistribution(0.0, 1.0, step=0.1),
    IntDistribution(1, 8),
    IntDistribution(0, 40, step=4),
    IntDistribution(1, 1024, log=True),
]


@pytest.mark.parametrize("distribution", [*NUMBERS, CategoricalDistribution(("a", None, 3))])
def test_positions_map_to_values_and_back(distribution: BaseDistribution) -> None:
    axis, rng = ParameterAxis("x", distribution), np.random.RandomState(0)
    for _ in range(50):
        value = axis.sample(axis.full_range(), rng)
        assert distribution._contains(distribution.to_internal_repr(value))
        again = axis.value(axis.position(value))
        assert again == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("distribution", NUMBERS)
@pytest.mark.parametrize("seed", range(20))
def test_a_narrowed_range_holds_the_best_and_is_of_the_same_kind(
    distribution: Any, seed: int
) -> None:
    axis, rng = ParameterAxis("x", distribution), np.random.RandomState(seed)
    values = [axis.sample(axis.full_range(), rng) for _ in range(60)]
    positions = [axis.position(value) for value in values]
    ranked = sorted(positions, key=lambda position: abs(position - positions[0]))
    part = narrow(axis, Interval(), ranked[:12], ranked, NARROWING)
    assert isinstance(part, Interval) and 0 <= part.low < part.high <= 1
    assert part.high - part.low >= 0.5 - 1e-12
    new: Any = restrict_distribution(axis, part)
    assert (type(new), new.log, new.step) == (
        type(distribution),
        distribution.log,
        distribution.step,
    )
    assert distribution.low <= new.low <= values[0] <= new.high <= distribution.high
    assert new.high - new.low < distribution.high - distribution.low
    for _ in range(20):
        assert distribution._contains(new.to_internal_repr(axis.sample(part, rng)))


def test_steps_beside_the_best_value_are_kept() -> None:
    axis = ParameterAxis("depth", IntDistribution(1, 8))
    part: Region = Interval()
    positions = [axis.position(1 + i % 8) for i in range(80)]
    ranked = sorted(positions, key=lambda position: abs(position - axis.position(3)))
    for _ in range(20):
        part = narrow(axis, part, ranked[:10], ranked, NARROWING)
    assert restrict_distribution(axis, part) == IntDistribution(2, 4)


def test_a_range_is_never_empty() -> None:
    axis = ParameterAxis("x", FloatDistribution(0.0, 1.0))
    part: Region = Interval()
    ranked = [0.5] * 12 + [i / 4000 for i in range(4001)]
    for _ in range(20):
        part = narrow(axis, part, ranked[:12], ranked, NARROWING)
        assert isinstance(part, Interval) and part.low < 0.5 < part.high
    assert isinstance(part, Interval) and part.high - part.low == pytest.approx(0.01)


@pytest.mark.parametrize("best, low, high", [(0.41, 0.3, 0.6), (0.59, 0.4, 0.7), (0.5, 0.4, 0.6)])
def test_intervals_grow_beyond_a_bound_with_the_best_trial(
    best: float, low: float, high: float
) -> None:
    """The best one on a bound, the others anywhere: half of the width more on its side."""
    axis = ParameterAxis("x", FloatDistribution(0.0, 1.0))
    tried = [best, *np.linspace(0.4, 0.6, 9)]
    part = narrow(axis, Interval(0.4, 0.6), tried, tried, NARROWING)
    assert isinstance(part, Interval)
    assert part.low <= low + 0.011 and part.high >= high - 0.011
    assert part.low > 0.29 and part.high < 0.71


@pytest.mark.parametrize(
    "ranked, best, kept",
    [
        ([0, 1, 2] * 6, 6, (0, 1, 2)),  # nothing is clear
        ([0, 1] * 6 + [2] * 6, 6, (0, 1)),
        ([2] + [0, 1] * 6 + [2] * 5, 6, (0, 1, 2)),  # the best has it
        ([0, 1] * 6 + [2] * 3, 6, (0, 1, 2)),  # too few
        ([0, 1, 0, 1, 2, 1, 0, 2, 2, 0, 1, 2], 3, (0, 1, 2)),  # not among the best, not far behind
    ],
)
def test_clearly_worse_choices_are_dropped(
    ranked: list[int], best: int, kept: tuple[int, ...]
) -> None:
    axis = ParameterAxis("x", CategoricalDistribution(("a", "b", "c")))
    positions = [float(index) for index in ranked]
    assert narrow(axis, axis.full_range(), positions[:best], positions, NARROWING) == Choices(kept)


def test_without_trials_nothing_changes() -> None:
    axis = ParameterAxis("x", FloatDistribution(0.0, 1.0))
    assert narrow(axis, Interval(0.2, 0.4), [], [], NARROWING) == Interval(0.2, 0.4)
