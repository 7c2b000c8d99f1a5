"""Loss functions, which training minimizes; trials are compared by the study's metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.spec import Hyperparameter

LOSS_CLASSIFICATION = Hyperparameter(
    name="loss",
    distribution=CategoricalDistribution(("cross_entropy", "focal")),
    default="cross_entropy",
    grid_values=("cross_entropy", "focal"),
    task="classification",
    help="cross_entropy: the standard; focal: gives less weight to examples that are classified "
    "with confidence, for rare classes.",
)
FOCAL_GAMMA = Hyperparameter(
    name="focal_gamma",
    distribution=FloatDistribution(0.5, 5.0),
    default=2.0,
    grid_values=(1.0, 2.0),
    domain=(0.0, 20.0),
    mutable=True,
    task="classification",
    active_if={"loss": ("focal",)},
    help="How strongly the focal loss reduces the weight of easy examples (0 is cross-entropy).",
)
LOSS_REGRESSION = Hyperparameter(
    name="loss",
    distribution=CategoricalDistribution(("mse", "mae", "huber")),
    default="mse",
    grid_values=("mse", "mae", "huber"),
    task="regression",
    help="mse: squared error, dominated by large errors; mae: absolute error, robust to outliers; "
    "huber: squared up to `huber_delta`, linear beyond.",
)
HUBER_DELTA = Hyperparameter(
    name="huber_delta",
    distribution=FloatDistribution(0.1, 10.0, log=True),
    default=1.0,
    grid_values=(0.1, 1.0),
    domain=(1e-6, 1e6),
    mutable=True,
    task="regression",
    active_if={"loss": ("huber",)},
    help="Error at which huber changes from squared to linear, in standard deviations of y.",
)


MIN_ERROR_PROBABILITY = 1e-7  # lower bound of 1 - p in the focal loss


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy and focal loss with label smoothing, for each member of a stack.

    Args:
        gamma:
            Exponent of the focal loss of each member; 0 for cross-entropy.
        smoothing:
            Label smoothing of each member.

    Shape:
        - All arguments: ``(k,)``.

    Example:
        >>> loss = ClassificationLoss(gamma=torch.tensor([0.0]), smoothing=torch.tensor([0.0]))
        >>> loss(torch.zeros(1, 3, 2), torch.tensor([0, 1, 1]))
        tensor([0.6931])

    Source:
        Lin et al. 2017 (focal loss, arXiv:1708.02002); Szegedy et al. 2016 (label smoothing,
        arXiv:1512.00567), as `torch.nn.functional.cross_entropy` computes it.
    """

    gamma: Tensor
    smoothing: Tensor

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of each member.

        Shape:
            - outputs: logits ``(k, batch, classes)``.
            - target: class indices ``(batch,)``, or ``(k, batch)`` when members see different
              examples.
            - Output: ``(k,)``.
        """
        out: Tensor = _ClassificationLossFunction.apply(  # type: ignore[no-untyped-call]
            outputs, target, self.smoothing[:, None], self.gamma[:, None]
        )
        return out


class _ClassificationLossFunction(torch.autograd.Function):
    """Computes the loss and its gradient in one pass.

    The twenty small operations of autograd took 15 of 85 us per step of one model (64 networks of
    2 x 64 units, batch 32).
    """

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, target: Tensor, smoothing: Tensor, gamma: Tensor
    ) -> Tensor:
        log_p = torch.log_softmax(outputs, dim=-1)
        index = target.expand(outputs.shape[:2]).unsqueeze(-1)
        log_p_target = log_p.gather(-1, index).squeeze(-1)  # (k, batch)
        any_smoothing = bool((smoothing > 0).any())
        loss = -log_p_target
        if any_smoothing:
            loss = torch.lerp(loss, -log_p.mean(-1), smoothing)
        # The focal factor (1 - p) ** gamma, and the part of the gradient that comes from it.
        factor, factor_grad = torch.ones_like(gamma), torch.zeros_like(gamma)
        if bool((gamma > 0).any()):
            error = -torch.expm1(log_p_target)  # 1 - p
            # For gamma < 1 the derivative of the factor is infinite at p = 1.
            bounded = error.clamp_min(MIN_ERROR_PROBABILITY)
            factor = bounded.pow(gamma)
            p_target, is_inside = log_p_target.exp(), error >= MIN_ERROR_PROBABILITY
            factor_grad = loss * gamma * factor / bounded * p_target * is_inside
            loss = loss * factor
        if ctx.needs_input_grad[0]:
            logits_grad = log_p.exp_().mul_((factor + factor_grad).unsqueeze(-1))
            target_grad = torch.addcmul(factor_grad, factor, 1 - smoothing).neg_()
            target_grad = target_grad.expand_as(log_p_target)
            logits_grad.scatter_add_(-1, index, target_grad.unsqueeze(-1))
            if any_smoothing:
                classes = logits_grad.shape[-1]
                logits_grad.sub_((factor * smoothing / classes).unsqueeze(-1))
            ctx.save_for_backward(logits_grad.div_(logits_grad.shape[1]))
        return loss.mean(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logits_grad,) = ctx.saved_tensors
        return logits_grad * grad[:, None, None], None, None, None


@dataclass(frozen=True)
class RegressionLoss:
    """Squared, absolute and Huber loss, for each member of a stack.

    Args:
        delta:
            Error at which the Huber loss becomes linear; the other two losses ignore it.
        is_mse:
            Whether the member has the squared loss.
        is_mae:
            Whether the member has the absolute loss; the others have the Huber loss.

    Shape:
        - All arguments: ``(k,)``.

    Example:
        >>> yes, no = torch.tensor([True]), torch.tensor([False])
        >>> loss = RegressionLoss(delta=torch.tensor([1.0]), is_mse=yes, is_mae=no)
        >>> loss(torch.zeros(1, 2, 1), torch.tensor([1.0, 3.0]))
        tensor([5.])
    """

    delta: Tensor
    is_mse: Tensor
    is_mae: Tensor

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of each member.

        Shape:
            - outputs: ``(k, batch, 1)``.
            - target: ``(batch,)``, or ``(k, batch)`` when members see different examples.
            - Output: ``(k,)``.
        """
        masks = self.is_mse[:, None], self.is_mae[:, None]
        out: Tensor = _RegressionLossFunction.apply(  # type: ignore[no-untyped-call]
            outputs, target, self.delta[:, None], *masks
        )
        return out


class _RegressionLossFunction(torch.autograd.Function):
    """Computes regression losses and their gradient in one pass."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, target: Tensor, delta: Tensor, is_mse: Tensor, is_mae: Tensor
    ) -> Tensor:
        error = outputs.squeeze(-1) - target
        size = error.abs()
        huber = torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))
        loss = torch.where(is_mse, error.square(), torch.where(is_mae, size, huber))
        if ctx.needs_input_grad[0]:
            error_grad = torch.where(is_mae, error.sign(), error.clamp(-delta, delta))
            error_grad = torch.where(is_mse, 2 * error, error_grad)
            ctx.save_for_backward(error_grad.div_(error_grad.shape[1]))
        return loss.mean(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (error_grad,) = ctx.saved_tensors
        return (error_grad * grad[:, None]).unsqueeze(-1), None, None, None, None


Loss = ClassificationLoss | RegressionLoss
