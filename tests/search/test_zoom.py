from __future__ import annotations

from collections.abc import Callable
import copy
import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import SingleOnlySamplerTestCase
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.samplers import ZoomSampler
from optuna_nnhp.search.narrowing import Choices
from optuna_nnhp.search.narrowing import Interval
from optuna_nnhp.search.narrowing import Region
from optuna_nnhp.search.zoom import RoundHistory
from optuna_nnhp.search.zoom import RoundState

X = FloatDistribution(0.0, 1.0)
RATE = FloatDistribution(1e-6, 1.0, log=True)
KIND = CategoricalDistribution(("a", "b", "c"))
SPACE: dict[str, BaseDistribution] = {"rate": RATE, "kind": KIND, "depth": IntDistribution(1, 8)}


class TestAsAnySampler(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return ZoomSampler


class TestForOneObjective(SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return ZoomSampler


def loss(params: dict[str, Any]) -> float:
    """Best at 1e-4, b and 3."""
    kind = {"a": 2.0, "b": 0.0, "c": 1.0}[params["kind"]]
    return float((np.log10(params["rate"]) + 4) ** 2 + kind + 0.1 * abs(params["depth"] - 3))


def run(study: optuna.Study, count: int, *, at_once: int = 1) -> None:
    for _ in range(count // at_once):
        for trial in [study.ask(SPACE) for _ in range(at_once)]:
            study.tell(trial, loss(trial.params))


def box(study: optuna.Study, size: int = 16) -> dict[str, Region]:
    stage = RoundHistory(size).refresh(study)
    return {axis.name: part for axis, part in stage.box.items()}


def rounds_of(study: optuna.Study) -> RoundHistory:
    assert isinstance(study.sampler, ZoomSampler)
    return study.sampler._round_history


def told(values: list[tuple[float, float]]) -> optuna.Study:
    """A study of `x` with the given places and values."""
    study = optuna.create_study()
    for x, value in values:
        study.add_trial(create_trial(params={"x": x}, distributions={"x": X}, value=value))
    return study


@pytest.mark.parametrize(
    "options, message",
    [
        ({"round_size": 4}, "^`round_size` must be at least 5, but got 4.$"),
        ({"patience": 0}, "^`patience` must be at least 1, but got 0.$"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZoomSampler(**options)


@pytest.mark.parametrize("at_once", [1, 64])
def test_better_than_random_search(at_once: int) -> None:
    best = {}
    for make in (ZoomSampler, RandomSampler):
        values = []
        for seed in range(10):
            study = optuna.create_study(sampler=make(seed=seed))
            run(study, 256, at_once=at_once)
            values.append(study.best_value)
        best[make] = np.median(values)
    assert best[ZoomSampler] < 0.5 * best[RandomSampler]


def test_the_box_closes_in_on_the_logarithmic_scale_and_drops_what_is_worse() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    run(study, 200)
    found = box(study)
    rate, kind = found["rate"], found["kind"]
    assert isinstance(rate, Interval) and rate.low < 2 / 6 < rate.high
    assert rate.high - rate.low < 0.5
    assert kind == Choices((1,))


def test_the_box_closes_in_on_maxima() -> None:
    study = optuna.create_study(direction="maximize", sampler=ZoomSampler(seed=0))
    for _ in range(100):
        trial = study.ask({"x": X})
        study.tell(trial, -abs(trial.params["x"] - 0.2))
    assert abs(study.best_params["x"] - 0.2) < 0.01


def test_an_interval_becomes_at_most_half_as_wide_in_a_round() -> None:
    study = told([(i / 32, abs(i / 32 - 0.5)) for i in range(32)])
    (whole, first, second) = (box(told_first(study, n)).get("x", Interval()) for n in (0, 16, 32))
    for before, after in ((whole, first), (first, second)):
        assert isinstance(before, Interval) and isinstance(after, Interval)
        assert after.high - after.low >= 0.5 * (before.high - before.low) - 1e-12


def told_first(study: optuna.Study, count: int) -> optuna.Study:
    other = optuna.create_study()
    other.add_trials(study.get_trials()[:count])
    return other


def test_a_box_grows_beyond_the_bound_on_which_the_best_lies() -> None:
    rng = np.random.RandomState(0)
    near = [(float(x), abs(float(x) - 0.3)) for x in rng.uniform(size=64)]
    before = box(told(near))["x"]
    assert isinstance(before, Interval) and before.high < 0.7
    bound = before.high - 0.01
    after = box(told([*near, *[(bound, -1.0)] * 16]))["x"]
    assert isinstance(after, Interval) and after.high > before.high


def test_values_that_no_trial_had_are_not_cut() -> None:
    """Followers share a leader's value: nothing is known of the others."""
    study = told([(0.3, float(i)) for i in range(64)])
    assert box(study)["x"] == Interval(0.0, 1.0)


def test_a_dropped_choice_comes_back_with_the_best_trial() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    run(study, 200)
    assert box(study)["kind"] == Choices((1,))
    params = {"rate": 1e-4, "kind": "c", "depth": 3}
    better = create_trial(params=params, distributions=SPACE, value=-1.0)
    study.add_trials([better] * 16)
    assert box(study)["kind"] == Choices((1, 2))


def test_pruned_trials_rank_by_their_last_step() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    for number in range(160):
        trial = study.ask(SPACE)
        steps = 9 if loss(trial.params) < 2 else 1
        trial.report(loss(trial.params), steps)
        state = TrialState.COMPLETE if number % 40 == 39 else TrialState.PRUNED
        study.tell(trial, loss(trial.params) if state == TrialState.COMPLETE else None, state)
    rate = box(study)["rate"]
    assert isinstance(rate, Interval) and rate.high - rate.low < 0.7


def test_failed_trials_do_not_count() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    for _ in range(40):
        study.tell(study.ask(SPACE), state=TrialState.FAIL)
    assert RoundHistory(16).refresh(study) == RoundState()


def test_values_of_a_new_sampler_lie_in_the_same_box() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    run(study, 100)
    proposals = []
    for known in (study.sampler, ZoomSampler()):
        assert isinstance(known, ZoomSampler)
        known._rng.rng.seed(5)
        study.sampler = known
        proposals.append(study.ask(SPACE).params)
    assert proposals[0] == proposals[1]


def test_incremental_rounds_equal_recomputed_rounds() -> None:
    study, rounds = optuna.create_study(sampler=ZoomSampler(seed=0)), RoundHistory(16)
    for _ in range(10):
        run(study, 10)
        stage, again = rounds.refresh(study), RoundHistory(16).refresh(study)
        parts = [{axis.name: part for axis, part in s.box.items()} for s in (stage, again)]
        assert parts[0] == parts[1]
        assert (stage.number, stage.rounds_without_improvement) == (
            again.number,
            again.rounds_without_improvement,
        )
    assert stage.number == 6


def test_late_trials_are_inserted_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study, rounds = optuna.create_study(sampler=ZoomSampler(seed=0)), RoundHistory(16)
    run(study, 60)
    trials = study.get_trials(deepcopy=False)
    late = copy.copy(trials[5])
    late.state = TrialState.RUNNING  # as another worker sees it for a while
    seen = [*trials[:5], late, *trials[6:]]
    with monkeypatch.context() as patch:
        patch.setattr(study, "_get_trials", lambda **_: seen)
        early = rounds.refresh(study)
    stage, again = rounds.refresh(study), RoundHistory(16).refresh(study)
    assert early.n_finished != stage.n_finished or early.started_at != stage.started_at
    assert (stage.n_finished, stage.started_at) == (again.n_finished, again.started_at)
    assert {a.name: p for a, p in stage.box.items()} == {a.name: p for a, p in again.box.items()}


def test_two_workers_see_the_same_box(tmp_path: Any) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    workers = [
        optuna.create_study(
            study_name="zoom", storage=storage, sampler=ZoomSampler(seed=n), load_if_exists=True
        )
        for n in range(2)
    ]
    for _ in range(20):
        asked = [(study, study.ask(SPACE)) for study in workers]
        for study, trial in asked:
            study.tell(trial, loss(trial.params))
    first, second = (rounds_of(study).refresh(study) for study in workers)
    assert first.number == second.number > 1
    assert {a.name: p for a, p in first.box.items()} == {a.name: p for a, p in second.box.items()}


def test_several_threads_may_sample() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        return abs(trial.suggest_float("x", 0, 1) - 0.5)

    study.optimize(objective, n_trials=60, n_jobs=2)
    assert len(study.trials) == 60
    assert len(rounds_of(study)._axes["x"]) == 1


def test_trials_that_began_before_a_round_do_not_end_it() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    run(study, 64, at_once=64)
    assert RoundHistory(16).refresh(study).number == 1
    run(study, 64, at_once=64)
    assert RoundHistory(16).refresh(study).number == 2


@pytest.mark.parametrize("patience, count", [(2, 49), (None, 200)])
def test_the_study_stops_without_improvement(patience: int | None, count: int) -> None:
    """A round that finds the best, two that do not, and the trial at whose end that is seen."""
    study = optuna.create_study(sampler=ZoomSampler(seed=0, patience=patience))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) * 0, n_trials=200)
    assert len(study.trials) == count


def test_the_study_continues_while_it_improves() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0, patience=1))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) - trial.number, n_trials=100)
    assert len(study.trials) == 100


