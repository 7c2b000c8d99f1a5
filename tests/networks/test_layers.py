from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.networks.layers import StackedBatchNorm
from optuna_nnhp.networks.layers import StackedLayerNorm
from optuna_nnhp.networks.layers import StackedLinear
from optuna_nnhp.networks.layers import select_members

K, BATCH, INPUTS, WIDTH = 3, 6, 4, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def randomize(module: nn.Module) -> None:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=10 + seed)


# --- linear ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sunk", [True, False])
def test_linear_is_torchs(bias: bool, shared: bool, sunk: bool) -> None:
    stack = StackedLinear(normal(K, INPUTS, WIDTH), bias=bias)
    randomize(stack)
    weight_grad_buffer, bias_grad_buffer = (
        torch.full_like(p, 7.0) for p in (stack.weight, stack.weight[:, 0])
    )
    if sunk:
        stack.grad_buffers = weight_grad_buffer, bias_grad_buffer if bias else None
    x = normal(*((BATCH, INPUTS) if shared else (K, BATCH, INPUTS))).requires_grad_()
    slopes = normal(K, BATCH, WIDTH, seed=2)
    outputs = stack(x)
    outputs.backward(slopes)
    grads = (
        (weight_grad_buffer, bias_grad_buffer)
        if sunk
        else (stack.weight.grad, getattr(stack.bias, "grad", None))
    )
    flow = torch.zeros_like(x)
    for i in range(K):
        plain = nn.Linear(INPUTS, WIDTH, bias=bias, dtype=torch.float64)
        plain.weight.data = stack.weight.detach()[i].T.clone()
        if stack.bias is not None:
            plain.bias.data = stack.bias.detach()[i].clone()
        own = (x if shared else x[i]).detach().clone().requires_grad_()
        expected = plain(own)
        expected.backward(slopes[i])
        torch.testing.assert_close(outputs[i], expected)
        assert own.grad is not None and plain.weight.grad is not None and grads[0] is not None
        torch.testing.assert_close(grads[0][i], plain.weight.grad.T)
        if bias:
            assert grads[1] is not None
            torch.testing.assert_close(grads[1][i], plain.bias.grad)
        (flow if shared else flow[i]).add_(own.grad)
    torch.testing.assert_close(x.grad, flow)


def test_a_sink_is_written_over_and_not_added_to() -> None:
    stack = StackedLinear(normal(K, INPUTS, WIDTH))
    stack.grad_buffers = torch.zeros(K, INPUTS, WIDTH).double(), torch.zeros(K, WIDTH).double()
    for _ in range(2):
        stack(normal(BATCH, INPUTS)).sum().backward()
        assert stack.grad_buffers[1] is not None
        assert torch.equal(stack.grad_buffers[1], torch.full((K, WIDTH), float(BATCH)).double())


def test_a_sink_is_left_alone_without_gradients() -> None:
    stack = StackedLinear(normal(K, INPUTS, WIDTH))
    stack.grad_buffers = torch.zeros(K, INPUTS, WIDTH).double(), torch.zeros(K, WIDTH).double()
    with torch.no_grad():
        sunk = stack(normal(BATCH, INPUTS))
    stack.grad_buffers = None
    torch.testing.assert_close(sunk, stack(normal(BATCH, INPUTS)).detach())


def test_a_bias_starts_at_zero() -> None:
    bias = StackedLinear(normal(K, INPUTS, WIDTH)).bias
    assert bias is not None and bias.shape == (K, WIDTH) and not bool(bias.any())


# --- batch normalization ---


