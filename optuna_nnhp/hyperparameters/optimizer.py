"""Optimization algorithms: torch.optim's update rules, for many members at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from torch import Tensor

from optuna_nnhp.hyperparameters.record import Hyperparameter

EPSILON = 1e-8  # torch.optim's default for Adam, AdamW and RMSprop

OPTIMIZER = Hyperparameter(
    name="optimizer",
    distribution=CategoricalDistribution(("sgd", "nesterov", "adam", "adamw", "rmsprop")),
    default="adamw",
    levels=("sgd", "adam", "adamw", "rmsprop"),
    help="sgd and nesterov (with momentum) want a larger rate and a schedule; adam, adamw and "
    "rmsprop scale each weight's step and are easier to set.",
)
MOMENTUM = Hyperparameter(
    name="momentum",
    distribution=FloatDistribution(0.5, 0.99),
    default=0.9,
    levels=(0.0, 0.9, 0.99),
    domain=(0.0, 0.9999),
    help="How much of the last step is kept: momentum of sgd, nesterov and rmsprop, beta1 of "
    "adam and adamw.",
)
SQUARED_DECAY = Hyperparameter(
    name="squared_decay",
    distribution=FloatDistribution(0.9, 0.999),
    default=0.999,
    levels=(0.95, 0.999),
    domain=(0.0, 0.999999),
    help="How slowly the running mean of squared gradients forgets: beta2 of adam and adamw, "
    "alpha of rmsprop; sgd and nesterov have none.",
)


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one update, per member.

    Args:
        rate:
            Learning rate at this step.
        momentum:
            See `MOMENTUM`.
        squared_decay:
            See `SQUARED_DECAY`.
        weight_decay:
            L2 coefficient; 0 for tensors that are not decayed (biases, normalization).
        step:
            Number of this update, from 1, as a float.

    Shape:
        - All arguments: broadcast against the parameter, as ``(k, 1, 1)`` does.
    """

    rate: Tensor
    momentum: Tensor
    squared_decay: Tensor
    weight_decay: Tensor
    step: Tensor


# (weight, gradient, first, second, coefficients); all but the coefficients change in place.
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Coefficients], None]


def _sgd(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, c: Coefficients) -> None:
    grad.addcmul_(weight, c.weight_decay)
    first.mul_(c.momentum).add_(grad)
    weight.sub_(c.rate * first)


def _nesterov(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, c: Coefficients
) -> None:
    grad.addcmul_(weight, c.weight_decay)
    first.mul_(c.momentum).add_(grad)
    weight.sub_(c.rate * grad.addcmul_(first, c.momentum))


def _adam(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, c: Coefficients) -> None:
    grad.addcmul_(weight, c.weight_decay)
    _adam_step(weight, grad, first, second, c)


def _adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, c: Coefficients) -> None:
    weight.mul_(1 - c.rate * c.weight_decay)
    _adam_step(weight, grad, first, second, c)


def _adam_step(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, c: Coefficients
) -> None:
    first.lerp_(grad, (1 - c.momentum).expand_as(grad))
    second.mul_(c.squared_decay).addcmul_((1 - c.squared_decay) * grad, grad)
    correction = (1 - c.squared_decay.double() ** c.step).sqrt().to(weight.dtype)
    rate = (c.rate / (1 - c.momentum.double() ** c.step)).to(weight.dtype)
    weight.sub_((second.sqrt().div_(correction).add_(EPSILON)).reciprocal_().mul_(first) * rate)


def _rmsprop(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, c: Coefficients) -> None:
    grad.addcmul_(weight, c.weight_decay)
    second.mul_(c.squared_decay).addcmul_((1 - c.squared_decay) * grad, grad)
    first.mul_(c.momentum).addcdiv_(grad, second.sqrt().add_(EPSILON))
    weight.sub_(c.rate * first)


UPDATES: dict[str, Update] = {
    "sgd": _sgd,
    "nesterov": _nesterov,
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
}


def update(
    optimizer: str,
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    coefficients: Coefficients,
) -> None:
    """One step of one algorithm, in place, for members that share the algorithm.

    Args:
        optimizer:
            A choice of `optimizer`.
        weight:
            The parameters.
        grad:
            Their gradients; overwritten.
        first:
            Momentum buffer (sgd, nesterov, rmsprop) or mean of gradients (adam, adamw); zeros
            at the start.
        second:
            Mean of squared gradients; zeros at the start, untouched by sgd and nesterov.
        coefficients:
            See `Coefficients`.

    Shape:
        - weight, grad, first, second: ``(k, ...)``.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> weight = torch.zeros(1, 1)
        >>> c = Coefficients(0.1 * one, 0 * one, 0 * one, 0 * one, one)
        >>> update("sgd", weight, torch.ones(1, 1), 0 * one, 0 * one, c)
        >>> weight
        tensor([[-0.1000]])

    Source:
        The formulas in the documentation of torch.optim.SGD, Adam, AdamW and RMSprop, which
        the tests use as the oracle.
    """
    UPDATES[optimizer](weight, grad, first, second, coefficients)
