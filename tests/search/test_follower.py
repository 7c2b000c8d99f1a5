from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna import Study
from optuna import Trial
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp.search.follower import FollowerSampler

SPACE: dict[str, BaseDistribution] = {
    "depth": IntDistribution(1, 8),
    "width": IntDistribution(16, 256, log=True),
    "rate": FloatDistribution(1e-4, 0.1, log=True),
    "warmup": FloatDistribution(0.0, 0.3),
    "norm": CategoricalDistribution(("none", "batch", "layer")),
    "optimizer": CategoricalDistribution(("sgd", "adam")),
}
LEADER = {"depth": 3, "norm": "layer"}
FEW = 5  # random trials before a model is asked, or the size of a population

SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: RandomSampler(seed=0),
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=FEW),
    "tpe-independent": lambda: TPESampler(seed=0, n_startup_trials=FEW, multivariate=False),
    "nsga2": lambda: NSGAIISampler(seed=0, population_size=FEW),
}


def pin(name: str, proposed: Any) -> Any:
    return LEADER.get(name, proposed)


def same(name: str, proposed: Any) -> Any:
    return proposed


def value_of(trial: Trial) -> float:
    params = trial.params
    return float(params["rate"] + params["width"] / 100 + (params["norm"] == "batch"))


def run(sampler: BaseSampler, n_trials: int) -> Study:
    study = optuna.create_study(sampler=sampler)
    more_trials(study, n_trials)
    return study


def more_trials(study: Study, n_trials: int) -> None:
    for _ in range(n_trials):
        trial = study.ask(SPACE)
        study.tell(trial, value_of(trial))


@pytest.mark.parametrize("name", SAMPLERS)
def test_pinned_values_are_the_trials_and_the_rest_varies(name: str) -> None:
    base = SAMPLERS[name]()
    study = run(base, 3 * FEW)
    study.sampler = FollowerSampler(base, pin)
    more_trials(study, 3 * FEW)
    followers = study.get_trials()[3 * FEW :]
    for trial in followers:
        assert {n: trial.params[n] for n in LEADER} == LEADER
        assert set(trial.params) == set(SPACE)
        for parameter, distribution in SPACE.items():
            value = distribution.to_internal_repr(trial.params[parameter])
            assert distribution._contains(value)
    for parameter in ("rate", "warmup"):
        assert len({t.params[parameter] for t in followers}) >= 3  # a genetic one repeats itself
    for parameter in ("width", "optimizer"):
        assert len({t.params[parameter] for t in followers}) > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_identity_pin_keeps_proposals(name: str) -> None:
    plain = run(SAMPLERS[name](), 4 * FEW)
    wrapped = run(FollowerSampler(SAMPLERS[name](), same), 4 * FEW)
    assert [t.params for t in wrapped.get_trials()] == [t.params for t in plain.get_trials()]


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_base_sampler_sees_the_whole_space(name: str) -> None:
    base = SAMPLERS[name]()
    study = run(base, 2 * FEW)
    study.sampler = FollowerSampler(base, pin)
    more_trials(study, 2 * FEW)
    study.sampler = base
    frozen = study.get_trials()[-1]
    assert set(base.infer_relative_search_space(study, frozen)) == set(SPACE)
    wrapped = FollowerSampler(base, pin)
    assert wrapped.infer_relative_search_space(study, frozen) == SPACE
    more_trials(study, 2 * FEW)  # and it goes on without the pin
    assert len({t.params["depth"] for t in study.get_trials()[-2 * FEW :]}) > 1


def test_pin_is_called_once_per_parameter() -> None:
    seen: list[tuple[str, Any]] = []

    def note(name: str, proposed: Any) -> Any:
        seen.append((name, proposed))
        return proposed

    for name in ("random", "tpe"):
        study = run(SAMPLERS[name](), 2 * FEW)
        study.sampler = FollowerSampler(study.sampler, note)
        seen.clear()
        trial = study.ask(SPACE)
        assert sorted(n for n, _ in seen) == sorted(SPACE)
        assert dict(seen) == trial.params


def test_enqueued_values_come_before_the_pin() -> None:
    study = optuna.create_study(sampler=FollowerSampler(RandomSampler(seed=0), pin))
    study.enqueue_trial({"depth": 7})
    assert study.ask(SPACE).params["depth"] == 7


class Spy(RandomSampler):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.told: list[Any] = []

    def reseed_rng(self) -> None:
        self.told.append("reseed")

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.told.append(("before", trial.number))

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        self.told.append(("after", trial.number, state, values))


def test_base_sampler_gets_all_callbacks() -> None:
    spy = Spy()
    sampler = FollowerSampler(spy, pin)
    study = optuna.create_study(sampler=sampler)
    study.tell(study.ask(SPACE), 1.5)
    study.tell(study.ask(SPACE), state=TrialState.FAIL)
    sampler.reseed_rng()
    assert spy.told == [
        ("before", 0),
        ("after", 0, TrialState.COMPLETE, [1.5]),
        ("before", 1),
        ("after", 1, TrialState.FAIL, None),
        "reseed",
    ]


class TestOptunasOwnSuite(BasicSamplerTestCase):
    """What Optuna asks of every sampler."""

    @pytest.fixture(params=["random", "tpe", "nsga2"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: FollowerSampler(SAMPLERS[request.param](), same)
