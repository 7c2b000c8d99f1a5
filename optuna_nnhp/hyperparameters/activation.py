"""Activation functions, each with what speaks for and against it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from optuna.distributions import CategoricalDistribution
import torch
from torch import Tensor
from torch import nn
from torch.nn.init import calculate_gain

from optuna_nnhp.hyperparameters.spec import Hyperparameter

aten = torch.ops.aten

Forward = Callable[[Tensor, Tensor], Any]  # (x, out): writes f(x)
Backward = Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # (grad, x, y, out): writes grad f'(x)


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Args:
        module:
            Makes the plain `torch.nn` module.
        forward:
            torch's own kernel, ``(x, out)``: writes the function of x into ``out``.
        backward:
            torch's own kernel, ``(grad, x, y, out)``: writes ``grad`` times the slope, from x or
            from the function's value y, into ``out``, which may be ``grad`` itself.
        gain:
            Factor on the initial weights that keeps the signal's size: `torch.nn.init`'s where
            it has one, else ``1 / sqrt(E[f(z)^2])`` for standard normal z (a test integrates it).
        pros:
            What speaks for it.
        cons:
            What speaks against it.
    """

    module: Callable[[], nn.Module]
    forward: Forward
    backward: Backward
    gain: float
    pros: str
    cons: str


LEAKY_SLOPE = 0.01
# alpha and scale in Klambauer et al. 2017 (arXiv:1706.02515), as `torch.nn.SELU`.
SELU = (1.6732632423543772, 1.0507009873554805)


# tanh(softplus(x)) = n / (n + 2) with n = e^x (e^x + 2): one exponential and a few products take
# a fifth of the time of torch's kernels.
MISH_LINEAR = 20.0  # from here on the factor is 1 in float64 too


def _mish_factor(x: Tensor) -> Tensor:
    e = x.clamp(max=MISH_LINEAR).exp_()
    n = (e + 2).mul_(e)
    return n.div_(n + 2)


def _mish_slope(x: Tensor) -> Tensor:
    """``factor + x (1 - factor^2) sigmoid(x)``."""
    factor = _mish_factor(x)
    return torch.addcmul(factor, (1 - factor.square()).mul_(x), x.sigmoid())


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        nn.ReLU,
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda grad, x, y, out: aten.threshold_backward.grad_input(grad, y, 0, grad_input=out),
        calculate_gain("relu"),
        "fast, sparse, the safe default",
        "units with negative input stop learning (dead units)",
    ),
    "leaky_relu": Activation(
        lambda: nn.LeakyReLU(LEAKY_SLOPE),
        lambda x, out: aten.leaky_relu.out(x, LEAKY_SLOPE, out=out),
        lambda grad, x, y, out: aten.leaky_relu_backward.grad_input(
            grad, x, LEAKY_SLOPE, False, grad_input=out
        ),
        calculate_gain("leaky_relu", LEAKY_SLOPE),
        "relu without dead units",
        "its slope is one more arbitrary number; seldom clearly better",
    ),
    "tanh": Activation(
        nn.Tanh,
        lambda x, out: torch.tanh(x, out=out),
        lambda grad, x, y, out: aten.tanh_backward.grad_input(grad, y, grad_input=out),
        calculate_gain("tanh"),
        "bounded and centred on zero; good in shallow networks",
        "saturates: gradients vanish in deep ones",
    ),
    "sigmoid": Activation(
        nn.Sigmoid,
        lambda x, out: torch.sigmoid(x, out=out),
        lambda grad, x, y, out: aten.sigmoid_backward.grad_input(grad, y, grad_input=out),
        calculate_gain("sigmoid"),
        "outputs read as probabilities",
        "saturates and is not centred: the slowest to train when deep",
    ),
    "elu": Activation(
        nn.ELU,
        lambda x, out: aten.elu.out(x, out=out),
        lambda grad, x, y, out: aten.elu_backward.grad_input(
            grad, 1, 1, 1, True, y, grad_input=out
        ),
        1.2452,
        "smooth for negative inputs, mean near zero",
        "exponential costs time; saturates on the left",
    ),
    "selu": Activation(
        nn.SELU,
        lambda x, out: aten.elu.out(x, *SELU, out=out),
        lambda grad, x, y, out: aten.elu_backward.grad_input(
            grad, *SELU, 1, True, y, grad_input=out
        ),
        calculate_gain("selu"),
        "normalizes itself in plain deep networks",
        "only with matching initialization, and not together with dropout",
    ),
    "gelu": Activation(
        nn.GELU,
        lambda x, out: aten.gelu.out(x, out=out),
        lambda grad, x, y, out: aten.gelu_backward.grad_input(grad, x, grad_input=out),
        1.5335,
        "smooth; the habit of transformers",
        "several times the cost of relu on a CPU",
    ),
    "silu": Activation(
        nn.SiLU,
        lambda x, out: aten.silu.out(x, out=out),
        lambda grad, x, y, out: aten.silu_backward.grad_input(grad, x, grad_input=out),
        1.6765,
        "smooth, often better than relu in deep networks",
        "costs an exponential; not monotonic",
    ),
    "mish": Activation(
        nn.Mish,
        lambda x, out: torch.mul(x, _mish_factor(x), out=out),
        lambda grad, x, y, out: torch.mul(grad, _mish_slope(x), out=out),
        1.4868,
        "smooth; strong in tuned tabular networks",
        "the most expensive of these",
    ),
}

