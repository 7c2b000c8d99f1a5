"""A network taken out of a stack and put back is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator
from torch import nn

from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.load_member import load_member
from optuna_nnhp.networks.stackability import StackabilityProbe
from optuna_nnhp.networks.transformer import Architecture
from tests.members import task
from tests.members import varied
from tests.networks.test_vmap_stack import ALL
from tests.networks.test_vmap_stack import Make
from tests.networks.test_vmap_stack import Recurrent
from tests.networks.test_vmap_stack import networks_of


def assert_moves(stack: StackedModule, other: StackedModule, last: int) -> None:
    """The last member of a stack goes into another one's first place, and comes back the same."""
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    plain = stack.member(last)
    load_member(other, 0, plain)
    back = other.member(0).state_dict()
    assert back.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(back[name], tensor), name
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor[1:], before[name][1:]), name  # its mates are as they were


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("regression", [True, False])
def test_perceptrons(normalization: str, regression: bool) -> None:
    chosen = task(regression=regression)
    members = varied(5, regression=regression, normalization=normalization)
    stack, other = chosen.build(members), chosen.build([members[4], members[0]])
    for buffer in dict(stack.named_buffers()).items():
        if buffer[0].endswith(("running_mean", "running_var")):
            buffer[1].uniform_(0.5, 2.0, generator=Generator().manual_seed(0))
    other.load_state_dict({n: torch.rand_like(t) for n, t in other.state_dict().items()})
    assert_moves(stack, other, 4)


def test_padding_stays_zero() -> None:
    chosen = task()
    members = varied(2)
    stack, other = chosen.build(members), chosen.build(members[1:])
    load_member(other, 0, stack.member(1))
    own, its = other.state_dict(), stack.state_dict()
    assert all(torch.equal(own[name][0], its[name][1]) for name in own)


@pytest.mark.parametrize(("make", "data"), ALL)
def test_networks_of_one_s_own(make: Make, data: Callable[[int], Any]) -> None:
    examiner = StackabilityProbe(data(4))
    networks = networks_of(make, 1 if make is Recurrent else 3)
    with torch.no_grad():
        for network in networks:
            for tensor in network.parameters():
                tensor.add_(0.1)
    other = examiner.stack(networks_of(make, 1 if make is Recurrent else 2))
    assert_moves(examiner.stack(networks), other, len(networks) - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied_head": False, "positions": "learned", "normalization": "layer-gain"},
        {"positions": "rotary", "normalization": "rms", "feed_forward": "swiglu"},
    ],
)
def test_language_models(settings: dict[str, Any]) -> None:
    architecture = Architecture(11, 2, 2, 8, 16, **settings)
    params = {"weight_init": "fan-in", "projection_init": "zero", "dropout": 0.1}
    sources = [Generator().manual_seed(seed) for seed in range(5)]
    stack = StackedGPT(architecture, [params] * 3, sources[:3])
    assert_moves(stack, StackedGPT(architecture, [params] * 2, sources[3:]), 2)


def test_a_stack_of_an_unknown_kind() -> None:
    class Unknown(StackedModule):
        """Nothing."""

    with pytest.raises(TypeError, match=r"`stack` must be a StackedMLP, .* but got Unknown"):
        load_member(Unknown(), 0, nn.Linear(1, 1))  # type: ignore[abstract]
