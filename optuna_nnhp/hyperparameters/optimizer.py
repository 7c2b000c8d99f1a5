"""Optimizers: the update rules of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import functools
import math

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.spec import Hyperparameter

EPSILON = 1e-8  # torch.optim's default for Adam, AdamW and RMSprop

OPTIMIZER = Hyperparameter(
    name="optimizer",
    distribution=CategoricalDistribution(("sgd", "nesterov", "adam", "adamw", "rmsprop")),
    default="adamw",
    grid_values=("sgd", "adam", "adamw", "rmsprop"),
    task="table",
    help="sgd and nesterov (with momentum) need a larger learning rate and a schedule; adam, "
    "adamw and rmsprop scale the step of each weight and are easier to tune.",
)
MOMENTUM = Hyperparameter(
    name="momentum",
    distribution=FloatDistribution(0.5, 0.99),
    default=0.9,
    grid_values=(0.5, 0.9, 0.99),
    domain=(0.0, 0.9999),
    mutable=True,
    help="Momentum of sgd, nesterov and rmsprop; beta1 of adam and adamw.",
)
BETA2 = Hyperparameter(
    name="beta2",
    distribution=FloatDistribution(0.9, 0.999),
    default=0.999,
    grid_values=(0.95, 0.999),
    domain=(0.0, 0.999999),
    mutable=True,
    active_if={"optimizer": ("adam", "adamw", "rmsprop", "muon")},
    help="Decay rate of the running mean of squared gradients: beta2 of adam and adamw, alpha of "
    "rmsprop; not used by sgd and nesterov.",
)


@dataclass(frozen=True)
class UpdateCoefficients:
    """The coefficients of one member's update rule, except the learning rate.

    Args:
        momentum:
            See `MOMENTUM`.
        beta2:
            See `BETA2`.
    """

    momentum: float
    beta2: float


class OptimizerState:
    """The tensors that an update of one member reads and changes.

    Args:
        weight:
            The parameters.
        grad:
            The gradients; may be overwritten.
        exp_avg:
            Momentum buffer (sgd, nesterov, rmsprop) or mean of gradients (adam, adamw); zeros at
            the start.
        exp_avg_sq:
            Mean of squared gradients; zeros at the start, unused by sgd and nesterov.
        step:
            The number of this update, from 1.

    Shape:
        - weight, grad, exp_avg, exp_avg_sq: equal, any; step: ``()``.
    """

    def __init__(
        self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor
    ) -> None:
        self.weight, self.grad, self.exp_avg, self.exp_avg_sq = weight, grad, exp_avg, exp_avg_sq
        # The fused kernels of torch take lists; here each has one tensor.
        self.lists = [weight], [grad], [exp_avg], [exp_avg_sq], [step]


def _sgd(
    state: OptimizerState, rate: float, c: UpdateCoefficients, nesterov: bool = False
) -> None:
    weights, grads, exp_avgs, _, _ = state.lists
    torch._fused_sgd_(
        weights,
        grads,
        exp_avgs if c.momentum else [],
        lr=rate,
        momentum=c.momentum,
        weight_decay=0.0,
        nesterov=nesterov and c.momentum > 0,
        dampening=0.0,
        maximize=False,
        is_first_step=False,
    )


def _nesterov(state: OptimizerState, rate: float, c: UpdateCoefficients) -> None:
    _sgd(state, rate, c, nesterov=True)


def _adam(state: OptimizerState, rate: float, c: UpdateCoefficients) -> None:
    weights, grads, exp_avgs, exp_avg_sqs, steps = state.lists
    torch._fused_adamw_(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=rate,
        beta1=c.momentum,
        beta2=c.beta2,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def _rmsprop(state: OptimizerState, rate: float, c: UpdateCoefficients) -> None:
    _, grads, exp_avgs, exp_avg_sqs, steps = state.lists
    state.exp_avg_sq.mul_(_scalar_tensor(c.beta2, state.weight.dtype))
    state.exp_avg.mul_(_scalar_tensor(c.momentum, state.weight.dtype))
    # Adagrad's kernel adds squared gradients to the running sum, then adds
    # lr * gradient / (sqrt(sum) + eps). With scaled gradients this is rmsprop's increment. It took
    # 5 us, and seven eager operations took 26 us (4,672 parameters).
    share = math.sqrt(1 - c.beta2)
    state.grad.mul_(_scalar_tensor(share, state.weight.dtype))
    torch._fused_adagrad_(
        exp_avgs,
        grads,
        exp_avg_sqs,
        steps,
        lr=-1 / share,
        lr_decay=0.0,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )
    state.weight.add_(state.exp_avg, alpha=-rate)


@functools.lru_cache(maxsize=4096)
def _scalar_tensor(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a cached tensor; torch would create a new one for each product."""
    return torch.tensor(value, dtype=dtype)


# Fused kernels of torch need one pass over memory, eager formulas ten: 2.7 ms and 17 ms on a stack
# of 32 networks of 2 x 256 units (one thread).
UPDATE_RULES: dict[str, Callable[[OptimizerState, float, UpdateCoefficients], None]] = {
    "sgd": _sgd,
    "nesterov": _nesterov,
    "adam": _adam,
    "adamw": _adam,
    "rmsprop": _rmsprop,
}


def optimizer_step(
    optimizer: str, state: OptimizerState, rate: float, coefficients: UpdateCoefficients
) -> None:
    """Do one optimizer step of one member, in place; weight decay is in `decay_weights`.

    Args:
        optimizer:
            One of the choices of `optimizer`.
        state:
            The tensors of the member; changed in place.
        rate:
            Learning rate at this step.
        coefficients:
            The other coefficients of the update rule.

    Example:
        >>> weight, grad = torch.zeros(1), torch.ones(1)
        >>> state = OptimizerState(weight, grad, torch.zeros(1), torch.zeros(1), torch.tensor(1.0))
        >>> optimizer_step("sgd", state, 0.1, UpdateCoefficients(0.0, 0.0))
        >>> weight
        tensor([-0.1000])

    Source:
        The formulas in the documentation of torch.optim.SGD, Adam, AdamW and RMSprop, which
        the tests compare with; the kernels are those of ``torch.optim.AdamW(fused=True)``.
    """
    UPDATE_RULES[optimizer](state, rate, coefficients)
