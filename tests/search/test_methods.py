from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler
import pytest

from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.search.bounded_tpe import BoundedTPESampler
from optuna_nnhp.search.evolution import EvolutionSampler
from optuna_nnhp.search.methods import METHODS
from optuna_nnhp.search.methods import make_sampler
from optuna_nnhp.search.methods import split_options
from optuna_nnhp.search.zoom import ZoomSampler

SPACE, _ = resolve_space("binary")
FEW = 12  # trials; ten of them come before the models


def proposals(method: str, seed: int, space: dict[str, BaseDistribution]) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=make_sampler(method, seed))
    for number in range(FEW):
        trial = study.ask(space)
        study.tell(trial, float((7 * number) % 5))
    return [t.params for t in study.get_trials()]


@pytest.mark.parametrize(
    "method, kind",
    [
        ("bayes", BoundedTPESampler),
        ("bayes-gp", GPSampler),
        ("evolution", EvolutionSampler),
        ("zoom", ZoomSampler),
        ("random", RandomSampler),
        ("quasi-random", QMCSampler),
    ],
)
def test_each_method_has_its_sampler(method: str, kind: type) -> None:
    assert type(make_sampler(method, seed=0)) is kind


@pytest.mark.parametrize("method", list(METHODS))
def test_proposals_lie_in_the_space_and_depend_on_the_seed(method: str) -> None:
    names = ["learning_rate", "width", "activation", "hidden_layers", "warmup"]
    space = {name: SPACE[name] for name in names}
    found = proposals(method, 0, space)
    for params in found:
        assert set(params) == set(space)
        for name, value in params.items():
            assert space[name]._contains(space[name].to_internal_repr(value))
    for name in names:
        assert len({params[name] for params in found}) > 2
    assert proposals(method, 0, space) == found
    assert proposals(method, 1, space) != found


@pytest.mark.parametrize("method", ["bayes", "random", "quasi-random"])
def test_the_whole_catalogue_is_a_space_for_it(method: str) -> None:
    for params in proposals(method, 3, SPACE):
        assert set(params) == set(SPACE)


def test_bayes_learns_from_the_first_of_few_trials() -> None:
    space = {name: SPACE[name] for name in ("learning_rate", "width", "dropout")}

    def near(few: bool) -> int:
        """How many of the second trials have a rate within a factor of three of the first."""
        count = 0
        for seed in range(20):
            study = optuna.create_study(sampler=make_sampler("bayes", seed, few=few))
            study.enqueue_trial({"learning_rate": 2e-3, "width": 64, "dropout": 0.1})
            for _ in range(2):
                study.tell(study.ask(space), 1.0)
            count += 1 / 3 < study.trials[1].params["learning_rate"] / 2e-3 < 3
        return count

    assert near(few=True) > near(few=False)


@pytest.mark.parametrize("method", list(METHODS))
def test_without_a_seed_runs_differ(method: str) -> None:
    def first() -> Any:
        study = optuna.create_study(sampler=make_sampler(method, None))
        for _ in range(2):  # the first point of a sequence may be fixed
            study.tell(study.ask({"x": SPACE["learning_rate"]}), 0.0)
        return study.get_trials()[-1].params

    assert first() != first()


@pytest.mark.parametrize(
    "method, message",
    [
        ("bayse", "^'bayse' is not a method; did you mean 'bayes'.*Known: grid, .*population"),
        ("hyperband", "^'hyperband' is not a method.* Known: grid, random, "),
        ("", "^'' is not a method"),
        ("Random", "^'Random' is not a method; did you mean 'random'"),
    ],
)
def test_unknown_methods_are_rejected(method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(method, seed=0)


@pytest.mark.parametrize(
    "method, option, message",
    [
        ("bayes", "size", "^'size' is not an option of the method 'bayes'"),
        ("population", "sise", "did you mean 'size'"),
        ("random", "seed", "^'seed' is not an option of the method 'random'"),
    ],
)
def test_unknown_options_are_rejected(method: str, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_options(method, {option: 1})
