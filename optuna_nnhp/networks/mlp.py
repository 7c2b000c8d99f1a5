"""Multilayer perceptrons: a plain network, and a stack of k networks."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Generator
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.hyperparameters.activation import activate
from optuna_nnhp.hyperparameters.activation import activation_groups
from optuna_nnhp.hyperparameters.regularization import dropout_factor
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.weight_init import initial_weight
from optuna_nnhp.hyperparameters.width import layer_widths
from optuna_nnhp.hyperparameters.width import padded_width
from optuna_nnhp.networks.layers import NoiseSource
from optuna_nnhp.networks.layers import StackedBatchNorm
from optuna_nnhp.networks.layers import StackedLayerNorm
from optuna_nnhp.networks.layers import StackedLinear
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.layers import append_members
from optuna_nnhp.networks.layers import select_members

Params = Mapping[str, Value]


def hidden_widths(params: Params) -> list[int]:
    """Return the number of neurons of a trial's hidden layers."""
    return layer_widths(
        int(params["width"] or 1), str(params["width_shape"]), int(params["hidden_layers"] or 1)
    )


def mlp_signature(params: Params) -> Hashable:
    """Return a key that is equal for trials that can be stacked.

    Example:
        >>> mlp_signature({"hidden_layers": 2, "width": 100, "normalization": "none"})
        (2, 128, 'none')
    """
    padded = padded_width(int(params["width"] or 1))
    return params["hidden_layers"], padded, params["normalization"]


def count_weights(params: Params, inputs: int, outputs: int) -> int:
    """Return the number of trained weights of a trial's network, biases included.

    Example:
        >>> params = {"hidden_layers": 1, "width": 8, "width_shape": "constant"}
        >>> count_weights({**params, "normalization": "none"}, inputs=4, outputs=2)
        58
    """
    sizes = [inputs, *hidden_widths(params), outputs]
    weights, units = sum(a * b for a, b in pairwise(sizes)), sum(sizes[1:-1])
    # Per hidden unit: a bias, a scale and shift (batch, see `_has_bias`), or all three (layer).
    per_unit = {"none": 1, "batch": 2, "layer": 3}[str(params["normalization"])]
    return weights + per_unit * units + outputs


def build_mlp(params: Params, inputs: int, outputs: int) -> nn.Sequential:
    """Build a trial's network from plain `torch.nn` modules; its weights are not loaded.

    Args:
        params:
            The trial's hyperparameters.
        inputs:
            Features of an example.
        outputs:
            Classes, or 1 for a number.

    Shape:
        - Input of the network: ``(batch, inputs)``; output: ``(batch, outputs)``, logits or
          standardized numbers.

    Example:
        >>> params = {"hidden_layers": 1, "width": 8, "width_shape": "constant"}
        >>> params |= {"normalization": "batch", "activation": "tanh", "dropout": 0.0}
        >>> [type(layer).__name__ for layer in build_mlp(params, 4, 2)]
        ['Linear', 'BatchNorm1d', 'Tanh', 'Linear']
    """
    layers: list[nn.Module] = []
    size = inputs
    for width in hidden_widths(params):
        layers.append(nn.Linear(size, width, bias=_has_bias(params)))
        if params["normalization"] == "batch":
            layers.append(nn.BatchNorm1d(width))
        elif params["normalization"] == "layer":
            layers.append(nn.LayerNorm(width))
        layers.append(ACTIVATIONS[str(params["activation"])].module())
        if params["dropout"]:
            layers.append(nn.Dropout(float(params["dropout"])))
        size = width
    return nn.Sequential(*layers, nn.Linear(size, outputs))


