"""The loop works with all samplers, pruners, cohort sizes and ways to stop."""

from __future__ import annotations

from collections.abc import Callable
import inspect
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp import CohortHalvingPruner
from optuna_nnhp.engine.mlp import load_library
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.study import autotune
from optuna_nnhp.study import tuner
from optuna_nnhp.study.running import FairQueue
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.training.cohort import Cohort
from tests.tiny import DIFFERENT_LENGTHS
from tests.tiny import SHAPE
from tests.tiny import TINY
from tests.tiny import causes
from tests.tiny import classes
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune
from tests.tolerance import FLOAT32
from tests.tolerance import assert_close

GRID: dict[str, list[Any]] = {
    "learning_rate": [0.01, 0.002],
    "activation": ["relu", "tanh", "elu"],
}
GRID_SPACE = {
    "learning_rate": FloatDistribution(1e-3, 0.5),
    "activation": CategoricalDistribution(("relu", "tanh", "elu")),
}


def fixed_except(*names: str) -> dict[str, Any]:
    """Return the defaults or the values of `TINY` of all parameters except some."""
    pinned = {name: h.default for name, h in specs("binary").items()} | TINY
    return {name: value for name, value in pinned.items() if name not in (*names, "iterations")}


@pytest.mark.parametrize(
    "sampler",
    [
        optuna.samplers.TPESampler(seed=0, n_startup_trials=3),
        optuna.samplers.TPESampler(seed=0, n_startup_trials=3, multivariate=True, group=True),
        optuna.samplers.RandomSampler(seed=0),
        optuna.samplers.QMCSampler(seed=0, warn_independent_sampling=False),
        optuna.samplers.NSGAIISampler(seed=0, population_size=4),
        optuna.samplers.GPSampler(seed=0, n_startup_trials=3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
@pytest.mark.parametrize("cohort_size", [1, 3])
def test_studies_finish_with_every_sampler(sampler: BaseSampler, cohort_size: int) -> None:
    result = tune(
        sampler=sampler, n_trials=8, cohort_size=cohort_size, fixed=SHAPE | {"epochs": 1}
    )
    assert states(result) == [TrialState.COMPLETE] * 8
    assert len({tuple(t.params.values()) for t in trials(result)}) >= 6  # a genetic twin may occur
    assert result.study.sampler is sampler


@pytest.mark.parametrize("cohort_size", [1, 4])
def test_values_of_a_partial_fixed_sampler_stay_fixed(cohort_size: int) -> None:
    fixed = {"hidden_layers": 3, "activation": "tanh"}
    base = optuna.samplers.RandomSampler(seed=0)
    result = tune(
        sampler=optuna.samplers.PartialFixedSampler(fixed, base),
        space={"hidden_layers": IntDistribution(1, 4)},
        fixed={name: value for name, value in TINY.items() if name != "hidden_layers"},
        n_trials=5,
        cohort_size=cohort_size,
    )
    for trial in trials(result)[1:]:  # the first one is the default configuration
        assert {name: trial.params[name] for name in fixed} == fixed


@pytest.mark.parametrize("cohort_size", [None, 1, 4, 30])
@pytest.mark.parametrize("budget", [{"n_trials": 50}, {"n_trials": None, "timeout": 60}])
@pytest.mark.parametrize("default_is_on_the_grid", [True, False])
def test_a_grid_covers_each_point_once_and_ends(
    cohort_size: int | None, budget: dict[str, Any], default_is_on_the_grid: bool
) -> None:
    grid = GRID if default_is_on_the_grid else GRID | {"learning_rate": [0.01, 0.3]}
    result = tune(
        sampler=optuna.samplers.GridSampler(grid, seed=1),
        space=GRID_SPACE,
        fixed=fixed_except(*GRID),
        cohort_size=cohort_size,
        **budget,
    )
    points = [(t.params["learning_rate"], t.params["activation"]) for t in trials(result)]
    expected = {(rate, name) for rate in grid["learning_rate"] for name in grid["activation"]}
    assert points[0] == (0.002, "relu")
    assert set(points) == expected | {(0.002, "relu")}
    assert len(points) == (6 if default_is_on_the_grid else 7)
    assert set(states(result)) == {TrialState.COMPLETE}


def test_a_grid_is_continued_where_it_stopped() -> None:
    storage = optuna.storages.InMemoryStorage()

    def run(n_trials: int) -> list[FrozenTrial]:
        sampler = optuna.samplers.GridSampler(GRID, seed=1)
        fixed = fixed_except(*GRID)
        settings = {"sampler": sampler, "space": GRID_SPACE, "fixed": fixed, "storage": storage}
        known = trials(tune(**settings, n_trials=n_trials, cohort_size=2))
        return [t for t in known if t.state.is_finished()]  # the other points wait

    assert [len(run(n)) for n in (3, 4, 50, 50)] == [3, 4, 6, 6]
    assert len({tuple(t.params.items()) for t in run(50)}) == 6


def test_a_grid_must_have_all_tuned_parameters() -> None:
    sampler = optuna.samplers.GridSampler(GRID | {"momentum": [0.9]}, seed=1)
    with pytest.raises(ValueError, match=r"lacks \[dropout\] and has \[momentum\] besides"):
        tune(
            sampler=sampler,
            space=GRID_SPACE,
            fixed=fixed_except(*GRID, "dropout") | {"momentum": 0.5},
        )


def test_a_brute_force_sampler_ends_the_study() -> None:
    sampler = optuna.samplers.BruteForceSampler(seed=0)
    space = {"activation": CategoricalDistribution(("relu", "tanh", "elu"))}
    result = tune(sampler=sampler, space=space, fixed=fixed_except("activation"), n_trials=30)
    assert {t.params["activation"] for t in trials(result)} == {"relu", "tanh", "elu"}
    assert len(trials(result)) < 30


@pytest.mark.parametrize(
    "pruner",
    [
        optuna.pruners.MedianPruner(n_startup_trials=1),
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        optuna.pruners.HyperbandPruner(min_resource=1, max_resource=4),
        optuna.pruners.PercentilePruner(30.0, n_startup_trials=1),
        CohortHalvingPruner(reduction_factor=2),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
@pytest.mark.parametrize("cohort_size", [1, 3])
def test_studies_prune_with_every_pruner(pruner: BasePruner, cohort_size: int) -> None:
    result = tune(*numbers(), pruner=pruner, n_trials=12, cohort_size=cohort_size, method="random")
    pruned = [t for t in trials(result) if t.state == TrialState.PRUNED]
    assert pruned
    assert len(trials(result)) == 12
    for trial in pruned:
        attributes = trial.user_attrs
        assert attributes["cause"] == "pruned"
        assert attributes["epochs"] == len(attributes["train_loss"]) == trial.last_step
        curve = trial.intermediate_values
        assert attributes["best_value"] == min(curve.values()) == curve[attributes["best_epoch"]]


def test_a_nop_pruner_prunes_nothing() -> None:
    result = tune(n_trials=8, pruner=optuna.pruners.NopPruner(), cohort_size=4)
    assert causes(result) == ["finished"] * 8


def test_a_threshold_pruner_prunes_after_its_warmup() -> None:
    pruner = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=3)
    result = tune(pruner=pruner, n_trials=3, cohort_size=3)  # no accuracy is 2
    assert states(result) == [TrialState.PRUNED] * 3
    assert [t.user_attrs["epochs"] for t in trials(result)] == [3, 3, 3]


def test_the_default_pruner_keeps_the_better_half_of_a_cohort() -> None:
    result = tune(*numbers(), pruner=None, n_trials=9, cohort_size=9, method="random")
    at_first = {t.number: t.intermediate_values[1] for t in trials(result)}
    gone = {t.number for t in trials(result) if t.user_attrs["epochs"] == 1}
    assert len(gone) == 4  # of nine trials the better half goes on
    assert min(at_first[n] for n in gone) >= max(at_first[n] for n in at_first.keys() - gone)


def test_the_baseline_is_never_pruned_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CohortHalvingPruner, "select_survivors", lambda *_, **__: set())
    result = tune(*numbers(), pruner=None, n_trials=6, method="random")
    assert causes(result) == ["finished"] + ["pruned"] * 5
    assert [t.user_attrs.get("baseline") for t in trials(result)] == [True] + [None] * 5


def record_rounds(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that gets the members of each round; cohort sizes are not measured."""
    train, rounds = Cohort.train_round, list[list[int]]()

    def noted(cohort: Cohort, *arguments: Any) -> Any:
        rounds.append(sorted(m.number for m in cohort.members))
        return train(cohort, *arguments)

    monkeypatch.setattr(Cohort, "train_round", noted)
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_measure", lambda make, most: autotune.Throughput(most, 1e-3))
    return rounds


def test_the_baseline_is_trained_alone_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = record_rounds(monkeypatch)
    tune(n_trials=30)
    assert rounds[:4] == [[0]] * 4
    assert 0 not in rounds[4] and len(rounds[4]) > 1


def test_the_portfolio_starts_together_with_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = record_rounds(monkeypatch)
    few = tune(*numbers(), fixed={"epochs": 4}, pruner=None, n_trials=9)
    assert not any(t.user_attrs.get("portfolio") for t in trials(few))
    rounds.clear()
    settings: dict[str, Any] = {"fixed": {"epochs": 4}, "pruner": None, "method": "random"}
    result = tune(*numbers(), n_trials=40, **settings)
    first, sixth = trials(result)[:5], trials(result)[5].params
    marks = [t.user_attrs.get("portfolio", False) for t in trials(result)]
    assert marks == [False] + [True] * 4 + [False] * 35
    assert [t.params["width"] for t in first] == [256, 256, 256, 512, 512]
    by_shape = [[t.user_attrs["cause"] for t in pair] for pair in (first[1:3], first[3:])]
    assert all(sorted(ends) == ["finished", "pruned"] for ends in by_shape)
    last = max(i for i, members in enumerate(rounds) if min(members) < 5)
    assert all(max(members) < 5 for members in rounds[: last + 1])
    best = min(first, key=lambda t: t.value or 0.0)
    assert sixth["hidden_layers"] == best.params["hidden_layers"]
    assert best.params["width"] / 2 < sixth["width"] <= best.params["width"]


def test_the_portfolio_is_compared_by_shape_also_without_stacking() -> None:
    settings: dict[str, Any] = {"fixed": {"epochs": 4}, "pruner": None, "method": "random"}
    result = tune(*numbers(), n_trials=40, cohort_size=1, **settings)
    openers = [t for t in trials(result) if t.user_attrs.get("portfolio")]
    assert len(openers) == 4
    assert "pruned" in {t.user_attrs["cause"] for t in openers}


def test_a_sampler_that_fixes_values_gets_no_portfolio() -> None:
    sampler = optuna.samplers.PartialFixedSampler(
        {"hidden_layers": 3}, optuna.samplers.RandomSampler(seed=0)
    )
    result = tune(fixed={"epochs": 1}, n_trials=20, sampler=sampler)
    assert {t.params["hidden_layers"] for t in trials(result)[1:]} == {3}


def test_a_long_baseline_does_not_delay_other_trials() -> None:
    endless = TINY | {"epochs": 10**6, "patience": 10**6}
    result = tune(n_trials=10**6, timeout=4.0, fixed=endless)
    assert trials(result)[0].user_attrs["cause"] == "timeout"
    assert sum(bool(t.intermediate_values) for t in trials(result)) > 12


def test_followers_are_asked_for_while_the_engine_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_measure", lambda make, most: autotune.Throughput(most, 1e-3))
    ask, prepared = TrialSource.ask, list[int]()

    def noted(self: TrialSource, count: int, *arguments: Any) -> Any:
        if any(frame.function == "ask_followers_ahead" for frame in inspect.stack()):
            prepared.append(count)
        return ask(self, count, *arguments)

    monkeypatch.setattr(TrialSource, "ask", noted)
    first = tune(n_trials=40)
    assert len(trials(first)) == 40 and set(causes(first)) == {"finished"}
    assert bool(prepared) == (load_library() is not None)
    assert learning_curves(tune(n_trials=40)) == learning_curves(first)


def test_followers_that_did_not_start_before_the_timeout_fail() -> None:
    result = tune(n_trials=10**6, timeout=2.0, fixed=TINY | {"epochs": 40})
    assert TrialState.RUNNING not in states(result)
    late = [t for t in trials(result) if t.state == TrialState.FAIL]
    assert {t.user_attrs["cause"] for t in late} <= {"timeout"}
    assert len(trials(result)) > len(late)


def test_halving_compares_with_trials_of_earlier_calls() -> None:
    storage = optuna.storages.InMemoryStorage()
    settings = {"pruner": None, "method": "random", "storage": storage, "cohort_size": 6}
    tune(*numbers(), **settings, n_trials=6)
    best = sorted(
        t.intermediate_values[1] for t in trials(tune(*numbers(), **settings, n_trials=6))
    )
    later = trials(tune(*numbers(), **settings, n_trials=12))[6:]
    for trial in later:
        if trial.user_attrs["epochs"] > 1:
            assert trial.intermediate_values[1] <= best[5]  # among the best 6 of 12


@pytest.mark.parametrize("cohort_size", [1, 2, 5])
def test_a_value_does_not_depend_on_the_cohort(cohort_size: int) -> None:
    params = [{"learning_rate": rate, "optimizer": "adam"} for rate in (0.001, 0.01, 0.1)]
    params += [{"learning_rate": rate, "optimizer": "sgd"} for rate in (0.01, 0.1)]
    space = {
        "learning_rate": FloatDistribution(1e-3, 0.5),
        "optimizer": CategoricalDistribution(("sgd", "adamw", "adam")),
    }

    pinned = {k: v for k, v in fixed_except(*space).items() if k in specs("regression")}
    settings = {"space": space, "fixed": pinned | {"loss": "mse"}}

    def run(size: int) -> list[FrozenTrial]:
        first = tune(*numbers(), **settings, storage=optuna.storages.InMemoryStorage(), n_trials=1)
        for method_config in params:
            first.study.enqueue_trial(method_config)
        storage = first.study._storage
        result = tune(*numbers(), **settings, storage=storage, n_trials=6, cohort_size=size)
        return trials(result)

    for alone, stacked in zip(run(1), run(cohort_size), strict=True):
        assert stacked.params == alone.params
        assert stacked.value == pytest.approx(alone.value, rel=FLOAT32["rtol"])
        for name in ("train_loss", "validation_loss"):
            assert_close(stacked.user_attrs[name], alone.user_attrs[name], FLOAT32)


def test_trials_of_equal_signature_are_stacked() -> None:
    settings = {"fixed": {"epochs": 1}, "space": {"width": IntDistribution(4, 64)}}
    result = tune(n_trials=12, cohort_size=6, method="random", **settings)
    static = ("hidden_layers", "normalization", "batch_size")
    first, second = trials(result)[:6], trials(result)[6:]
    for cohort in (first, second):
        assert len({tuple(t.params[name] for name in static) for t in cohort}) == 1
    assert len({t.params["learning_rate"] for t in trials(result)}) == 12


@pytest.mark.parametrize("cohort_size", [1, 4])
def test_stop_from_a_callback_ends_the_study_after_the_running_cohort(cohort_size: int) -> None:
    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        study.stop()

    result = tune(callbacks=[stop], n_trials=50, cohort_size=cohort_size)
    assert causes(result) == ["finished"] * cohort_size
    assert result.best_value == max(t.value or 0.0 for t in trials(result))
    assert len(trials(tune(storage=result.study._storage, n_trials=9))) == 9  # not for ever


def test_a_max_trials_callback_ends_the_study() -> None:
    callback = optuna.study.MaxTrialsCallback(4, states=(TrialState.COMPLETE,))
    result = tune(callbacks=[callback], n_trials=50, cohort_size=2)
    assert len(trials(result)) == 4


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_error_in_a_callback_leaves_nothing_running(error: type[BaseException]) -> None:
    def broken(study: optuna.Study, trial: FrozenTrial) -> None:
        raise error("of the user")

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(error, match="of the user"):
        tune(callbacks=[broken], storage=storage, cohort_size=3, **DIFFERENT_LENGTHS)
    left = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    assert {t.state.name for t in left} == {"COMPLETE", "FAIL"}
    assert len(trials(tune(storage=storage, n_trials=6, **DIFFERENT_LENGTHS))) == 6


def test_an_error_of_the_sampler_leaves_nothing_running() -> None:
    class Broken(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, *rest: Any) -> Any:
            if trial.number == 3:
                raise ZeroDivisionError("of the sampler")
            return super().sample_independent(study, trial, *rest)

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ZeroDivisionError, match="of the sampler"):
        tune(sampler=Broken(seed=0), storage=storage, n_trials=6, cohort_size=6)
    left = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    # Those that were created along with them wait for the next call.
    assert {t.state for t in left[:4]} == {TrialState.FAIL}
    assert {t.state for t in left[4:]} <= {TrialState.WAITING}


def tune_slow_networks(**options: Any) -> Any:
    source = np.random.default_rng(0)
    X = source.normal(size=(6000, 20)).astype(np.float32)
    fixed = {"width": 1024, "hidden_layers": 6, "batch_size": 16, "normalization": "none"}
    return tune(X, X[:, 0] > 0, fixed=fixed | {"epochs": 1000}, **options)


@pytest.mark.parametrize("cohort_size", [1, 2])
def test_the_timeout_interrupts_an_epoch(cohort_size: int) -> None:
    tune(*numbers(), n_trials=1)  # a first call imports modules, which takes time
    began = time.monotonic()
    result = tune_slow_networks(n_trials=40, timeout=1, cohort_size=cohort_size)
    assert time.monotonic() - began < 15  # an epoch alone takes longer
    assert states(result) == [TrialState.FAIL] * cohort_size
    assert causes(result) == ["timeout"] * cohort_size
    # On one core the second may get all of the time.
    assert 0 < max(t.user_attrs["iterations"] for t in trials(result)) < 300
    with pytest.raises(RuntimeError, match="give it more time or trials"):
        _ = result.best_value


def test_trials_ended_by_the_timeout_keep_their_best_value() -> None:
    result = tune(
        *numbers(),
        n_trials=4,
        cohort_size=4,
        timeout=0.5,
        fixed=TINY | {"epochs": 10**6} | {"patience": 10**6},
    )
    assert causes(result) == ["timeout"] * 4
    assert {TrialState.COMPLETE} <= set(states(result)) <= {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in trials(result):
        assert trial.user_attrs["best_value"] == min(trial.intermediate_values.values())
    best = min(t.user_attrs["best_value"] for t in trials(result))
    assert result.best_value == best
    assert result.predict(numbers()[0]).shape == (80,)


def test_trials_without_a_value_do_not_count() -> None:
    storage = optuna.storages.InMemoryStorage()
    settings: dict[str, Any] = {"storage": storage, "study_name": "s"}
    cut = tune_slow_networks(n_trials=2, timeout=0.2, **settings)
    assert TrialState.COMPLETE not in states(cut)
    before = len(trials(cut))
    again = tune_slow_networks(n_trials=2, timeout=0.2, **settings)
    assert len(trials(again)) > before


@pytest.mark.parametrize("make", [classes, numbers])
def test_first_of_equal_values_is_the_best(make: Callable[[], Any]) -> None:
    result = tune(*make(), n_trials=10, cohort_size=5)
    values = {t.number: t.value for t in trials(result)}
    first = min(n for n, value in values.items() if value == result.best_value)
    assert result.best_trial.number == first
    assert result.study.best_value == result.best_value


def test_the_same_seed_gives_the_same_study_with_halving_and_cohorts() -> None:
    settings: dict[str, Any] = {
        "n_trials": 12,
        "pruner": None,
        "fixed": {"epochs": 3, "batch_size": 64},
    }
    assert learning_curves(tune(*numbers(), **settings)) == learning_curves(
        tune(*numbers(), **settings)
    )


def test_only_the_first_round_of_a_cohort_is_recorded_as_its_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, seen = [0.0], []
    train, start = Cohort.train_round, tuner.Tuner.run

    def train_for_a_second(cohort: Cohort, *args: Any) -> Any:
        clock[0] += 1
        return train(cohort, *args)

    def run(self: tuner.Tuner) -> None:
        seen.append(self)
        start(self)

    monkeypatch.setattr(tuner, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Cohort, "train_round", train_for_a_second)
    monkeypatch.setattr(tuner.Tuner, "run", run)
    tune(pruner=optuna.pruners.NopPruner(), n_trials=4, cohort_size=4)
    assert clock[0] > 1
    assert seen[0].policy.admission.first_round == 1


def test_the_study_keeps_its_grid_sampler() -> None:
    sampler = optuna.samplers.GridSampler(GRID, seed=1)
    result = tune(sampler=sampler, space=GRID_SPACE, fixed=fixed_except(*GRID), n_trials=2)
    assert result.study.sampler is sampler


def test_only_a_study_with_nothing_to_do_logs_that(log: pytest.LogCaptureFixture) -> None:
    storage = optuna.storages.InMemoryStorage()
    tune(storage=storage, n_trials=2)
    assert "nothing to do" not in log.text
    tune(storage=storage, n_trials=2)
    assert "The study has its 2 trials already: nothing to do." in log.text


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Return a list that gets, per join, the rounds of the members and the number of new ones."""
    seen: list[tuple[list[int], int]] = []
    append = Cohort.append

    def spy(cohort: Cohort, members: Any) -> None:
        seen.append((list(cohort.rounds_done), len(members)))
        append(cohort, members)

    monkeypatch.setattr(Cohort, "append", spy)
    return seen


def test_free_slots_are_refilled_while_others_train(joins: list[tuple[list[int], int]]) -> None:
    result = tune(cohort_size=4, n_trials=40, **DIFFERENT_LENGTHS)
    assert states(result) == [TrialState.COMPLETE] * 40
    later = [(done, new) for done, new in joins if max(done) > 0]
    assert later
    assert all(len(done) + new <= 4 for done, new in later)
    for trial in trials(result):
        assert trial.user_attrs["epochs"] == trial.params["epochs"]
    assert 0.5 < result.study.user_attrs["timing"]["occupancy"] <= 1


def test_one_cohort_at_a_time_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    note = FairQueue.record_turn

    def spy(queue: FairQueue, *arguments: Any, **more: Any) -> None:
        filled.append(sum(run.refills for run in queue.runs))
        note(queue, *arguments, **more)

    monkeypatch.setattr(FairQueue, "record_turn", spy)
    tune(cohort_size=4, n_trials=40)
    assert set(filled) == {1}


def test_trials_that_join_later_have_the_values_of_single_training() -> None:
    settings: dict[str, Any] = {"n_trials": 12, **DIFFERENT_LENGTHS}
    result = tune(cohort_size=4, **settings)
    problem = DNNTemplate(
        *classes(), space=settings["space"], fixed=settings["fixed"], device="cpu"
    )
    for trial in trials(result):
        alone = problem.cohort([problem.member(trial.number, trial.params)])
        values = []
        for _ in range(trial.params["epochs"]):
            scores = alone.train_round()
            assert scores is not None
            values += scores.value
        assert_close(list(trial.intermediate_values.values()), values, FLOAT32)


def test_cohorts_with_a_budget_in_iterations_take_no_new_members(
    joins: list[tuple[list[int], int]],
) -> None:
    fixed = {name: value for name, value in TINY.items() if name != "epochs"}
    result = tune(cohort_size=4, n_trials=12, fixed=fixed | {"iterations": 5})
    assert {trial.user_attrs["iterations"] for trial in trials(result)} == {5}
    assert all(max(done) == 0 for done, _ in joins)


def test_leaders_of_other_shapes_start_too() -> None:
    space = {"hidden_layers": IntDistribution(1, 4)}
    fixed = {name: value for name, value in TINY.items() if name != "hidden_layers"}
    result = tune(space=space, fixed=fixed, cohort_size=2, n_trials=40, method="random")
    assert len({trial.params["hidden_layers"] for trial in trials(result)}) > 2


def test_the_study_records_where_the_time_went() -> None:
    timing = tune().study.user_attrs["timing"]
    assert timing.keys() == {"seconds", "occupancy", "training", "asking", "bookkeeping"}
    assert sum(timing[name] for name in ("training", "asking", "bookkeeping")) <= 1


def test_a_trial_that_another_process_ends_does_not_stop_the_study(
    log: pytest.LogCaptureFixture,
) -> None:
    storage = optuna.storages.InMemoryStorage()
    ended: list[int] = []

    def interfere(study: optuna.Study, trial: FrozenTrial) -> None:
        other = optuna.load_study(study_name=study.study_name, storage=storage)
        running = other.get_trials(states=(TrialState.RUNNING,))
        if not ended and running:
            ended.append(running[0].number)
            other.tell(ended[0], state=TrialState.FAIL)

    result = tune(
        storage=storage, n_trials=12, cohort_size=4, callbacks=[interfere], **DIFFERENT_LENGTHS
    )
    assert [t.number for t in trials(result) if t.state == TrialState.FAIL] == ended
    assert states(result).count(TrialState.COMPLETE) == 11
    assert f"Trial {ended[0]} was ended by another process." in log.text
