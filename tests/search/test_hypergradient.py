from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
import pytest

from optuna_nnhp.search.hypergradient import AdamOnUnitScale
from optuna_nnhp.search.hypergradient import HypergradientSampler
from optuna_nnhp.search.hypergradient import slope_on_unit_scale
from optuna_nnhp.search.unit_scale import from_unit
from optuna_nnhp.search.unit_scale import to_unit

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-6, 1.0, log=True),
    "depth": IntDistribution(1, 9),
    "dropout": FloatDistribution(0.0, 0.9),
}


class TestBasic(BasicSamplerTestCase):
    """Optuna's own tests of a sampler."""

    @pytest.fixture(params=[1, 4])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: HypergradientSampler(starts=request.param, seed=0)


def descend(trials: int, sign: float = 1.0, **options: Any) -> optuna.Study:
    """A study whose best rate is 1e-3 and best dropout 0.3, at any depth."""
    direction = "minimize" if sign > 0 else "maximize"
    study = optuna.create_study(direction=direction, sampler=HypergradientSampler(**options))
    for _ in range(trials):
        trial = study.ask(SPACE)
        far, drop = math.log10(trial.params["rate"]) + 3, trial.params["dropout"] - 0.3
        slopes = {"rate": 2 * far / (trial.params["rate"] * math.log(10)), "dropout": 2 * drop}
        trial.set_user_attr("hypergradient", {name: sign * s for name, s in slopes.items()})
        study.tell(trial, sign * (far**2 + drop**2))
    return study


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_paths_converge_from_far_away(sign: float) -> None:
    study = descend(60, sign, starts=1, seed=3)
    best = study.best_trial.params
    assert best["rate"] == pytest.approx(1e-3, rel=0.5)
    assert best["dropout"] == pytest.approx(0.3, abs=0.05)
    assert len({t.params["depth"] for t in study.trials}) == 1


def test_paths_take_turns_and_keep_their_values() -> None:
    study = descend(12, starts=3, seed=0)
    assert [t.user_attrs["origin"] for t in study.trials] == [0, 1, 2] * 4
    for origin in range(3):
        path = [t for t in study.trials if t.user_attrs["origin"] == origin]
        assert len({t.params["depth"] for t in path}) == 1
        assert len({t.params["rate"] for t in path}) == 4


def test_another_sampler_continues_the_paths_with_the_same_momentum() -> None:
    whole, parts = descend(9, starts=2, seed=0), descend(8, starts=2, seed=0)
    parts.sampler = HypergradientSampler(starts=2, seed=99)
    assert parts.ask(SPACE).params == whole.trials[8].params


def test_parameters_without_gradient_or_name_stay() -> None:
    study = descend(4, starts=1, seed=0, names=["rate"])
    assert len({t.params["dropout"] for t in study.trials}) == 1
    assert len({t.params["rate"] for t in study.trials}) == 4


def test_slope_on_unit_scale_equals_differences() -> None:
    distribution, value = FloatDistribution(1e-4, 1.0, log=True), 0.01
    unit, h = to_unit(distribution, value), 1e-4
    above, below = from_unit(distribution, unit + h), from_unit(distribution, unit - h)
    by_difference = (above**2 - below**2) / (2 * h)
    assert slope_on_unit_scale(distribution, value, 2 * value) == pytest.approx(
        by_difference, rel=1e-4
    )


def test_nan_gradients_and_long_steps_are_limited() -> None:
    adam = AdamOnUnitScale({"x": FloatDistribution(0.0, 1.0)}, rate=0.1)
    assert adam.step({"x": 0.5}, {"x": math.nan})["x"] == 0.5
    values = {"x": 0.9}
    for slope in (1e-9, 1e9, 1.0):
        moved = adam.step(values, {"x": slope})
        assert 0 < values["x"] - moved["x"] <= 0.1 + 1e-12
        values = moved


@pytest.mark.parametrize(
    "options, message",
    [
        ({"starts": 0}, "`starts` must be at least 1, but got 0."),
        ({"rate": 0.0}, "`rate` must be above 0, but got 0.0."),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HypergradientSampler(**options)
