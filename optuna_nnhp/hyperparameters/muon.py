"""Muon: an optimizer with orthogonalized updates for hidden layers."""

from __future__ import annotations

import math

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.spec import Hyperparameter

GPT_OPTIMIZER = Hyperparameter(
    name="optimizer",
    distribution=CategoricalDistribution(("muon", "adamw")),
    default="muon",
    grid_values=("muon", "adamw"),
    static=True,
    task="language",
    help="muon: orthogonalized updates for hidden matrices, adamw for the rest; better in short "
    "runs, equal after some thousand steps. adamw: the standard, for all parameters.",
)
MUON_LEARNING_RATE = Hyperparameter(
    name="muon_learning_rate",
    distribution=FloatDistribution(5e-3, 0.1, log=True),
    default=0.02,
    grid_values=(0.01, 0.02, 0.04),
    domain=(1e-10, 100.0),
    mutable=True,
    task="language",
    active_if={"optimizer": ("muon",)},
    help="Peak learning rate of muon; it follows the schedule of `learning_rate`, which is "
    "adamw's.",
)

# A quintic iteration with maximal slope at zero. Singular values end between about 0.7 and 1.2
# instead of at 1, which is as good for training.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and with singular values near 1.

    It computes in the dtype of its argument. `torch.optim.Muon` converts to bfloat16, which is a
    hundred times slower on a CPU that must emulate it.

    Shape:
        - matrices, Output: ``(n, rows, columns)``.

    Example:
        >>> out = orthogonalize(torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)))
        >>> values = torch.linalg.svdvals(out[0])
        >>> bool((values > 0.5).all() and (values < 1.5).all())
        True

    Source:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the formula
        in the documentation of `torch.optim.Muon`.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPSILON)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.transpose(1, 2) if is_tall else x


def learning_rate_factor(inputs: int, outputs: int) -> float:
    """Return the factor of the learning rate for a matrix that is not square.

    Example:
        >>> learning_rate_factor(64, 256), learning_rate_factor(256, 64)
        (2.0, 1.0)

    Source:
        The rule of the original implementation, ``adjust_lr_fn="original"`` in
        `torch.optim.Muon`.
    """
    return math.sqrt(max(1.0, outputs / inputs))
