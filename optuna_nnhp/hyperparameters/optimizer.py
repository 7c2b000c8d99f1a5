"""Optimization algorithms: torch.optim's update rules, for many members at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import functools
import math

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.record import Hyperparameter

EPSILON = 1e-8  # torch.optim's default for Adam, AdamW and RMSprop

OPTIMIZER = Hyperparameter(
    name="optimizer",
    distribution=CategoricalDistribution(("sgd", "nesterov", "adam", "adamw", "rmsprop")),
    default="adamw",
    levels=("sgd", "adam", "adamw", "rmsprop"),
    task="table",
    help="sgd and nesterov (with momentum) want a larger rate and a schedule; adam, adamw and "
    "rmsprop scale each weight's step and are easier to set.",
)
MOMENTUM = Hyperparameter(
    name="momentum",
    distribution=FloatDistribution(0.5, 0.99),
    default=0.9,
    levels=(0.5, 0.9, 0.99),
    domain=(0.0, 0.9999),
    changes=True,
    help="How much of the last step is kept: momentum of sgd, nesterov and rmsprop, beta1 of "
    "adam and adamw.",
)
SQUARED_DECAY = Hyperparameter(
    name="squared_decay",
    distribution=FloatDistribution(0.9, 0.999),
    default=0.999,
    levels=(0.95, 0.999),
    domain=(0.0, 0.999999),
    changes=True,
    only_with={"optimizer": ("adam", "adamw", "rmsprop", "muon")},
    help="How slowly the running mean of squared gradients forgets: beta2 of adam and adamw, "
    "alpha of rmsprop; sgd and nesterov have none.",
)


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one member's update, besides its learning rate.

    Args:
        momentum:
            See `MOMENTUM`.
        squared_decay:
            See `SQUARED_DECAY`.
    """

    momentum: float
    squared_decay: float


class Row:
    """What the updates of one member read and change.

    Args:
        weight:
            Parameters.
        grad:
            Their gradients; may be overwritten.
        first:
            Momentum buffer (sgd, nesterov, rmsprop) or mean of gradients (adam, adamw); zeros at
            the start.
        second:
            Mean of squared gradients; zeros at the start, unused by sgd and nesterov.
        step:
            Number of this update, from 1.

    Shape:
        - weight, grad, first, second: the same, any; step: ``()``.
    """

    def __init__(
        self, weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor
    ) -> None:
        self.weight, self.grad, self.first, self.second = weight, grad, first, second
        # As torch's fused kernels want them: lists, here of one tensor each.
        self.lists = [weight], [grad], [first], [second], [step]


def _sgd(row: Row, rate: float, c: Coefficients, nesterov: bool = False) -> None:
    weights, grads, firsts, _, _ = row.lists
    torch._fused_sgd_(
        weights,
        grads,
        firsts if c.momentum else [],
        lr=rate,
        momentum=c.momentum,
        weight_decay=0.0,
        nesterov=nesterov and c.momentum > 0,
        dampening=0.0,
        maximize=False,
        is_first_step=False,
    )


def _nesterov(row: Row, rate: float, c: Coefficients) -> None:
    _sgd(row, rate, c, nesterov=True)


def _adam(row: Row, rate: float, c: Coefficients) -> None:
    weights, grads, firsts, seconds, steps = row.lists
    torch._fused_adamw_(
        weights,
        grads,
        firsts,
        seconds,
        [],
        steps,
        lr=rate,
        beta1=c.momentum,
        beta2=c.squared_decay,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def _rmsprop(row: Row, rate: float, c: Coefficients) -> None:
    _, grads, firsts, seconds, steps = row.lists
    row.second.mul_(_number(c.squared_decay, row.weight.dtype))
    row.first.mul_(_number(c.momentum, row.weight.dtype))
    # Adagrad's kernel adds the squares of its gradients to the running sum and then steps by
    # gradient / (sqrt(sum) + eps): rmsprop's increment, once the gradients are scaled. It took
    # 5 us where seven eager operations took 26 (4,672 parameters).
    share = math.sqrt(1 - c.squared_decay)
    row.grad.mul_(_number(share, row.weight.dtype))
    torch._fused_adagrad_(
        firsts,
        grads,
        seconds,
        steps,
        lr=-1 / share,
        lr_decay=0.0,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )
    row.weight.add_(row.first, alpha=-rate)


@functools.lru_cache(maxsize=4096)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor; torch makes one anew for each product, which takes longer than it."""
    return torch.tensor(value, dtype=dtype)


# torch's fused kernels do one pass over memory where eager formulas do ten; on a stack of 32
# networks of 2 x 256 units they took 2.7 ms against 17 ms (one thread).
UPDATES: dict[str, Callable[[Row, float, Coefficients], None]] = {
    "sgd": _sgd,
    "nesterov": _nesterov,
    "adam": _adam,
    "adamw": _adam,
    "rmsprop": _rmsprop,
}


def update(optimizer: str, row: Row, rate: float, coefficients: Coefficients) -> None:
    """One step of one algorithm, in place, for one member; see `decay_weights` for weight decay.

    Args:
        optimizer:
            A choice of `optimizer`.
        row:
            What is updated.
        rate:
            Learning rate at this step.
        coefficients:
            Its other numbers.

    Example:
        >>> weight, grad = torch.zeros(1), torch.ones(1)
        >>> row = Row(weight, grad, torch.zeros(1), torch.zeros(1), torch.tensor(1.0))
        >>> update("sgd", row, 0.1, Coefficients(0.0, 0.0))
        >>> weight
        tensor([-0.1000])

    Source:
        The formulas in the documentation of torch.optim.SGD, Adam, AdamW and RMSprop, which
        the tests use as the oracle; the kernels are those of ``torch.optim.AdamW(fused=True)``.
    """
    UPDATES[optimizer](row, rate, coefficients)