def test_ask_and_tell_does_not_stop() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0, patience=1))
    for _ in range(60):
        trial = study.ask({"x": X})
        study.tell(trial, 1.0)
    assert len(study.trials) == 60


def test_pruned_trials_do_not_stop_the_study() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0, patience=1))

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number:
            raise optuna.TrialPruned
        return 0.0

    study.optimize(objective, n_trials=100)
    assert len(study.trials) == 100


def test_changed_ranges_have_their_own_box() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0))
    for _ in range(64):
        trial = study.ask({"x": FloatDistribution(0, 10)})
        study.tell(trial, trial.params["x"])
    wider = [study.ask({"x": FloatDistribution(0, 100)}).params["x"] for _ in range(32)]
    assert max(wider) > 50


def test_copies_recompute_their_state() -> None:
    study = optuna.create_study(sampler=ZoomSampler(seed=0, round_size=20))
    run(study, 40)
    for other in (copy.deepcopy(study.sampler), pickle.loads(pickle.dumps(study.sampler))):
        study.sampler = other
        assert rounds_of(study).size == 20
        assert rounds_of(study).refresh(study).number == 2


def test_work_on_a_long_study_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.RandomState(0)
    study, rounds = told([(float(x), float(x)) for x in rng.uniform(size=5000)]), RoundHistory(16)
    rounds.refresh(study)
    looked_at: list[int] = []
    sort_key = rounds._sort_key

    def noted(number: int) -> Any:
        looked_at.append(number)
        return sort_key(number)

    monkeypatch.setattr(rounds, "_sort_key", noted)
    for _ in range(3):
        study.tell(study.ask({"x": X}), 1.0)
        rounds.refresh(study)
    assert looked_at == [5000, 5001, 5002]
