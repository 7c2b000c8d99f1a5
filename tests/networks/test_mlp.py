from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.networks.layers import StackedLinear
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.mlp import build_mlp
from optuna_nnhp.networks.mlp import count_weights
from optuna_nnhp.networks.mlp import hidden_widths
from optuna_nnhp.networks.mlp import mlp_signature

INPUTS, OUTPUTS = 6, 3
PLAIN: dict[str, Any] = {
    "hidden_layers": 2,
    "width": 20,
    "width_shape": "constant",
    "normalization": "none",
    "activation": "relu",
    "weight_init": "he_normal",
    "dropout": 0.0,
}
MIXED: list[dict[str, Any]] = [
    PLAIN | {"width": 17 + i, "activation": name, "width_shape": ("constant", "funnel")[i % 2]}
    for i, name in enumerate(ACTIVATIONS)
]
NORMALIZATIONS = ["none", "batch", "layer"]


def stack_of(params: Sequence[dict[str, Any]], **changes: Any) -> StackedMLP:
    generators = [rng.generator(0, rng.INITIALIZATION, i) for i in range(len(params))]
    return StackedMLP([p | changes for p in params], INPUTS, OUTPUTS, generators)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train_a_little(stack: StackedMLP, steps: int = 3) -> None:
    """So that biases, scales and running estimates are no longer at their start."""
    stack.train()
    optimizer = torch.optim.Adam(stack.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        stack(normal(16, INPUTS, seed=step)).square().sum().backward()
        optimizer.step()
    stack.eval()


# --- the plain network ---


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ["Linear", "ReLU", "Linear", "ReLU", "Linear"]),
        ({"hidden_layers": 1, "activation": "selu"}, ["Linear", "SELU", "Linear"]),
        (
            {"hidden_layers": 1, "normalization": "layer", "dropout": 0.2},
            ["Linear", "LayerNorm", "ReLU", "Dropout", "Linear"],
        ),
        (
            {"hidden_layers": 1, "normalization": "batch", "dropout": 0.2},
            ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"],
        ),
    ],
)
def test_modules(changes: dict[str, Any], expected: list[str]) -> None:
    network = build_mlp(PLAIN | changes, INPUTS, OUTPUTS)
    assert [type(module).__name__ for module in network] == expected
    assert [m.p for m in network if isinstance(m, nn.Dropout)] == [0.2] * ("Dropout" in expected)
    # A bias before batch normalization would change nothing.
    biases = [m.bias is not None for m in network if isinstance(m, nn.Linear)]
    assert biases[:-1] == [changes.get("normalization") != "batch"] * (len(biases) - 1)
    assert biases[-1]


