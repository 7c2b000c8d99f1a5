"""Activation functions, with their advantages and disadvantages."""

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
            A torch kernel ``(x, out)`` that writes the function of x into ``out``.
        backward:
            A torch kernel ``(grad, x, y, out)`` that writes ``grad`` times the derivative into
            ``out``, which may be ``grad`` itself; y is the function's value at x.
        gain:
            Factor of the initial weights that keeps the variance of activations: that of
            `torch.nn.init` if it has one, else ``1 / sqrt(E[f(z)^2])`` for standard normal z.
        pros:
            Advantages.
        cons:
            Disadvantages.
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


# Mish is x * tanh(softplus(x)), and tanh(softplus(x)) = n / (n + 2) with n = e^x (e^x + 2). One
# exponential and a few products take a fifth of the time of torch's kernels.
MISH_LINEAR = 20.0  # above this x the factor rounds to 1, even in float64


def _mish_factor(x: Tensor) -> Tensor:
    e = x.clamp(max=MISH_LINEAR).exp_()
    n = (e + 2).mul_(e)
    return n.div_(n + 2)


def _mish_slope(x: Tensor) -> Tensor:
    """Return the derivative of Mish, ``factor + x (1 - factor^2) sigmoid(x)``."""
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
        "its slope is an arbitrary constant; rarely clearly better than relu",
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
        "outputs can be read as probabilities",
        "saturates and is not zero-centred: the slowest to train in deep networks",
    ),
    "elu": Activation(
        nn.ELU,
        lambda x, out: aten.elu.out(x, out=out),
        lambda grad, x, y, out: aten.elu_backward.grad_input(
            grad, 1, 1, 1, True, y, grad_input=out
        ),
        1.2452,
        "smooth for negative inputs, mean near zero",
        "the exponential costs time; saturates for negative inputs",
    ),
    "selu": Activation(
        nn.SELU,
        lambda x, out: aten.elu.out(x, *SELU, out=out),
        lambda grad, x, y, out: aten.elu_backward.grad_input(
            grad, *SELU, 1, True, y, grad_input=out
        ),
        calculate_gain("selu"),
        "normalizes itself in plain deep networks",
        "needs matching initialization; does not work with dropout",
    ),
    "gelu": Activation(
        nn.GELU,
        lambda x, out: aten.gelu.out(x, out=out),
        lambda grad, x, y, out: aten.gelu_backward.grad_input(grad, x, grad_input=out),
        1.5335,
        "smooth; the usual choice for transformers",
        "several times the cost of relu on a CPU",
    ),
    "silu": Activation(
        nn.SiLU,
        lambda x, out: aten.silu.out(x, out=out),
        lambda grad, x, y, out: aten.silu_backward.grad_input(grad, x, grad_input=out),
        1.6765,
        "smooth, often better than relu in deep networks",
        "the exponential costs time; not monotonic",
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
    help="Function after every hidden layer. relu is fast and reliable; smooth ones (gelu, silu, "
    "mish) cost more and are often slightly better.",
)


def activation_groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return runs of consecutive members with the same activation, with their lengths.

    Example:
        >>> activation_groups(["relu", "relu", "tanh"])
        [('relu', 2), ('tanh', 1)]
    """
    return [(name, len(list(members))) for name, members in groupby(names)]


def activate(h: Tensor, groups: Sequence[tuple[str, int]], keep: Tensor | None = None) -> Tensor:
    """Apply its own activation to each member of a stack.

    Args:
        h:
            The outputs of the layer.
        groups:
            The members' activations in order, from `activation_groups`; fewer groups are faster.
        keep:
            Factor of the result: dropout, or a mask that is 0 for padded units.

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
    """Applies the activations and the factor at once, without intermediate tensors.

    A graph of slices, concatenation and products by autograd took three times as long.
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
