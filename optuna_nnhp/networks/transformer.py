"""What GPTs are made of, one function each; stacked and plain networks are built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-5
ROTARY_BASE = 10_000.0  # Su et al. 2021 (arXiv:2104.09864)
NORMAL_STD = 0.02  # of GPT-2's first weights
BASE_HEAD = 16  # head size at which muP's attention has the standard scale


@dataclass(frozen=True)
class Architecture:
    """What fixes the shapes and the graph of a GPT; equal ones can be stacked.

    Args:
        vocabulary:
            Tokens that there are.
        layers:
            Blocks of attention and feed-forward.
        heads:
            Heads of attention.
        head_size:
            Channels of a head; the model's width is heads times this.
        context:
            Tokens that are seen at once, at most.
        positions:
            ``"learned"`` (GPT) or ``"rotary"`` (Su et al. 2021, arXiv:2104.09864).
        normalization:
            ``"layer"``: LayerNorm without parameters; ``"layer-gain"``: with a gain, as in
            nanoGPT; ``"rms"``: RMSNorm without parameters (arXiv:1910.07467).
        qk_norm:
            Whether queries and keys are normalized (arXiv:2010.04245).
        feed_forward:
            ``"gelu"``, ``"relu2"`` (squared ReLU, arXiv:2109.08668) or ``"swiglu"``
            (arXiv:2002.05202).
        token_shift:
            Whether half the channels of what a block reads come from the token before (RWKV,
            arXiv:2305.13048).
        tied_head:
            Whether the embedding's weights are the output layer's too (arXiv:1608.05859).
        logit_cap:
            Largest logit, by tanh (Gemma 2, arXiv:2408.00118); 0 for none.
        width_ratio:
            muP: the width over the width that rates are given for; 0 for the standard
            parametrization. See `templates.gpt`.

    Example:
        >>> Architecture(65, 2, 4, 16, 64).width
        64
    """

    vocabulary: int
    layers: int
    heads: int
    head_size: int
    context: int
    positions: str = "rotary"
    normalization: str = "layer"
    qk_norm: bool = False
    feed_forward: str = "relu2"
    token_shift: bool = False
    tied_head: bool = False
    logit_cap: float = 0.0
    width_ratio: float = 0.0

    @classmethod
    def from_params(cls, params: Mapping[str, Any], vocabulary: int) -> Architecture:
        """Return the architecture of a trial's hyperparameters."""
        mup, width = params["parametrization"] == "mup", params["heads"] * params["head_size"]
        return cls(
            vocabulary=vocabulary,
            layers=int(params["layers"]),
            heads=int(params["heads"]),
            head_size=int(params["head_size"]),
            context=int(params["context"]),
            positions=str(params["positions"]),
            normalization=str(params["normalization"]),
            qk_norm=bool(params["qk_norm"]),
            feed_forward=str(params["feed_forward"]),
            token_shift=bool(params["token_shift"]),
            tied_head=bool(params["tied_head"]),
            logit_cap=float(params["logit_cap"]),
            width_ratio=width / params["base_width"] if mup else 0.0,
        )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_size

    @property
    def inner(self) -> int:
        """Units of a feed-forward layer; a gated one has two thirds of them, in eights."""
        if self.feed_forward == "swiglu":
            return max(8, round(8 * self.width / 3 / 8) * 8)
        return 4 * self.width

    @property
    def attention_scale(self) -> float:
        """The factor of the products of queries and keys."""
        if self.width_ratio:
            return math.sqrt(BASE_HEAD) / self.head_size
        return 1 / math.sqrt(self.head_size)

    @property
    def head_scale(self) -> float:
        """The factor of the output layer's products."""
        return 1 / self.width_ratio if self.width_ratio else 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters of a `networks.gpt.GPT`; matrices ``(in, out)``.

        Example:
            >>> shapes = Architecture(65, 2, 4, 16, 64).shapes()
            >>> shapes["blocks.0.qkv"], shapes["head"], len(shapes)
            ((64, 192), (64, 65), 10)
        """
        width, inner = self.width, self.inner
        up = 2 * inner if self.feed_forward == "swiglu" else inner
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            block = {
                "qkv": (width, 3 * width),
                "out": (width, width),
                "up": (width, up),
                "down": (inner, width),
            }
            shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        shapes["embedding"] = (self.vocabulary, width)
        if self.positions == "learned":
            shapes["position"] = (self.context, width)
        if not self.tied_head:
            shapes["head"] = (width, self.vocabulary)
        if self.normalization == "layer-gain":
            for layer in range(self.layers):
                shapes |= {f"blocks.{layer}.gain{i}": (width,) for i in (1, 2)}
            shapes["gain"] = (width,)
        return shapes


def count_parameters(architecture: Architecture) -> int:
    """Return the number of trained weights.

    Example:
        >>> count_parameters(Architecture(50257, 12, 12, 64, 1024, "learned", tied_head=True))
        124318464
    """
    return sum(math.prod(shape) for shape in architecture.shapes().values())


def initial_weights(
    architecture: Architecture,
    weight_init: str,
    projection_init: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draw the initial weights of one GPT, by name.

    Args:
        architecture:
            Its shapes.
        weight_init:
            ``"gpt2"``: normal with 0.02; ``"fan-in"``: normal with one over the root of the
            inputs, embeddings with 0.02.
        projection_init:
            Of what a block adds to the residual stream: ``"zero"`` (and a head that is not tied
            too), ``"scaled"`` by one over the root of twice the layers (GPT-2), or ``"plain"``.
        generator:
            Where they come from.

    Source:
        Radford et al. 2019 (GPT-2); Zhang et al. 2019 (arXiv:1901.09321) for zeros; Yang et al.
        2022 (arXiv:2203.03466), table 8, for muP: the variance of hidden matrices falls with the
        width.
    """
    weights: dict[str, Tensor] = {}
    for name, shape in architecture.shapes().items():
        part = name.rsplit(".", 1)[-1]
        if part.startswith("gain"):
            weights[name] = torch.ones(shape)
            continue
        is_hidden = name.startswith("blocks.")
        std = NORMAL_STD
        if is_hidden or part == "head":
            if weight_init == "fan-in":
                # muP's head has the base width's, since its products are scaled.
                ratio = architecture.width_ratio if part == "head" else 0.0
                std = (shape[0] / (ratio or 1.0)) ** -0.5
            elif architecture.width_ratio and is_hidden:
                std *= architecture.width_ratio**-0.5
        is_projection = part in ("out", "down")
        if is_projection and projection_init == "scaled":
            std /= math.sqrt(2 * architecture.layers)
        drawn = torch.normal(0.0, std, shape, generator=generator)
        if projection_init == "zero" and (is_projection or part == "head"):
            drawn.zero_()
        weights[name] = drawn
    return weights