class StackedMLP(StackedModule):
    """A stack of k multilayer perceptrons with the same signature.

    Each member has its own initialization, activation, dropout and widths. Widths are padded
    with units whose weights are zero. Padding does not change results: padded units output zero
    (by a mask, if the activation of zero is not zero), so their gradients are zero, and no update
    rule of the catalogue changes a zero weight with zero gradient.

    Args:
        params:
            Hyperparameters of each member; their `mlp_signature` is equal.
        inputs:
            Features of an example.
        outputs:
            Classes, or 1 for a number.
        generators:
            The random number generator of each member, for its initial weights.

    Shape:
        - Input: ``(batch, inputs)``, or ``(k, batch, inputs)``.
        - Output: ``(k, batch, outputs)``.

    Raises:
        ValueError: If the members' signatures differ.

    Example:
        >>> params = {"hidden_layers": 1, "width": 8, "width_shape": "constant"}
        >>> params |= {"normalization": "batch", "activation": "tanh", "dropout": 0.0}
        >>> params |= {"weight_init": "he_normal"}
        >>> stack = StackedMLP([params, {**params, "width": 5}], 4, 2, [torch.Generator()] * 2)
        >>> stack(torch.zeros(7, 4)).shape
        torch.Size([2, 7, 2])
    """

    def __init__(
        self, params: Sequence[Params], inputs: int, outputs: int, generators: Sequence[Generator]
    ) -> None:
        super().__init__()
        signatures = {mlp_signature(p) for p in params}
        if len(signatures) != 1:
            raise ValueError(f"Stacked networks must share a signature, but got {signatures}.")
        self.params = list(params)
        self.inputs, self.outputs = inputs, outputs
        depth, padded = len(hidden_widths(params[0])), padded_width(int(params[0]["width"] or 1))
        k, kind = len(params), params[0]["normalization"]
        self.linears, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer, weight in enumerate(
            _initial_weights(params, inputs, outputs, padded, generators)
        ):
            self.linears.append(StackedLinear(weight, layer == depth or _has_bias(params[0])))
            if layer < depth:
                self.register_buffer(f"mask{layer}", _mask(params, layer, padded))
                if kind == "batch":
                    self.norms.append(StackedBatchNorm(k, padded))
                elif kind == "layer":
                    self.norms.append(StackedLayerNorm(self.get_buffer(f"mask{layer}")))
        self.register_buffer("dropout", torch.tensor([float(p["dropout"] or 0) for p in params]))
        self._update_groups()

    def forward(self, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """Compute every member's output.

        Args:
            x:
                Examples.
            noise:
                Uniform random numbers for dropout, drawn once per hidden layer; dropout is off
                if None.
        """
        h = x
        for layer, linear in enumerate(list(self.linears)[:-1]):
            h = linear(h)
            if self.norms:
                h = self.norms[layer](h)
            h = activate(h, self.groups, self._output_factor(layer, h, noise))
        return self.linears[-1](h)  # type: ignore[no-any-return]

    def _output_factor(self, layer: int, h: Tensor, noise: NoiseSource | None) -> Tensor | None:
        """Return the product of dropout factor and mask; None if neither is needed."""
        mask = self.get_buffer(f"mask{layer}") if self.needs_mask else None
        if noise is None or not self.has_dropout:
            return mask
        u = noise(h.shape[-2], h.shape[-1])
        factor = dropout_factor(u, self.get_buffer("dropout")[:, None, None])
        return factor if mask is None else factor.mul_(mask)

    def select(self, members: Tensor) -> None:
        """Keep only some members ``(m,)``."""
        select_members(self, members)
        self.params = [self.params[i] for i in members.tolist()]
        self._update_groups()

    def append(self, other: StackedMLP) -> None:
        """Append the members of another stack with the same signature."""
        append_members(self, other)
        self.params = [*self.params, *other.params]
        self._update_groups()

    def set_hyperparameters(
        self, params: Sequence[Params], make_stack: Callable[[], StackedModule]
    ) -> None:
        """Set new hyperparameters of the same structure; keep the weights."""
        self.params = list(params)
        rates = torch.tensor([float(p["dropout"] or 0) for p in params])
        self.get_buffer("dropout").copy_(rates)
        self._update_groups()

    def member(self, i: int, weights: Mapping[str, Tensor] | None = None) -> nn.Sequential:
        """Return one member as a plain network, without its padding.

        Args:
            i:
                The index of the member.
            weights:
                A `state_dict` of the stack; None for its current weights.
        """
        source = weights if weights is not None else self.state_dict()
        network = build_mlp(self.params[i], self.inputs, self.outputs)
        sizes = [self.inputs, *hidden_widths(self.params[i]), self.outputs]
        linears = [m for m in network if isinstance(m, nn.Linear)]
        norms = [m for m in network if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)]
        with torch.no_grad():
            for n, linear in enumerate(linears):
                rows, columns = sizes[n], sizes[n + 1]
                linear.weight.copy_(source[f"linears.{n}.weight"][i, :rows, :columns].T)
                if linear.bias is not None:
                    linear.bias.copy_(source[f"linears.{n}.bias"][i, :columns])
            for n, norm in enumerate(norms):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    if hasattr(norm, name):
                        getattr(norm, name).copy_(source[f"norms.{n}.{name}"][i, : sizes[n + 1]])
        return network.eval()

    def _update_groups(self) -> None:
        names = [str(p["activation"]) for p in self.params]
        self.groups = activation_groups(names)
        self.has_dropout = bool((self.get_buffer("dropout") > 0).any())
        padded = any(
            not bool(self.get_buffer(f"mask{layer}").all())
            for layer in range(len(self.linears) - 1)
        )
        self.needs_mask = padded and "sigmoid" in names


def _has_bias(params: Params) -> bool:
    return params["normalization"] != "batch"  # batch normalization has its own bias


def _mask(params: Sequence[Params], layer: int, padded: int) -> Tensor:
    """Return 1 for each member's own units of a layer, 0 for padding: ``(k, 1, padded)``."""
    widths = torch.tensor([hidden_widths(p)[layer] for p in params])
    return (torch.arange(padded) < widths[:, None]).to(torch.get_default_dtype())[:, None]


def _initial_weights(
    params: Sequence[Params],
    inputs: int,
    outputs: int,
    padded: int,
    generators: Sequence[Generator],
) -> list[Tensor]:
    """Draw the zero-padded initial weights of each layer, ``(k, in, out)``.

    They are drawn without padding, layer after layer, so that they depend neither on the padding
    nor on other members.
    """
    depth = len(hidden_widths(params[0]))
    sizes = [inputs, *[padded] * depth, outputs]
    weights = [torch.zeros(len(params), a, b) for a, b in pairwise(sizes)]
    for i, (p, generator) in enumerate(zip(params, generators, strict=True)):
        own_sizes = [inputs, *hidden_widths(p), outputs]
        for layer, (fan_in, fan_out) in enumerate(pairwise(own_sizes)):
            gain = ACTIVATIONS[str(p["activation"])].gain if layer < depth else 1.0
            weights[layer][i, :fan_in, :fan_out] = initial_weight(
                str(p["weight_init"]), fan_in, fan_out, gain, generator
            )
    return weights
