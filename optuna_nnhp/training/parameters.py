"""All parameters of a stack in one matrix, a row for each member."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.optimizer import Row
from optuna_nnhp.networks.layers import StackedLinear

# Numbers of a block. The operations before an update each pass over the gradients or the weights:
# over the whole stack (64 networks of 2 x 64 units) they took 50 us a model-step more.
BLOCK = 2**17


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
        first, second: State of the optimizers, see `hyperparameters.optimizer.Row`.
        steps: Updates of each member so far.
        rows: Of each member, ready to be updated.
        blocks: Members to be updated one after the other, as many as fit in a core's cache.

    Shape:
        - weights, grads, first, second: ``(k, parameters)``; steps: ``(k,)``.

    Example:
        >>> flat = FlatParameters(StackedLinear(torch.ones(3, 2, 5)))
        >>> flat.weights.shape, flat.decayed
        (torch.Size([3, 15]), 10)
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = _sorted(network)
        with torch.no_grad():
            self.weights = torch.cat([p.reshape(len(p), -1) for p in parameters], dim=1)
        self.decayed = sum(p[0].numel() for p in parameters if _is_matrix(p))
        self.first = torch.zeros_like(self.weights)
        self.second = torch.zeros_like(self.weights)
        self.steps = self.weights.new_zeros(len(self.weights), dtype=torch.float32)
        self._prepared = False
        self._bind(network)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a number, over those of the step before."""
        loss.backward()
        for parameter, sink, place in self._places:
            if sink is not None:
                place.copy_(sink)
            elif parameter.grad is not None:
                place.copy_(parameter.grad)
                parameter.grad = None
            else:  # no output depends on it
                place.zero_()
        self.steps += 1

    def keep(self, members: Tensor, network: nn.Module) -> None:
        """Go on with some members ``(m,)``, which the network holds already."""
        for name in STATE:
            setattr(self, name, getattr(self, name)[members])
        self._bind(network)

    def join(self, other: FlatParameters, network: nn.Module) -> None:
        """Take in the members of another stack, which the network holds already."""
        for name in STATE:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self._bind(network)

    def prepare(self, by_autograd: bool = True) -> None:
        """Make what steps need, before the first of them.

        Args:
            by_autograd:
                Whether `backward` will write the gradients.
        """
        if self._prepared:
            return
        self._prepared, self.grads = True, torch.zeros_like(self.weights)
        k, size = self.weights.shape
        self.rows = [self._row(i) for i in range(k)]
        step = max(1, BLOCK // size)
        self.blocks = [slice(i, i + step) for i in range(0, k, step)]
        if by_autograd:
            self._place_gradients()

    def _place_gradients(self) -> None:
        # Products are fastest into tensors without gaps: sinks, copied to the rows.
        sinks: dict[nn.Parameter, Tensor] = {}
        for layer in self._network.modules():
            if isinstance(layer, StackedLinear):
                layer.sink = layer.make_sink()
                weight, bias = layer.sink
                sinks[layer.weight] = weight
                if layer.bias is not None and bias is not None:
                    sinks[layer.bias] = bias
        for parameter, start in self.starts.items():
            place = self.grads[:, start : start + parameter[0].numel()].view(parameter.shape)
            self._places.append((parameter, sinks.get(parameter), place))

    def _bind(self, network: nn.Module) -> None:
        self._prepared = False
        self._network, self.starts, start = network, dict[nn.Parameter, int](), 0
        for parameter in _sorted(network):
            end, shape = start + parameter[0].numel(), parameter.shape
            parameter.data = self.weights[:, start:end].view(shape)
            self.starts[parameter] = start
            start = end
        self._places: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []

    def _row(self, i: int) -> Row:
        return Row(
            weight=self.weights[i],
            grad=self.grads[i],
            first=self.first[i],
            second=self.second[i],
            step=self.steps[i],
        )


STATE = ("weights", "first", "second", "steps")


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a member's part of it has more than one axis; biases and normalization have one."""
    return parameter.dim() > 2


def _sorted(network: nn.Module) -> list[nn.Parameter]:
    return sorted(network.parameters(), key=lambda p: not _is_matrix(p))
