"""Costs, best values, noise and claims of `studies/compare_methods.py`."""

from __future__ import annotations

from datetime import datetime
from datetime import timedelta
import doctest
import importlib
import math
from pathlib import Path
import pkgutil
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest
from scipy import stats

from optuna_nnhp.study.policies.hypergradient import gradient_space
from studies import comparison
from studies.comparison import gradient
from studies.comparison import methods
from studies.comparison import population
from studies.comparison.effort import Point
from studies.comparison.effort import best_values_of
from studies.comparison.effort import model_epochs
from studies.comparison.effort import networks
from studies.comparison.figure import band
from studies.comparison.figure import plot_best_values
from studies.comparison.methods import Run
from studies.comparison.noise import differences
from tests.tiny import TINY
from tests.tiny import trials
from tests.tiny import tune

START = datetime(2026, 1, 1)
PARTS = [m.name for m in pkgutil.iter_modules([str(Path(comparison.__file__).parent)])]


def trial(
    number: int, seconds: float | None, value: float | None, state: TrialState, **attributes: Any
) -> FrozenTrial:
    made = optuna.trial.create_trial(value=value, state=state, user_attrs=attributes)
    made.number = number
    made.datetime_complete = None if seconds is None else START + timedelta(seconds=seconds)
    return made


def run(method: str, seed: int, *points: Point, data: str = "d", epochs: float = 90.0) -> Run:
    return Run(data, "accuracy", True, method, seed, points, 0.5, 7, epochs, 3.0)


def ending(method: str, *values: float, data: str = "d") -> list[Run]:
    """One run a seed, by its best value."""
    return [run(method, i, Point(1.0, 9.0, v), data=data) for i, v in enumerate(values)]


@pytest.mark.parametrize("part", PARTS)
def test_doctests(part: str) -> None:
    module = importlib.import_module(f"studies.comparison.{part}")
    assert doctest.testmod(module).failed == 0


def test_population_trial_counts_only_its_own_epochs() -> None:
    options = {"size": 3, "generations": 2}
    result = tune(n_trials=6, method="population", method_options=options)
    assert model_epochs(trials(result)) == [TINY["epochs"] / 2] * 6


def test_generation_without_an_evaluation_counts_no_epochs() -> None:
    first = trial(0, 1.0, 0.5, TrialState.COMPLETE, epochs=2, generation=0, parent=None)
    cut = trial(1, 2.0, None, TrialState.FAIL, epochs=0, generation=1, parent=0)
    assert model_epochs([first, cut]) == [2, 0]


def test_perturbed_copies_count_as_networks() -> None:
    result = tune(n_trials=2, method="gradient", method_options={"starts": 2})
    moved = len(gradient_space(result._problem))
    assert moved > 1
    assert [networks(t) for t in trials(result)] == [1 + moved] * 2
    assert model_epochs(trials(result)) == [(1 + moved) * TINY["epochs"]] * 2


def test_best_values_are_ordered_by_the_end_of_their_trials() -> None:
    found = [
        trial(0, 3.0, 0.7, TrialState.COMPLETE, epochs=50),
        trial(1, 1.0, 0.6, TrialState.COMPLETE, epochs=20),
        trial(2, 2.0, 0.9, TrialState.PRUNED, epochs=5),
        trial(3, None, None, TrialState.RUNNING),
        trial(4, 4.0, 0.65, TrialState.COMPLETE, epochs=50),
        trial(5, 5.0, 0.8, TrialState.COMPLETE, epochs=50),
    ]
    best_values = best_values_of(found, START, maximize=True)
    assert best_values == (Point(1.0, 20, 0.6), Point(3.0, 75, 0.7), Point(5.0, 175, 0.8))
    assert best_values_of(found, START, maximize=False) == (Point(1.0, 20, 0.6),)


def test_band_spans_the_time_in_which_all_runs_have_a_value() -> None:
    slow = run("zoom", 0, Point(2.0, 30.0, 0.4), Point(5.0, 80.0, 0.7), epochs=100)
    fast = run("zoom", 1, Point(1.0, 40.0, 0.6), Point(2.0, 70.0, 0.8), epochs=75)
    found = band([slow, fast], "epochs")
    expected = [(40.0, 0.4, 0.5, 0.6), (70.0, 0.4, 0.6, 0.8), (75.0, 0.4, 0.6, 0.8)]
    assert np.allclose(found, expected)
    assert band([slow, run("zoom", 1)], "epochs") == []


