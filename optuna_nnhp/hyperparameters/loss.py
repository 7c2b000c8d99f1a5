"""Loss functions: what training minimizes (the study's metric is what it is judged by)."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.record import Hyperparameter

LOSS_CLASSIFICATION = Hyperparameter(
    name="loss",
    distribution=CategoricalDistribution(("cross_entropy", "focal")),
    default="cross_entropy",
    levels=("cross_entropy", "focal"),
    task="classification",
    help="cross_entropy: the standard; focal: gives less weight to examples that are already "
    "right, for rare classes.",
)
FOCAL_GAMMA = Hyperparameter(
    name="focal_gamma",
    distribution=FloatDistribution(0.5, 5.0),
    default=2.0,
    levels=(1.0, 2.0),
    domain=(0.0, 20.0),
    task="classification",
    help="How strongly the focal loss turns away from easy examples (0 is cross-entropy).",
)
LOSS_REGRESSION = Hyperparameter(
    name="loss",
    distribution=CategoricalDistribution(("mse", "mae", "huber")),
    default="mse",
    levels=("mse", "mae", "huber"),
    task="regression",
    help="mse: large errors count most; mae: all alike, robust to outliers; huber: mse up to "
    "`huber_delta`, mae beyond.",
)
HUBER_DELTA = Hyperparameter(
    name="huber_delta",
    distribution=FloatDistribution(0.1, 10.0, log=True),
    default=1.0,
    levels=(0.1, 1.0),
    domain=(1e-6, 1e6),
    task="regression",
    help="Error at which huber turns from square to absolute, in standard deviations of y.",
)


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
        """Mean loss of each member.

        Shape:
            - outputs: logits ``(k, batch, classes)``.
            - target: class indices ``(batch,)``, or ``(k, batch)`` when members see different
              examples.
            - Output: ``(k,)``.
        """
        log_p = torch.log_softmax(outputs, dim=-1)
        target = target.expand(outputs.shape[:2])
        right = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)  # (k, batch)
        loss = -right
        if bool((self.smoothing > 0).any()):
            smoothing = self.smoothing[:, None]
            loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1)
        if bool((self.gamma > 0).any()):
            # (1 - p) ** 0 has no finite slope at p = 1: kept away from it.
            wrong = (-torch.expm1(right)).clamp_min(1e-7)
            loss = loss * wrong.pow(self.gamma[:, None])
        return loss.mean(-1)


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
        """Mean loss of each member.

        Shape:
            - outputs: ``(k, batch, 1)``.
            - target: ``(batch,)``, or ``(k, batch)`` when members see different examples.
            - Output: ``(k,)``.
        """
        error = outputs.squeeze(-1) - target
        size, delta = error.abs(), self.delta[:, None]
        huber = torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))
        loss = torch.where(self.is_mae[:, None], size, huber)
        return torch.where(self.is_mse[:, None], error.square(), loss).mean(-1)


Loss = ClassificationLoss | RegressionLoss


def take(loss: Loss, members: Tensor) -> Loss:
    """The loss of some members ``(m,)`` of a stack only."""
    return type(loss)(**{f.name: getattr(loss, f.name)[members] for f in fields(loss)})
