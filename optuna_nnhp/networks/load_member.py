"""Load a plain network's weights into a stack, the inverse of `StackedModule.member`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.vmap_stack import ModuleStack
from optuna_nnhp.networks.vmap_stack import tensors_of


@torch.no_grad()
def load_member(stack: StackedModule, i: int, network: nn.Module) -> None:
    """Copy the weights and running statistics of a plain network to a member of a stack.

    Args:
        stack:
            The stack.
        i:
            The index of the member, which has the network's structure.
        network:
            A plain network, as `StackedModule.member` returns it.

    Example:
        >>> from optuna_nnhp.networks.vmap_stack import VmapStack
        >>> stack, network = (
        ...     VmapStack([nn.Linear(3, 2) for _ in range(4)], dims=2),
        ...     nn.Linear(3, 2),
        ... )
        >>> load_member(stack, 1, network)
        >>> torch.equal(stack.member(1).weight, network.weight)
        True
    """
    for stacked, plain in _tensor_pairs(stack, i, network):
        stacked.copy_(plain)


def _tensor_pairs(
    stack: StackedModule, i: int, network: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of a member with its counterpart in the plain network."""
    if isinstance(stack, StackedMLP):
        yield from _pair_stacked_and_plain_tensors(stack, i, network)
        return
    plain, stacked = tensors_of(network), stack.state_dict()
    if isinstance(stack, ModuleStack):
        names = {key: name for key, name in stack.names.items() if name in plain}
    elif isinstance(stack, StackedGPT):
        names = {key: key.removesuffix(".weight") for key in stacked if key != "dropout"}
    else:
        raise TypeError(
            "`stack` must be a StackedMLP, StackedGPT or ModuleStack, but got "
            f"{type(stack).__name__}."
        )
    for key, name in names.items():
        yield stacked[key][i], plain[name]


def _pair_stacked_and_plain_tensors(
    stack: StackedMLP, i: int, network: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensor pairs of a multilayer perceptron, without the padding."""
    stacked, layers = stack.state_dict(), list(network.modules())
    for n, linear in enumerate(m for m in layers if isinstance(m, nn.Linear)):
        columns, rows = linear.weight.shape
        yield stacked[f"linears.{n}.weight"][i, :rows, :columns], linear.weight.T
        if linear.bias is not None:
            yield stacked[f"linears.{n}.bias"][i, :columns], linear.bias
    for n, norm in enumerate(m for m in layers if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(norm, name):
                tensor = getattr(norm, name)
                yield stacked[f"norms.{n}.{name}"][i, : len(tensor)], tensor