def test_methods_are_compared_by_the_paired_t_test() -> None:
    source = np.random.default_rng(0)
    verdicts = set()
    for gain in (0.0, 0.5, 1.0, 3.0, -3.0):
        one = source.normal(size=5)
        other = one + gain + source.normal(size=5)
        found = differences({"a": one.tolist(), "b": other.tolist()}, "a", maximize=True)["b"]
        p = stats.ttest_rel(other, one).pvalue
        assert (abs(found.mean) > found.noise) == (p < 0.05)
        assert math.isclose(found.mean, float((other - one).mean()))
        verdicts.add(found.verdict)
    assert verdicts == {"equal", "better", "worse"}


def test_differences_between_seeds_are_not_noise() -> None:
    source = np.random.default_rng(0)
    table = 100 * source.normal(size=(1, 4000)) + source.normal(size=(2, 4000))
    values = {name: row.tolist() for name, row in zip("ab", table, strict=True)}
    found = differences(values, "a", maximize=False)
    assert math.isclose(found["b"].noise, 1.96 * math.sqrt(2 / 4000), rel_tol=0.03)


def test_seed_without_a_value_is_left_out() -> None:
    values = {"a": [0.1, 0.2, 0.3], "b": [0.4, math.nan, 0.61], "c": [0.2, 0.31, 0.4]}
    found = differences(values, "a", maximize=True)
    assert found["b"].seeds == 2 and math.isclose(found["b"].mean, 0.305)
    assert found["c"].seeds == 3 and found["c"].verdict == "better"


def test_verdict_of_one_seed_is_unknown() -> None:
    found = differences({"a": [0.1], "b": [0.2]}, "a", maximize=True)["b"]
    assert found.verdict == "unknown" and math.isclose(found.mean, 0.1)


def test_lower_loss_is_better() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.1, 0.21, 0.3]}
    assert differences(values, "a", maximize=False)["b"].verdict == "better"
    assert differences(values, "a", maximize=True)["b"].verdict == "worse"


def test_each_seed_starts_with_another_method() -> None:
    plan = list(methods.run_order(["d", "e"], ["a", "b", "c", "x", "y"], seeds=3))
    assert len(plan) == len(set(plan)) == 30
    assert len({plan[10 * seed][1] for seed in range(3)}) == 3


def test_claims_of_methods() -> None:
    low = ending("random", 0.50, 0.61, 0.70)
    good = [*ending("zoom", 0.60, 0.71, 0.80), *ending("bayes", 0.61, 0.70, 0.80)]
    bad = ending("grid", 0.40, 0.50, 0.61)
    first, second = methods.claims([*low, *good])
    assert "random beyond noise: holds" in first and "every data set: holds" in second
    first, second = methods.claims([*low, *good, *bad])
    assert "noise: does not hold; grid on d worse (-0.1" in first and "set: holds" in second
    elsewhere = [*low, *good, *ending("random", 0.5, 0.6, data="e")]
    first, second = methods.claims([*elsewhere, *ending("zoom", 0.6, 0.5, data="e")])
    assert "noise: holds" in first and "set: does not hold" in second
    assert "set: cannot be said" in methods.claims([*low, *good[:3]])[1]  # no bayes
    first, second = methods.claims([*low[:1], *good[:1], *good[3:4]])
    assert "cannot be said" in first and "cannot be said" in second
    assert all("cannot be said" in claim for claim in methods.claims(good))


def test_run_without_a_value_is_a_gap() -> None:
    runs = [*ending("random", 0.5, 0.6), *ending("zoom", 0.7), run("zoom", 1)]
    row = methods.table_of(runs).set_index("method").loc["zoom"]
    assert math.isnan(row["best"]) and row["s to random's"] == math.inf
    assert row["reached"] == "1/2" and row["is"] == "unknown"
    assert len(plot_best_values(runs, 3.0).data) == 12


def test_claim_of_the_gradient() -> None:
    def descent(seed: int, start: float, moved: str, loss: float) -> gradient.GradientRun:
        return gradient.GradientRun("d", seed, start, moved, loss, 0.1, 1.0, 0.01, 1.1, 9, 1, 1)

    found = [descent(s, 1.0, gradient.ONLY, v) for s, v in enumerate((0.9, 1.01, 1.5))]
    found += [descent(0, 1.0, gradient.EVERYTHING, 1.03)]
    only, everything = gradient.claims(found)
    assert ": holds; d from 1: +1.0 % (-10.0 to +50.0)." in only
    assert ": does not hold; d from 1: +3.0 %" in everything


def test_claim_of_the_population() -> None:
    runs = [*ending("random", 0.5, 0.6, 0.7), *ending("population", 0.6, 0.71, 0.8)]
    other = [*ending("random", 0.5, 0.6, data="e"), *ending("population", 0.4, 0.7, data="e")]
    assert "least one data set: holds; better on d" in population.claims([*runs, *other])[0]
    assert "least one data set: does not hold" in population.claims(other)[0]
    assert "cannot be said" in population.claims([runs[0], runs[3]])[0]