@functools.lru_cache(maxsize=64)
def rotary_angles(length: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the complex factors that rotate queries and keys, ``(length, 1, head_size / 2)``."""
    steps = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float64), ROTARY_BASE**-steps)
    turned = torch.polar(torch.ones_like(angles), angles)[:, None]
    return turned.to(torch.complex128 if dtype == torch.float64 else torch.complex64).to(device)


def apply_rotary(x: Tensor) -> Tensor:
    """Rotate each pair of channels by an angle proportional to the position.

    Shape:
        - x, Output: ``(n, length, heads, head_size)``.

    Example:
        >>> x = torch.arange(24.0).view(1, 3, 2, 4)
        >>> bool((apply_rotary(x)[:, 0] == x[:, 0]).all())  # nothing at the first position
        True

    Source:
        Su et al. 2021 (arXiv:2104.09864), with neighbouring channels as pairs.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    make = rotary_angles.__wrapped__ if torch.compiler.is_compiling() else rotary_angles
    turned = pairs * make(x.shape[1], x.shape[-1], x.dtype, x.device)
    return torch.view_as_real(turned).flatten(-2)


def causal_attention(qkv: Tensor, architecture: Architecture) -> Tensor:
    """Compute causal self-attention.

    Shape:
        - qkv: ``(n, length, 3 * width)``: queries, keys and values.
        - Output: ``(n, length, width)``.
    """
    heads, size = architecture.heads, architecture.head_size
    qk, v = qkv.unflatten(-1, (3 * heads, size)).split((2 * heads, heads), dim=2)
    if architecture.positions == "rotary":
        qk = apply_rotary(qk)
    if architecture.qk_norm:
        qk = rms_norm(qk)
    q, k = qk.split(heads, dim=2)
    mixed = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=architecture.attention_scale,
    )
    return mixed.transpose(1, 2).flatten(-2)


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply the activation of the feed-forward layer.

    Shape:
        - x: ``(..., up)``; Output: ``(..., inner)``, half of it for ``"swiglu"``.

    Example:
        >>> activate(torch.tensor([-1.0, 3.0]), "relu2"), activate(torch.ones(4), "swiglu").shape
        (tensor([0., 9.]), torch.Size([2]))
    """
    if kind == "relu2":
        squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    if kind == "gelu":
        return functional.gelu(x)
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def rms_norm(x: Tensor) -> Tensor:
    """Divide each vector by its root mean square.

    Source:
        Zhang and Sennrich 2019 (arXiv:1910.07467), without a gain.
    """
    out: Tensor = _RMSNorm.apply(x)  # type: ignore[no-untyped-call]
    return out


def token_shift(x: Tensor) -> Tensor:
    """Take half the channels of each token from the token before it; zero for the first.

    Shape:
        - x, Output: ``(n, length, width)``.

    Example:
        >>> token_shift(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[0., 2.],
                 [1., 4.]]])

    Source:
        RWKV (arXiv:2305.13048), with a fixed half instead of learned shares.
    """
    out: Tensor = _TokenShift.apply(x)  # type: ignore[no-untyped-call]
    return out


def cap_logits(logits: Tensor, largest: float) -> Tensor:
    """Bound logits smoothly by tanh; 0 leaves them unchanged."""
    return largest * torch.tanh(logits / largest) if largest else logits


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive: Tensor = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        back: Tensor = torch.mul(grad, positive).mul_(2)
        return back


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(size).add_(EPSILON).rsqrt_()
        out: Tensor = x * rstd
        ctx.save_for_backward(out, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out, rstd = ctx.saved_tensors
        along = (grad * out).mean(-1, keepdim=True)
        back: Tensor = torch.addcmul(grad, out, along, value=-1).mul_(rstd)
        return back


class _TokenShift(torch.autograd.Function):
    """Needs one pass over memory in each direction; slices and a concatenation need three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        half, out = x.shape[-1] // 2, torch.empty_like(x)
        out[..., half:] = x[..., half:]
        out[..., 1:, :half] = x[..., :-1, :half]
        out[..., 0, :half] = 0
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        half, back = grad.shape[-1] // 2, torch.empty_like(grad)
        back[..., half:] = grad[..., half:]
        back[..., :-1, :half] = grad[..., 1:, :half]
        back[..., -1, :half] = 0
        return back
