"""Levels, the points that differ, and their order."""

from __future__ import annotations

from collections import Counter
from itertools import product
import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import pytest

from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.search import grid as module
from optuna_nnhp.search.grid import Grid
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.search.grid import check_grid_values
from optuna_nnhp.search.grid import default_grid_values
from optuna_nnhp.search.grid import point_key

BINARY, REGRESSION = specs("binary"), specs("regression")


@pytest.mark.parametrize(
    "name, distribution, expected",
    [
        ("learning_rate", BINARY["learning_rate"].distribution, (0.1, 0.01, 0.001)),
        ("learning_rate", FloatDistribution(0.005, 0.2, log=True), (0.1, 0.01)),
        ("learning_rate", FloatDistribution(0.001, 0.001), (0.001,)),
        ("optimizer", BINARY["optimizer"].distribution, ("sgd", "adam", "adamw", "rmsprop")),
        ("optimizer", CategoricalDistribution(("sgd", "nesterov")), ("sgd", "nesterov")),
        ("batch_size", IntDistribution(16, 100), (16, 32, 64)),
        ("batch_size", IntDistribution(16, 64, step=16), (16, 32, 64)),
        ("batch_size", IntDistribution(100, 120), (100, 110, 120)),
        ("own", FloatDistribution(-1.0, 1.0), (-1.0, 0.0, 1.0)),
        ("own", FloatDistribution(0.0, 0.9, step=0.3), (0.0, 0.6, 0.9)),
        ("own", IntDistribution(4, 64, log=True), (4, 16, 64)),
        ("own", IntDistribution(0, 10, step=10), (0, 10)),
        ("own", CategoricalDistribution((None, True, "a")), (None, True, "a")),
    ],
)
def test_default_grid_values_lie_in_the_range(
    name: str, distribution: BaseDistribution, expected: tuple[Any, ...]
) -> None:
    levels = default_grid_values(distribution, BINARY.get(name))
    assert levels == pytest.approx(expected) if type(levels[0]) is float else levels == expected
    assert [type(level) for level in levels] == [type(level) for level in expected]


def test_ranges_with_one_default_value_use_their_ends() -> None:
    levels = default_grid_values(FloatDistribution(0.002, 0.05, log=True), BINARY["learning_rate"])
    assert levels == pytest.approx((0.002, 0.01, 0.05))


SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-3, 0.5, log=True),
    "width": IntDistribution(16, 64, step=16),
    "optimizer": CategoricalDistribution(("sgd", "adam")),
    "dropout": BINARY["dropout"].distribution,
    "clip_norm": BINARY["clip_norm"].distribution,
    "heads": IntDistribution(1, 8),
}


