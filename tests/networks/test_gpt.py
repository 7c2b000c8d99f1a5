from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from optuna_nnhp.networks.gpt import GPT
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.gpt import normalize
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.networks.transformer import activate
from optuna_nnhp.networks.transformer import apply_rotary
from optuna_nnhp.networks.transformer import causal_attention
from optuna_nnhp.networks.transformer import count_parameters
from optuna_nnhp.networks.transformer import initial_weights
from optuna_nnhp.networks.transformer import rms_norm
from optuna_nnhp.networks.transformer import token_shift
from tests.tolerance import EXACT
from tests.tolerance import FLOAT64
from tests.tolerance import assert_close

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"positions": "learned", "normalization": "layer-gain", "feed_forward": "gelu"},
    {"tied_head": True, "positions": "learned"},
    {"normalization": "rms", "feed_forward": "swiglu"},
    {"qk_norm": True, "token_shift": True, "logit_cap": 15.0},
    {"width_ratio": 2.0},
)


def architecture(**changes: Any) -> Architecture:
    small = {"vocabulary": 11, "layers": 2, "heads": 2, "head_size": 4, "context": 8}
    return Architecture(**{**small, **changes})


def stack(k: int, a: Architecture, projection: str = "scaled") -> StackedGPT:
    params = {"weight_init": "gpt2", "projection_init": projection, "dropout": 0.0}
    return StackedGPT(a, [params] * k, [torch.Generator().manual_seed(i) for i in range(k)])


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Oracle(nn.Module):
    """The same by torch.nn's own parts, as a textbook has it."""

    def __init__(self, a: Architecture, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.a, self.w = a, weights

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.a.normalization == "rms":
            return functional.rms_norm(x, x.shape[-1:], eps=1e-5)
        return functional.layer_norm(x, x.shape[-1:], self.w.get(name), eps=1e-5)

    def read(self, x: Tensor, name: str) -> Tensor:
        x = self.norm(x, name)
        if not self.a.token_shift:
            return x
        half = x.shape[-1] // 2
        before = functional.pad(x[:, :-1, :half], (0, 0, 1, 0))
        return torch.cat([before, x[..., half:]], dim=-1)

    def turn(self, x: Tensor) -> Tensor:
        """Pairs of channels by sine and cosine; x: (batch, heads, length, size)."""
        size, length = x.shape[-1], x.shape[-2]
        rate = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(length)[:, None] * rate
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, dim=-1).flatten(-2)

    def attention(self, x: Tensor, layer: int) -> Tensor:
        a = self.a
        q, k, v = (
            part.unflatten(-1, (a.heads, a.head_size)).transpose(1, 2)
            for part in (x @ self.w[f"blocks.{layer}.qkv"]).chunk(3, -1)
        )
        if a.positions == "rotary":
            q, k = self.turn(q), self.turn(k)
        if a.qk_norm:
            q, k = (functional.rms_norm(p, p.shape[-1:], eps=1e-5) for p in (q, k))
        scores = q @ k.transpose(-1, -2) * a.attention_scale
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(-2)

    def forward(self, ids: Tensor) -> Tensor:
        a, w = self.a, self.w
        x = w["embedding"][ids]
        if a.positions == "learned":
            x = x + w["position"][: ids.shape[1]]
        for layer in range(a.layers):
            start = f"blocks.{layer}."
            x = x + self.attention(self.read(x, start + "gain1"), layer) @ w[start + "out"]
            units = self.read(x, start + "gain2") @ w[start + "up"]
            if a.feed_forward == "gelu":
                units = functional.gelu(units)
            elif a.feed_forward == "relu2":
                units = functional.relu(units) ** 2
            else:
                gate, value = units.chunk(2, -1)
                units = functional.silu(gate) * value
            x = x + units @ w[start + "down"]
        logits = self.norm(x, "gain") @ (w["embedding"].T if a.tied_head else w["head"])
        if a.width_ratio:
            logits = logits / a.width_ratio
        return a.logit_cap * torch.tanh(logits / a.logit_cap) if a.logit_cap else logits


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_stack_the_plain_network_and_the_textbook_agree(
    changes: dict[str, Any], float64: None
) -> None:
    a, k = architecture(**changes), 3
    together, ids = stack(k, a), torch.randint(a.vocabulary, (4, 8))
    logits = together(ids).view(k, 4, 8, -1)
    for i in range(k):
        plain = together.member(i)
        weights = {n: w.detach().clone().requires_grad_() for n, w in plain.named_parameters()}
        textbook = Oracle(a, weights)(ids)
        assert_close(plain(ids), textbook, FLOAT64)
        assert_close(logits[i], textbook, FLOAT64)


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_are_those_of_the_textbook(changes: dict[str, Any], float64: None) -> None:
    a, k = architecture(**changes), 2
    together, ids = stack(k, a), torch.randint(a.vocabulary, (3, 8))
    target = torch.randint(a.vocabulary, (3 * 8,))
    own = {n.removesuffix(".weight"): p for n, p in together.named_parameters()}
    losses = [functional.cross_entropy(out, target) for out in together(ids)]
    sum(losses).backward()  # type: ignore[union-attr]
    for i in range(k):
        weights = {n: p[i].detach().clone().requires_grad_() for n, p in own.items()}
        functional.cross_entropy(Oracle(a, weights)(ids).flatten(0, 1), target).backward()
        for name, weight in weights.items():
            grad = own[name].grad
            assert grad is not None
            assert_close(grad[i], weight.grad, FLOAT64)


