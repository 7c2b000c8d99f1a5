"""The compiled engine of GPTs against the stacked network of torch's operations."""

from __future__ import annotations

from collections.abc import Iterator
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from optuna_nnhp.engine import gpt
from optuna_nnhp.engine.gpt import CompiledGPT
from optuna_nnhp.engine.gpt import load_library
from optuna_nnhp.engine.gpt import orthogonalize_
from optuna_nnhp.engine.gpt import supports_tensors
from optuna_nnhp.hyperparameters.muon import orthogonalize
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.training.language import total_nats
from tests.tolerance import EXACT
from tests.tolerance import FLOAT32
from tests.tolerance import FLOAT64
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(
    load_library() is None and "CI" not in os.environ, reason="there was no C compiler"
)

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"positions": "learned", "normalization": "layer-gain", "feed_forward": "gelu"},
    {"tied_head": True, "positions": "learned", "token_shift": True},
    {"normalization": "rms", "feed_forward": "swiglu", "token_shift": True},
    {"qk_norm": True, "token_shift": True, "logit_cap": 1.5, "normalization": "layer-gain"},
    {"width_ratio": 2.0, "tied_head": True},
    {"heads": 3, "head_size": 6, "layers": 3, "context": 7, "vocabulary": 300},
    {"heads": 2, "head_size": 16, "context": 70, "vocabulary": 2000},  # strips, pieces of logits
)
TEXT = 400


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stack(k: int, dropout: float = 0.0, **changes: Any) -> StackedGPT:
    """Members with weights large enough for every part to matter."""
    small = {"vocabulary": 11, "layers": 2, "heads": 2, "head_size": 4, "context": 8}
    architecture = Architecture(**{**small, **changes})
    params = [
        {"weight_init": "fan-in", "projection_init": "plain", "dropout": dropout * (i + 1)}
        for i in range(k)
    ]
    sources = [torch.Generator().manual_seed(i) for i in range(k)]
    network = StackedGPT(architecture, params, sources)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
            parameter.add_(0.1 * noise)
    return network


def text(network: StackedGPT) -> Tensor:
    source = torch.Generator().manual_seed(3)
    return torch.randint(network.architecture.vocabulary, (TEXT,), generator=source)


def places(network: StackedGPT, windows: int, k: int | None = None) -> Tensor:
    source, length = torch.Generator().manual_seed(4), network.architecture.context
    shape = (windows, 1) if k is None else (k, windows, 1)
    return torch.randint(TEXT - length - 1, shape, generator=source) + torch.arange(length)


def by_torch(network: StackedGPT, rows: Tensor, noise: DropoutNoise) -> tuple[Tensor, Tensor]:
    """Losses and gradients."""
    tokens, flat = text(network), FlatParameters(network)
    flat.allocate_grads()
    logits = network.train()(tokens[rows], noise)
    targets = tokens[rows + 1].flatten(-2).expand(len(logits), -1)
    losses = functional.cross_entropy(logits.mT, targets, reduction="none").mean(1)
    flat.backward(losses.sum())
    return losses.detach(), flat.grads


def by_engine(network: StackedGPT, rows: Tensor, noise: DropoutNoise) -> tuple[Tensor, Tensor]:
    tokens, flat = text(network), FlatParameters(network)
    flat.allocate_grads()
    engine = CompiledGPT(network, flat, tokens[:-1], tokens[1:], rows.shape[-2])
    losses = engine.backward(rows, noise)
    assert float(flat.steps[0]) == 1
    return losses, flat.grads


def make_noise(k: int, ages: int = 1) -> DropoutNoise:
    keys = [11, 22, 33][:ages]
    return DropoutNoise(keys, torch.arange(k) % ages, step=2)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("windows", [1, 5])
