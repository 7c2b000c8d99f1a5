"""Loss functions: what training minimizes (the study's metric is what it is judged by)."""

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
    help="cross_entropy: the standard; focal: gives less weight to examples that are already "
    "right, for rare classes.",
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
    help="How strongly the focal loss turns away from easy examples (0 is cross-entropy).",
)
LOSS_REGRESSION = Hyperparameter(
    name="loss",
    distribution=CategoricalDistribution(("mse", "mae", "huber")),
    default="mse",
    grid_values=("mse", "mae", "huber"),
    task="regression",
    help="mse: large errors count most; mae: all alike, robust to outliers; huber: mse up to "
    "`huber_delta`, mae beyond.",
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
    help="Error at which huber turns from square to absolute, in standard deviations of y.",
)


MIN_ERROR_PROBABILITY = 1e-7  # of 1 - p


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy and focal loss with label smoothing, per member of a stack.

    Args:
        gamma:
            Focal exponent; 0 for members with cross-entropy.
        smoothing:
            Label smoothing.

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
    """Computes cross-entropy and its gradient in one pass.

    Autograd's twenty small operations took 15 us of a model-step of 85 (64 networks of 2 x 64
    units, batch 32).
    """

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, target: Tensor, smoothing: Tensor, gamma: Tensor
    ) -> Tensor:
        log_p = torch.log_softmax(outputs, dim=-1)
        index = target.expand(outputs.shape[:2]).unsqueeze(-1)
        right = log_p.gather(-1, index).squeeze(-1)  # (k, batch)
        smooth = bool((smoothing > 0).any())
        loss = torch.lerp(-right, -log_p.mean(-1), smoothing) if smooth else -right
        # Of the loss by its factor from focal, and of that factor by the logits:
        factor, inner = torch.ones_like(gamma), torch.zeros_like(gamma)
        if bool((gamma > 0).any()):
            wrong = -torch.expm1(right)
            # (1 - p) ** 0 has no finite slope at p = 1: kept away from it.
            near = wrong.clamp_min(MIN_ERROR_PROBABILITY)
            factor = near.pow(gamma)
            inner = loss * gamma * factor / near * right.exp() * (wrong >= MIN_ERROR_PROBABILITY)
            loss = loss * factor
        if ctx.needs_input_grad[0]:
            slope = log_p.exp_().mul_((factor + inner).unsqueeze(-1))
            hit = torch.addcmul(inner, factor, 1 - smoothing).neg_().expand_as(right)
            slope.scatter_add_(-1, index, hit.unsqueeze(-1))
            if smooth:
                slope.sub_((factor * smoothing / slope.shape[-1]).unsqueeze(-1))
            ctx.save_for_backward(slope.div_(slope.shape[1]))
        return loss.mean(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None, None], None, None, None


@dataclass(frozen=True)
class RegressionLoss:
    """Squared, absolute and Huber loss, per member of a stack.

    Args:
        delta:
            Where Huber turns from square to absolute; unused by the other two.
        is_mse:
            Members with the squared loss.
        is_mae:
            Members with the absolute loss.

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
            slope = torch.where(is_mae, error.sign(), error.clamp(-delta, delta))
            slope = torch.where(is_mse, 2 * error, slope)
            ctx.save_for_backward(slope.div_(slope.shape[1]))
        return loss.mean(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).unsqueeze(-1), None, None, None, None


Loss = ClassificationLoss | RegressionLoss
