"""A user's network is tuned like the networks of the package."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch import nn

import optuna_nnhp
from optuna_nnhp import Result
from optuna_nnhp import load
from optuna_nnhp import optimize
from optuna_nnhp.networks.vmap_stack import SingleNetworkStack
from optuna_nnhp.networks.vmap_stack import VmapStack
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates.custom_network import STRUCTURAL_PARAMS
from optuna_nnhp.templates.supervised import MAX_COHORT_SIZE
from tests.tiny import Array
from tests.tiny import causes
from tests.tiny import classes
from tests.tiny import learning_curves

Params = Mapping[str, Any]
TINY = {"epochs": 3, "batch_size": 32}
CHANNELS = {"channels": IntDistribution(2, 8, log=True)}


def images(rows: int = 80) -> tuple[Array, Array]:
    """Return pictures whose class is their brighter half."""
    X = np.random.default_rng(0).normal(size=(rows, 1, 4, 4))
    return X, np.where(X[:, 0, :2].sum((1, 2)) > X[:, 0, 2:].sum((1, 2)), "top", "bottom")


def convolutional(params: Params) -> nn.Module:
    channels = params["channels"]
    layers = [nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    drop = nn.Dropout(params["dropout"])
    return nn.Sequential(*layers, drop, nn.Flatten(), nn.Linear(16 * channels, 2))


def tokens(rows: int = 80) -> tuple[Array, Array]:
    """Return token ids, and numbers that depend on how often a token occurs."""
    X = np.random.default_rng(0).integers(0, 5, size=(rows, 6))
    return X, 100.5 + 10.0 * (X == 3).sum(1)


class TokenModel(nn.Module):
    """A network with tied weights and an output of one dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.read = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
        self.read.weight = self.tokens.weight
        self.out = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.read(self.tokens(x).mean(1)))[:, 0]  # type: ignore[no-any-return]


def token_model(params: Params) -> nn.Module:
    return TokenModel(int(params["units"]))


def perceptron(params: Params) -> nn.Module:
    units = params["width"]
    return nn.Sequential(nn.Linear(3, units), nn.Tanh(), nn.Linear(units, 2))


def recurrent(params: Params) -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(5, 4)
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.drop, self.out = nn.Dropout(params["rate"]), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.drop(self.lstm(self.tokens(x))[0][:, -1]))  # type: ignore[no-any-return]

    return Recurrent()


def make_problem(network: Any = convolutional, **options: Any) -> CustomNetworkTemplate:
    X, y = images()
    usual = {"space": CHANNELS, "fixed": TINY, "device": "cpu"}
    return CustomNetworkTemplate(network, X, y, **(usual | options))


def tune(network: Any, X: Any, y: Any = None, **options: Any) -> Result:
    usual = {
        "n_trials": 4,
        "storage": None,
        "fixed": TINY,
        "pruner": optuna.pruners.NopPruner(),
        "device": "cpu",
    }
    return optimize(network=network, X=X, y=y, **(usual | options))


CASES: list[Any] = [
    pytest.param(convolutional, *images(), CHANNELS, id="images"),
    pytest.param(token_model, *tokens(), {"units": IntDistribution(2, 4)}, id="tokens"),
    pytest.param(recurrent, *tokens(), {"rate": FloatDistribution(0.0, 0.5)}, id="recurrent"),
    pytest.param(perceptron, pd.DataFrame(classes()[0]), classes()[1], {}, id="frame"),
]


