"""Updates of language models: Muon for hidden matrices, AdamW for the rest, each at its rate."""

from __future__ import annotations

from collections.abc import Sequence
import math

import torch
from torch import Tensor

from optuna_nnhp.engine.gpt import orthogonalize_
from optuna_nnhp.engine.gpt import supports_tensors
from optuna_nnhp.hyperparameters.muon import orthogonalize
from optuna_nnhp.hyperparameters.muon import shape_rate_factor
from optuna_nnhp.hyperparameters.optimizer import OptimizerState
from optuna_nnhp.hyperparameters.optimizer import UpdateCoefficients
from optuna_nnhp.hyperparameters.optimizer import optimizer_step
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.step_params import Member
from optuna_nnhp.training.step_params import param_column

PARTS = {"qkv": 3}  # matrices that hold several beside each other


class ParamGroupUpdate:
    """One step of all members, whose parameters are of three kinds.

    Hidden matrices move at the learning rate (under muP over the width's ratio), or by Muon at
    its own rate; embeddings and the head at ``embedding_rate`` times the learning rate; gains at
    the learning rate. Weight decay is decoupled and for matrices only; under muP it is as strong
    as at the base width.

    Args:
        flat:
            The members' parameters.
        network:
            Their network; names that begin with ``blocks.`` are hidden.
        members:
            The trials, all with one ``optimizer``.
    """

    def __init__(
        self, flat: FlatParameters, network: StackedModule, members: Sequence[Member]
    ) -> None:
        self.flat = flat
        names = {parameter: name for name, parameter in network.named_parameters()}
        places = {names[p]: (start, p.shape[1:]) for p, start in flat.offsets.items()}
        self._hidden = {
            n: place
            for n, place in places.items()
            if n.startswith("blocks.") and len(place[1]) > 1
        }
        matrices = [n for n, (_, shape) in places.items() if len(shape) > 1]
        outer = [n for n in matrices if n not in self._hidden]
        self._is_muon = members[0].params["optimizer"] == "muon"
        ratio = float(network.architecture.width_ratio) or 1.0  # type: ignore[union-attr,arg-type]
        size = flat.weights.shape[1]
        outside = [self._place(places, n) for n in outer]
        inside = [] if self._is_muon else _joined(self._place(places, n) for n in self._hidden)
        gains = [slice(flat.num_decayed, size)] if size > flat.num_decayed else []
        embedding = param_column(members, "embedding_rate")
        self._coefficients = [
            UpdateCoefficients(*numbers)
            for numbers in zip(
                param_column(members, "momentum"), param_column(members, "beta2"), strict=True
            )
        ]
        decay = param_column(members, "weight_decay")
        # By member: a slice, the factor of its rate, and what its weights lose at a rate of one.
        self._adam = [
            [
                *((part, embedding[i], embedding[i] * decay[i]) for part in outside),
                *((part, 1 / ratio, decay[i]) for part in inside),
                *((part, 1.0, 0.0) for part in gains),
            ]
            for i in range(len(members))
        ]
        base = param_column(members, "learning_rate")
        muon = param_column(members, "muon_learning_rate") if self._is_muon else base
        self._muon_rate = torch.tensor([m / b for m, b in zip(muon, base, strict=True)])
        self._decay = torch.tensor(decay)
        like = flat.weights
        self._momentum = torch.tensor(param_column(members, "momentum")).to(like)[:, None]
        self._clip = torch.tensor(param_column(members, "clip_norm")).to(like)
        self._clips = bool(torch.isfinite(self._clip).any())
        self._rows: list[list[tuple[OptimizerState, float, float]]] = []

    @staticmethod
    def _place(places: dict[str, tuple[int, torch.Size]], name: str) -> slice:
        start, shape = places[name]
        return slice(start, start + math.prod(shape))

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Clip the gradients and update, at each member's learning rate ``(k,)``."""
        flat = self.flat
        if self._clips:
            clip_gradients(flat.grads, self._clip)
        if not self._rows:
            self._rows = [self._views(i) for i in range(len(flat.weights))]
        for rows, rate, coefficients in zip(
            self._rows, rates.tolist(), self._coefficients, strict=True
        ):
            for state, factor, decay in rows:
                if decay:
                    state.weight.mul_(1 - rate * decay)
                optimizer_step("adamw", state, rate * factor, coefficients)
        if self._is_muon:
            self._step_by_muon(rates)

    def _views(self, i: int) -> list[tuple[OptimizerState, float, float]]:
        flat = self.flat
        return [
            (
                OptimizerState(
                    weight=flat.weights[i, part],
                    grad=flat.grads[i, part],
                    exp_avg=flat.exp_avg[i, part],
                    exp_avg_sq=flat.exp_avg_sq[i, part],
                    step=flat.steps[i],
                ),
                factor,
                decay,
            )
            for part, factor, decay in self._adam[i]
        ]

    def _step_by_muon(self, rates: Tensor) -> None:
        """Nesterov momentum, then a step of orthogonal matrices; equal shapes as one stack."""
        flat, k = self.flat, len(rates)
        rate = (rates.cpu() * self._muon_rate).to(flat.weights)
        keep = (1 - rates.cpu() * self._muon_rate * self._decay).to(flat.weights)
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for part in _joined(self._place(self._hidden, n) for n in self._hidden):
            exp_avg, grad = flat.exp_avg[:, part], flat.grads[:, part]
            exp_avg.lerp_(grad, 1 - self._momentum)
            grad.lerp_(exp_avg, self._momentum)
        for name, (start, shape) in self._hidden.items():
            part = slice(start, start + math.prod(shape))
            steps = flat.grads[:, part].view(k, *shape)
            weights = flat.weights[:, part].view(k, *shape)
            pieces = PARTS.get(name.split(".")[-2], 1)
            for step, weight in zip(
                steps.chunk(pieces, -1), weights.chunk(pieces, -1), strict=True
            ):
                key = (int(step.shape[1]), int(step.shape[2]))
                stacks.setdefault(key, []).append((step, weight))
        for (inputs, outputs), pairs in stacks.items():
            stack = torch.stack([step for step, _ in pairs], dim=1)  # (k, n, inputs, outputs)
            if supports_tensors(stack):
                orthogonalize_(stack.flatten(0, 1))
            else:
                stack = orthogonalize(stack.flatten(0, 1)).view(stack.shape)
            straight = stack * (-rate * shape_rate_factor(inputs, outputs))[:, None, None, None]
            for place, (_, weight) in enumerate(pairs):
                weight.mul_(keep[:, None, None]).add_(straight[:, place])


def _joined(parts: object) -> list[slice]:
    """Slices, those that touch as one."""
    joined: list[slice] = []
    for part in parts:  # type: ignore[attr-defined]
        if joined and joined[-1].stop == part.start:
            joined[-1] = slice(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined
