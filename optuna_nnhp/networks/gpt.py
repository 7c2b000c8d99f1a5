"""GPT-style language models: k of them as one, and a plain one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from optuna_nnhp.hyperparameters.regularization import dropout_factor
from optuna_nnhp.networks.layers import NoiseSource
from optuna_nnhp.networks.layers import StackedLinear
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.layers import append_members
from optuna_nnhp.networks.layers import select_members
from optuna_nnhp.networks.transformer import EPSILON
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.networks.transformer import activate
from optuna_nnhp.networks.transformer import cap_logits
from optuna_nnhp.networks.transformer import causal_attention
from optuna_nnhp.networks.transformer import initial_weights
from optuna_nnhp.networks.transformer import rms_norm
from optuna_nnhp.networks.transformer import token_shift

MATRICES = ("qkv", "out", "up", "down")  # of a block


class StackedBlock(nn.Module):
    """k transformer blocks side by side.

    Args:
        architecture:
            What they have in common.
        weights:
            First weights, by the names of `Architecture.shapes` without their block.

    Shape:
        - weights: ``(k, in, out)``, gains ``(k, width)``.
        - Input, Output: ``(k, batch * length, width)``.
    """

    qkv: StackedLinear
    out: StackedLinear
    up: StackedLinear
    down: StackedLinear
    gain1: Tensor | None
    gain2: Tensor | None

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.architecture = architecture
        for name in MATRICES:
            self.add_module(name, StackedLinear(weights[name], bias=False))
        for name in ("gain1", "gain2"):
            self.register_parameter(name, nn.Parameter(weights[name]) if name in weights else None)

    def forward(self, x: Tensor, length: int, drop: _SharedDropout) -> Tensor:
        """Return the residual stream after attention and feed-forward."""
        a = self.architecture
        qkv = self.qkv(_block_input(x, a, self.gain1, length))
        k, rows, _ = qkv.shape
        mixed = causal_attention(qkv.view(-1, length, qkv.shape[-1]), a).reshape(k, rows, -1)
        x = x + drop(self.out(mixed))
        units = activate(self.up(_block_input(x, a, self.gain2, length)), a.feed_forward)
        return x + drop(self.down(units))


class _SharedDropout:
    """Dropout with each member's rate; the members share the noise."""

    def __init__(self, probability: Tensor, noise: NoiseSource | None) -> None:
        self.probability, self.noise = probability, noise

    def __call__(self, x: Tensor) -> Tensor:
        if self.noise is None:
            return x
        return x * dropout_factor(self.noise(x.shape[-2], x.shape[-1]), self.probability)


def _block_input(x: Tensor, a: Architecture, gain: Tensor | None, length: int) -> Tensor:
    """Return the input of a sublayer: the residual stream, normalized and shifted."""
    out = normalize(x, a.normalization, None if gain is None else gain[:, None])
    if a.token_shift:
        out = token_shift(out.view(-1, length, out.shape[-1])).view(x.shape)
    return out


def normalize(x: Tensor, kind: str, gain: Tensor | None = None) -> Tensor:
    """Apply one of the normalizations of `Architecture`.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0]), "layer").round(decimals=3)
        tensor([-1.,  1.])
    """
    if kind == "rms":
        return rms_norm(x)
    out = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    return out if gain is None else out * gain


