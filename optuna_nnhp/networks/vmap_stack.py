"""Any `nn.Module` k times as one: stacked by `torch.func`, or one alone where that fails."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Generator
from torch import Tensor
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from optuna_nnhp import rng
from optuna_nnhp.hyperparameters.regularization import dropout_factor
from optuna_nnhp.networks.layers import NoiseSource
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.layers import append_members
from optuna_nnhp.networks.layers import select_members
from optuna_nnhp.networks.structure import DROPOUT_TYPES

# Dropout of whole channels, by the dimensions of its input.
CHANNEL_DROPOUT_DIMS: dict[type, int] = {nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5}
NUM_SEEDS = 2**24  # as many as a uniform float32 has values


class ModuleStack(StackedModule):
    """The base of stacks of a user's modules.

    Every parameter and buffer of the plain network is one here, with the member first and with
    ``/`` for ``.`` in its name. The modules themselves are not registered.

    Args:
        plain:
            One of the networks, as a model for `member`.
        dims:
            Dimensions of a batch that all members share; an input with one more has the member
            first.

    Attributes:
        names: Of each parameter and buffer here its name in a plain network.
    """

    def __init__(self, plain: nn.Module, dims: int) -> None:
        super().__init__()
        self.dims, self.names = dims, dict[str, str]()
        # In a list a module is not registered: its weights are not those of the stack.
        self._prototype, self._modules_run = [deepcopy(plain)], list[nn.Module]()

    def train(self, mode: bool = True) -> ModuleStack:
        """Set training or evaluation mode, as `nn.Module.train`."""
        super().train(mode)
        for network in self._modules_run:
            network.train(mode)
        return self

    def select(self, members: Tensor) -> None:
        """Keep only some members ``(m,)``."""
        select_members(self, members)

    def set_hyperparameters(
        self, params: Sequence[Mapping[str, Any]], make_stack: Callable[[], StackedModule]
    ) -> None:
        """Set the dropout rates of a new stack; keep the weights."""
        layers = dict(self._modules_run[0].named_modules())
        settings = [
            key
            for key, name in self.names.items()
            if isinstance(layers.get(name.rpartition(".")[0]), _StackedDropout)
        ]
        if settings:
            other = make_stack()
            for key in settings:
                self.get_buffer(key).copy_(other.get_buffer(key))

    def member(self, i: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return one member as a plain network in evaluation mode.

        Args:
            i:
                Which member.
            weights:
                A `state_dict` of the stack to read from instead of its present weights.
        """
        source = weights if weights is not None else self.state_dict()
        network = deepcopy(self._prototype[0]).eval()
        tensors = tensors_of(network)
        with torch.no_grad():
            for key, name in self.names.items():
                if name in tensors:
                    tensors[name].copy_(source[key][i])
                else:  # a rate of dropout; float32 keeps seven digits of it
                    layer: Any = network.get_submodule(name.rpartition(".")[0])
                    layer.p = round(float(source[key][i]), 7)
        return network

    def _register(self, name: str, stacked: Tensor, trained: bool) -> str:
        key = f"of/{name.replace('.', '/')}"
        self.names[key] = name
        if trained:
            self.register_parameter(key, nn.Parameter(stacked))
        else:
            self.register_buffer(key, stacked)
        return key