@pytest.mark.parametrize("hidden_layers", [1, 2, 8])
@pytest.mark.parametrize("width_shape", ["constant", "funnel"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("width, inputs, outputs", [(20, 6, 3), (1, 1, 1), (300, 10, 1)])
def test_count_weights_is_what_build_mlp_makes(
    hidden_layers: int, width_shape: str, normalization: str, width: int, inputs: int, outputs: int
) -> None:
    params = PLAIN | {
        "hidden_layers": hidden_layers,
        "width_shape": width_shape,
        "normalization": normalization,
        "width": width,
    }
    network = build_mlp(params, inputs, outputs)
    counted = sum(p.numel() for p in network.parameters())
    assert count_weights(params, inputs, outputs) == counted
    assert [m.out_features for m in network if isinstance(m, nn.Linear)] == [
        *hidden_widths(params),
        outputs,
    ]


# --- signatures ---


@pytest.mark.parametrize(
    "changes, together",
    [
        ({"width": 32}, True),
        ({"width": 17}, True),
        ({"width": 16}, False),
        ({"width": 33}, False),
        ({"hidden_layers": 3}, False),
        ({"normalization": "layer"}, False),
        ({"normalization": "batch"}, False),
        ({"width_shape": "funnel"}, True),
        ({"activation": "mish"}, True),
        ({"weight_init": "orthogonal"}, True),
        ({"dropout": 0.5}, True),
    ],
)
def test_who_can_be_stacked(changes: dict[str, Any], together: bool) -> None:
    other = PLAIN | changes
    assert (mlp_signature(other) == mlp_signature(PLAIN)) is together
    if together:
        assert stack_of([PLAIN, other])(normal(4, INPUTS)).shape == (2, 4, OUTPUTS)
    else:
        with pytest.raises(ValueError, match=r"^Stacked networks must share a signature"):
            stack_of([PLAIN, other])


# --- the stacked network ---


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_shapes(normalization: str) -> None:
    stack = stack_of(MIXED, normalization=normalization)
    k = len(MIXED)
    assert stack(normal(7, INPUTS)).shape == (k, 7, OUTPUTS)
    assert stack(normal(k, 7, INPUTS)).shape == (k, 7, OUTPUTS)
    assert {tensor.shape[0] for tensor in stack.state_dict().values()} == {k}


def test_members_may_see_different_examples() -> None:
    stack = stack_of(MIXED)
    x = normal(len(MIXED), 7, INPUTS)
    for i in range(len(MIXED)):
        torch.testing.assert_close(stack(x)[i], stack(x[i])[i])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_first_weights_depend_on_the_members_own_source_alone(normalization: str) -> None:
    stack = stack_of(MIXED, normalization=normalization)
    for i in range(len(MIXED)):
        source = rng.generator(0, rng.INITIALIZATION, i)
        alone = StackedMLP(
            [MIXED[i] | {"normalization": normalization}], INPUTS, OUTPUTS, [source]
        )
        for name, tensor in alone.state_dict().items():
            assert torch.equal(tensor[0], stack.state_dict()[name][i])


def test_first_weights_have_the_spread_of_their_scheme() -> None:
    wide = PLAIN | {"width": 400, "hidden_layers": 2, "activation": "tanh"}
    stack = StackedMLP([wide], 300, 200, [rng.generator(0, 1)])
    matrices = [
        tensor
        for name, tensor in stack.state_dict().items()
        if "linears" in name and "weight" in name
    ]
    deviations = [float(matrix[0, :, :400].std()) for matrix in matrices]
    # He: gain / sqrt(fan-in); the output layer has no activation and so no gain.
    expected = [5 / 3 / 300**0.5, 5 / 3 / 400**0.5, 1 / 400**0.5]
    # The padded rows of the second and third matrix are zeros.
    shares = [1.0, (400 / 512) ** 0.5, (400 / 512) ** 0.5]
    for deviation, value, share in zip(deviations, expected, shares, strict=True):
        assert deviation == pytest.approx(value * share, rel=0.02)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("hidden_layers", [1, 3])
def test_member_round_trip(normalization: str, hidden_layers: int) -> None:
    stack = stack_of(MIXED, normalization=normalization, hidden_layers=hidden_layers, dropout=0.3)
    train_a_little(stack)
    x = normal(9, INPUTS, seed=5)
    outputs = stack(x)
    for i, params in enumerate(MIXED):
        network = stack.member(i)
        assert not network.training
        torch.testing.assert_close(network(x), outputs[i], rtol=1e-4, atol=1e-5)
        fresh = build_mlp({**params, **stack.params[i]}, INPUTS, OUTPUTS)
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh.eval()(x), network(x))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_member_has_weights_of_its_own(normalization: str) -> None:
    stack = stack_of(MIXED, normalization=normalization)
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    for parameter in stack.member(0).parameters():
        parameter.data.fill_(9.0)
    assert all(torch.equal(stack.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_member_of_other_weights(normalization: str) -> None:
    stack = stack_of(MIXED, normalization=normalization)
    train_a_little(stack)
    kept = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    x = normal(9, INPUTS, seed=5)
    expected = stack(x).detach()
    train_a_little(stack)
    assert not torch.allclose(stack(x), expected)
    for i in range(len(MIXED)):
        torch.testing.assert_close(stack.member(i, kept)(x), expected[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("members", [[0], [3, 1], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_keep(normalization: str, members: list[int]) -> None:
    stack = stack_of(MIXED, normalization=normalization)
    train_a_little(stack)
    x = normal(9, INPUTS, seed=5)
    expected = stack(x).detach()[members]
    stack.select(torch.tensor(members))
    assert stack.params == [MIXED[i] | {"normalization": normalization} for i in members]
    torch.testing.assert_close(stack(x), expected, rtol=1e-5, atol=1e-6)
    for place in range(len(members)):
        torch.testing.assert_close(stack.member(place)(x), expected[place], rtol=1e-4, atol=1e-5)


# --- dropout ---


def test_dropout_asks_for_noise_once_per_hidden_layer() -> None:
    asked: list[tuple[int, int]] = []

    def noise(batch: int, width: int) -> Tensor:
        asked.append((batch, width))
        return torch.rand(batch, width)

    stack = stack_of([PLAIN, PLAIN | {"dropout": 0.5}], hidden_layers=3)
    stack(normal(9, INPUTS), noise)
    assert asked == [(9, 32)] * 3


def test_dropout_is_that_of_the_member_and_only_with_noise() -> None:
    stack = stack_of([PLAIN, PLAIN | {"dropout": 0.5}, PLAIN | {"dropout": 0.95}])
    x = normal(9, INPUTS)
    clean = stack(x)
    everything, nothing = (stack(x, lambda b, w, u=u: torch.full((b, w), u)) for u in (0.0, 0.99))
    torch.testing.assert_close(everything[0], clean[0])
    # All hidden units are silent, so only the output's bias is left: zero at the start.
    assert not bool(everything[1:].any())
    # None is silent: relu without biases lets the two factors 1 / (1 - p) through.
    for i, p in enumerate([0.0, 0.5, 0.95]):
        torch.testing.assert_close(nothing[i], clean[i] / (1 - p) ** 2, rtol=1e-4, atol=1e-4)


def test_dropout_of_torch_has_the_same_mean() -> None:
    stack = stack_of([PLAIN | {"dropout": 0.3, "hidden_layers": 1}])
    x, source = normal(1, INPUTS), torch.Generator().manual_seed(0)
    noise = torch.rand(20000, 32, generator=source)
    mean = stack(x.expand(20000, -1), lambda b, w: noise)[0].mean(0)
    torch.testing.assert_close(mean, stack(x)[0, 0], rtol=0.03, atol=0.03)


# --- padding ---


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_padding_gets_no_gradient_and_sends_nothing_on(normalization: str, name: str) -> None:
    stack = stack_of([PLAIN | {"activation": name}], normalization=normalization)
    stack(normal(9, INPUTS)).square().sum().backward()
    for n, layer in enumerate(stack.linears):
        assert isinstance(layer, StackedLinear)
        assert layer.weight.grad is not None
        gradient = layer.weight.grad[0]
        if n > 0:
            assert not bool(gradient[20:].any())
        if n < 2:
            assert not bool(gradient[:, 20:].any())
            assert layer.bias is None or not bool(layer.bias.grad[0, 20:].any())  # type: ignore
        assert bool(gradient[:20, :20].any())


def test_a_stack_in_another_precision() -> None:
    stack = stack_of(MIXED, normalization="layer")
    x = normal(9, INPUTS)
    expected = stack(x).detach().double()
    torch.testing.assert_close(stack.double()(x.double()), expected, rtol=1e-4, atol=1e-5)