@pytest.mark.parametrize(
    "levels, message",
    [
        ({"learning_rat": [0.1]}, r"'learning_rat' is not .* tuned; did you mean 'learning_rate'"),
        ({"epochs": [1]}, "'epochs' is not a hyperparameter that is tuned"),
        ({"learning_rate": [0.1, 0.6]}, r"`learning_rate` must be .* 0.001 to 0.5, but got 0\.6"),
        ({"learning_rate": [0]}, "`learning_rate` must be a number from .*, but got 0"),
        ({"learning_rate": [math.nan]}, "but got nan"),
        ({"learning_rate": [None]}, "but got None"),
        ({"learning_rate": ["0.1"]}, "but got '0.1'"),
        ({"width": [24]}, "from 16 to 64 in steps of 16, but got 24"),
        ({"heads": [True]}, "a whole number from 1 to 8, but got True"),
        ({"heads": [1.5]}, r"a whole number from 1 to 8, but got 1\.5"),
        ({"optimizer": ["rmsprop"]}, "'rmsprop' is not a choice of `optimizer`"),
        ({"optimizer": "adam"}, "must be a list with a value or more, but got 'adam'"),
        ({"width": 16}, "must be a list with a value or more, but got 16"),
        ({"width": []}, r"must be a list with a value or more, but got \[\]"),
        ({}, "`levels` must name hyperparameters and lists of their values, but got {}"),
        (["width"], "`levels` must name hyperparameters"),
    ],
)
def test_invalid_grid_values_are_rejected(levels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid_values(levels, SPACE, BINARY)


def test_grid_values_are_stored_once_as_trials_store_them() -> None:
    levels = {
        "learning_rate": np.array([0.5, 0.1, 0.5]),
        "width": (16, 32.0, np.int64(16)),
        "heads": range(1, 3),
        "optimizer": ["adam", "sgd", "adam"],
    }
    expected = {
        "learning_rate": (0.5, 0.1),
        "width": (16, 32),
        "heads": (1, 2),
        "optimizer": ("adam", "sgd"),
    }
    assert repr(check_grid_values(levels, SPACE, BINARY)) == repr(expected)


def test_equivalent_values_occur_once() -> None:
    levels = {"dropout": [0, 0.2, 0.01], "clip_norm": [1.0, math.inf, 50.0]}
    assert check_grid_values(levels, SPACE, BINARY) == {
        "dropout": (0.005, 0.2),
        "clip_norm": (1.0, 100.0),
    }


def grid(task: str, levels: dict[str, tuple[Any, ...]], **fixed: Any) -> Grid:
    inactive_values = {name: values[-1] for name, values in levels.items()}
    return Grid(levels, {"rest": "rest"}, fixed, inactive_values, specs(task))


RULED: dict[str, tuple[Any, ...]] = {
    "beta2": (0.9, 0.99, 0.999),
    "optimizer": ("sgd", "adam", "nesterov", "rmsprop"),
    "loss": ("mse", "huber", "mae"),
    "warmup": (0.0, 0.1),
    "huber_delta": (0.1, 1.0),
    "learning_rate_decay": ("constant", "cosine", "one_cycle"),
    "min_lr_ratio": (0.001, 0.1),
    "hidden_layers": (1, 2),
    "width_shape": ("constant", "funnel"),
}


@pytest.mark.parametrize("names", [tuple(RULED), tuple(RULED)[::-1], ("loss", "huber_delta")])
def test_points_are_all_combinations_that_differ_in_effect(names: tuple[str, ...]) -> None:
    levels = {name: RULED[name] for name in names}
    combinations = [dict(zip(names, v, strict=True)) for v in product(*levels.values())]
    effects = {
        point_key({n: v for n, v in c.items() if REGRESSION[n].is_active(c)}): c
        for c in combinations
    }
    a_grid = grid("regression", levels)
    points = list(a_grid.points())
    assert a_grid.count == len(points) == len(effects) < len(combinations)
    found = {point_key({n: v for n, v in p.items() if REGRESSION[n].is_active(p)}) for p in points}
    assert found == set(effects)
    spread = a_grid.sobol_order(seed=0)
    assert {point_key(point) for point in spread} == {
        point_key({**p, "rest": "rest"}) for p in points
    }
    assert len(spread) == len(points)


def test_values_without_effect_are_inactive() -> None:
    points = list(
        grid("regression", {"huber_delta": (0.1, 1.0), "loss": ("mse", "huber")}).points()
    )
    assert [p["huber_delta"] for p in points if p["loss"] == "mse"] == [1.0]
    assert {p["huber_delta"] for p in points if p["loss"] == "huber"} == {0.1, 1.0}
    assert len(points) == 3


def test_fixed_values_make_others_inactive() -> None:
    levels = {"beta2": (0.9, 0.99, 0.999)}
    assert grid("regression", levels, optimizer="sgd").count == 1
    assert grid("regression", levels, optimizer="adam").count == 3
    assert grid("regression", levels).count == 3  # nobody says what optimizer


@pytest.mark.parametrize(
    "point, is_on",
    [
        ({"loss": "huber", "huber_delta": 0.1}, True),
        ({"loss": "huber", "huber_delta": 0.2}, False),
        ({"loss": "mse", "huber_delta": 0.2}, True),
        ({"loss": "mae", "huber_delta": 0.1}, False),
    ],
)
def test_contains_checks_active_values(point: dict[str, Any], is_on: bool) -> None:
    a_grid = grid("regression", {"loss": ("mse", "huber"), "huber_delta": (0.1, 1.0)})
    assert a_grid.contains(point) is is_on


def unevenness(points: list[dict[str, Any]], levels: dict[str, tuple[Any, ...]]) -> float:
    """The largest surplus of one level over another, as a share of the points."""
    counts = [Counter(point[name] for point in points) for name in levels]
    wide = [
        max(count[v] for v in values) - min(count[v] for v in values)
        for count, values in zip(counts, levels.values(), strict=True)
    ]
    return max(wide) / len(points)


@pytest.mark.parametrize("seed", range(5))
def test_early_points_cover_the_grid(seed: int) -> None:
    levels = {
        "learning_rate": (0.1, 0.01, 0.001),
        "batch_size": (16, 32, 64, 128, 256, 512),
        "epochs": (1, 10, 50, 100),
        "momentum": (0.5, 0.9, 0.99),
    }
    a_grid = grid("binary", levels)
    early = a_grid.sobol_order(seed)[: a_grid.count // 10]
    ordered = list(a_grid.points())[: a_grid.count // 10]
    assert unevenness(ordered, levels) == 1.0  # of the first name there is one level only
    assert unevenness(early, levels) <= 0.25
    for name, values in levels.items():
        assert {point[name] for point in early} == set(values)


def test_the_order_depends_on_the_seed() -> None:
    a_grid = grid("regression", RULED)
    one, again, other = (a_grid.sobol_order(seed) for seed in (0, 0, 1))
    assert one == again != other
    assert a_grid.sobol_order(0, most=7) == one[:7]


def test_no_point_occurs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOBOL_EXPONENT", 5)
    a_grid = grid("regression", RULED)
    points = a_grid.sobol_order(seed=3)
    assert len({point_key(point) for point in points}) == len(points) == a_grid.count
    assert len(a_grid.sobol_order(seed=3, most=100)) == 100
    # In a random order: those who come late in the listing are not all late here.
    listed = {point_key({**p, "rest": "rest"}): i for i, p in enumerate(a_grid.points())}
    places = [listed[point_key(point)] for point in points[32:]]
    assert places != sorted(places)


def test_a_huge_grid_is_never_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Grid) -> None:
        raise AssertionError

    monkeypatch.setattr(Grid, "points", fail)
    levels = {f"x{i}": tuple(range(10)) for i in range(12)} | {"loss": ("mse", "huber")}
    a_grid = grid("regression", levels)
    assert a_grid.count == 2 * 10**12
    points = a_grid.sobol_order(seed=0, most=3_000)
    assert len({point_key(point) for point in points}) == len(points) == 3_000


def test_str_contains_the_size() -> None:
    assert str(grid("binary", {"width": (1, 2), "depth": (1, 2, 3), "one": (1,)})) == (
        "6 points: width 2 x depth 3"
    )
    assert str(grid("binary", {"one": (1,)})) == "1 point"


def test_the_sampler_itself_proposes_at_random() -> None:
    sampler = GridPointsSampler([{"x": 1.0}])
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=4)
    assert len({trial.params["x"] for trial in study.trials}) == 4
    assert sampler.text == "1 points"
