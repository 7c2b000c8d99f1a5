from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import RegressionLoss

BATCH = 11
GAMMAS = (0.0, 0.0, 0.5, 2.0, 5.0)
SMOOTHINGS = (0.0, 0.2, 0.0, 0.1, 0.3)
# kind and delta of each member
REGRESSION = (("mse", 1.0), ("mae", 1.0), ("huber", 0.3), ("huber", 1.0), ("huber", 10.0))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def focal(logits: Tensor, target: Tensor, gamma: float, smoothing: float) -> Tensor:
    """Lin et al. 2017, equation 4: cross-entropy times (1 - p of the true class) ** gamma."""
    losses = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    p = torch.softmax(logits, -1)[torch.arange(len(target)), target]
    return ((1 - p) ** gamma * losses).mean()


def regression_loss(kinds: Any = REGRESSION) -> RegressionLoss:
    names = [kind for kind, _ in kinds]
    is_mse, is_mae = (torch.tensor([n == kind for n in names]) for kind in ("mse", "mae"))
    return RegressionLoss(tensor([delta for _, delta in kinds]), is_mse, is_mae)


def plain(kind: str, delta: float, outputs: Tensor, target: Tensor) -> Tensor:
    match kind:
        case "mse":
            return F.mse_loss(outputs, target)
        case "mae":
            return F.l1_loss(outputs, target)
        case _:
            return F.huber_loss(outputs, target, delta=delta)


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_classification(classes: int, per_member: bool) -> None:
    k = len(GAMMAS)
    outputs = (3 * normal(k, BATCH, classes)).requires_grad_()
    target = labels(*((k, BATCH) if per_member else (BATCH,)), classes=classes)
    value = ClassificationLoss(tensor(GAMMAS), tensor(SMOOTHINGS))(outputs, target)
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    for i in range(k):
        own = outputs[i].detach().requires_grad_()
        oracle = focal(own, target[i] if per_member else target, GAMMAS[i], SMOOTHINGS[i])
        torch.testing.assert_close(value[i], oracle)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(oracle, own)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_gamma_zero_is_torchs_cross_entropy(smoothing: float) -> None:
    outputs, target = normal(1, BATCH, 4), labels(BATCH, classes=4)
    value = ClassificationLoss(tensor([0.0]), tensor([smoothing]))(outputs, target)
    oracle = F.cross_entropy(outputs[0], target, label_smoothing=smoothing)
    torch.testing.assert_close(value[0], oracle)


@pytest.mark.parametrize(
    "p, gamma, value",
    [(0.9, 2.0, 0.001053605157), (0.5, 2.0, 0.173286795140), (0.5, 0.0, 0.693147180560)],
)
def test_focal_by_hand(p: float, gamma: float, value: float) -> None:
    # (1 - p) ** gamma * -log(p)
    outputs = torch.log(tensor([[[p, 1 - p]]]))
    loss = ClassificationLoss(tensor([gamma]), tensor([0.0]))(outputs, torch.tensor([0]))
    assert float(loss) == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 20.0, 1e4, -1e4])
def test_slopes_are_finite_where_a_class_is_certain(
    dtype: torch.dtype, gamma: float, smoothing: float, margin: float
) -> None:
    outputs = torch.tensor([[[margin, 0.0]], [[margin, 0.0]]], dtype=dtype, requires_grad=True)
    both = torch.tensor([gamma, 2.0], dtype=dtype), torch.full((2,), smoothing, dtype=dtype)
    value = ClassificationLoss(*both)(outputs, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(gradient).all())
    assert bool((value >= 0).all())


@pytest.mark.parametrize("per_member", [False, True])
def test_regression(per_member: bool) -> None:
    k = len(REGRESSION)
    outputs = (2 * normal(k, BATCH, 1)).requires_grad_()
    target = normal(*((k, BATCH) if per_member else (BATCH,)), seed=1)
    value = regression_loss()(outputs, target)
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    for i, (kind, delta) in enumerate(REGRESSION):
        own = outputs[i].detach().requires_grad_()
        oracle = plain(kind, delta, own.squeeze(-1), target[i] if per_member else target)
        torch.testing.assert_close(value[i], oracle)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(oracle, own)[0])


@pytest.mark.parametrize(
    "error, kind, delta, value",
    [
        (3.0, "mse", 1.0, 9.0),
        (-3.0, "mae", 1.0, 3.0),
        (3.0, "huber", 1.0, 2.5),
        (-0.5, "huber", 1.0, 0.125),
        (1.0, "huber", 1.0, 0.5),
        (3.0, "huber", 0.5, 1.375),
    ],
)
def test_regression_by_hand(error: float, kind: str, delta: float, value: float) -> None:
    loss = regression_loss([(kind, delta)])
    assert float(loss(tensor([[[error]]]), tensor([0.0]))) == pytest.approx(value)


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0, 1e6])
def test_regression_slopes_are_finite(error: float) -> None:
    k = len(REGRESSION)
    outputs = torch.full((k, 2, 1), error, requires_grad=True)
    value = regression_loss()(outputs, torch.zeros(2))
    (gradient,) = torch.autograd.grad(value.sum(), outputs)
    assert bool(torch.isfinite(gradient).all())