def test_a_token_sees_only_those_before_it() -> None:
    gpt = stack(1, architecture(token_shift=True)).member(0)
    ids = torch.randint(11, (1, 8))
    other = ids.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 11
    assert_close(gpt(ids)[:, :5], gpt(other)[:, :5], {"rtol": 0.0, "atol": 1e-6})
    assert not torch.equal(gpt(ids)[:, 5:], gpt(other)[:, 5:])


def test_members_with_windows_of_their_own() -> None:
    together, ids = stack(2, architecture()), torch.randint(11, (2, 3, 8))
    both = together(ids)
    for i in range(2):
        assert_close(both[i], together(ids[i])[i], {"rtol": 1e-5, "atol": 1e-6})


def test_members_are_removed_and_appended() -> None:
    a = architecture()
    together, other, ids = stack(3, a), stack(1, a), torch.randint(11, (2, 8))
    before, new = together(ids), other(ids)
    together.select(torch.tensor([2, 0]))
    together.append(other)
    assert_close(together(ids), torch.cat([before[[2, 0]], new]), {"rtol": 1e-5, "atol": 1e-6})


def test_zero_projections_make_an_empty_network_at_first() -> None:
    gpt = stack(1, architecture(), projection="zero")
    assert not gpt(torch.randint(11, (1, 8))).any()


@pytest.mark.parametrize("name", ["qkv", "out", "up", "down"])
def test_first_weights_of_gpt2(name: str) -> None:
    a = Architecture(11, 8, 8, 32, 8)
    weights = initial_weights(a, "gpt2", "scaled", torch.Generator().manual_seed(0))
    wanted = 0.02 / 4 if name in ("out", "down") else 0.02
    assert weights[f"blocks.3.{name}"].std().item() == pytest.approx(wanted, rel=0.02)


def test_gpt2s_published_size() -> None:
    gpt2 = Architecture(50257, 12, 12, 64, 1024, "learned", "layer-gain", tied_head=True)
    assert count_parameters(gpt2) == pytest.approx(124.4e6, rel=0.001)


def test_counted_parameters_are_those_of_the_network() -> None:
    for changes in VARIANTS:
        a = architecture(**changes)
        assert count_parameters(a) == sum(p.numel() for p in GPT(a).parameters())


def test_dropout_silences_and_its_rate_is_each_members_own() -> None:
    a = architecture()
    params = [
        {"weight_init": "gpt2", "projection_init": "scaled", "dropout": rate}
        for rate in (0.0, 0.5)
    ]
    gpt = StackedGPT(a, params, [torch.Generator().manual_seed(0) for _ in params])
    ids, noise = torch.randint(11, (2, 8)), torch.rand(16, 8)
    dropped, whole = gpt.train()(ids, lambda rows, width: noise), gpt.eval()(ids)
    assert_close(dropped[0], whole[0], {"rtol": 1e-5, "atol": 1e-6})
    assert not torch.allclose(dropped[1], whole[1])


@pytest.mark.parametrize("function", [token_shift, rms_norm, lambda x: activate(x, "relu2")])
def test_gradients_by_hand(function: Any, float64: None) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(4), torch.randn(4)
    turned_q, turned_k = (apply_rotary(v.expand(1, 6, 1, 4))[0, :, 0] for v in (q, k))
    scores = turned_q @ turned_k.T
    assert_close(scores[3, 1], scores[5, 3], {"rtol": 1e-5, "atol": 1e-6})


def test_attention_to_oneself_alone_is_ones_value() -> None:
    a = architecture()
    qkv = torch.randn(1, 1, 24)
    assert_close(causal_attention(qkv, a), qkv[..., 16:], {"rtol": 1e-6, "atol": 1e-6})


def test_normalize_keeps_directions() -> None:
    x = torch.randn(3, 8)
    assert_close(normalize(x, "rms").square().mean(-1), torch.ones(3), {"rtol": 1e-3, "atol": 0.0})


def test_generation_is_greedy_at_temperature_zero_and_reproducible_above() -> None:
    gpt, start = stack(1, architecture()).member(0), torch.tensor([1, 2])
    greedy = gpt.generate(start, 12, temperature=0)
    assert len(greedy) == 14
    assert greedy[2] == gpt(start[None])[0, -1].argmax()
    twice = [gpt.generate(start, 12, generator=torch.Generator().manual_seed(3)) for _ in "ab"]
    assert_close(twice[0], twice[1], EXACT)
    likeliest = gpt.generate(start, 12, top_k=1)
    assert_close(likeliest, greedy, EXACT)
