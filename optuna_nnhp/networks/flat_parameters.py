"""The parameters of a stack and the hyperparameters of its update, one row for each member."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.learning_rate import learning_rates
from optuna_nnhp.hyperparameters.optimizer import OptimizerState
from optuna_nnhp.hyperparameters.optimizer import UpdateCoefficients
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.networks.layers import StackedLinear

# Before an update, several operations each read all gradients or all weights. They are faster on
# blocks that fit in the cache: 50 us less per step for 64 networks of 2 x 64 units.
MAX_BLOCK_ELEMENTS = 2**17
PER_MEMBER_TENSORS = ("weights", "exp_avg", "exp_avg_sq", "steps")


class FlatParameters:
    """The parameters of a stacked network, their gradients and the optimizer's state.

    The network's parameters become views of the rows of one matrix. So an operation on all
    weights of a member (an update, a norm, a penalty) is one operation on a row, and an operation
    on all members is one operation on the matrix.

    Args:
        network:
            A module whose parameters have the member as their first axis.

    Attributes:
        weights: All parameters; first the matrices, which have weight decay, then the rest.
        grads: The gradients of the last `backward`.
        num_decayed: The number of columns that belong to matrices.
        offsets: The first column of each of the network's parameters.
        exp_avg, exp_avg_sq: See `hyperparameters.optimizer.OptimizerState`.
        steps: Number of updates of each member so far.
        optimizer_states: One for each member; views of the tensors above.
        blocks: Slices of members that are updated together, each small enough for the cache.

    Shape:
        - weights, grads, exp_avg, exp_avg_sq: ``(k, parameters)``; steps: ``(k,)``.

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
        """Replace the gradients by those of a scalar loss."""
        loss.backward()
        for parameter, grad_buffer, view in self._grad_views:
            if grad_buffer is not None:
                view.copy_(grad_buffer)
            elif parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
            else:  # the loss does not depend on this parameter
                view.zero_()
        self.steps += 1

    def select(self, members: Tensor, network: nn.Module) -> None:
        """Keep only some members ``(m,)``; the network must have been reduced to them before."""
        for name in PER_MEMBER_TENSORS:
            setattr(self, name, getattr(self, name)[members])
        self._view_parameters(network)

    def append(self, other: FlatParameters, network: nn.Module) -> None:
        """Append the members of another stack; the network must have appended them before."""
        for name in PER_MEMBER_TENSORS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self._view_parameters(network)

    def allocate_grads(self, by_autograd: bool = True) -> None:
        """Allocate the gradients and their views if needed.

        Args:
            by_autograd:
                Whether `backward` computes the gradients.
        """
        if self._prepared:
            return
        self._prepared, self.grads = True, torch.zeros_like(self.weights)
        k, size = self.weights.shape
        self.optimizer_states = [self._state(i) for i in range(k)]
        step = max(1, MAX_BLOCK_ELEMENTS // size)
        self.blocks = [slice(i, i + step) for i in range(0, k, step)]
        if by_autograd:
            self._view_grads()

    def _view_grads(self) -> None:
        # Matrix products are fastest with contiguous outputs: they write to buffers, which
        # `backward` copies to the rows.
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


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether a member's part has more than one axis; biases and gains have one."""
    return parameter.dim() > 2


def _matrices_first(network: nn.Module) -> list[nn.Parameter]:
    return sorted(network.parameters(), key=lambda p: not _is_matrix(p))


def param_column(params: Sequence[Mapping[str, Value]], name: str) -> list[float]:
    """Return one hyperparameter of each member as floats, 0 where a member does not have it."""
    return [float(p.get(name) or 0) for p in params]


class StepParams:
    """The hyperparameters that the training loop reads at every step, as tensors.

    Args:
        params:
            The hyperparameters of each member.
        like:
            A tensor with the device and the dtype of the results.

    Attributes:
        l1, clip_norm, weight_decay: See `hyperparameters.regularization`.
        decoupled: Whether a member's weight decay is decoupled, as in AdamW.
        optimizers: The name of each member's optimizer.
        coefficients: The other coefficients of each member's update rule.
        has_l1: Whether any member has an L1 penalty.

    Shape:
        - l1: ``(k, 1)``; clip_norm, weight_decay, decoupled: ``(k,)``.
    """

    def __init__(self, params: Sequence[Mapping[str, Value]], like: Tensor) -> None:
        def tensor(name: str) -> Tensor:
            return torch.tensor(param_column(params, name)).to(like)

        self._params = params
        self.l1 = tensor("l1")[:, None]
        self.has_l1 = any(l1 > 0 for l1 in param_column(params, "l1"))
        self.clip_norm, self.weight_decay = tensor("clip_norm"), tensor("weight_decay")
        self.optimizers = [str(p["optimizer"]) for p in params]
        is_adamw = [name == "adamw" for name in self.optimizers]
        self.decoupled = torch.tensor(is_adamw).to(like.device)
        momentum, beta2 = param_column(params, "momentum"), param_column(params, "beta2")
        self.coefficients = list(map(UpdateCoefficients, momentum, beta2))

    def rates(self, done: Sequence[int], steps: int, total: Sequence[int]) -> Tensor:
        """Return the learning rates of the next steps.

        Args:
            done:
                Steps that each member has done.
            steps:
                How many steps.
            total:
                Steps of each member's whole budget.

        Shape:
            - Output: ``(steps, k)``, in float64, on the CPU.
        """

        def tensor(name: str) -> Tensor:
            return torch.tensor(param_column(self._params, name))

        return learning_rates(
            tensor("learning_rate"),
            [str(p["learning_rate_decay"]) for p in self._params],
            tensor("warmup"),
            tensor("min_lr_ratio"),
            torch.tensor(done)[:, None] + torch.arange(steps),
            torch.tensor(total),
        ).T
