"""Activation functions, each with what speaks for and against it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from optuna.distributions import CategoricalDistribution
import torch
from torch import Tensor
from torch import nn
from torch.nn.init import calculate_gain

from optuna_nnhp.hyperparameters.record import Hyperparameter


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Args:
        module:
            Makes the plain `torch.nn` module.
        gain:
            Factor on the initial weights that keeps the signal's size: `torch.nn.init`'s where
            it has one, else ``1 / sqrt(E[f(z)^2])`` for standard normal z (a test integrates it).
        pros:
            What speaks for it.
        cons:
            What speaks against it.
    """

    module: Callable[[], nn.Module]
    gain: float
    pros: str
    cons: str


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        nn.ReLU,
        calculate_gain("relu"),
        "fast, sparse, the safe default",
        "units with negative input stop learning (dead units)",
    ),
    "leaky_relu": Activation(
        lambda: nn.LeakyReLU(0.01),
        calculate_gain("leaky_relu", 0.01),
        "relu without dead units",
        "its slope is one more arbitrary number; seldom clearly better",
    ),
    "tanh": Activation(
        nn.Tanh,
        calculate_gain("tanh"),
        "bounded and centred on zero; good in shallow networks",
        "saturates: gradients vanish in deep ones",
    ),
    "sigmoid": Activation(
        nn.Sigmoid,
        calculate_gain("sigmoid"),
        "outputs read as probabilities",
        "saturates and is not centred: the slowest to train when deep",
    ),
    "elu": Activation(
        nn.ELU,
        1.2452,
        "smooth for negative inputs, mean near zero",
        "exponential costs time; saturates on the left",
    ),
    "selu": Activation(
        nn.SELU,
        calculate_gain("selu"),
        "normalizes itself in plain deep networks",
        "only with matching initialization, and not together with dropout",
    ),
    "gelu": Activation(
        nn.GELU,
        1.5335,
        "smooth; the habit of transformers",
        "several times the cost of relu on a CPU",
    ),
    "silu": Activation(
        nn.SiLU,
        1.6765,
        "smooth, often better than relu in deep networks",
        "costs an exponential; not monotonic",
    ),
    "mish": Activation(
        nn.Mish,
        1.4868,
        "smooth; strong in tuned tabular networks",
        "the most expensive of these",
    ),
}

ACTIVATION = Hyperparameter(
    name="activation",
    distribution=CategoricalDistribution(tuple(ACTIVATIONS)),
    default="relu",
    levels=("relu", "tanh", "gelu"),
    help="Function after every hidden layer; relu is fast and safe, smooth ones (gelu, silu, "
    "mish) cost more and are often a little better.",
)


def activation_groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """How many members of a stack in a row have the same activation.

    Example:
        >>> activation_groups(["relu", "relu", "tanh"])
        [('relu', 2), ('tanh', 1)]
    """
    return [(name, len(list(members))) for name, members in groupby(names)]


def activate(h: Tensor, groups: Sequence[tuple[str, int]]) -> Tensor:
    """Apply to each member of a stack its own activation.

    Args:
        h:
            What the layer computed.
        groups:
            The members' activations in their order, from `activation_groups`: the fewer groups,
            the faster.

    Shape:
        - Input, output: ``(k, batch, width)``.

    Example:
        >>> h = torch.tensor([[[-1.0]], [[0.5]]])
        >>> activate(h, [("relu", 1), ("tanh", 1)]).flatten()
        tensor([0.0000, 0.4621])
    """
    if len(groups) == 1:
        return FUNCTIONS[groups[0][0]](h)
    parts = torch.split(h, [count for _, count in groups])
    return torch.cat([FUNCTIONS[n](part) for (n, _), part in zip(groups, parts, strict=True)])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: activation.module() for name, activation in ACTIVATIONS.items()
}
