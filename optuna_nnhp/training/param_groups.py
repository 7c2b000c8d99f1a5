"""Update language models: Muon for hidden matrices, AdamW for the rest, each at its own rate."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import math

import torch
from torch import Tensor

from optuna_nnhp.engine.gpt import orthogonalize_
from optuna_nnhp.engine.gpt import supports_tensors
from optuna_nnhp.hyperparameters.muon import learning_rate_factor
from optuna_nnhp.hyperparameters.muon import orthogonalize
from optuna_nnhp.hyperparameters.optimizer import OptimizerState
from optuna_nnhp.hyperparameters.optimizer import UpdateCoefficients
from optuna_nnhp.hyperparameters.optimizer import optimizer_step
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.flat_parameters import param_column
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.task import Member

JOINED_MATRICES = {"qkv": 3}  # the number of matrices that a parameter holds side by side


class ParamGroupUpdate:
    """Updates the three groups of a GPT's parameters, each at its own rate.

    Hidden matrices are updated at the learning rate (under muP divided by the width ratio), or by
    Muon at its own rate; embeddings and head at ``embedding_rate`` times the learning rate; gains
    at the learning rate. Parameters whose names begin with ``blocks.`` are hidden, and all members
    have the same optimizer. Weight decay is decoupled and for matrices only; under muP it is as
    strong as at the base width.
    """

    def __init__(
        self, flat: FlatParameters, network: StackedModule, members: Sequence[Member]
    ) -> None:
        self.flat = flat
        params = [m.params for m in members]
        names = {parameter: name for name, parameter in network.named_parameters()}
        layout = {names[p]: (start, p.shape[1:]) for p, start in flat.offsets.items()}
        matrices = {n: entry for n, entry in layout.items() if len(entry[1]) > 1}
        self._hidden = {n: entry for n, entry in matrices.items() if n.startswith("blocks.")}
        self._is_muon = params[0]["optimizer"] == "muon"
        ratio = float(network.architecture.width_ratio) or 1.0  # type: ignore[union-attr,arg-type]
        size = flat.weights.shape[1]
        outer = [_columns_of_parameter(layout, n) for n in matrices if n not in self._hidden]
        self._hidden_columns = _merge_adjacent(
            _columns_of_parameter(layout, n) for n in self._hidden
        )
        hidden = [] if self._is_muon else self._hidden_columns
        gains = [slice(flat.num_decayed, size)] if size > flat.num_decayed else []
        embedding, decay = (
            param_column(params, "embedding_rate"),
            param_column(params, "weight_decay"),
        )
        momentum, beta2 = param_column(params, "momentum"), param_column(params, "beta2")
        self._coefficients = list(map(UpdateCoefficients, momentum, beta2))
        # The AdamW groups of each member: columns, factor of the learning rate, weight decay.
        self._groups = [
            [
                *((columns, embedding[i], embedding[i] * decay[i]) for columns in outer),
                *((columns, 1 / ratio, decay[i]) for columns in hidden),
                *((columns, 1.0, 0.0) for columns in gains),
            ]
            for i in range(len(members))
        ]
        base = param_column(params, "learning_rate")
        muon = param_column(params, "muon_learning_rate") if self._is_muon else base
        self._muon_ratio = torch.tensor([m / b for m, b in zip(muon, base, strict=True)])
        self._decay = torch.tensor(decay)
        like, clip_norm = flat.weights, param_column(params, "clip_norm")
        self._momentum = torch.tensor(momentum).to(like)[:, None]
        self._clip_norm = torch.tensor(clip_norm).to(like)
        self._clips = any(map(math.isfinite, clip_norm))
        self._states: list[list[tuple[OptimizerState, float, float]]] = []

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Clip the gradients and update all members, at each one's learning rate ``(k,)``."""
        flat = self.flat
        if self._clips:
            clip_gradients(flat.grads, self._clip_norm)
        if not self._states:
            self._states = [self._group_states(i) for i in range(len(flat.weights))]
        for states, rate, coefficients in zip(
            self._states, rates.tolist(), self._coefficients, strict=True
        ):
            for state, factor, decay in states:
                if decay:
                    state.weight.mul_(1 - rate * decay)
                optimizer_step("adamw", state, rate * factor, coefficients)
        if self._is_muon:
            self._step_by_muon(rates)

    def _group_states(self, i: int) -> list[tuple[OptimizerState, float, float]]:
        """Return a member's groups with their optimizer states."""
        flat = self.flat
        return [
            (
                OptimizerState(
                    weight=flat.weights[i, columns],
                    grad=flat.grads[i, columns],
                    exp_avg=flat.exp_avg[i, columns],
                    exp_avg_sq=flat.exp_avg_sq[i, columns],
                    step=flat.steps[i],
                ),
                factor,
                decay,
            )
            for columns, factor, decay in self._groups[i]
        ]

    def _step_by_muon(self, rates: Tensor) -> None:
        """Update hidden matrices by Muon: Nesterov momentum, then orthogonalized steps.

        Matrices of equal shape are orthogonalized as one stack.
        """
        flat, k = self.flat, len(rates)
        rate = (rates.cpu() * self._muon_ratio).to(flat.weights)
        decayed = (1 - rates.cpu() * self._muon_ratio * self._decay).to(flat.weights)
        for columns in self._hidden_columns:
            exp_avg, grad = flat.exp_avg[:, columns], flat.grads[:, columns]
            exp_avg.lerp_(grad, 1 - self._momentum)
            grad.lerp_(exp_avg, self._momentum)
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, (_, shape) in self._hidden.items():
            columns = _columns_of_parameter(self._hidden, name)
            steps = flat.grads[:, columns].view(k, *shape)
            weights = flat.weights[:, columns].view(k, *shape)
            count = JOINED_MATRICES.get(name.split(".")[-2], 1)
            pairs = zip(steps.chunk(count, -1), weights.chunk(count, -1), strict=True)
            for step, weight in pairs:
                key = (int(step.shape[1]), int(step.shape[2]))
                by_shape.setdefault(key, []).append((step, weight))
        for (inputs, outputs), matrices in by_shape.items():
            stack = torch.stack([step for step, _ in matrices], dim=1)  # (k, n, inputs, outputs)
            if supports_tensors(stack):
                orthogonalize_(stack.flatten(0, 1))
            else:
                stack = orthogonalize(stack.flatten(0, 1)).view(stack.shape)
            scale = -rate * learning_rate_factor(inputs, outputs)
            update = stack * scale[:, None, None, None]
            for n, (_, weight) in enumerate(matrices):
                weight.mul_(decayed[:, None, None]).add_(update[:, n])


def _columns_of_parameter(layout: Mapping[str, tuple[int, torch.Size]], name: str) -> slice:
    """Return a parameter's columns in the matrix of all parameters."""
    start, shape = layout[name]
    return slice(start, start + math.prod(shape))


def _merge_adjacent(slices: Iterable[slice]) -> list[slice]:
    """Merge slices that follow each other without a gap."""
    merged: list[slice] = []
    for part in slices:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged
