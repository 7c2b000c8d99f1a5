"""Stacked layers of k networks: the first axis of each parameter and buffer is the member."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import copy
from typing import Any

import torch
from torch import Tensor
from torch import nn

NoiseSource = Callable[[int, int], Tensor]  # (batch, width) -> uniform numbers of that shape

EPSILON = 1e-5  # default of torch.nn.BatchNorm1d and torch.nn.LayerNorm
RUNNING_MOMENTUM = 0.1  # default of torch.nn.BatchNorm1d


class StackedModule(nn.Module):
    """A stack of k networks; the first axis of its parameters and buffers is the member.

    Attributes:
        flops: Floating-point operations of one member's forward pass of one example; 0 if they
            are estimated as two per weight.
        activations_per_example: Outputs of all layers for one example; 0 if they are estimated
            by the widest layer.

    Shape:
        - Input: ``(batch, ...)``, shared, or ``(k, batch, ...)``; output: ``(k, batch, outputs)``.
    """

    flops: float = 0.0
    activations_per_example: int = 0

    @abstractmethod
    def forward(self, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """Compute the outputs of all members; dropout is off if ``noise`` is None."""

    @abstractmethod
    def select(self, members: Tensor) -> None:
        """Keep only some members ``(m,)``."""

    @abstractmethod
    def append(self, other: Any) -> None:
        """Append the members of another stack of this class and signature."""

    @abstractmethod
    def member(self, i: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return one member as a plain network; ``weights`` is a `state_dict` to read from."""

    @abstractmethod
    def set_hyperparameters(
        self, params: Sequence[Mapping[str, Any]], make_stack: Callable[[], StackedModule]
    ) -> None:
        """Set new hyperparameters of the same structure; keep the weights.

        Args:
            params:
                All hyperparameters of each member.
            make_stack:
                Builds a new stack with these hyperparameters, for stacks that cannot set them.
        """


