"""All parameters of a stack in one matrix, a row for each member."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.optimizer import OptimizerState
from optuna_nnhp.networks.layers import StackedLinear

# Numbers of a block. The operations before an update each pass over the gradients or the weights:
# over the whole stack (64 networks of 2 x 64 units) they took 50 us a model-step more.
BLOCK_ELEMENTS = 2**17


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
        starts: The first column of each of the network's parameters.
        first, second: State of the optimizers, see `hyperparameters.optimizer.OptimizerState`.
        steps: Updates of each member so far.
        rows: Of each member, ready to be updated.
        blocks: Members to be updated one after the other, as many as fit in a core's cache.

    Shape:
        - weights, grads, first, second: ``(k, parameters)``; steps: ``(k,)``.

    Example:
        >>> flat = FlatParameters(StackedLinear(torch.ones(3, 2, 5)))
        >>> flat.weights.shape, flat.num_decayed
        (torch.Size([3, 15]), 10)
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = _matrices_first(network)
        with torch.no_grad():
            self.weights = torch.cat([p.reshape(len(p), -1) for p in parameters], dim=1)
        self.num_decayed = sum(p[0].numel() for p in parameters if _is_matrix(p))
        self.exp_avg = torch.zeros_like(self.weights)
        self.exp_avg_sq = torch.zeros_like(self.weights)
        self.steps = self.weights.new_zeros(len(self.weights), dtype=torch.float32)
        self._prepared = False
        self._view_parameters(network)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a number, over those of the step before."""
        loss.backward()
        for parameter, grad_buffer, view in self._grad_views:
            if grad_buffer is not None:
                view.copy_(grad_buffer)
            elif parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
            else:  # no output depends on it
                view.zero_()
        self.steps += 1

    def select(self, members: Tensor, network: nn.Module) -> None:
        """Go on with some members ``(m,)``, which the network holds already."""
        for name in PER_MEMBER_TENSORS:
            setattr(self, name, getattr(self, name)[members])
        self._view_parameters(network)

    def append(self, other: FlatParameters, network: nn.Module) -> None:
        """Take in the members of another stack, which the network holds already."""
        for name in PER_MEMBER_TENSORS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self._view_parameters(network)

    def allocate_grads(self, by_autograd: bool = True) -> None:
        """Make what steps need, before the first of them.

        Args:
            by_autograd:
                Whether `backward` will write the gradients.
        """
        if self._prepared:
            return
        self._prepared, self.grads = True, torch.zeros_like(self.weights)
        k, size = self.weights.shape
        self.optimizer_states = [self._state(i) for i in range(k)]
        step = max(1, BLOCK_ELEMENTS // size)
        self.blocks = [slice(i, i + step) for i in range(0, k, step)]
        if by_autograd:
            self._view_grads()

    def _view_grads(self) -> None:
        # Products are fastest into tensors without gaps: sinks, copied to the rows.
        grad_buffers: dict[nn.Parameter, Tensor] = {}
        for layer in self._network.modules():
            if isinstance(layer, StackedLinear):
                layer.grad_buffers = layer.make_grad_buffers()
                weight, bias = layer.grad_buffers
                grad_buffers[layer.weight] = weight
                if layer.bias is not None and bias is not None:
                    grad_buffers[layer.bias] = bias
        for parameter, start in self.offsets.items():
            view = self.grads[:, start : start + parameter[0].numel()].view(parameter.shape)
            self._grad_views.append((parameter, grad_buffers.get(parameter), view))

    def _view_parameters(self, network: nn.Module) -> None:
        self._prepared = False
        self._network, self.offsets, start = network, dict[nn.Parameter, int](), 0
        for parameter in _matrices_first(network):
            end, shape = start + parameter[0].numel(), parameter.shape
            parameter.data = self.weights[:, start:end].view(shape)
            self.offsets[parameter] = start
            start = end
        self._grad_views: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []

    def _state(self, i: int) -> OptimizerState:
        return OptimizerState(
            weight=self.weights[i],
            grad=self.grads[i],
            exp_avg=self.exp_avg[i],
            exp_avg_sq=self.exp_avg_sq[i],
            step=self.steps[i],
        )


PER_MEMBER_TENSORS = ("weights", "exp_avg", "exp_avg_sq", "steps")


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a member's part of it has more than one axis; biases and normalization have one."""
    return parameter.dim() > 2


def _matrices_first(network: nn.Module) -> list[nn.Parameter]:
    return sorted(network.parameters(), key=lambda p: not _is_matrix(p))