def test_losses_and_gradients_are_torchs(
    windows: int, changes: dict[str, Any], float64: None
) -> None:
    rows = places(stack(2, **changes), windows)
    ours = by_engine(stack(2, **changes), rows, make_noise(2))
    theirs = by_torch(stack(2, **changes), rows, make_noise(2))
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 1e-3
        assert_close(mine, expected, FLOAT64)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_dropout_has_the_same_noise(positions: str, float64: None) -> None:
    changes: dict[str, Any] = {"positions": positions, "token_shift": True}
    rows = places(stack(3), 4, k=3)
    ours = by_engine(stack(3, 0.2, **changes), rows, make_noise(3, ages=2))
    theirs = by_torch(stack(3, 0.2, **changes), rows, make_noise(3, ages=2))
    for mine, expected in zip(ours, theirs, strict=True):
        assert_close(mine, expected, FLOAT64)
    without = by_torch(stack(3, **changes), rows, make_noise(3))
    assert not torch.allclose(without[0], theirs[0])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_in_the_precision_of_studies(changes: dict[str, Any]) -> None:
    rows = places(stack(2, **changes), 6)
    ours = by_engine(stack(2, 0.1, **changes), rows, make_noise(2))
    theirs = by_torch(stack(2, 0.1, **changes), rows, make_noise(2))
    for mine, expected in zip(ours, theirs, strict=True):
        assert_close(mine, expected, FLOAT32)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_text_costs_what_torch_says(changes: dict[str, Any], float64: None) -> None:
    network = stack(3, **changes).eval()
    tokens, flat = text(network), FlatParameters(network)
    engine = CompiledGPT(network, flat, tokens[:-1], tokens[1:], 4)
    length = network.architecture.context
    for some in (tokens, tokens[: length + 1], tokens[:3]):
        expected = total_nats(network, some, length, 3)
        assert_close(engine.total_nats(some, [0, 1, 2]), expected, FLOAT64)
        assert_close(engine.total_nats(some, [2, 0]), expected[[2, 0]], FLOAT64)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_broken_member_is_seen_and_its_mate_is_not_touched(changes: dict[str, Any]) -> None:
    rows, network = places(stack(2, **changes), 5), stack(2, **changes)
    losses, grads = by_engine(network, rows, make_noise(2))
    for name in ("up", "embedding"):
        broken = stack(2, **changes)
        found = [p for n, p in broken.named_parameters() if name in n]
        with torch.no_grad():
            found[0][0].view(-1)[0] = torch.nan
            if name == "embedding":
                found[0][0].fill_(torch.inf)
        loss, grad = by_engine(broken, rows, make_noise(2))
        assert not torch.isfinite(loss[0])
        assert_close(loss[1], losses[1], EXACT)
        assert_close(grad[1], grads[1], EXACT)
        tokens, flat = text(broken), FlatParameters(broken)
        nats = CompiledGPT(broken, flat, tokens[:-1], tokens[1:], 4).total_nats(tokens, [0, 1])
        assert not torch.isfinite(nats[0]) and torch.isfinite(nats[1])


def test_fewer_threads_than_there_was_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = stack(1)
    rows, tokens, flat = places(network, 4), text(network), FlatParameters(network)
    flat.allocate_grads(by_autograd=False)
    engine, losses = CompiledGPT(network, flat, tokens[:-1], tokens[1:], 4), []
    for threads in (1, 3, 2):
        monkeypatch.setattr(gpt, "available_threads", lambda threads=threads: threads)
        losses.append(float(engine.backward(rows, make_noise(1))))
    assert len(set(losses)) == 1


def test_wrong_token_ids_and_positions_do_not_reach_the_c_code() -> None:
    network = stack(2)
    tokens, flat, rows = text(network), FlatParameters(network), places(network, 4)
    flat.allocate_grads(by_autograd=False)
    for wrong in (-1, network.architecture.vocabulary):
        broken = tokens.clone()
        broken[7] = wrong
        message = f"All token ids must be from 0 to 10, but got {wrong}."
        with pytest.raises(ValueError, match=message):
            CompiledGPT(network, flat, broken[:-1], tokens[1:], 4)
        with pytest.raises(ValueError, match=message):
            CompiledGPT(network, flat, tokens[:-1], broken[1:], 4)
        engine = CompiledGPT(network, flat, tokens[:-1], tokens[1:], 4)
        with pytest.raises(ValueError, match=message):
            engine.total_nats(broken, [0])
    with pytest.raises(ValueError, match="`y` must have 399 tokens as `x` has, but got 398"):
        CompiledGPT(network, flat, tokens[:-1], tokens[2:], 4)
    with pytest.raises(ValueError, match=r"must be int64, but got torch.int32"):
        CompiledGPT(network, flat, tokens[:-1].int(), tokens[1:], 4)
    for start in (-1, TEXT - network.architecture.context):
        with pytest.raises(IndexError, match="first positions must be from 0 to 391, but got"):
            engine.backward(rows - rows[:, :1] + start, make_noise(2))
    with pytest.raises(ValueError, match=r"must end in the dimensions \(4, 8\)"):
        engine.backward(rows[:3], make_noise(2))
    assert torch.isfinite(engine.backward(rows, make_noise(2))).all()


def test_threads_and_mates_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = places(stack(3), 5)
    losses, grads = by_engine(stack(3), rows, make_noise(3))
    monkeypatch.setattr(gpt, "available_threads", lambda: 1)
    alone = stack(3)
    alone.select(torch.tensor([1]))
    loss, grad = by_engine(alone, rows, make_noise(1))
    assert_close(loss, losses[1:2], EXACT)
    assert_close(grad, grads[1:2], EXACT)


@pytest.mark.parametrize("shape", [(7, 6, 6), (3, 8, 20), (2, 33, 9)])
def test_matrices_become_orthogonal(shape: tuple[int, ...], float64: None) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    ours = matrices.clone()
    orthogonalize_(ours)
    assert_close(ours, orthogonalize(matrices), FLOAT64)
    zeros = torch.zeros(1, 4, 4)
    orthogonalize_(zeros)
    assert_close(zeros, torch.zeros(1, 4, 4), EXACT)


def test_what_it_cannot_do_is_left_to_torch() -> None:
    network = stack(1)
    assert CompiledGPT.supports(network, torch.zeros(1))
    assert not CompiledGPT.supports(network, torch.zeros(1, dtype=torch.float16))
    assert not CompiledGPT.supports(network, torch.zeros(1, device="meta"))
    assert not supports_tensors(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