ACTIVATION = Hyperparameter(
    name="activation",
    distribution=CategoricalDistribution(tuple(ACTIVATIONS)),
    default="relu",
    grid_values=("relu", "tanh", "gelu"),
    task="table",
    help="Function after every hidden layer; relu is fast and safe, smooth ones (gelu, silu, "
    "mish) cost more and are often a little better.",
)


def activation_groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Count how many members in a row have the same activation.

    Example:
        >>> activation_groups(["relu", "relu", "tanh"])
        [('relu', 2), ('tanh', 1)]
    """
    return [(name, len(list(members))) for name, members in groupby(names)]


def activate(h: Tensor, groups: Sequence[tuple[str, int]], keep: Tensor | None = None) -> Tensor:
    """Apply to each member of a stack its own activation.

    Args:
        h:
            What the layer computed.
        groups:
            The members' activations in their order, from `activation_groups`: the fewer groups,
            the faster.
        keep:
            Factor on the result: dropout, or the units that are real.

    Shape:
        - Input, output: ``(k, batch, width)``; keep: broadcasts to it.

    Example:
        >>> h = torch.tensor([[[-1.0]], [[0.5]]])
        >>> activate(h, [("relu", 1), ("tanh", 1)]).flatten()
        tensor([0.0000, 0.4621])
    """
    out: Tensor = _ActivateFunction.apply(h, groups, keep)  # type: ignore[no-untyped-call]
    return out


class _ActivateFunction(torch.autograd.Function):
    """Applies activations and their factor at once, without intermediate tensors.

    Autograd's own graph of slices, concatenation and products took three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: Sequence[tuple[str, int]], keep: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        for (name, _), part, out in _group_slices(groups, x, y):
            ACTIVATIONS[name].forward(part, out)
        ctx.groups = groups
        ctx.save_for_backward(x, y, keep)
        return y if keep is None else y * keep

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, y, keep = ctx.saved_tensors
        out = torch.empty_like(grad)
        if keep is not None:
            grad = torch.mul(grad, keep, out=out)
        for (name, _), *parts in _group_slices(ctx.groups, grad, x, y, out):
            ACTIVATIONS[name].backward(*parts)
        return out, None, None


def _group_slices(groups: Sequence[tuple[str, int]], *stacks: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each group with its slice of every stack."""
    counts = [count for _, count in groups]
    return zip(groups, *(stack.split(counts) for stack in stacks), strict=True)
