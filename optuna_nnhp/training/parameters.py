"""All parameters of a stack in one matrix, a row for each member."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.optimizer import Row
from optuna_nnhp.networks.layers import StackedLinear


class FlatParameters:
    """The parameters of a stacked network, their gradients and the optimizers' state.

    The network's parameters become views of the rows, so that whatever is done to all of a
    member's weights (an update, a norm, a penalty) is one operation on a row, and whatever is
    done to all members is one operation on a matrix.

    Args:
        network:
            A module whose parameters have the member as their first axis.

    Attributes:
        weights: Of all parameters; matrices (which are decayed) first, then the rest.
        grads: Their gradients, after `backward`.
        decayed: How many columns are matrices.
        rows: Of each member the matrices and the rest, ready to be updated.

    Shape:
        - weights, grads: ``(k, parameters)``.

    Example:
        >>> flat = FlatParameters(StackedLinear(torch.ones(3, 2, 5)))
        >>> flat.weights.shape, flat.decayed
        (torch.Size([3, 15]), 10)
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = _sorted(network)
        with torch.no_grad():
            self.weights = torch.cat([p.flatten(1) for p in parameters], dim=1)
        self.decayed = sum(p[0].numel() for p in parameters if p.dim() == 3)
        self.grads = torch.zeros_like(self.weights)
        self._first = torch.zeros_like(self.weights)
        self._second = torch.zeros_like(self.weights)
        self._step = torch.zeros((), device=self.weights.device)  # the same for all members
        self._bind(network)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a number, over those of the step before."""
        loss.backward()
        for parameter, grad in self._by_autograd:
            assert parameter.grad is not None
            grad.copy_(parameter.grad)
            parameter.grad = None
        self._step.add_(1)

    def keep(self, members: Tensor, network: nn.Module) -> None:
        """Go on with some members ``(m,)``, which the network holds already."""
        for name in ("weights", "grads", "_first", "_second"):
            setattr(self, name, getattr(self, name)[members])
        self._bind(network)

    def _bind(self, network: nn.Module) -> None:
        grads, start = {}, 0
        for parameter in _sorted(network):
            end, shape = start + parameter[0].numel(), parameter.shape
            parameter.data = self.weights[:, start:end].view(shape)
            grads[parameter] = self.grads[:, start:end].view(shape)
            start = end
        for layer in network.modules():
            if isinstance(layer, StackedLinear):
                bias = grads.pop(layer.bias) if layer.bias is not None else None
                layer.sink = (grads.pop(layer.weight), bias)
        self._by_autograd = list(grads.items())
        matrices, rest = slice(None, self.decayed), slice(self.decayed, None)
        self.rows = [
            (self._row(i, matrices), self._row(i, rest)) for i in range(len(self.weights))
        ]

    def _row(self, i: int, columns: slice) -> Row:
        return Row(
            weight=self.weights[i, columns],
            grad=self.grads[i, columns],
            first=self._first[i, columns],
            second=self._second[i, columns],
            step=self._step,
        )


def _sorted(network: nn.Module) -> list[nn.Parameter]:
    return sorted(network.parameters(), key=lambda p: p.dim() != 3)
