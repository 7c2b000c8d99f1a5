"""TPE over a bounded history: Optuna's results while it is short, its time when it is long."""

from __future__ import annotations

from collections.abc import Callable
import copy
import math
import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimatorParameters
from optuna.samplers._tpe.sampler import _split_trials
from optuna.samplers._tpe.sampler import default_gamma
from optuna.samplers._tpe.sampler import default_weights
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import MultiObjectiveSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.search.bounded_tpe import BoundedTPESampler
from optuna_nnhp.search.parzen import VectorizedParzenEstimator

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "width": IntDistribution(16, 1024, log=True),
    "layers": IntDistribution(1, 8),
    "even": IntDistribution(2, 20, step=2),
    "dropout": FloatDistribution(0.0, 0.9),
    "tenth": FloatDistribution(0.0, 1.0, step=0.1),
    "loss": CategoricalDistribution(("mse", "mae", "huber")),
}
PARAMETERS = _ParzenEstimatorParameters(1.0, True, False, default_weights, True)


class TestBasic(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's own tests of a sampler."""

    @pytest.fixture(params=[0, 10])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: BoundedTPESampler(n_startup_trials=request.param, seed=0)


class TestRelative(RelativeSamplerTestCase):
    """Optuna's own tests of a sampler's joint proposals."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: BoundedTPESampler(n_startup_trials=0, seed=0)


def score(values: dict[str, float]) -> float:
    return abs(math.log10(values["rate"]) + 3) + values["layers"] / 8 + values["dropout"]


def random_trials(n: int, seed: int = 0) -> list[FrozenTrial]:
    """Finished trials, of all the kinds that there are."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    rng = np.random.default_rng(seed)
    for _ in range(n):
        trial = study.ask(SPACE)
        kind = rng.integers(10)
        if kind < 5:
            study.tell(trial, score(trial.params))
        elif kind == 5:
            study.tell(trial, state=TrialState.FAIL)
        else:
            for step in range(int(rng.integers(4))):
                trial.report(float("nan") if kind == 6 else float(rng.random()), step)
            if kind == 7:
                trial.set_constraint("memory", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
    return study.trials


def proposals(sampler: BaseSampler, direction: str, n: int = 30) -> list[dict[str, Any]]:
    """What a sampler asks for in rounds of three at once, after other trials."""
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials(random_trials(40))
    last_asked = []
    for _ in range(n // 3):
        trials = [study.ask(SPACE) for _ in range(3)]
        last_asked += [trial.params for trial in trials]
        for trial in trials:
            study.tell(trial, score(trial.params))
    return last_asked


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_short_studies_get_the_proposals_of_optuna(direction: str) -> None:
    ours = proposals(BoundedTPESampler(seed=3), direction)
    for own, theirs in zip(ours, proposals(TPESampler(seed=3), direction), strict=True):
        assert own.pop("loss") == theirs.pop("loss")
        assert own == pytest.approx(theirs, rel=1e-6)


def test_long_studies_get_other_proposals() -> None:
    def last_asked(max_trials: int) -> list[dict[str, float]]:
        study = optuna.create_study(sampler=BoundedTPESampler(seed=3, max_trials=max_trials))
        study.add_trials(random_trials(160))
        return [study.ask(SPACE).params for _ in range(20)]

    assert last_asked(1000) == last_asked(2000)
    assert last_asked(100) != last_asked(1000)
    assert last_asked(100) == last_asked(100)


@pytest.mark.parametrize("kernels", [0, 1, 2, 40])
@pytest.mark.parametrize("names", [["loss"], ["dropout"], ["width"], list(SPACE)])
def test_densities_equal_those_of_optuna(kernels: int, names: list[str]) -> None:
    space = {name: SPACE[name] for name in names}
    trials = [t for t in random_trials(60) if t.params][:kernels]
    observations = {
        name: np.array([d.to_internal_repr(t.params[name]) for t in trials], dtype=float)
        for name, d in space.items()
    }
    ours = VectorizedParzenEstimator(observations, space, PARAMETERS)
    theirs = _ParzenEstimator(observations, space, PARAMETERS)
    drawn = ours.sample(np.random.RandomState(0), 50)
    expected = theirs.sample(np.random.RandomState(0), 50)
    for name in names:
        np.testing.assert_allclose(drawn[name], expected[name], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.log_pdf(expected), theirs.log_pdf(expected), rtol=1e-9)


def test_densities_far_from_observations_equal_those_of_optuna() -> None:
    space = {"x": FloatDistribution(100.0, 101.0), "n": IntDistribution(90, 99)}
    observations = {"x": np.linspace(0, 1, 20), "n": np.arange(20.0)}
    ours = VectorizedParzenEstimator(observations, space, PARAMETERS)
    theirs = _ParzenEstimator(observations, space, PARAMETERS)
    drawn = ours.sample(np.random.RandomState(0), 50)
    expected = theirs.sample(np.random.RandomState(0), 50)
    for name in space:
        np.testing.assert_allclose(drawn[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(ours.log_pdf(expected), theirs.log_pdf(expected), rtol=1e-9)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[FrozenTrial]]:
    """The good and the other trials of every fit, in turn."""
    fits: list[list[FrozenTrial]] = []
    original = TPESampler._build_parzen_estimator

    def noted(self: TPESampler, study, space, trials, handle_below):  # type: ignore[no-untyped-def]
        fits.append(trials)
        return original(self, study, space, trials, handle_below)

    monkeypatch.setattr(TPESampler, "_build_parzen_estimator", noted)
    return fits


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_good_trials_equal_those_of_optuna(seen: list[list[FrozenTrial]], direction: str) -> None:
    study = optuna.create_study(sampler=BoundedTPESampler(seed=0), direction=direction)
    trials = [t for t in random_trials(80) if t.state != TrialState.FAIL]
    study.add_trials(trials)
    study.ask(SPACE)
    good, others = _split_trials(study, study.get_trials(), default_gamma(len(trials)))
    assert seen[0] == good
    own = [t for t in others if t.state.is_finished()]
    assert seen[1] == own


def test_long_histories_are_thinned_evenly(seen: list[list[FrozenTrial]]) -> None:
    study = optuna.create_study(sampler=BoundedTPESampler(seed=0, max_trials=100))
    for number in range(400):
        values = {"dropout": number / 1000}
        space = {"dropout": SPACE["dropout"]}
        study.add_trial(
            create_trial(value=abs(number - 200.0), params=values, distributions=space)
        )
    running = [study.ask(SPACE) for _ in range(3)]
    good, others = seen[-2:] if len(seen[-1]) > 25 else (seen[0], seen[-1])
    assert {t.number for t in good} == set(range(188, 213))
    n_finished = [t.number for t in others if t.state.is_finished()]
    assert [t.number for t in others if not t.state.is_finished()] == [
        t.number for t in running[:2]
    ]
    assert len(n_finished) + len(good) <= 100
    assert len(n_finished) >= 65
    assert np.diff([n for n in n_finished if n < 188]).max() <= 6
    assert np.diff([n for n in n_finished if n > 212]).max() <= 6


def test_each_study_has_its_own_history() -> None:
    sampler = BoundedTPESampler(seed=0)
    first = optuna.create_study(sampler=sampler)
    first.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=15)
    second = optuna.create_study(sampler=sampler)
    second.optimize(lambda trial: -trial.suggest_float("x", 0, 1), n_trials=40)
    assert second.best_value < -0.9


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_propose_the_same(again: Callable[[optuna.Study], optuna.Study]) -> None:
    study = optuna.create_study(sampler=BoundedTPESampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=15)
    other = again(study)
    space = {"x": FloatDistribution(0, 1)}
    assert other.ask(space).params == study.ask(space).params


def test_reseeding_changes_proposals() -> None:
    def last_asked(reseed: bool) -> float:
        study = optuna.create_study(sampler=BoundedTPESampler(seed=0))
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=15)
        if reseed:
            study.sampler.reseed_rng()
        return study.ask().suggest_float("x", 0, 1)

    assert last_asked(False) == last_asked(False)
    assert last_asked(False) != last_asked(True)


def test_hyperband_studies_use_optunas_method() -> None:
    study = optuna.create_study(
        sampler=BoundedTPESampler(seed=0), pruner=optuna.pruners.HyperbandPruner(max_resource=9)
    )
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=60)
    assert study.best_value < 0.05


def test_too_small_max_trials_is_rejected() -> None:
    with pytest.raises(ValueError, match="`max_trials` must be at least 100, but got 99"):
        BoundedTPESampler(max_trials=99)
