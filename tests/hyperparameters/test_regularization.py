from __future__ import annotations

from itertools import pairwise
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.regularization import EarlyStopping
from optuna_nnhp.hyperparameters.regularization import add_l1
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.hyperparameters.regularization import decay_weights
from optuna_nnhp.hyperparameters.regularization import dropout_factor

NAN, INF = math.nan, math.inf


def normal(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- dropout ---

PROBABILITIES = torch.tensor([0.0, 0.1, 0.5, 0.95], dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("per_member", [False, True])
def test_dropout_is_a_mask_by_hand(per_member: bool) -> None:
    h, noise = normal(4, 6, 5), uniform(*((4, 6, 5) if per_member else (6, 5)))
    dropped = h * dropout_factor(noise, PROBABILITIES)
    for i, p in enumerate(PROBABILITIES.flatten().tolist()):
        u = noise[i] if per_member else noise
        for row in range(6):
            for unit in range(5):
                kept = float(h[i, row, unit]) / (1 - p)
                expected = 0.0 if float(u[row, unit]) < p else kept
                assert float(dropped[i, row, unit]) == pytest.approx(expected)


def test_dropout_silences_its_share_and_keeps_the_mean() -> None:
    dropped = dropout_factor(uniform(400, 250), PROBABILITIES)
    silent = (dropped == 0).double().mean((1, 2))
    torch.testing.assert_close(silent, PROBABILITIES.flatten(), rtol=0, atol=0.005)
    torch.testing.assert_close(
        dropped.double().mean((1, 2)), torch.ones(4).double(), rtol=0, atol=0.06
    )


def test_without_dropout_nothing_changes() -> None:
    h = normal(1, 6, 5)
    noise = uniform(6, 5)
    noise[0, 0] = 0.0  # the least that a uniform source may give
    assert torch.equal(h * dropout_factor(noise, torch.zeros(1, 1, 1)), h)


def test_shared_noise_silences_more_where_the_probability_is_greater() -> None:
    silent = dropout_factor(uniform(30, 20), PROBABILITIES) == 0
    for less, more in pairwise(silent):
        assert bool((more | ~less).all())


# --- L1 ---


def test_l1_is_the_gradient_of_the_penalty() -> None:
    weight, grad = normal(3, 5, 4).requires_grad_(), normal(3, 5, 4, seed=1)
    l1 = torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64)[:, None, None]
    (slope,) = torch.autograd.grad((l1 * weight.abs()).sum(), weight)
    expected = grad + slope
    add_l1(weight.detach(), grad, l1)
    torch.testing.assert_close(grad, expected)


def test_l1_leaves_a_zero_weight_alone() -> None:
    grad = torch.zeros(1, 2)
    add_l1(torch.tensor([[0.0, -0.0]]), grad, torch.ones(1, 1))
    assert grad.tolist() == [[0.0, 0.0]]


# --- gradient clipping ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_is_that_of_torch(dtype: torch.dtype, scale: float) -> None:
    bounds = torch.tensor([1e-6, 0.1, 1.0, 100.0, INF], dtype=dtype)
    grads = (scale * normal(5, 37)).to(dtype)
    before = grads.clone()
    clip_gradients(grads, bounds)
    for i, bound in enumerate(bounds.tolist()):
        # Two parameters, so that torch too takes the norm over all of them.
        parameters = [nn.Parameter(torch.zeros(7, 4)), nn.Parameter(torch.zeros(9))]
        parameters = [nn.Parameter(p.detach().to(dtype)) for p in parameters]
        for parameter, part in zip(parameters, before[i].split([28, 9]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        nn.utils.clip_grad_norm_(parameters, bound)
        expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        torch.testing.assert_close(grads[i], expected)
        assert float(grads[i].norm()) <= bound * (1 + 1e-5)


def test_weight_decay_is_that_of_torch() -> None:
    optimizers = [torch.optim.AdamW, torch.optim.SGD, torch.optim.SGD]
    weight, decay = normal(3, 7), torch.tensor([0.3, 0.3, 0.0], dtype=torch.float64)
    rate = torch.full((3,), 0.1, dtype=torch.float64)
    for i, kind in enumerate(optimizers):
        oracle = nn.Parameter(weight[i].clone())
        oracle.grad = torch.zeros(7, dtype=torch.float64)
        kind([oracle], lr=0.1, weight_decay=float(decay[i])).step()  # type: ignore[arg-type]
        row, grad = weight[i : i + 1].clone(), torch.zeros(1, 7, dtype=torch.float64)
        is_adamw = torch.tensor([i == 0])
        decay_weights(row, grad, rate[i : i + 1], decay[i : i + 1], is_adamw)
        torch.testing.assert_close(row[0] - 0.1 * grad[0], oracle.detach())


def test_nothing_is_clipped_under_the_bound_and_zero_stays_zero() -> None:
    grads = torch.tensor([[0.3, 0.4], [0.0, 0.0]])
    clip_gradients(grads, torch.tensor([1.0, 1e-6]))
    assert torch.equal(grads, torch.tensor([[0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_broken_gradient_breaks_no_mate(bad: float) -> None:
    grads = torch.tensor([[bad, 1.0], [3.0, 4.0], [0.3, 0.4]])
    clip_gradients(grads, torch.tensor([1.0, 1.0, 1.0]))
    torch.testing.assert_close(grads[1:], torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    assert not bool(torch.isfinite(grads[0]).all())


def test_a_broken_gradient_is_broken_whole_as_in_torch() -> None:
    grads = torch.tensor([[NAN, 1.0], [0.3, 0.4]])
    clip_gradients(grads, torch.tensor([1.0, 1.0]))
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([NAN, 1.0])
    nn.utils.clip_grad_norm_([parameter], 1.0)
    torch.testing.assert_close(grads[0], parameter.grad, equal_nan=True)
    torch.testing.assert_close(grads[1], torch.tensor([0.3, 0.4]))


# --- early stopping ---


def stop(
    values: list[float], losses: list[float], patience: int, min_improvement: float
) -> tuple[int | None, int, float]:
    """Epoch of the stop, best epoch, best value."""
    stopping = EarlyStopping.start([patience], [min_improvement])
    for epoch, (value, loss) in enumerate(zip(values, losses, strict=True), start=1):
        if bool(stopping.update([value], [loss], [0], [epoch])):
            return epoch, int(stopping.best_round), float(stopping.best)
    return None, int(stopping.best_round), float(stopping.best)


@pytest.mark.parametrize(
    "patience, min_improvement, values, stopped, best_epoch, best",
    [
        (1, 0.0, [0.5, 0.6, 0.7], None, 3, 0.7),
        (1, 0.0, [0.5, 0.4, 0.9], 2, 1, 0.5),
        (1, 0.0, [0.5, 0.5], 2, 1, 0.5),  # no more is no improvement
        (2, 0.0, [0.5, 0.4, 0.6, 0.5, 0.5, 0.9], 5, 3, 0.6),
        (3, 0.0, [0.5, 0.4, 0.4], None, 1, 0.5),
        (3, 0.0, [-3.0, -2.0, -4.0, -4.0, -4.0], 5, 2, -2.0),
        (2, 0.1, [0.5, 0.55, 0.59], 3, 3, 0.59),  # the best, though it did not count
        (2, 0.1, [0.5, 0.55, 0.61, 0.65], None, 4, 0.65),  # 0.61 counts from 0.5 on
        (2, 0.1, [0.5, 0.61, 0.65, 0.70], 4, 4, 0.70),  # and then 0.61 is the reference
        (1, 0.5, [0.0, 0.5], 2, 2, 0.5),  # exactly so much is not more
        (2, 0.0, [NAN, 0.5, NAN, NAN], 4, 2, 0.5),
        (3, 0.0, [0.5, NAN, 0.6, 0.1], None, 3, 0.6),
        (2, 0.0, [NAN, NAN, 0.5], 2, 0, -INF),
        (1, 1e12, [0.5, 9.0], 2, 2, 9.0),
    ],
)
def test_early_stopping(
    patience: int,
    min_improvement: float,
    values: list[float],
    stopped: int | None,
    best_epoch: int,
    best: float,
) -> None:
    # Losses that rise, so that equal values never move the best epoch.
    losses = [float(i) for i in range(len(values))]
    assert stop(values, losses, patience, min_improvement) == (stopped, best_epoch, best)


@pytest.mark.parametrize(
    "values, losses, best_epoch",
    [
        ([0.5, 0.5, 0.5], [0.9, 0.7, 0.8], 2),
        ([0.5, 0.5], [0.7, 0.7], 1),
        ([0.5, 0.5], [0.7, NAN], 1),
        ([0.5, 0.6], [0.1, 0.9], 2),  # the value comes first
        ([0.6, 0.5], [0.9, 0.1], 1),
        ([0.5, 0.6, 0.6], [0.1, 0.9, 0.8], 3),
    ],
)
def test_of_equal_values_the_lowest_loss_is_best(
    values: list[float], losses: list[float], best_epoch: int
) -> None:
    assert stop(values, losses, patience=9, min_improvement=0.0)[1] == best_epoch


def test_a_lower_loss_alone_is_no_improvement() -> None:
    assert stop([0.5, 0.5, 0.5], [0.9, 0.8, 0.7], 2, 0.0) == (3, 3, 0.5)


def everyone(stopping: EarlyStopping, values: Tensor, losses: Tensor, epoch: int) -> Tensor:
    k = len(values)
    return stopping.update(values, losses, range(k), [epoch] * k)


def test_only_evaluated_members_are_updated() -> None:
    stopping = EarlyStopping.start([1, 1, 1], [0.0, 0.0, 0.0])
    assert stopping.update([0.5, 0.7], [1.0, 1.0], [0, 2], [4, 9, 2]).tolist() == [False, False]
    assert stopping.best.tolist() == [0.5, -INF, 0.7]
    assert stopping.best_round.tolist() == [4, 0, 2]
    assert stopping.update([0.1], [1.0], [2], [5, 9, 3]).tolist() == [True]
    assert stopping.waited.tolist() == [0, 0, 1]


def test_patience_counts_whole_epochs() -> None:
    stopping = EarlyStopping.start([1], [0.0])
    ends = [bool(stopping.update([0.5], [1.0], [0], [done], rounds=3)) for done in (1, 2, 3)]
    assert ends == [False, False, True]


def test_members_join() -> None:
    stopping, other = EarlyStopping.start([1], [0.0]), EarlyStopping.start([3], [0.2])
    stopping.update([0.5], [1.0], [0], [4])
    stopping.append(other)
    assert stopping.best.tolist() == [0.5, -INF]
    assert stopping.patience.tolist() == [1, 3]


def test_members_stop_one_by_one_and_some_go_on() -> None:
    stopping, ones = EarlyStopping.start([1, 2, 1], [0.0, 0.0, 0.2]), torch.ones(3)
    assert everyone(stopping, torch.tensor([0.5, 0.5, 0.5]), ones, 1).tolist() == [False] * 3
    stops = everyone(stopping, torch.tensor([0.6, 0.4, 0.6]), ones, 2)
    assert stops.tolist() == [False, False, True]
    stopping.select(torch.tensor([1, 0]))
    torch.testing.assert_close(stopping.best, torch.tensor([0.5, 0.6]).double())
    assert stopping.best_round.tolist() == [1, 2]
    assert stopping.update([0.4, 0.5], [1.0, 1.0], [0, 1], [3, 3]).tolist() == [True, True]


def test_float32_values_are_taken_as_they_are() -> None:
    stopping = EarlyStopping.start([5], [0.0])
    stopping.update(torch.tensor([0.1]), torch.tensor([0.2]), [0], [1])
    assert stopping.best.item() == torch.tensor(0.1).double().item()
    assert stopping.best_loss.item() == torch.tensor(0.2).double().item()


@pytest.mark.parametrize("seed", range(5))
def test_early_stopping_is_its_definition(seed: int) -> None:
    # By a plain loop over one member, on random curves with NaN and ties.
    k, epochs = 50, 30
    values = (10 * uniform(k, epochs).roll(seed, 1)).round(decimals=1)
    values[normal(k, epochs, seed=seed) > 1.5] = NAN
    losses = uniform(k, epochs)
    patience = [1 + i % 7 for i in range(k)]
    least = [0.0 if i % 2 else 0.5 for i in range(k)]
    stopping = EarlyStopping.start(patience, least)
    seen: dict[str, list[Any]] = {"stops": [], "epochs": []}
    for epoch in range(epochs):
        seen["stops"].append(everyone(stopping, values[:, epoch], losses[:, epoch], epoch + 1))
        seen["epochs"].append(stopping.best_round.clone())
    for i in range(k):
        best, best_loss, best_epoch, reference, waited = -INF, INF, 0, -INF, 0
        for epoch, (value, loss) in enumerate(
            zip(values[i].tolist(), losses[i].tolist(), strict=True)
        ):
            if value > best or (value == best and loss < best_loss):
                best, best_loss, best_epoch = value, loss, epoch + 1
            waited += 1
            if value > reference + least[i]:
                reference, waited = value, 0
            assert bool(seen["stops"][epoch][i]) == (waited >= patience[i])
            assert int(seen["epochs"][epoch][i]) == best_epoch
