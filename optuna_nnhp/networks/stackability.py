"""Whether a network can be stacked, and how large it is: found by trying it on a small batch."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
import logging
from typing import Any

import torch
from torch import Generator
from torch import Tensor
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.networks.structure import CannotStack
from optuna_nnhp.networks.structure import structure_key
from optuna_nnhp.networks.vmap_stack import ModuleStack
from optuna_nnhp.networks.vmap_stack import SingleNetworkStack
from optuna_nnhp.networks.vmap_stack import VmapStack
from optuna_nnhp.networks.vmap_stack import tensors_of

_logger = logging.getLogger(f"optuna.{__name__}")

PROBE_ROWS = 4  # of the batch that a network is tried on
# Of the largest output: torch.vmap sums in another order, in half precision on some devices.
RELATIVE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class StackabilityReport:
    """What a trial run on a small batch shows about all networks of one structure.

    Args:
        structure:
            What they share.
        obstacle:
            Why they cannot be stacked; None if they can.
        constant:
            Names of parameters that get no gradient.
        weights:
            Number of trained weights of one.
        activations_per_example:
            Numbers that its layers put out for one example.
        flops:
            Operations of its forward pass for one example, about: two for each weight of a layer
            and each place where the layer uses it.
        outputs:
            **Shape** of its output for one example.
    """

    structure: str
    obstacle: str | None
    constant: frozenset[str]
    weights: int
    activations_per_example: int
    flops: float
    outputs: tuple[int, ...]


class StackabilityProbe:
    """Finds whether networks can be stacked, once for each structure, and stacks them.

    Args:
        x:
            Some examples, at least two.

    Shape:
        - x: ``(n, ...)``.

    Example:
        >>> examiner = StackabilityProbe(torch.zeros(4, 3))
        >>> examiner(nn.Linear(3, 2)).weights
        8
        >>> examiner(nn.Sequential(nn.Linear(3, 2), nn.AlphaDropout(0.1))).obstacle
        'vmap: called random operation while in randomness error mode.'
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x[:PROBE_ROWS]
        self._known: dict[str, StackabilityReport] = {}
        self._logged: set[str] = set()

    def __call__(self, network: nn.Module) -> StackabilityReport:
        """Return the report on a network's structure.

        Raises:
            Exception: Whatever the network raises when it runs alone.
        """
        reason: str | None = None
        try:
            found = structure_key(network)
        except CannotStack as error:
            shapes = [(name, t.shape) for name, t in tensors_of(network).items()]
            reason, found = str(error), f"{type(network).__qualname__} {shapes}"
        if found not in self._known:
            self._known[found] = self._probe(network, found, reason)
            self._log(network, self._known[found].obstacle)
        return self._known[found]

    def stack(self, networks: Sequence[nn.Module]) -> ModuleStack:
        """Stack networks of one structure.

        Raises:
            ValueError: If they cannot be stacked, or have different structures.
        """
        found = [self(network) for network in networks]
        if found[0].obstacle is not None and len(networks) == 1:
            return _with_sizes(SingleNetworkStack(networks[0], self._x.dim()), found[0])
        if found[0].obstacle is not None or any(f != found[0] for f in found):
            raise ValueError(
                "Stacked networks must share a structure, but these do not: "
                f"{found[0].obstacle or 'their structures differ'}."
            )
        return _with_sizes(VmapStack(networks, self._x.dim(), found[0].constant), found[0])

    def _probe(self, network: nn.Module, found: str, reason: str | None) -> StackabilityReport:
        run = _ProbeStep(network, self._x)
        obstacle = reason or self._find_obstacle(network, run)
        constant = frozenset() if obstacle else run.constant
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        weights = sum(p.numel() for n, p in trained.items() if n not in constant)
        return StackabilityReport(
            structure=found,
            obstacle=obstacle,
            constant=constant,
            weights=weights,
            activations_per_example=run.activations_per_example,
            flops=max(run.flops, 2.0 * weights),
            outputs=run.outputs,
        )

    def _find_obstacle(self, network: nn.Module, run: _ProbeStep) -> str | None:
        """Return why a network cannot be stacked, from a stack of it and a copy; None if it can.

        The copy has other weights, which reveals weights that `torch.vmap` does not map.
        """
        double = deepcopy(network)
        with torch.no_grad():
            for parameter in double.parameters():
                parameter.mul_(0.5)
        try:
            stack = VmapStack([network, double], self._x.dim())
            with torch.no_grad():
                outputs = stack.eval()(self._x)
            stack.train()
            stack(self._x, self._noise_without_drops).square().sum().backward()
        except Exception as error:  # torch.vmap raises of all kinds; the plain run was fine
            return _first_line(error)
        idle = {stack.names[key] for key, p in stack.named_parameters() if p.grad is None}
        if idle != run.constant:
            return "gradients of " + ", ".join(sorted(idle ^ run.constant)) + " get lost"
        for output, plain in zip(outputs, (network, double), strict=True):
            expected = _outputs(deepcopy(plain).eval(), self._x)
            if not _is_close(output, expected):
                return "stacked, its outputs are others"
        return None

    def _noise_without_drops(self, batch: int, width: int) -> Tensor:
        return torch.full((batch, width), 0.999, device=self._x.device)

    def _log(self, network: nn.Module, obstacle: str | None) -> None:
        text = f"{type(network).__qualname__} cannot be stacked and trains alone: {obstacle}"
        if obstacle is not None and text not in self._logged:
            self._logged.add(text)
            _logger.info(text)


