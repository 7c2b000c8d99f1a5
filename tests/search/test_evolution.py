"""CMA-ES and the genetic algorithm: who is chosen, what they learn from, and that they learn."""

from __future__ import annotations

from collections.abc import Callable
import copy
import math
from pathlib import Path
import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import CmaEsSampler
from optuna.samplers import NSGAIISampler
from optuna.samplers import RandomSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase
from optuna.testing.pytest_samplers import SingleOnlySamplerTestCase
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.search.evolution import POPULATION_SIZE
from optuna_nnhp.search.evolution import EvolutionSampler

NUMBERS: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(-5, 5) for i in range(5)}
MIXED: dict[str, BaseDistribution] = {
    **NUMBERS,
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    **{f"n{i}": IntDistribution(1, 64, log=True) for i in range(2)},
    **{f"c{i}": CategoricalDistribution(("a", "b", "c", "d")) for i in range(4)},
}
SEEDS = range(10)


class TestBasic(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    """Optuna's own tests of a sampler."""

    @pytest.fixture(params=[2, POPULATION_SIZE])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: EvolutionSampler(population_size=request.param, seed=0)


class TestRelative(RelativeSamplerTestCase):
    """Optuna's own tests of a sampler's joint proposals."""

    # They want a proposal after one trial; a genetic algorithm has no parents then.
    test_sample_relative_categorical = None  # type: ignore[assignment]
    test_sample_relative_mixed = None  # type: ignore[assignment]

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: EvolutionSampler(seed=0)


def cost(params: dict[str, Any], seed: int) -> float:
    """A bowl with its bottom somewhere inside; each category adds something."""
    bottom = np.random.default_rng(seed).uniform(-3, 3, 5)
    value = sum((params[f"x{i}"] - bottom[i]) ** 2 / 10 for i in range(5))
    if "rate" in params:
        value += (math.log10(params["rate"]) + 2) ** 2
        value += sum((math.log2(params[f"n{i}"]) - 4) ** 2 / 4 for i in range(2))
        value += sum(("abcd".index(params[f"c{i}"]) + seed + i) % 4 for i in range(4)) / 2
    return float(value)


def best_of(
    sampler: BaseSampler, space: dict[str, BaseDistribution], seed: int, *, bulk: int, rounds: int
) -> float:
    """Best cost of a study that asks for so many trials at once, and prunes most of them.

    Each trial has four steps; after the first the worse half is pruned, after the second again.
    """
    study = optuna.create_study(sampler=sampler)
    best = math.inf
    for _ in range(rounds):
        running = [study.ask(space) for _ in range(bulk)]
        costs = {trial.number: cost(trial.params, seed) for trial in running}
        for step in (1, 2, 4):
            for trial in running:
                trial.report(costs[trial.number] * (1 + 1 / step), step)
            running.sort(key=lambda trial: costs[trial.number])
            stay = max(1, len(running) // 2) if bulk > 1 and step < 4 else len(running)
            for trial in running[stay:]:
                study.tell(trial, state=TrialState.PRUNED)
            running = running[:stay]
        for trial in running:
            study.tell(trial, costs[trial.number])
            best = min(best, costs[trial.number])
    return best


@pytest.mark.parametrize("space", [NUMBERS, MIXED], ids=["numbers", "mixed"])
@pytest.mark.parametrize("bulk, rounds", [(1, 160), (64, 5)])
def test_it_beats_random_search(
    space: dict[str, BaseDistribution], bulk: int, rounds: int
) -> None:
    def bests(make: Callable[[int], BaseSampler]) -> list[float]:
        return [best_of(make(s), space, s, bulk=bulk, rounds=rounds) for s in SEEDS]

    ours = bests(lambda seed: EvolutionSampler(seed=seed))
    others = bests(lambda seed: RandomSampler(seed=seed))
    assert np.median(ours) < 0.7 * np.median(others)
    assert sum(own < other for own, other in zip(ours, others, strict=True)) >= 8


@pytest.mark.parametrize(
    "space, kind",
    [
        (NUMBERS, CmaEsSampler),
        (MIXED, NSGAIISampler),
        (NUMBERS | {"only": CategoricalDistribution(["one"])}, CmaEsSampler),
    ],
)
def test_sampler_depends_on_categories(
    monkeypatch: pytest.MonkeyPatch, space: dict[str, BaseDistribution], kind: type[BaseSampler]
) -> None:
    called: list[type[BaseSampler]] = []
    for sampler in (CmaEsSampler, NSGAIISampler):

        def noted(*args: Any, sampler: type[BaseSampler] = sampler) -> dict[str, Any]:
            called.append(sampler)
            return {}

        monkeypatch.setattr(sampler, "sample_relative", noted)
    study = optuna.create_study(sampler=EvolutionSampler(seed=0))
    study.tell(study.ask(space), 1.0)
    study.ask(space)
    assert called == [kind]
    # Another worker, or the same call again: by the study's first trial.
    again = optuna.load_study(
        study_name=study.study_name, storage=study._storage, sampler=EvolutionSampler(seed=1)
    )
    again.ask(space)
    assert called == [kind] * 2


def numbered(value: float, state: TrialState = TrialState.COMPLETE, step: int = 1) -> FrozenTrial:
    """A trial that can be told by its parameter, and a category."""
    return create_trial(
        value=value if state == TrialState.COMPLETE else None,
        state=state,
        params={"x": value, "kind": "a"},
        distributions={"x": FloatDistribution(0, 100), "kind": CategoricalDistribution("ab")},
        intermediate_values={step: value},
    )


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_parents_are_the_best_and_pruned_trials_come_last(direction: str) -> None:
    sign = 1 if direction == "minimize" else -1
    study = optuna.create_study(direction=direction)
    pruned = TrialState.PRUNED
    study.add_trials(
        [
            numbered(50 + sign * 9, pruned, step=1),
            numbered(50 + sign * 4),
            numbered(50 - sign * 9, pruned, step=2),
            numbered(50 - sign * 8, pruned, step=3),
            numbered(50 + sign * 3),
            numbered(50.0, TrialState.FAIL),
            numbered(50 + sign * 8, pruned, step=3),
        ]
    )
    sampler = EvolutionSampler(population_size=5)._nsga2_sampler
    parents = sampler.get_parent_population(study, 1)
    assert [trial.number for trial in parents] == [4, 1, 3, 6, 2]


def test_children_resemble_their_parents() -> None:
    study = optuna.create_study(sampler=EvolutionSampler(seed=0, population_size=4))
    study.add_trials([numbered(float(value)) for value in (10, 11, 12, 13, 60, 70, 80, 90)])
    space: dict[str, BaseDistribution] = dict(study.trials[0].distributions)
    children = [study.ask(space).params["x"] for _ in range(60)]
    # One of two parameters is drawn anew; the others lie between two parents or a little outside.
    assert sum(8.5 <= x <= 14.5 for x in children) >= 25


def test_trials_that_end_late_become_parents() -> None:
    study = optuna.create_study(sampler=EvolutionSampler(seed=0, population_size=2))
    space: dict[str, BaseDistribution] = dict(numbered(0.0).distributions)
    late = [study.ask(space) for _ in range(2)]
    study.add_trials([numbered(99.0), numbered(98.0), numbered(97.0)])
    study.ask(space)  # there are parents by now
    for trial in late:
        study.tell(trial, 0.5)
    sampler: Any = study.sampler
    parents = sampler._nsga2_sampler.get_parent_population(study, 1)
    assert [trial.number for trial in parents] == [trial.number for trial in late]


def test_cma_learns_from_pruned_trials() -> None:
    study = optuna.create_study(sampler=EvolutionSampler(seed=0))
    for _ in range(300):
        trial = study.ask(NUMBERS)
        trial.report(sum(x**2 for x in trial.params.values()), 1)
        study.tell(trial, state=TrialState.PRUNED)
    last = [sum(x**2 for x in trial.params.values()) for trial in study.trials[-30:]]
    assert np.median(last) < 1.0


@pytest.mark.parametrize("space", [NUMBERS, MIXED], ids=["numbers", "mixed"])
def test_proposals_depend_on_the_seed(space: dict[str, BaseDistribution]) -> None:
    def asked(seed: int, again: Callable[[optuna.Study], optuna.Study]) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=EvolutionSampler(seed=seed))
        for _ in range(40):
            trial = study.ask(space)
            study.tell(trial, cost(trial.params, 0))
        study = again(study)
        return [study.ask(space).params for _ in range(3)]

    assert asked(0, lambda s: s) == asked(0, lambda s: s)
    assert asked(0, lambda s: s) == asked(0, copy.deepcopy)
    assert asked(0, lambda s: s) == asked(0, lambda s: pickle.loads(pickle.dumps(s)))
    assert asked(0, lambda s: s) != asked(1, lambda s: s)

    def reseeded(study: optuna.Study) -> optuna.Study:
        study.sampler.reseed_rng()
        return study

    if space is MIXED:
        assert asked(0, lambda s: s) != asked(0, reseeded)


def test_the_whole_catalogue_is_a_space_for_it() -> None:
    space, _ = resolve_space("binary")
    study = optuna.create_study(sampler=EvolutionSampler(seed=0))
    for number in range(2 * POPULATION_SIZE):
        trial = study.ask(space)
        assert set(trial.params) == set(space)
        for name, value in trial.params.items():
            assert space[name]._contains(space[name].to_internal_repr(value))
        study.tell(trial, float((7 * number) % 5))


def test_too_small_populations_are_rejected() -> None:
    with pytest.raises(ValueError, match="`population_size` must be at least 2, but got 1"):
        EvolutionSampler(population_size=1)


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("owned.txt", "w")


def bowl(trial: optuna.Trial) -> float:
    return cost({n: trial.suggest_float(n, -5, 5) for n in NUMBERS}, 0)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(pickle.dumps(Evil()).hex(), id="code"),
        pytest.param(pickle.dumps(np.zeros(3)).hex(), id="no optimizer"),
        pytest.param("80", id="cut"),
        pytest.param("no", id="no bytes"),
    ],
)
def test_stored_pickles_run_no_code(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study(sampler=EvolutionSampler(seed=0))
    study.optimize(bowl, n_trials=40)
    assert any("cma:optimizer:0" in trial.system_attrs for trial in study.trials)
    other = optuna.create_study()
    other.add_trials(study.trials)
    worst = copy.deepcopy(study.trials[-1])
    worst.values, worst.number = [1e9], 40
    worst.system_attrs = {"cma:optimizer:0": state}
    other.add_trial(worst)
    other.sampler = EvolutionSampler(seed=1)
    other.optimize(bowl, n_trials=3)
    assert "an earlier state is used" in log.text
    assert not list(tmp_path.iterdir())