@pytest.mark.parametrize("batches", [(8, 8, 8), (8, 8, 3), (2, 50, 2), (8, 1, 8), (1, 1, 5)])
def test_batch_norm_is_torchs_over_several_batches(batches: tuple[int, ...]) -> None:
    stack = StackedBatchNorm(K, WIDTH).double()
    randomize(stack)
    plains = [nn.BatchNorm1d(WIDTH, dtype=torch.float64) for _ in range(K)]
    for i, plain in enumerate(plains):
        plain.weight.data, plain.bias.data = stack.weight.detach()[i], stack.bias.detach()[i]
    for seed, batch in enumerate(batches):
        x = (3 * normal(K, batch, WIDTH, seed=seed) + 2).requires_grad_()
        slopes = normal(K, batch, WIDTH, seed=seed + 50)
        outputs = stack(x)
        (gradient,) = torch.autograd.grad(outputs, x, slopes)
        for i, plain in enumerate(plains):
            if batch == 1:  # torch refuses it
                torch.testing.assert_close(outputs[i, 0], stack.bias[i])
                assert bool(torch.isfinite(gradient[i]).all())
            else:
                own = x[i].detach().requires_grad_()
                expected = plain(own)
                torch.testing.assert_close(outputs[i], expected)
                (slope,) = torch.autograd.grad(expected, own, slopes[i])
                torch.testing.assert_close(gradient[i], slope, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(stack.running_mean[i], plain.running_mean)
            torch.testing.assert_close(stack.running_var[i], plain.running_var)
    stack.eval()
    x = normal(K, BATCH, WIDTH, seed=99)
    for i, plain in enumerate(plains):
        torch.testing.assert_close(stack(x)[i], plain.eval()(x[i]))


def test_batch_norm_in_evaluation_learns_nothing_and_looks_at_no_other_example() -> None:
    stack = StackedBatchNorm(K, WIDTH).double()
    stack(normal(K, BATCH, WIDTH))
    stack.eval()
    before = stack.running_mean.clone(), stack.running_var.clone()
    x = normal(K, BATCH, WIDTH, seed=1)
    torch.testing.assert_close(stack(x)[:, :2], stack(x[:, :2]))
    assert torch.equal(stack.running_mean, before[0])
    assert torch.equal(stack.running_var, before[1])


def test_running_estimates_are_no_part_of_the_graph() -> None:
    stack = StackedBatchNorm(K, WIDTH).double()
    stack(normal(K, BATCH, WIDTH).requires_grad_())
    assert not stack.running_mean.requires_grad and not stack.running_var.requires_grad


# --- layer normalization ---


@pytest.mark.parametrize("true_widths", [(5, 5, 5), (5, 3, 1), (2, 4, 5)])
def test_layer_norm_is_torchs_over_the_true_width(true_widths: tuple[int, ...]) -> None:
    true = torch.tensor(true_widths)
    mask = (torch.arange(WIDTH) < true[:, None]).double()[:, None]
    stack = StackedLayerNorm(mask).double()
    randomize(stack)
    # Biases of the padding are zero at the start and, without gradient, stay so.
    stack.bias.data *= mask[:, 0]
    x = (normal(K, BATCH, WIDTH) * mask).requires_grad_()
    slopes = normal(K, BATCH, WIDTH, seed=1)
    outputs = stack(x)
    outputs.backward(slopes * mask)
    assert x.grad is not None and stack.weight.grad is not None and stack.bias.grad is not None
    for i, width in enumerate(true_widths):
        plain = nn.LayerNorm(width, dtype=torch.float64)
        plain.weight.data = stack.weight.detach()[i, :width].clone()
        plain.bias.data = stack.bias.detach()[i, :width].clone()
        own = x[i, :, :width].detach().requires_grad_()
        expected = plain(own)
        expected.backward(slopes[i, :, :width])
        torch.testing.assert_close(outputs[i, :, :width], expected)
        torch.testing.assert_close(x.grad[i, :, :width], own.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(stack.weight.grad[i, :width], plain.weight.grad)
        torch.testing.assert_close(stack.bias.grad[i, :width], plain.bias.grad)
        for padding in (outputs[i], x.grad[i], stack.weight.grad[i], stack.bias.grad[i]):
            assert not bool(padding[..., width:].any())


# --- keep_members ---


@pytest.mark.parametrize("members", [[0], [2, 0], [1, 2], [0, 1, 2], [2, 1, 0]])
def test_keep_members(members: list[int]) -> None:
    mask = torch.ones(K, 1, WIDTH, dtype=torch.float64)
    stack = nn.Sequential(
        StackedLinear(normal(K, INPUTS, WIDTH)),
        nn.Sequential(StackedBatchNorm(K, WIDTH), StackedLayerNorm(mask)),
        StackedLinear(normal(K, WIDTH, 2, seed=1), bias=False),
    ).double()
    randomize(stack)
    stack(normal(BATCH, INPUTS))  # so that running estimates differ
    stack.eval()
    x = normal(BATCH, INPUTS, seed=3)
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    outputs = stack(x)
    select_members(stack, torch.tensor(members))
    after: dict[str, Any] = stack.state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name][members])
    torch.testing.assert_close(stack(x), outputs[members])
    assert all(p.requires_grad and p.is_leaf for p in stack.parameters())