class StackedGPT(StackedModule):
    """k decoder-only transformers of one architecture; every parameter has the member first.

    Args:
        architecture:
            What they have in common.
        params:
            Hyperparameters of each member: ``weight_init``, ``projection_init``, ``dropout``.
        generators:
            Where each member's first weights come from.

    Shape:
        - Input: token ids ``(batch, length)``, shared, or ``(k, batch, length)``.
        - Output: logits ``(k, batch * length, vocabulary)``.

    Example:
        >>> params = {"weight_init": "fan-in", "projection_init": "zero", "dropout": 0.0}
        >>> gpt = StackedGPT(Architecture(65, 1, 2, 8, 32), [params], [torch.Generator()])
        >>> gpt(torch.zeros(3, 32, dtype=torch.long)).shape
        torch.Size([1, 96, 65])

    Source:
        Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2).
    """

    dropout: Tensor

    def __init__(
        self,
        architecture: Architecture,
        params: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.architecture = architecture
        drawn = [
            initial_weights(architecture, p["weight_init"], p["projection_init"], generator)
            for p, generator in zip(params, generators, strict=True)
        ]
        weights = {name: torch.stack([d[name] for d in drawn]) for name in drawn[0]}
        self.blocks = nn.ModuleList(
            StackedBlock(architecture, _block_weights(weights, layer))
            for layer in range(architecture.layers)
        )
        self.embedding = nn.Parameter(weights["embedding"])
        self.position = nn.Parameter(weights["position"]) if "position" in weights else None
        self.head = None if architecture.tied_head else StackedLinear(weights["head"], bias=False)
        self.gain = nn.Parameter(weights["gain"]) if "gain" in weights else None
        rates = torch.tensor([float(p["dropout"] or 0) for p in params])
        self.register_buffer("dropout", rates[:, None, None])
        self.has_dropout = bool((rates > 0).any())
        self.activations_per_example = (
            max(architecture.vocabulary, 4 * architecture.width) * architecture.context
        )

    def forward(self, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """Return the logits of the next token at every position."""
        a, k, length = self.architecture, len(self.embedding), x.shape[-1]
        ids = x.expand(k, *x.shape[-2:])
        first = torch.arange(k, device=x.device)[:, None, None] * a.vocabulary
        table = self.embedding.reshape(-1, a.width)
        h = functional.embedding(ids + first if k > 1 else ids, table)
        if self.position is not None:
            h = h + self.position[:, None, :length]
        h = h.view(k, -1, a.width)
        drop = _SharedDropout(self.dropout, noise if self.has_dropout and self.training else None)
        if self.position is not None:  # GPT-2 drops the sum of both embeddings
            h = drop(h)
        for block in self.blocks:
            h = block(h, length, drop)
        h = normalize(h, a.normalization, None if self.gain is None else self.gain[:, None])
        if self.head is None:
            logits = torch.bmm(h, self.embedding.transpose(1, 2))
        else:
            logits = self.head(h)
        return cap_logits(logits * a.head_scale if a.width_ratio else logits, a.logit_cap)

    def select(self, members: Tensor) -> None:
        """Keep only some members."""
        select_members(self, members)
        self.has_dropout = bool((self.dropout > 0).any())

    def append(self, other: StackedGPT) -> None:
        """Append another stack's members."""
        append_members(self, other)
        self.has_dropout = bool((self.dropout > 0).any())

    def set_hyperparameters(
        self, params: Sequence[Mapping[str, Any]], make_stack: Callable[[], StackedModule]
    ) -> None:
        """Set new hyperparameters of the same architecture; keep the weights."""
        rates = torch.tensor([float(p["dropout"] or 0) for p in params])
        self.dropout.copy_(rates[:, None, None])
        self.has_dropout = bool((rates > 0).any())

    def member(self, i: int, weights: Mapping[str, Tensor] | None = None) -> GPT:
        """Return one member as a plain network."""
        state = self.state_dict() if weights is None else weights
        gpt = GPT(self.architecture, float(self.dropout[i]))
        own = {n.removesuffix(".weight"): w[i] for n, w in state.items() if n != "dropout"}
        gpt.load_state_dict({n: w.detach().clone() for n, w in own.items()})
        return gpt.to(self.embedding.device).eval()


def _block_weights(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    start = f"blocks.{layer}."
    return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}


class Block(nn.Module):
    """One block of a plain GPT; matrices are ``(in, out)``."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    gain1: Tensor | None
    gain2: Tensor | None

    def __init__(self, architecture: Architecture, dropout: float) -> None:
        super().__init__()
        self.architecture, self.dropout = architecture, dropout
        shapes = architecture.shapes()
        for name in (*MATRICES, "gain1", "gain2"):
            shape = shapes.get(f"blocks.0.{name}")
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if shape else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream ``(batch, length, width)`` after both sublayers."""
        a = self.architecture
        mixed = causal_attention(self._block_input(x, self.gain1) @ self.qkv, a)
        x = x + self._drop(mixed @ self.out)
        units = activate(self._block_input(x, self.gain2) @ self.up, a.feed_forward)
        return x + self._drop(units @ self.down)

    def _block_input(self, x: Tensor, gain: Tensor | None) -> Tensor:
        out = normalize(x, self.architecture.normalization, gain)
        return token_shift(out) if self.architecture.token_shift else out

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer as a plain module.

    Args:
        architecture:
            Its shapes.
        dropout:
            Share of what each block adds that is dropped in training.

    Shape:
        - Input: token ids ``(batch, length)``; Output: logits ``(batch, length, vocabulary)``.

    Example:
        >>> GPT(Architecture(65, 1, 2, 8, 32))(torch.zeros(3, 9, dtype=torch.long)).shape
        torch.Size([3, 9, 65])
    """

    embedding: Tensor
    position: Tensor | None
    head: Tensor | None
    gain: Tensor | None

    def __init__(self, architecture: Architecture, dropout: float = 0.0) -> None:
        super().__init__()
        self.architecture, self.dropout = architecture, dropout
        self.blocks = nn.ModuleList(
            Block(architecture, dropout) for _ in range(architecture.layers)
        )
        shapes = architecture.shapes()
        for name in ("embedding", "position", "head", "gain"):
            shape = shapes.get(name)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if shape else None)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token at every position."""
        a = self.architecture
        h = functional.embedding(ids, self.embedding)
        if self.position is not None:
            h = functional.dropout(h + self.position[: ids.shape[-1]], self.dropout, self.training)
        for block in self.blocks:
            h = block(h)
        h = normalize(h, a.normalization, self.gain)
        logits = h @ (self.embedding.T if self.head is None else self.head)
        return cap_logits(logits * a.head_scale, a.logit_cap)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a text, token by token.

        Args:
            ids:
                Its tokens; the last ``context`` of them are seen.
            tokens:
                How many to add.
            temperature:
                Under 1 the likely tokens get likelier; 0 takes the likeliest always.
            top_k:
                How many of the likeliest are drawn from; all if None.
            generator:
                Where the draws come from.

        Shape:
            - ids: ``(length,)``; Output: ``(length + tokens,)``.
        """
        self.eval()
        for _ in range(tokens):
            logits = self(ids[None, -self.architecture.context :])[0, -1]
            if temperature == 0:
                chosen = logits.argmax()[None]
            else:
                logits = logits / temperature
                if top_k is not None and top_k < len(logits):
                    least = logits.topk(top_k).values[-1]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, chosen])
        return ids
