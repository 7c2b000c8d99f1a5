from __future__ import annotations

from collections.abc import Callable
import math

import pytest
import torch
from torch import Generator
from torch import Tensor
from torch.nn import init

from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.hyperparameters.weight_init import WEIGHT_INIT
from optuna_nnhp.hyperparameters.weight_init import initial_weight

FAN_IN, FAN_OUT = 400, 300
SCHEMES: tuple[str, ...] = WEIGHT_INIT.distribution.choices  # type: ignore
GAIN = math.sqrt(2)  # of relu, for which torch's own He schemes are made

ORACLES: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "normal": lambda w, g: init.normal_(w, 0.0, 0.05, generator=g),
    "uniform": lambda w, g: init.uniform_(w, -0.05, 0.05, generator=g),
    "xavier_normal": lambda w, g: init.xavier_normal_(w, GAIN, generator=g),
    "xavier_uniform": lambda w, g: init.xavier_uniform_(w, GAIN, generator=g),
    "he_normal": lambda w, g: init.kaiming_normal_(w, nonlinearity="relu", generator=g),
    "he_uniform": lambda w, g: init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
    "orthogonal": lambda w, g: init.orthogonal_(w, GAIN, generator=g),
}
# Standard deviation by the papers' formulas; a uniform's bound is sqrt(3) times that.
SPREAD: dict[str, Callable[[float], float]] = {
    "normal": lambda gain: 0.05,
    "uniform": lambda gain: 0.05 / math.sqrt(3),
    "xavier_normal": lambda gain: gain * math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "xavier_uniform": lambda gain: gain * math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "he_normal": lambda gain: gain / math.sqrt(FAN_IN),
    "he_uniform": lambda gain: gain / math.sqrt(FAN_IN),
    "orthogonal": lambda gain: gain / math.sqrt(max(FAN_IN, FAN_OUT)),
}


def draw(scheme: str, gain: float = GAIN, fans: tuple[int, int] = (FAN_IN, FAN_OUT)) -> Tensor:
    return initial_weight(scheme, *fans, gain, torch.Generator().manual_seed(3))


def test_every_scheme_has_an_oracle() -> None:
    assert set(SCHEMES) == set(ORACLES) == set(SPREAD)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_are_those_of_torch(scheme: str) -> None:
    # torch's layout is (out, in), so fan-in and fan-out cannot be mixed up unnoticed.
    expected = ORACLES[scheme](torch.empty(FAN_OUT, FAN_IN), torch.Generator().manual_seed(3)).T
    torch.testing.assert_close(draw(scheme), expected)


@pytest.mark.parametrize("gain", [1.0, 5 / 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_mean_spread_and_bounds(scheme: str, gain: float) -> None:
    weight, spread = draw(scheme, gain), SPREAD[scheme](gain)
    assert weight.shape == (FAN_IN, FAN_OUT)
    assert abs(float(weight.mean())) < 4 * spread / weight.numel() ** 0.5
    assert float(weight.std()) == pytest.approx(spread, rel=0.01)
    largest = float(weight.abs().max())
    if "uniform" in scheme:
        bound = math.sqrt(3) * spread
        assert 0.999 * bound < largest <= bound * (1 + 1e-6)
    else:
        assert largest > 3.5 * spread  # tails that a uniform does not have


@pytest.mark.parametrize("fans", [(40, 30), (30, 40), (30, 30), (1, 5), (5, 1)])
@pytest.mark.parametrize("gain", [1.0, 5 / 3])
def test_orthogonal(fans: tuple[int, int], gain: float) -> None:
    weight = draw("orthogonal", gain, fans)
    product = weight.T @ weight if fans[0] >= fans[1] else weight @ weight.T
    torch.testing.assert_close(product, gain**2 * torch.eye(min(fans)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_generator_decides(scheme: str) -> None:
    torch.manual_seed(0)
    first = draw(scheme)
    torch.manual_seed(1)
    assert torch.equal(draw(scheme), first)
    other = initial_weight(scheme, FAN_IN, FAN_OUT, GAIN, torch.Generator().manual_seed(4))
    assert not torch.equal(other, first)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_he_with_the_activations_gain_keeps_the_signal(name: str) -> None:
    # Over five wide layers a wrong gain shrinks or swells it; tanh and sigmoid move towards
    # their fixed points, whatever the gain, so only the order of magnitude is asked of them.
    source = torch.Generator().manual_seed(0)
    activation = ACTIVATIONS[name]
    h = torch.randn(64, 256, generator=source)
    for _ in range(5):
        h = activation.module()(h @ initial_weight("he_normal", 256, 256, activation.gain, source))
    size = float(h.square().mean().sqrt())
    saturates = name in ("tanh", "sigmoid", "selu")
    assert (0.3 if saturates else 0.7) < size < 1.5


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^'kaiming' is not a choice of `weight_init`.*he_normal"
    ):
        draw("kaiming")
