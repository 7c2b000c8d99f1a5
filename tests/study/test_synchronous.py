"""Methods whose trials train in synchronous groups: populations and hypergradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
import pytest
import torch
from torch import nn
from torch.nn import functional

from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp.search.unit_scale import to_unit
from optuna_nnhp.study.policies.hypergradient import PERTURBATION
from optuna_nnhp.study.policies.hypergradient import perturbed_value
from optuna_nnhp.templates.dnn import DNNTemplate
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from tests import tiny

SLOPE_TOLERANCE = 0.05  # of a finite difference over a round, compared with autograd
FIXED_PARAMS = tiny.SHAPE | {"epochs": 8}
METHODS: dict[str, dict[str, Any]] = {
    "population": {"method_options": {"size": 4, "generations": 4}, "n_trials": 16},
    "gradient": {"method_options": {"starts": 2}, "n_trials": 4},
}


def run(method: str, **more: Any) -> Result:
    X, y = tiny.classes()
    options = {**METHODS[method], "fixed": FIXED_PARAMS, "storage": None, **more}
    return optimize("dnn", X, y, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_study_finishes_its_trials_and_has_a_model(method: str) -> None:
    result = run(method)
    trials = result.study.get_trials()
    assert len(trials) == METHODS[method]["n_trials"]
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert result.score(*tiny.classes()) > 0.7
    X, _ = tiny.classes()
    assert len(result.predict(X)) == len(X)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_study(method: str) -> None:
    first, again, other = run(method), run(method), run(method, seed=1)
    values = [[t.value for t in r.study.trials] for r in (first, again, other)]
    assert values[0] == values[1]
    params = [[t.params for t in r.study.trials] for r in (first, again, other)]
    assert params[0] == params[1] != params[2]


@pytest.mark.parametrize("method", METHODS)
def test_training_with_the_stored_schedule_gives_the_same_value(method: str) -> None:
    result = run(method)
    for trial in result.study.get_trials():
        best = result._load_predictor(
            trial.number
        )  # most have no stored weights and are trained again
        X, y = tiny.classes()
        data = DNNTemplate(X, y, fixed=FIXED_PARAMS).data
        outputs = best.model(torch.from_numpy(data.valid_X))  # type: ignore[union-attr]
        right = (outputs.argmax(1).numpy() == data.valid_y).mean()
        assert right == pytest.approx(trial.value, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_model_loads_although_dropout_was_switched_on_and_off(seed: int) -> None:
    # Dropout goes on and off within this range, and a network without it has fewer layers.
    space = {"dropout": FloatDistribution(0.035, 0.045, log=True)}
    result = run("gradient", space=space, method_options={"starts": 2, "rate": 0.5}, seed=seed)
    X, _ = tiny.classes()
    assert len(result.predict(X)) == len(X)
    dropouts = [
        stage[1]["dropout"] for t in result.study.trials for stage in t.user_attrs["schedule"]
    ]
    assert min(dropouts) < 0.04 < max(dropouts)


def test_generations_continue_their_parents() -> None:
    trials = run("population").study.get_trials()
    assert [t.user_attrs["generation"] for t in trials] == [g for g in range(4) for _ in range(4)]
    for trial in trials[4:]:
        parent = trials[trial.user_attrs["parent"]]
        assert parent.user_attrs["generation"] == trial.user_attrs["generation"] - 1
        assert trial.user_attrs["root"] == parent.user_attrs["root"]
        assert trial.user_attrs["epochs"] == parent.user_attrs["epochs"] + 2
        course, before = trial.user_attrs["schedule"], parent.user_attrs["schedule"]
        assert course[: len(before)] == before
        moved = {n: v for n, v in trial.params.items() if v != parent.params[n]}
        assert (len(course) > len(before)) == bool(moved)
        assert not moved.keys() & {"activation", "optimizer", "weight_init", "width_shape"}
    assert any(len(t.user_attrs["schedule"]) > 1 for t in trials)


def test_hypergradients_change_only_continuous_values() -> None:
    result = run("gradient")
    for trial in result.study.get_trials():
        course = trial.user_attrs["schedule"]
        assert [stage[0] for stage in course] == list(range(8))
        first, last = course[0][1], course[-1][1]
        assert first == {name: trial.params[name] for name in first}
        assert "learning_rate" in first and "optimizer" not in first
        assert any(first[name] != last[name] for name in first)


def test_hypergradients_correct_a_poor_learning_rate() -> None:
    X, y = tiny.numbers(400)
    space = {"learning_rate": FloatDistribution(1e-6, 1e-4, log=True)}
    poor: dict[str, Any] = {
        **tiny.SHAPE,
        **{"epochs": 30, "optimizer": "adamw", "loss": "mse", "learning_rate_decay": "constant"},
    }
    fixed = poor | {"warmup": 0.0, "activation": "relu", "width_shape": "constant"}
    stays = optimize("dnn", X, y, fixed=fixed, space=space, n_trials=1, storage=None)
    wide = {"learning_rate": FloatDistribution(1e-6, 1.0, log=True)}
    for start in (1e-5, 1.0):
        moved = optimize(
            "dnn",
            X,
            y,
            fixed=fixed,
            space=wide,
            n_trials=1,
            storage=None,
            method="gradient",
            method_options={"rate": 0.08},
            sampler=optuna.samplers.PartialFixedSampler(
                {"learning_rate": start}, optuna.samplers.RandomSampler(seed=0)
            ),
        )
        assert moved.best_value < 0.5 * stays.best_value


def test_the_finite_difference_over_a_round_equals_the_gradient_of_autograd() -> None:
    """Compare with autograd through the same steps of plain gradient descent."""
    X, y = tiny.numbers()
    options = {
        **FIXED_PARAMS,
        **{"optimizer": "sgd", "momentum": 0.0, "loss": "mse", "activation": "tanh"},
        **{"learning_rate_decay": "constant", "warmup": 0.0, "dropout": 0.0, "l1": 0.0},
        **{"clip_norm": float("inf"), "weight_decay": 0.0, "width_shape": "constant"},
    }
    problem = DNNTemplate(X, y, space={"learning_rate": WIDE}, fixed=options | {"batch_size": 64})
    rate = 0.02
    there = perturbed_value("learning_rate", WIDE, rate)
    distance = to_unit(WIDE, there) - to_unit(WIDE, rate)
    params = {**problem.defaults(), "learning_rate": rate}
    members = [problem.member(0, params) for _ in range(2)]
    members[1] = Member(-1, 0, {**members[1].params, "learning_rate": there})
    cohort = problem.cohort(members[:1])
    train_one_round(cohort)  # not from the beginning
    state = cohort.network.member(0).train()
    cohort.resume_from([0, 0], members)
    train_one_round(cohort)
    loss = dict(zip([m.number for m in cohort.members], losses(cohort), strict=True))
    slope = (loss[-1] - loss[0]) / distance
    oracle = slope_by_autograd(cohort, state, rate)
    assert distance == pytest.approx(PERTURBATION, rel=1e-6)
    assert slope == pytest.approx(oracle, rel=SLOPE_TOLERANCE)


WIDE = FloatDistribution(0.01, 0.1, log=True)


def train_one_round(cohort: Cohort) -> None:
    cohort.set_next_evaluation(cohort.rounds_done[0] + 1)
    assert cohort.train_round() is not None


def losses(cohort: Cohort) -> list[float]:
    with torch.no_grad():
        all_members = torch.arange(len(cohort.members))
        loss, _, _ = cohort.task.evaluate(cohort.apply(all_members), cohort.members, True)
    return [float(value) for value in loss]


def slope_by_autograd(cohort: Cohort, network: nn.Module, rate: float) -> float:
    """Differentiate one full-batch step of gradient descent by the rate on the unit scale."""
    arrays = cohort.task.arrays
    unit = torch.tensor(to_unit(WIDE, rate), requires_grad=True)
    step = WIDE.low * (WIDE.high / WIDE.low) ** unit
    weights = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
    out = torch.func.functional_call(network, weights, (arrays.train_x,))
    loss = functional.mse_loss(out.squeeze(-1), arrays.train_y)
    grads = torch.autograd.grad(loss, list(weights.values()))
    after = {n: w - step * g for (n, w), g in zip(weights.items(), grads, strict=True)}
    out = torch.func.functional_call(network, after, (arrays.valid_x,))
    functional.mse_loss(out.squeeze(-1), arrays.valid_y).backward()
    assert unit.grad is not None
    return float(unit.grad)


def convolution(params: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(params["dropout"]), nn.Linear(8, 2)
    )


def recurrent(params: Mapping[str, Any]) -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.out = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.out(self.recurrent(x.movedim(1, 2))[0][:, -1])
            return found

    return Last()


@pytest.mark.parametrize("method", METHODS)
def test_synchronous_methods_tune_a_users_network(method: str) -> None:
    X, y = tiny.classes()
    fixed = {"epochs": 4, "batch_size": 32}
    options = {**METHODS[method], "storage": None, "fixed": fixed}
    result = optimize(network=convolution, X=X[:, None], y=y, method=method, **options)
    assert len(result.study.trials) == options["n_trials"]
    dropouts = {
        stage[1]["dropout"] for t in result.study.trials for stage in t.user_attrs["schedule"]
    }
    assert len(dropouts) > 2
    assert len(result.predict(X[:, None])) == len(X)


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_cannot_be_stacked_are_rejected(method: str) -> None:
    X, y = tiny.classes()
    with pytest.raises(ValueError, match="this one can only train alone"):
        optimize(
            network=recurrent,
            X=X[:, None],
            y=y,
            method=method,
            fixed={"epochs": 2},
            n_trials=4,
            storage=None,
        )


@pytest.mark.parametrize("method", METHODS)
def test_synchronous_methods_tune_language_models(method: str) -> None:
    fixed = {"iterations": 18, "width": 16, "layers": 1, "context": 32, "batch_tokens": 64}
    text = "to be or not to be, that is the question\n" * 60
    n_trials = 4 if method == "population" else 1
    options = {"population": {"size": 2, "generations": 2}, "gradient": {"starts": 1}}[method]
    result = optimize(
        "gpt",
        text,
        method=method,
        fixed=fixed,
        n_trials=n_trials,
        storage=None,
        method_options=options,
    )
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE] * n_trials
    assert len(result.generate("to be", tokens=5)) == 10


def test_a_diverging_member_is_replaced_by_a_good_one() -> None:
    X, y = tiny.numbers()
    fixed = {n: v for n, v in tiny.DIVERGING.items() if n != "learning_rate"}
    space = {"learning_rate": CategoricalDistribution((1e-3, 100.0))}
    result = optimize(
        "dnn",
        X,
        y,
        method="population",
        fixed=fixed,
        space=space,
        n_trials=16,
        storage=None,
        method_options={"size": 8, "generations": 2},
        seed=2,
    )
    trials = result.study.get_trials()
    diverged = [t for t in trials[:8] if t.user_attrs["cause"] == "diverged"]
    assert diverged and all(t.state == TrialState.PRUNED for t in diverged)
    parents = {t.user_attrs["parent"] for t in trials[8:]}
    assert not parents & {t.number for t in diverged}
    assert np.isfinite(result.best_value)


@pytest.mark.parametrize("method", METHODS)
def test_the_timeout_ends_all_running_trials(method: str) -> None:
    fixed = FIXED_PARAMS | {"epochs": 100_000, "patience": 1_000_000}
    X, y = tiny.classes()
    result = optimize(
        "dnn",
        X,
        y,
        method=method,
        fixed=fixed,
        timeout=1.0,
        storage=None,
        method_options=METHODS[method]["method_options"],
    )
    assert result.study.get_trials()
    assert all(t.user_attrs["cause"] == "timeout" for t in result.study.get_trials())


@pytest.mark.parametrize("method", METHODS)
def test_a_study_can_be_continued(method: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    first = run(method, storage=storage)
    count = len(first.study.get_trials())
    again = run(method, storage=storage, n_trials=count + 4)
    assert len(again.study.get_trials()) == count + 4
    assert again.best_value >= first.best_value


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"method": "population", "method_options": {"size": 1}},
            "`size` must be .* 2, but got 1",
        ),
        ({"method": "population", "method_options": {"size": 2.5}}, "`size` must be a whole"),
        ({"method": "population", "method_options": {"generations": 0}}, "`generations` must be"),
        ({"method": "gradient", "method_options": {"starts": 0}}, "`starts` must be a whole"),
        (
            {"method": "gradient", "method_options": {"rate": -1}},
            "`rate` must be a number above 0",
        ),
        (
            {"method": "gradient", "space": {}, "fixed": FIXED_PARAMS | {"momentum": 0.9}},
            "must have a continuous hyperparameter to move",
        ),
        ({"method": "zoom", "sampler": optuna.samplers.RandomSampler()}, "`sampler` must stand"),
        ({"method": "random", "levels": {"momentum": [0.9]}}, "`levels` must come with"),
        ({"method": "grid", "method_options": {"partial": 1}}, "`partial` must be True or False"),
    ],
)
def test_invalid_options_are_rejected_before_training(
    options: dict[str, Any], message: str
) -> None:
    X, y = tiny.classes()
    if "continuous" in message:
        problem = DNNTemplate(X, y)
        floats = {n: d.low for n, d in problem.space.items() if isinstance(d, FloatDistribution)}
        options["fixed"] = FIXED_PARAMS | floats
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ValueError, match=message):
        optimize("dnn", X, y, **{"fixed": FIXED_PARAMS, **options}, n_trials=4, storage=storage)
    assert all(not s.get_trials() for s in load_studies(storage))


def load_studies(storage: optuna.storages.BaseStorage) -> list[optuna.Study]:
    names = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=name, storage=storage) for name in names]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given",
    [{"pruner": optuna.pruners.MedianPruner()}, {"cohort_size": 4}],
    ids=["pruner", "cohort size"],
)
def test_options_that_a_method_does_not_use_are_rejected(
    method: str, given: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(given))}` must not be given with"):
        run(method, **given)


@pytest.mark.parametrize("method", METHODS)
def test_an_enqueued_trial_leads_a_group_of_its_own(method: str) -> None:
    X, y = tiny.classes()
    storage = optuna.storages.InMemoryStorage()
    fixed = {name: value for name, value in FIXED_PARAMS.items() if name != "hidden_layers"}
    options = {**METHODS[method], "fixed": fixed, "storage": storage, "method": method}
    first = optimize("dnn", X, y, **options)
    study = optuna.load_study(study_name=first.study.study_name, storage=storage)
    count, depths = len(study.get_trials()), (3, 4)
    for depth in depths:
        study.enqueue_trial({**first.study.trials[0].params, "hidden_layers": depth})
    again = optimize("dnn", X, y, **{**options, "n_trials": count + 8})
    added = again.study.get_trials()[count:]
    assert len(added) == 8
    assert all(t.state == TrialState.COMPLETE for t in added)
    assert set(depths) <= {t.params["hidden_layers"] for t in added}


def test_hypergradients_do_not_change_dropout_that_decides_the_structure() -> None:
    def network(params: Mapping[str, Any]) -> nn.Module:
        drop = [nn.Dropout(params["dropout"])] if params["dropout"] else []
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), *drop, nn.Linear(8, 2))

    X, y = tiny.classes()
    result = optimize(
        network=network, X=X, y=y, method="gradient", n_trials=2, fixed={"epochs": 3}, storage=None
    )
    stages = [stage[1] for t in result.study.trials for stage in t.user_attrs["schedule"]]
    assert stages and all("dropout" not in stage for stage in stages)
