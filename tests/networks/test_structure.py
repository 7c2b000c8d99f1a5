"""Networks that may share a stack have one structure, and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.networks.structure import CannotStack
from optuna_nnhp.networks.structure import structure_key


@dataclass
class Config:
    width: int = 3
    act: Callable[[Tensor], Tensor] = torch.relu


class Holder(nn.Module):
    """Holds a value as an attribute."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(2, 2), value


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    return lambda h: h * by


def local(by: float) -> nn.Module:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * by  # type: ignore[no-any-return]

    return Local()


def hooked(by: float) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, inputs, output: output * by)
    return layer


def frozen(first: bool) -> nn.Module:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers[0].requires_grad_(not first)
    return layers


def tied(whole: bool) -> nn.Module:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    if not whole:
        other.weight = one.weight
    return nn.Sequential(one, one if whole else other)


def circle(value: float) -> nn.Module:
    items: list[Any] = [value]
    items.append(items)
    return Holder(items)


SAME: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
    lambda: nn.TransformerEncoderLayer(4, 2, 8),
    lambda: Holder({"a": [1, (2.0, "b")], "c": {3, 4}}),
    lambda: Holder(Config()),
    lambda: Holder(SimpleNamespace(a=1)),
    lambda: Holder(partial(torch.add, alpha=2)),
    lambda: Holder(torch.arange(3)),
    lambda: Holder(np.arange(3)),
    lambda: Holder(scaled(2.0)),
    lambda: Holder(torch.float32),
    lambda: Holder(nn.Linear),
    lambda: local(2.0),
    lambda: hooked(2.0),
    lambda: tied(True),
    lambda: tied(False),
    lambda: circle(1.0),
]


@pytest.mark.parametrize("make", SAME)
def test_two_of_a_kind_are_equal(make: Callable[[], nn.Module]) -> None:
    assert structure_key(make()) == structure_key(make())


@pytest.mark.parametrize("rates", [(0.0, 0.5), (0.1, 0.2)])
@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_rates_of_dropout_may_differ(rates: tuple[float, float], layer: type) -> None:
    one, other = (nn.Sequential(nn.Linear(2, 2), layer(p)) for p in rates)
    assert structure_key(one) == structure_key(other)


def test_weights_and_mode_may_differ() -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    one(torch.randn(4, 2))
    assert structure_key(one) == structure_key(other.eval())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 3)),
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False)),
        (nn.Linear(2, 2), nn.Linear(2, 2).double()),
        (nn.ReLU(), nn.GELU()),
        (nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, padding=0)),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.AlphaDropout(0.1), nn.AlphaDropout(0.2)),
        (nn.Dropout(0.1), nn.Dropout(0.1, inplace=True)),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
        (Holder({"a": 1}), Holder({"a": 2})),
        (Holder([1, 2]), Holder((1, 2))),
        (Holder(1), Holder(1.0)),
        (Holder(True), Holder(1)),
        (Holder(Config(3)), Holder(Config(4))),
        (Holder(SimpleNamespace(a=1)), Holder(SimpleNamespace(a=2))),
        (Holder(torch.relu), Holder(torch.tanh)),
        (Holder(lambda h: h + 1), Holder(lambda h: h + 2)),
        (Holder(scaled(1.0)), Holder(scaled(2.0))),
        (Holder(partial(torch.add, alpha=1)), Holder(partial(torch.add, alpha=2))),
        (Holder(torch.arange(3)), Holder(torch.arange(3) + 1)),
        (Holder(np.arange(3)), Holder(np.arange(3.0))),
        (Holder(nn.Linear), Holder(nn.Bilinear)),
        (local(1.0), local(2.0)),
        (hooked(1.0), hooked(2.0)),
        (frozen(True), frozen(False)),
        (tied(True), tied(False)),
        (tied(True), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        (circle(1.0), circle(2.0)),
    ],
)
def test_what_computes_otherwise_is_another(one: nn.Module, other: nn.Module) -> None:
    assert structure_key(one) != structure_key(other)


def with_parameter() -> nn.Module:
    return Holder([nn.Linear(2, 2).weight])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Holder(threading.Lock()), "`value` of Holder is a lock, which cannot"),
        (lambda: Holder([object()]), "`value` of Holder is a object, which cannot"),
        (lambda: Holder([nn.Linear(2, 2)]), "holds a module that is not registered"),
        (with_parameter, "holds weights that are not registered"),
        (lambda: Holder(np.array([None])), "an array of objects"),
        (lambda: nn.GRU(2, 2), "GRU holds its weights in a second place"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_be_compared(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CannotStack, match=message):
        structure_key(make())


def test_a_submodule_may_be_referred_to() -> None:
    def make(which: int) -> nn.Module:
        holder = Holder(None)
        holder.more = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        holder.value = [holder.more[which]]
        return holder

    assert structure_key(make(0)) == structure_key(make(0)) != structure_key(make(1))