@pytest.mark.parametrize(("network", "X", "y", "space"), CASES)
def test_a_custom_network_is_tuned(
    network: Any, X: Any, y: Array, space: Any, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    state = torch.random.get_rng_state()
    result = tune(network, X, y, space=space, storage="a.journal")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert causes(result) == ["finished"] * 4
    assert space.keys() <= result.best_params.keys()
    assert result.predict(X).shape == y.shape
    # What is kept is the network of the best epoch, and a saved one is the same.
    loaded = load(result.save(folder / "model"), network=network)
    assert np.array_equal(loaded.predict(X), result.predict(X))
    assert loaded.score(X, y) == result.score(X, y)
    with pytest.raises(ValueError, match=rf"`load\(folder, network={network.__qualname__}\)`"):
        load(folder / "model")
    # The same call continues the study, and finds the weights; elsewhere it trains again.
    again = tune(network, X, y, space=space, storage="a.journal")
    assert len(again.study.trials) == 4
    assert np.array_equal(again.predict(X), result.predict(X))
    for file in Path("a.models").rglob("*.safetensors"):
        file.unlink()
    again = tune(network, X, y, space=space, storage="a.journal")
    np.testing.assert_allclose(again.score(X, y), result.score(X, y), rtol=1e-4)
    alone = [line for line in log.messages if "trains alone" in line]
    assert len(set(alone)) == (network is recurrent)


@pytest.mark.parametrize(("network", "X", "y", "space"), CASES)
def test_the_same_seed_gives_the_same_study(network: Any, X: Any, y: Array, space: Any) -> None:
    one, two = (tune(network, X, y, space=space, n_trials=3) for _ in range(2))
    assert learning_curves(one) == learning_curves(two)


@pytest.mark.parametrize("validation", [0.25, "pair"])
def test_best_params_give_best_value(validation: Any) -> None:
    X, y = images(120)
    if validation == "pair":
        validation, X, y = (torch.tensor(X[80:]), y[80:]), X[:80], y[:80]
    result = tune(convolutional, X, y, space=CHANNELS, validation=validation, metric="log_loss")
    if isinstance(validation, tuple):
        assert result.score(*validation) == pytest.approx(result.best_value, abs=1e-6)
    assert result.predict_proba(X).shape == (len(X), 2)
    assert isinstance(result.model, nn.Sequential) and not result.model.training


def test_custom_networks_work_in_plain_optuna() -> None:
    objective = optuna_nnhp.Objective(
        network=convolutional, X=images()[0], y=images()[1], space=CHANNELS, fixed=TINY
    )
    study = optuna.create_study(direction=objective.direction)
    study.enqueue_trial(objective.defaults)
    study.optimize(objective, n_trials=2)
    assert study.trials[0].params["channels"] == 4
    assert objective.result(study).predict(images()[0]).shape == (80,)


def test_a_csv_file_is_accepted(folder: Path) -> None:
    X, y = classes()
    pd.DataFrame(X, columns=["a", "b", "c"]).assign(label=y).to_csv("a.csv", index=False)
    result = tune(perceptron, "a.csv", target="label", n_trials=1)
    assert set(result.predict(pd.read_csv("a.csv"))) <= {"up", "down"}


def test_predictions_have_the_targets_unit() -> None:
    X, y = tokens()
    result = tune(token_model, X, y, fixed={"epochs": 60, "batch_size": 16, "units": 8})
    assert np.sqrt(np.mean((result.predict(X) - y) ** 2)) < 0.5 * y.std()
    assert result.score(X, y) == pytest.approx(np.sqrt(np.mean((result.predict(X) - y) ** 2)))


def test_catalogue_parameters_that_the_function_reads_are_tuned() -> None:
    own = make_problem()
    assert next(iter(own.space)) == "channels" and {"optimizer", "l1"} <= own.space.keys()
    assert [n for n in STRUCTURAL_PARAMS if n in {*own.space, *own.fixed}] == ["dropout"]
    assert own.fixed["epochs"] == 3
    assert own.defaults()["channels"] == 4 and own.defaults()["learning_rate"] == 2e-3
    narrow = make_problem(space=CHANNELS | {"learning_rate": FloatDistribution(0.1, 0.2)})
    assert narrow.defaults()["learning_rate"] == 0.1
    assert "width" not in own.fixed and own.member(0, own.defaults()).params["width"] == 256


def test_all_parameters_reach_the_function() -> None:
    seen: dict[str, Any] = {}

    def network(params: Params) -> nn.Module:
        seen.update({n: params[n] for n in ("learning_rate", "width", "epochs", "channels")})
        seen["other"] = params.get("other", 5)
        return convolutional(params)

    own = make_problem(network, fixed=TINY | {"channels": 3, "width": 9}, space={})
    own.network(own.member(0, own.defaults() | {"learning_rate": 0.5}))
    assert seen == {"learning_rate": 0.5, "width": 9, "epochs": 3, "channels": 3, "other": 5}


def test_conditionally_read_parameters_are_found() -> None:
    def network(params: Params) -> nn.Module:
        if params["kind"] == "narrow":
            return convolutional({"channels": 2, "dropout": 0.0})
        return convolutional(params)

    space = CHANNELS | {"kind": CategoricalDistribution(["narrow", "wide"])}
    own = make_problem(network, space=space)
    assert {"kind", "channels", "dropout"} <= own.space.keys()


@pytest.mark.parametrize(
    ("options", "is_equal"),
    [
        ({"metric": "f1"}, False),
        ({"space": {"channels": IntDistribution(2, 9)}}, False),
        ({"fixed": {"epochs": 4}}, False),
        ({"network": lambda params: convolutional(params)}, False),
        ({"seed": 1}, False),
        ({}, True),
    ],
)
def test_study_names_depend_on_the_function(options: dict[str, Any], is_equal: bool) -> None:
    other = make_problem(**options)
    assert (other.name == make_problem().name) is is_equal
    assert other.name.startswith("own-")
    expected = "lambda" if "network" in options else "convolutional"
    assert expected in other.description["network"]


@pytest.mark.parametrize(
    ("changed", "is_equal"),
    [
        ({"learning_rate": 0.1, "optimizer": "sgd", "dropout": 0.3}, True),
        ({"channels": 5}, False),
        ({"batch_size": 128}, False),
    ],
)
def test_networks_of_one_structure_share_a_signature(
    changed: dict[str, Any], is_equal: bool
) -> None:
    own = make_problem(fixed={"epochs": 3})
    usual = own.defaults() | {"batch_size": 64}
    one, two = own.member(0, usual), own.member(1, usual | changed)
    assert (own.signature(one) == own.signature(two)) is is_equal
    assert isinstance(own.cohort([one]).network, VmapStack)


def test_a_pinned_proposal_can_join_its_leader() -> None:
    def network(params: Params) -> nn.Module:
        if params["channels"] == 7:
            raise ValueError("seven")
        layers = [nn.Conv2d(1, params["channels"], 3), nn.LeakyReLU(params["slope"])]
        if params["dropout"]:
            layers.append(nn.Dropout(params["dropout"]))
        layers += [nn.Flatten(), nn.Linear(4 * params["channels"], 2)]
        return nn.Sequential(*layers)

    space = {
        "channels": CategoricalDistribution([4, 5, 7]),
        "slope": FloatDistribution(0.0, 0.5),
        "batch_size": CategoricalDistribution([16, 32]),
    }
    with pytest.raises(TrialError, match="ValueError: seven"):
        own = make_problem(network, space=space, fixed={"epochs": 2})
        own.signature(own.member(0, own.defaults() | {"channels": 7}))
    leader = own.member(0, own.defaults() | {"channels": 4, "slope": 0.25, "batch_size": 16})
    pin = own.pin_to_leader(leader)
    assert [pin("channels", c) for c in (4, 5, 7)] == [4, 4, 4]
    assert (pin("slope", 0.1), pin("batch_size", 32)) == (0.25, 16)
    assert (pin("learning_rate", 0.3), pin("dropout", 0.2)) == (0.3, 0.2)
    # Off is no layer at all; as a proposal it is a value of the range.
    assert pin("dropout", 0.01) == 0.1
    off = own.pin_to_leader(own.member(0, own.defaults() | {"dropout": 0.01}))
    assert [off("dropout", rate) for rate in (0.5, 0.02)] == [0.005, 0.02]


def test_networks_that_cannot_be_stacked_train_alone() -> None:
    X, y = tokens()
    own = CustomNetworkTemplate(recurrent, X, y, space={"rate": FloatDistribution(0.0, 0.5)})
    one, two = (own.member(i, own.defaults()) for i in range(2))
    assert own.signature(one) != own.signature(two)
    assert own.cohort_size(one) == 1
    assert isinstance(own.cohort([one]).network, SingleNetworkStack)


def test_cohorts_fit_in_their_share_of_memory() -> None:
    sizes = []
    for channels in (2, 2**16):
        own = make_problem(fixed={"channels": channels}, space={})
        sizes.append(own.cohort_size(own.member(0, own.defaults())))
    assert 1 <= sizes[1] < sizes[0] == MAX_COHORT_SIZE


def test_first_weights_depend_on_seed_and_number() -> None:
    def first(seed: int, number: int) -> Tensor:
        own = make_problem(seed=seed)
        network = own.network(own.member(number, own.defaults()))
        return next(network.parameters()).detach()

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_networks_with_lazy_layers_are_tuned() -> None:
    def network(params: Params) -> nn.Module:
        layers = [nn.LazyConv2d(params["channels"], 3), nn.Flatten(), nn.LazyLinear(2)]
        return nn.Sequential(*layers)

    result = tune(network, *images(), space=CHANNELS, n_trials=2)
    assert causes(result) == ["finished"] * 2


def network_without(name: str) -> Callable[[Params], nn.Module]:
    def network(params: Params) -> nn.Module:
        params[name]
        return convolutional(params)

    return network


def network_of(*layers: nn.Module) -> Callable[[Params], nn.Module]:
    return lambda params: nn.Sequential(*layers)


def failing_network(params: Params) -> nn.Module:
    raise ZeroDivisionError("not today")


X, Y = images()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"network": nn.Linear(2, 2)}, ValueError, "a function that makes a module, but got Lin"),
        ({"network": 3}, ValueError, "a function that makes a module, but got int"),
        ({"network": lambda params: 3}, ValueError, "must return a torch.nn.Module, but returned"),
        ({"network": failing_network}, ZeroDivisionError, "not today"),
        (
            {"network": network_without("chanels")},
            ValueError,
            "'chanels' is not.*did you mean 'channels'",
        ),
        (
            {"network": network_of(nn.Flatten(), nn.Linear(16, 3)), "space": {}},
            ValueError,
            r"`network` must give \(batch, 2\) logits, but gave \(batch, 3\)",
        ),
        (
            {"network": network_of(nn.Linear(9, 2)), "space": {}},
            ValueError,
            r"`network` must take X of shape \(batch, 1, 4, 4\), torch.float32, but: mat1 and",
        ),
        (
            {"network": network_of(nn.Conv2d(1, 2, 4)), "y": np.arange(80) / 3, "space": {}},
            ValueError,
            r"`network` must give \(batch, 1\) numbers, but gave \(batch, 2, 1, 1\)",
        ),
        (
            {"space": {"chanels": IntDistribution(1, 2)}},
            ValueError,
            "'channels' is not.*'chanels'",
        ),
        (
            {"space": CHANNELS | {"more": IntDistribution(1, 2)}},
            ValueError,
            "'more' is not a parameter that `network` reads",
        ),
        ({"fixed": {"width": 20}}, ValueError, "'width' is not a parameter that `network` reads"),
        ({"fixed": {"more": [3]}}, ValueError, "`fixed.*must be a number, a text"),
        ({"fixed": {"channels": 3}}, ValueError, "must be in `space` or in `fixed`"),
        ({"space": {"channels": (1, 2)}}, ValueError, "must be an Optuna distribution"),
        ({"space": CHANNELS | {"l1": IntDistribution(-2, 2)}}, ValueError, "`l1` must be"),
        ({"X": X.tolist()}, ValueError, "must be an array, a tensor, a frame or a CSV file"),
        ({"X": X.astype(str)}, ValueError, "must be an array of numbers"),
        ({"X": X[:0], "y": Y[:0]}, ValueError, "at least one example"),
        ({"X": np.where(X > 2, np.nan, X)}, ValueError, "must be finite"),
        ({"X": X[:9]}, ValueError, "must have the same number of rows"),
        ({"validation": (X[:, :, 1:], Y)}, ValueError, r"X_val must have shape \(examples, 1, 4"),
        ({"template": "gpt"}, ValueError, "`template` must not be given with `network`"),
        ({"template": X}, ValueError, "`template` must not be given with `network`"),
    ],
)
def test_invalid_arguments_are_rejected_before_training(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    usual = {"network": convolutional, "X": X, "y": Y, "space": CHANNELS, "n_trials": 1}
    with pytest.raises(error, match=message) as found:
        optimize(storage=None, **(usual | options))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (X[:, :, :3], r"X must have shape \(examples, 1, 4, 4\), but has \(80, 1, 3, 4\)"),
        (np.full((2, 1, 4, 4), np.inf), "X must be finite"),
        (X[0, 0, 0, 0], "at least one example"),
    ],
)
def test_invalid_arrays_are_rejected_by_predict(new: Any, message: str) -> None:
    result = tune(convolutional, X, Y, space=CHANNELS, n_trials=1)
    with pytest.raises(ValueError, match=message):
        result.predict(new)


def test_integer_inputs_must_stay_integers() -> None:
    result = tune(token_model, *tokens(), fixed=TINY | {"units": 2}, n_trials=1)
    assert result.predict(torch.tensor([[0, 1, 2, 3, 4, 0]])).shape == (1,)
    with pytest.raises(ValueError, match="X must hold whole numbers, but holds float64"):
        result.predict(np.full((1, 6), 0.5))


def test_a_network_that_cannot_be_built_fails_only_its_own_trial() -> None:
    def network(params: Params) -> nn.Module:
        if params["channels"] in (5, 6, 7):
            raise ValueError(f"{params['channels']} channels")
        return convolutional(params)

    X, y = images()
    result = optimize(
        network=network,
        X=X,
        y=y,
        space=CHANNELS,
        fixed=TINY,
        n_trials=40,
        cohort_size=1,
        method="random",
        storage=None,
    )
    trials = result.study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert failed
    for trial in failed:
        channels = trial.params["channels"]
        assert channels in (5, 6, 7)
        assert trial.user_attrs["cause"] == "error"
        assert trial.user_attrs["error"] == f"ValueError: {channels} channels"
    assert all(trial.params["channels"] not in (5, 6, 7) for trial in trials if trial.value)
    assert result.best_value > 0