class VmapStack(ModuleStack):
    """k networks of one structure, run by `torch.vmap` over their weights.

    Each member has its own weights and its own rates of dropout; the noise of dropout is shared.
    Everything else they must have in common, see `networks.structure`.

    Args:
        networks:
            The members.
        dims:
            Dimensions of a batch that all members share.
        constant:
            Names of parameters that are not trained, since the network does not use them.

    Shape:
        - Input: ``(batch, ...)``, or ``(k, batch, ...)`` with one dimension more.
        - Output: ``(k, batch, outputs)``; a member's output ``(batch,)`` counts as one column.

    Example:
        >>> stack = VmapStack([nn.Conv1d(3, 5, 2) for _ in range(4)], dims=3)
        >>> stack(torch.zeros(7, 3, 6)).shape, stack(torch.zeros(4, 7, 3, 6)).shape
        (torch.Size([4, 7, 5, 5]), torch.Size([4, 7, 5, 5]))

    Source:
        https://docs.pytorch.org/tutorials/intermediate/ensembling.html
    """

    def __init__(
        self, networks: Sequence[nn.Module], dims: int, constant: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(networks[0], dims)
        skeleton, self._dropouts = _replace_dropouts(deepcopy(networks[0]))
        _use_running_stats_for_single_values(skeleton)
        self._modules_run.append(skeleton.train(self.training))
        tensors = tensors_of(skeleton)
        # Rates of dropout are made on the CPU, the weights may be on a GPU.
        device = next((p.device for p in networks[0].parameters()), torch.device("cpu"))
        sources = [{**_dropout_rates(network), **tensors_of(network)} for network in networks]
        for name, tensor in tensors.items():
            stacked = torch.stack([source[name].detach() for source in sources]).to(device)
            self._register(name, stacked, tensor.requires_grad and name not in constant)

    def forward(self, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """Compute the outputs of all members.

        Args:
            x:
                Examples, shared or with the member first.
            noise:
                Uniform random numbers for dropout, drawn anew at every call of a dropout;
                without it, or in evaluation, nothing is dropped.
        """
        for layer in self._dropouts:
            layer.noise = noise
        state = {name: getattr(self, key) for key, name in self.names.items()}
        in_dims = (0, 0 if x.dim() > self.dims else None)
        with _attention_for_vmap(x.device):
            outputs, changed = torch.vmap(self._run_member, in_dims, randomness="error")(state, x)
        for key, name in self.names.items():
            if name in changed:
                getattr(self, key).copy_(changed[name].detach())
        return _as_columns(outputs)

    def _run_member(self, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one member's output, and the buffers that it replaced."""
        given = dict(state)
        output = functional_call(self._modules_run[0], state, (x,))
        return output, {name: t for name, t in state.items() if t is not given[name]}

    def append(self, other: StackedModule) -> None:
        """Append another stack's members, of the same structure."""
        append_members(self, other)


class SingleNetworkStack(ModuleStack):
    """A stack of one network that `torch.vmap` cannot run.

    Its weights are views of those here, and its gradients go to those here. Whatever random
    numbers it draws follow from the noise, so that the same seed gives the same course.

    Args:
        network:
            The member; it belongs to the stack from now on.
        dims:
            Dimensions of a batch.

    Shape:
        - Input: ``(batch, ...)``, or ``(1, batch, ...)`` with one dimension more.
        - Output: ``(1, batch, outputs)``.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 5), nn.AlphaDropout(0.2))
        >>> SingleNetworkStack(network, dims=2)(torch.zeros(7, 3)).shape
        torch.Size([1, 7, 5])
    """

    def __init__(self, network: nn.Module, dims: int) -> None:
        super().__init__(network, dims)
        _use_running_stats_for_single_values(network)
        self._modules_run.append(network.train(self.training))
        for name, tensor in tensors_of(network).items():
            key = self._register(name, tensor.detach()[None].clone(), tensor.requires_grad)
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._grad_mover(key))

    def forward(self, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """Compute the member's outputs; its random numbers follow from ``noise``."""
        (network,) = self._modules_run
        tensors = tensors_of(network)
        for key, name in self.names.items():
            here = getattr(self, key)
            tensors[name].data = here.detach()[0]
            if here.requires_grad and torch.is_grad_enabled():
                here.grad = torch.zeros_like(
                    here
                )  # weights that this step does not use have no gradient
        seed = int(float(noise(1, 1)) * NUM_SEEDS) if noise is not None else 0
        with rng.global_rng_from(Generator().manual_seed(seed)):
            outputs = network(x[0] if x.dim() > self.dims else x)
        tensors = tensors_of(network)
        for key, name in self.names.items():
            here, there = getattr(self, key), tensors[name]
            if there.data_ptr() != here.data_ptr():  # it was replaced instead of changed
                here.copy_(there.detach()[None])
        return _as_columns(outputs[None])

    def append(self, other: StackedModule) -> None:
        """Raise: such a network must train alone."""
        raise ValueError("A network that cannot be stacked must train alone.")

    def _grad_mover(self, key: str) -> Callable[[Tensor], None]:
        """Return a hook that moves a weight's gradient to its counterpart in the stack."""

        def move_grad(weight: Tensor) -> None:
            assert weight.grad is not None
            getattr(self, key).grad = weight.grad[None]
            weight.grad = None

        return move_grad


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; tied ones by the first name.

    Example:
        >>> list(tensors_of(nn.BatchNorm1d(2, affine=False)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return dict(chain(network.named_parameters(), network.named_buffers()))


class _StackedDropout(nn.Module):
    """Dropout of units or whole channels at each member's own rate.

    Args:
        layer:
            The plain one.

    Shape:
        - p: ``()`` inside `torch.vmap`, ``(k,)`` outside.
    """

    p: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.register_buffer("p", _dropout_rate(layer))
        self.kind = type(layer)
        self.noise: NoiseSource | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Drop values at the member's rate and scale up the rest."""
        if not self.training or self.noise is None:
            return h
        dims = CHANNEL_DROPOUT_DIMS.get(self.kind, h.dim())
        if h.dim() != dims:
            raise ValueError(f"{self.kind.__name__} takes {dims} dimensions, but got {h.dim()}.")
        whole = self.kind in CHANNEL_DROPOUT_DIMS
        out: Tensor = _VmapDropout.apply(h, self.p, self.noise, whole)  # type: ignore[no-untyped-call]
        return out


class _VmapDropout(torch.autograd.Function):
    """Applies dropout inside `torch.vmap`, with noise that the members share.

    Source:
        https://docs.pytorch.org/docs/stable/notes/extending.func.html, "Defining the vmap
        staticmethod".
    """

    @staticmethod
    def forward(h: Tensor, p: Tensor, noise: NoiseSource, whole_channels: bool) -> Tensor:
        raise AssertionError("Dropout of a stack must run inside torch.vmap.")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, h: Tensor, p: Tensor, noise: NoiseSource, whole_channels: bool
    ) -> tuple[Tensor, int]:
        h = h[None] if in_dims[0] is None else h.movedim(in_dims[0], 0)
        units = h.shape[2:3] if whole_channels else h.shape[2:]
        u = noise(h.shape[1], units.numel())
        ones = [1] * (h.dim() - 2 - len(units))
        u = u.view(*u.shape[:-1], *units, *ones)  # (batch, ...), or each its own (k, batch, ...)
        return h * dropout_factor(u, p.to(u.dtype).view(-1, *[1] * (h.dim() - 1))), 0


def _dropout_rate(layer: nn.Module) -> Tensor:
    return torch.tensor(float(layer.p))  # type: ignore[arg-type]


def _is_stackable(layer: nn.Module) -> bool:
    return type(layer) in DROPOUT_TYPES and not layer.inplace


def _dropout_rates(network: nn.Module) -> dict[str, Tensor]:
    """Return the dropout rates by the names of their buffers in a stack."""
    layers = {name: m for name, m in network.named_modules() if _is_stackable(m)}
    return {f"{name}.p" if name else "p": _dropout_rate(layer) for name, layer in layers.items()}


def _replace_dropouts(network: nn.Module) -> tuple[nn.Module, list[_StackedDropout]]:
    """Replace dropout layers in place by ones that can be stacked; return both."""
    made: dict[nn.Module, _StackedDropout] = {}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if _is_stackable(child):
                module._modules[name] = made.setdefault(child, _StackedDropout(child))
    return network, list(made.values())


def _use_running_stats_for_single_values(network: nn.Module) -> None:
    """Make batch normalization use its running estimates where a channel has a single value.

    torch.nn refuses such a batch, and the last one of an epoch may be one.
    """
    paused: set[nn.Module] = set()

    def use_running_stats(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if norm.training and inputs[0].dim() > 1 and inputs[0].numel() == inputs[0].shape[1]:
            norm.training = False
            paused.add(norm)

    def restore_training_mode(norm: nn.Module, inputs: Any, output: Any) -> None:
        if norm in paused:
            norm.training = True
            paused.discard(norm)

    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(use_running_stats)
            module.register_forward_hook(restore_training_mode, always_call=True)


@contextmanager
def _attention_for_vmap(device: torch.device) -> Iterator[None]:
    """Use attention operations on the CPU that `torch.vmap` runs as one, not in turn."""
    if device.type != "cpu":
        yield
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _as_columns(outputs: Tensor) -> Tensor:
    """Reshape outputs ``(k, batch)`` to ``(k, batch, 1)``."""
    return outputs[..., None] if outputs.dim() == 2 else outputs