class StackedLinear(nn.Module):
    """k linear layers side by side.

    Args:
        weight:
            Initial weights.
        bias:
            Whether the layer has a bias. It must not have one before batch normalization: a bias
            has no effect there, but Adam would change it by rounding errors of its gradient.

    Shape:
        - weight: ``(k, in, out)``; bias: ``(k, out)``, zero at the start.
        - Input: ``(k, batch, in)``, or ``(batch, in)`` when the members share it.
        - Output: ``(k, batch, out)``.

    Attributes:
        grad_buffers: Tensors for the gradients of weight and bias; None if autograd allocates
            them.

    Example:
        >>> StackedLinear(torch.ones(3, 2, 5))(torch.ones(7, 2)).shape
        torch.Size([3, 7, 5])
    """

    def __init__(self, weight: Tensor, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        zeros = weight.new_zeros(weight.shape[0], weight.shape[2])
        self.bias = nn.Parameter(zeros) if bias else None
        self.grad_buffers: tuple[Tensor, Tensor | None] | None = None

    def make_grad_buffers(self) -> tuple[Tensor, Tensor | None]:
        """Allocate contiguous tensors for the gradients of weight and bias."""
        weight = torch.empty(self.weight.shape).to(self.weight)
        return weight, None if self.bias is None else torch.empty(self.bias.shape).to(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply each member's layer."""
        x = x.expand(self.weight.shape[0], *x.shape[-2:])
        if self.grad_buffers is not None and torch.is_grad_enabled():
            out: Tensor = _LinearIntoGradBuffers.apply(
                x, self.weight, self.bias, *self.grad_buffers
            )  # type: ignore[no-untyped-call]
            return out
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias[:, None], x, self.weight)


class _LinearIntoGradBuffers(torch.autograd.Function):
    """A stacked linear layer that writes its gradients to given buffers.

    Autograd would allocate gradients at every step and then copy them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_grad_buffer: Tensor,
        bias_grad_buffer: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grad_buffers = weight_grad_buffer, bias_grad_buffer
        if bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(bias[:, None], x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        weight_grad_buffer, bias_grad_buffer = ctx.grad_buffers
        torch.bmm(x.transpose(1, 2), grad, out=weight_grad_buffer)
        if bias_grad_buffer is not None:
            torch.sum(grad, 1, out=bias_grad_buffer)
        back = torch.bmm(grad, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None


class StackedBatchNorm(nn.Module):
    """k batch normalizations side by side, as `torch.nn.BatchNorm1d`.

    Padded units stay zero: they are zero before, and their bias gets no gradient.

    Args:
        members:
            Number of members, k.
        width:
            Number of units, including padding.

    Shape:
        - weight, bias, running_mean, running_var: ``(k, width)``.
        - Input, output: ``(k, batch, width)``.

    Example:
        >>> x = torch.arange(48.0).view(2, 8, 3) % 7
        >>> y = StackedBatchNorm(2, 3)(x)
        >>> bool(y.mean(1).abs().max() < 1e-5)
        True

    Source:
        Ioffe and Szegedy 2015 (arXiv:1502.03167).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))
        self.register_buffer("running_mean", torch.zeros(members, width))
        self.register_buffer("running_var", torch.ones(members, width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by batch statistics in training, by running statistics in evaluation."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + EPSILON)
            centred = x - self.running_mean[:, None]
            return torch.addcmul(self.bias[:, None], centred, scale[:, None])
        variance, mean = torch.var_mean(x.detach(), dim=1, correction=0, keepdim=True)
        self._update_running_stats(mean[:, 0], variance[:, 0], x.shape[1])
        return _normalize(x, mean, variance, self.weight, self.bias, 1)

    def _update_running_stats(self, mean: Tensor, variance: Tensor, batch: int) -> None:
        # The variance of a single example is undefined; torch.nn raises an error.
        if batch == 1:
            return
        self.running_mean.lerp_(mean, RUNNING_MOMENTUM)
        self.running_var.lerp_(variance * (batch / (batch - 1)), RUNNING_MOMENTUM)


class StackedLayerNorm(nn.Module):
    """k layer normalizations side by side, as `torch.nn.LayerNorm` over the true width.

    Args:
        mask:
            1 for a member's own units, 0 for padding.

    Shape:
        - mask: ``(k, 1, width)``; weight, bias: ``(k, width)``.
        - Input, output: ``(k, batch, width)``, padded units zero.

    Example:
        >>> norm = StackedLayerNorm(torch.tensor([[[1.0, 1.0, 0.0]]]))
        >>> norm(torch.tensor([[[1.0, 3.0, 0.0]]])).detach().round(decimals=3)
        tensor([[[-1.,  1.,  0.]]])

    Source:
        Ba et al. 2016 (arXiv:1607.06450).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(mask.shape[0], mask.shape[2]))
        self.bias = nn.Parameter(torch.zeros(mask.shape[0], mask.shape[2]))
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each example over the member's own units."""
        width = self.mask.sum(-1, keepdim=True)
        mean = x.detach().sum(-1, keepdim=True) / width  # padded units are zero
        centred = (x.detach() - mean) * self.mask
        variance = centred.square_().sum(-1, keepdim=True) / width
        return _normalize(x, mean, variance, self.weight, self.bias, 2, self.mask)


def _normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    dim: int,
    mask: Tensor | None = None,
) -> Tensor:
    rstd = torch.rsqrt(variance + EPSILON)
    affine = weight[:, None], bias[:, None]
    out: Tensor = _NormalizeFunction.apply(x, mean, rstd, *affine, dim, mask)  # type: ignore[no-untyped-call]
    return out


class _NormalizeFunction(torch.autograd.Function):
    """Computes ``weight (x - mean) rstd + bias``, with mean and rstd of x along one axis.

    This backward pass needs six passes over memory; autograd needed fourteen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        dim: int,
        mask: Tensor | None,
    ) -> Tensor:
        normal = (x - mean).mul_(rstd if mask is None else rstd * mask)
        ctx.dim, ctx.mask = dim, mask
        ctx.save_for_backward(normal, rstd, weight)
        return torch.addcmul(bias, normal, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, rstd, weight = ctx.saved_tensors
        dim, mask = ctx.dim, ctx.mask
        count = grad.shape[dim] if mask is None else mask.sum(-1, keepdim=True)
        scaled, product = grad * weight, grad * normal
        weight_grad, bias_grad = product.sum(1, keepdim=True), grad.sum(1, keepdim=True)
        if dim == 1:  # the sums along the batch are those of weight and bias
            along, across = bias_grad * weight, weight_grad * weight
        else:
            along, across = scaled.sum(dim, True), product.mul_(weight).sum(dim, True)
        back = scaled.sub_(along / count).addcmul_(normal, across / count, value=-1)
        back.mul_(rstd if mask is None else rstd * mask)
        return back, None, None, weight_grad, bias_grad, None, None


def select_members(module: nn.Module, members: Tensor) -> None:
    """Keep some members of a stack, in place.

    Args:
        module:
            Any module whose parameters and buffers all have the member as their first axis.
        members:
            Indices of the members to keep, in their new order.

    Shape:
        - members: ``(m,)``.

    Example:
        >>> layer = StackedLinear(torch.arange(3.0).view(3, 1, 1))
        >>> select_members(layer, torch.tensor([2]))
        >>> layer.weight
        Parameter containing:
        tensor([[[2.]]], requires_grad=True)
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach()[members]))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer[members])


def append_members(module: nn.Module, other: nn.Module) -> None:
    """Append another stack's members, in place.

    Args:
        module:
            Any module whose parameters and buffers all have the member as their first axis.
        other:
            A module with the same submodules.

    Example:
        >>> layer = StackedLinear(torch.zeros(1, 1, 1))
        >>> append_members(layer, StackedLinear(torch.ones(2, 1, 1)))
        >>> layer.weight.flatten().tolist()
        [0.0, 1.0, 1.0]
    """
    for part, new in zip(module.modules(), other.modules(), strict=True):
        for name, parameter in part.named_parameters(recurse=False):
            joined = torch.cat([parameter.detach(), new.get_parameter(name).detach()])
            setattr(part, name, nn.Parameter(joined))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.cat([buffer, new.get_buffer(name)]))


def subset_stack(stack: StackedModule, members: Tensor) -> StackedModule:
    """Return some members ``(m,)`` as a new stack; leave the old one unchanged."""
    shared = [*stack.parameters(), *stack.buffers()]
    for layer in stack.modules():
        if isinstance(layer, StackedLinear) and layer.grad_buffers is not None:
            shared += [tensor for tensor in layer.grad_buffers if tensor is not None]
    selected = copy.deepcopy(stack, {id(tensor): tensor for tensor in shared})
    selected.select(members)
    return selected
