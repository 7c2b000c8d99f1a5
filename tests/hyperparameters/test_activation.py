from __future__ import annotations

import math

import pytest
from scipy.integrate import quad  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torch.nn.init import calculate_gain

from optuna_nnhp.hyperparameters.activation import ACTIVATION
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.hyperparameters.activation import activate
from optuna_nnhp.hyperparameters.activation import activation_groups

NAMES = list(ACTIVATIONS)
TORCH_HAS_A_GAIN: dict[str, float | None] = {
    "relu": None,
    "leaky_relu": 0.01,
    "tanh": None,
    "sigmoid": None,
    "selu": None,
}


def expected(name: str, x: Tensor) -> Tensor:
    """By `torch.nn.functional`, or by the paper's formula where that is short."""
    match name:
        case "relu":
            return x.clamp_min(0)
        case "leaky_relu":
            return torch.where(x > 0, x, 0.01 * x)
        case "sigmoid":
            return 1 / (1 + torch.exp(-x))
        case "silu":
            return x / (1 + torch.exp(-x))
        case "mish":
            return x * torch.tanh(torch.log1p(torch.exp(x)))
        case "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        case "elu":
            return torch.where(x > 0, x, torch.expm1(x))
        case "selu":
            return F.selu(x)
        case _:
            return torch.tanh(x)


def test_the_choices_are_the_functions_there_are() -> None:
    assert ACTIVATION.distribution.choices == tuple(ACTIVATIONS)  # type: ignore
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_function(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name].module()(x), expected(name, x))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sigmoid"])
def test_zero_stays_zero(name: str) -> None:
    # Padded units rely on it; those of sigmoid are masked.
    assert float(ACTIVATIONS[name].module()(torch.zeros(()))) == 0


@pytest.mark.parametrize("name", TORCH_HAS_A_GAIN)
def test_gain_is_that_of_torch(name: str) -> None:
    assert ACTIVATIONS[name].gain == calculate_gain(name, TORCH_HAS_A_GAIN[name])  # type: ignore


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TORCH_HAS_A_GAIN])
def test_gain_keeps_the_second_moment_of_a_standard_normal(name: str) -> None:
    function = ACTIVATIONS[name].module()

    def integrand(z: float) -> float:
        value = float(function(torch.tensor(z, dtype=torch.float64)))
        return value**2 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    moment = quad(integrand, -12, 0)[0] + quad(integrand, 0, 12)[0]
    assert ACTIVATIONS[name].gain == pytest.approx(1 / math.sqrt(moment), abs=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_something_speaks_for_it_and_something_against(name: str) -> None:
    activation = ACTIVATIONS[name]
    assert len(activation.pros) > 10 and len(activation.cons) > 10
    assert activation.pros != activation.cons


@pytest.mark.parametrize("name", NAMES)
def test_every_call_makes_a_module_of_its_own(name: str) -> None:
    first, second = ACTIVATIONS[name].module(), ACTIVATIONS[name].module()
    assert isinstance(first, nn.Module) and first is not second


@pytest.mark.parametrize(
    "members, groups",
    [
        (["relu"], [("relu", 1)]),
        (["relu", "relu"], [("relu", 2)]),
        (["tanh", "tanh", "relu"], [("tanh", 2), ("relu", 1)]),
        # Only neighbours form a group, so that members stay in their order.
        (["tanh", "relu", "tanh"], [("tanh", 1), ("relu", 1), ("tanh", 1)]),
        ([], []),
    ],
)
def test_groups(members: list[str], groups: list[tuple[str, int]]) -> None:
    assert activation_groups(members) == groups


@pytest.mark.parametrize(
    "members",
    [
        ["gelu"],
        ["tanh", "tanh", "tanh"],
        NAMES,
        [*reversed(NAMES), *NAMES],
        ["mish", "relu", "mish", "sigmoid", "relu", "mish"],
    ],
    ids=len,
)
def test_mixed_groups_are_members_one_by_one(members: list[str]) -> None:
    source = torch.Generator().manual_seed(0)
    h = torch.randn(len(members), 7, 5, generator=source, dtype=torch.float64)
    slopes = torch.randn(len(members), 7, 5, generator=source, dtype=torch.float64)
    mixed, single = h.clone().requires_grad_(), h.clone().requires_grad_()
    together = activate(mixed, activation_groups(members))
    alone = torch.stack([ACTIVATIONS[n].module()(single[i]) for i, n in enumerate(members)])
    torch.testing.assert_close(together, alone)
    (together * slopes).sum().backward()
    (alone * slopes).sum().backward()
    torch.testing.assert_close(mixed.grad, single.grad)
    torch.testing.assert_close(mixed.detach(), h, rtol=0, atol=0)  # the input is left alone