def _with_sizes(stack: ModuleStack, found: StackabilityReport) -> ModuleStack:
    stack.flops, stack.activations_per_example = found.flops, found.activations_per_example
    return stack


class _ProbeStep:
    """One training step of a plain network: its outputs, sizes and unused parameters.

    Attributes:
        outputs: **Shape** of an output.
        numbers: Numbers that the layers put out, of an example.
        flops: Operations of the forward pass, of an example, about.
        constant: Names of parameters without a gradient.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        network = _copy(network).train()
        with rng.global_rng_from(Generator().manual_seed(0)):
            with _count_operations(network) as counts:
                outputs = network(x)
            _check_outputs(outputs, len(x))
            outputs.square().sum().backward()
        self.outputs = tuple(outputs.shape[1:])
        self.activations_per_example = sum(numbers for numbers, _ in counts) // len(x)
        self.flops = sum(flops for _, flops in counts) / len(x)
        trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        self.constant = frozenset(n for n, p in trained if p.grad is None)


def _check_outputs(outputs: Any, rows: int) -> None:
    given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (rows,):
        raise ValueError(
            "A network must give a tensor with a row for each example, "
            f"but for {rows} examples gave {given}."
        )
    if not outputs.requires_grad:
        raise ValueError("A network must have weights to train, but this one has none.")


@contextmanager
def _count_operations(network: nn.Module) -> Iterator[list[tuple[int, float]]]:
    """Count each layer's outputs and operations during a forward pass.

    Torch's own `FlopCounterMode` is exact, but loads its compiler first, for seconds.
    """
    counts: list[tuple[int, float]] = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        numbers = first.numel() if isinstance(first, Tensor) else 0
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        counts.append((numbers, sum(2.0 * numbers * p.numel() / len(p) for p in matrices)))

    def is_layer(module: nn.Module) -> bool:
        return not list(module.children()) or bool(list(module.parameters(recurse=False)))

    handles = [m.register_forward_hook(count) for m in network.modules() if is_layer(m)]
    yield counts
    for handle in handles:
        handle.remove()


def _copy(network: nn.Module) -> nn.Module:
    try:
        return deepcopy(network)
    except Exception as error:  # whatever the user's attributes raise
        raise ValueError(
            f"A network must be one that `copy.deepcopy` can copy, but: {_first_line(error)}"
        ) from error


def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = network(x)
    return outputs[:, None] if outputs.dim() == 1 else outputs


def _is_close(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    atol = RELATIVE_TOLERANCE * float(expected.abs().max())
    return torch.allclose(output, expected, rtol=0.0, atol=atol, equal_nan=True)


def _first_line(error: Exception) -> str:
    """Return the first sentence or line of an error message."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    head, dot, _ = line.partition(". ")
    return head + dot.strip()
