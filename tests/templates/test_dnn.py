"""The template describes its problem and groups trials by network shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
import pytest
import torch

from optuna_nnhp.hyperparameters.spec import is_in_distribution
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import supervised
from optuna_nnhp.templates.supervised import MAX_COHORT_SIZE
from tests.tiny import classes
from tests.tiny import numbers

STATIC = ("hidden_layers", "normalization", "batch_size")

GIB = 2**30


def params_of(problem: DNNTemplate, **changed: Any) -> dict[str, Any]:
    return {**problem.defaults(), **changed}


def test_study_names_depend_on_data_metric_and_space() -> None:
    X, y = classes()
    names = {
        DNNTemplate(X, y).name,
        DNNTemplate(X + 1.5 * X**2, y).name,
        DNNTemplate(X, y[::-1]).name,
        DNNTemplate(X, y, metric="f1").name,
        DNNTemplate(X, y, validation=0.3).name,
        DNNTemplate(X, y, seed=1).name,
        DNNTemplate(X, y, fixed={"epochs": 3}).name,
        DNNTemplate(X, y, space={"width": IntDistribution(8, 9)}).name,
    }
    assert len(names) == 8
    assert DNNTemplate(X, y).name == DNNTemplate(X.copy(), y.tolist()).name
    assert all(name.startswith("dnn-") for name in names)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "up to 50 epochs a trial, early stopping after 16 epochs without improvement"),
        (
            {"fixed": {"epochs": 7, "patience": 2}},
            "up to 7 epochs a trial, early stopping after 2",
        ),
        ({"fixed": {"iterations": 300}}, "up to 300 iterations a trial"),
        ({"space": {"epochs": IntDistribution(1, 9)}}, "up to a tuned number of epochs: epochs"),
        ({"space": {"iterations": IntDistribution(1, 9)}}, "a tuned number of iterations: iter"),
    ],
)
def test_describe_budget_names_the_limits(settings: dict[str, Any], expected: str) -> None:
    assert expected in DNNTemplate(*classes(), **settings).description["budget"]


def test_members_have_effective_parameters() -> None:
    problem = DNNTemplate(*classes(), fixed={"epochs": 9, "dropout": 0.0})
    member = problem.member(7, params_of(problem, clip_norm=50.0))
    assert member.number == 7
    assert member.params["epochs"] == 9
    assert member.params["clip_norm"] == float("inf")  # off
    assert member.params["l1"] == 0.0
    assert member.params["learning_rate"] == 2e-3


@pytest.mark.parametrize(
    ("changed", "is_equal"),
    [
        ({"learning_rate": 0.1, "optimizer": "sgd", "activation": "tanh"}, True),
        ({"width": 200}, True),
        ({"width": 300}, False),
        ({"hidden_layers": 3}, False),
        ({"normalization": "layer"}, False),
        ({"batch_size": 128}, False),
    ],
)
def test_members_of_one_shape_share_a_signature(changed: dict[str, Any], is_equal: bool) -> None:
    problem = DNNTemplate(*classes())
    one = problem.signature(problem.member(0, params_of(problem)))
    two = problem.signature(problem.member(1, params_of(problem, **changed)))
    assert (one == two) is is_equal


@pytest.mark.parametrize("width", [16, 17, 100, 256, 700, 1024])
@pytest.mark.parametrize(
    "distribution",
    [
        None,
        IntDistribution(16, 1024, step=12),
        CategoricalDistribution((16, 17, 100, 256, 700, 1024)),
    ],
)
def test_a_pinned_proposal_can_join_its_leader(width: int, distribution: Any) -> None:
    problem = DNNTemplate(*classes(), space={"width": distribution} if distribution else None)
    leader = problem.member(0, params_of(problem, width=width, hidden_layers=5, batch_size=16))
    pin = problem.pin_to_leader(leader)
    for proposed in (16, 17, 30, 100, 257, 700, 1000, 1024):
        values = {"width": proposed, "hidden_layers": 1, "batch_size": 512, "learning_rate": 0.3}
        pinned = {name: pin(name, value) for name, value in values.items()}
        follower = problem.member(1, params_of(problem, **pinned))
        assert problem.signature(follower) == problem.signature(leader)
        assert pinned["learning_rate"] == 0.3
        known = problem.space["width"]
        in_space = known._contains(known.to_internal_repr(pinned["width"]))
        assert in_space or pinned["width"] == width


@pytest.mark.parametrize(
    ("rows", "changed", "low", "high"),
    [
        (100, {"width": 16}, MAX_COHORT_SIZE, MAX_COHORT_SIZE),
        (100, {"width": 1024, "hidden_layers": 8}, 2, 16),
        (20_000, {"width": 1024, "hidden_layers": 8}, 1, 1),
        (20_000, {"width": 16}, MAX_COHORT_SIZE, MAX_COHORT_SIZE),
    ],
)
def test_cohort_size_fits_in_memory(
    rows: int, changed: dict[str, Any], low: int, high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "free_memory", lambda device: 2 * GIB)
    problem = DNNTemplate(*numbers(rows))
    leader = problem.member(0, params_of(problem, **changed))
    assert low <= problem.cohort_size(leader) <= high
    weights = problem.count_weights(leader)
    assert problem.cohort_size(leader) * weights * 4 * 5 < GIB


@pytest.mark.parametrize("make", [classes, numbers])
@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_count_weights_equals_the_network(make: Any, normalization: str) -> None:
    problem = DNNTemplate(*make())
    changed = {"width": 20, "width_shape": "funnel", "hidden_layers": 3}
    member = problem.member(0, params_of(problem, **changed, normalization=normalization))
    network = problem.network(member)
    assert problem.count_weights(member) == sum(w.numel() for w in network.parameters())
    outputs = network(torch.zeros(5, problem.inputs))
    assert outputs.shape == (5, 2 if make is classes else 1)


def test_first_weights_depend_on_seed_and_number() -> None:
    def first(seed: int, number: int) -> torch.Tensor:
        problem = DNNTemplate(*classes(), seed=seed)
        network = problem.cohort([problem.member(number, params_of(problem))]).network
        assert isinstance(network, StackedMLP)
        return next(network.parameters()).detach().clone()

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_metrics_use_the_targets_unit() -> None:
    X, y = numbers()
    problem = DNNTemplate(X, y, fixed={"epochs": 30, "width": 32, "learning_rate": 0.03})
    member = problem.member(0, params_of(problem))
    cohort = problem.cohort([member])
    for _ in range(30):
        cohort.train_round()
    predictor = problem.predictor(cohort.best_network(0), member, {}, cohort.best_value(0))
    error = np.sqrt(np.mean((predictor.predict(X) - y) ** 2))
    assert error < 0.3 * y.std()
    assert predictor.score(X, y) == pytest.approx(error)


def test_the_portfolio_lies_in_the_space_and_differs() -> None:
    problem = DNNTemplate(*classes(), fixed={"epochs": 3})
    portfolio = problem.portfolio()
    assert len(portfolio) == 4 and problem.defaults() not in portfolio
    assert len({tuple(params.items()) for params in portfolio}) == 4
    for params in portfolio:
        assert params.keys() == problem.space.keys() and params["hidden_layers"] == 1
        assert all(
            is_in_distribution(problem.space[name], value) for name, value in params.items()
        )


def test_the_portfolio_fits_a_users_space() -> None:
    def portfolio(**settings: Any) -> list[dict[str, Any]]:
        return DNNTemplate(*classes(), **settings).portfolio()

    assert portfolio(fixed={"hidden_layers": 2}) == []
    assert portfolio(space={"activation": CategoricalDistribution(("tanh", "elu"))}) == []
    assert portfolio(space={"width": IntDistribution(8, 300)}) == portfolio()[:2]
    wide = np.random.default_rng(0).normal(size=(40, 800))
    assert DNNTemplate(wide, wide[:, 0] > 0).portfolio() == []  # no cheaper than the default
    rates = [p["dropout"] for p in portfolio(fixed={"learning_rate": 0.1})]
    assert rates == [0.1, 0.05]  # one of each shape: they differ by nothing else
