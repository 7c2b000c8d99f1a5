"""Cohorts on synthetic data in which every hyperparameter varies."""

from __future__ import annotations

from collections.abc import Sequence
import random
from typing import Any

import torch

from optuna_nnhp import rng
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.hyperparameters.learning_rate import LEARNING_RATE_DECAY
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import RegressionLoss
from optuna_nnhp.hyperparameters.optimizer import UPDATE_RULES
from optuna_nnhp.hyperparameters.weight_init import WEIGHT_INIT
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Task
from optuna_nnhp.training.metrics import accuracy
from optuna_nnhp.training.metrics import rmse

FEATURES, CLASSES, ROWS = 6, 3, 100

PLAIN: dict[str, Any] = {
    "weight_init": "he_normal",
    "hidden_layers": 2,
    "width": 20,
    "width_shape": "constant",
    "activation": "relu",
    "loss": "cross_entropy",
    "focal_gamma": 2.0,
    "huber_delta": 1.0,
    "optimizer": "adamw",
    "momentum": 0.9,
    "beta2": 0.99,
    "learning_rate": 0.01,
    "learning_rate_decay": "cosine",
    "warmup": 0.1,
    "min_lr_ratio": 0.1,
    "batch_size": 16,
    "epochs": 4,
    "iterations": 0,
    "dropout": 0.0,
    "weight_decay": 0.01,
    "l1": 0.0,
    "normalization": "none",
    "label_smoothing": 0.0,
    "clip_norm": float("inf"),
    "patience": 100,
    "min_improvement": 0.0,
}


def varied(k: int, *, regression: bool = False, seed: int = 0, **static: Any) -> list[Member]:
    """Return k members that differ in every hyperparameter that may differ in a cohort."""
    draw = random.Random(seed)
    members = []
    for number in range(k):
        params = PLAIN | {
            "weight_init": draw.choice(WEIGHT_INIT.distribution.choices),  # type: ignore
            "width": draw.randint(17, 32),
            "width_shape": draw.choice(["constant", "funnel"]),
            "activation": list(ACTIVATIONS)[number % len(ACTIVATIONS)],
            "loss": draw.choice(
                ["mse", "mae", "huber"] if regression else ["cross_entropy", "focal"]
            ),
            "huber_delta": draw.uniform(0.2, 2),
            "optimizer": list(UPDATE_RULES)[number % len(UPDATE_RULES)],
            "momentum": draw.uniform(0.5, 0.95),
            "beta2": draw.uniform(0.9, 0.999),
            "learning_rate": draw.choice([0.001, 0.003]),
            "learning_rate_decay": draw.choice(LEARNING_RATE_DECAY.distribution.choices),  # type: ignore
            "warmup": draw.choice([0.0, 0.2]),
            "min_lr_ratio": draw.uniform(0.01, 1),
            "epochs": draw.choice([3, 4]),
            "dropout": draw.choice([0.0, 0.3]),
            "weight_decay": draw.choice([0.0, 0.01]),
            "l1": draw.choice([0.0, 0.001]),
            "label_smoothing": 0.0 if regression else draw.choice([0.0, 0.1]),
            "clip_norm": draw.choice([0.5, float("inf")]),
        }
        members.append(Member(number, number, params | static))
    return members


def task(*, regression: bool = False, rows: int = ROWS, seed: int = 0) -> Task:
    """Return a small task."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 40, FEATURES, generator=source)
    y: torch.Tensor = x[:, 0] * x[:, 1] + 0.3 * torch.randn(rows + 40, generator=source)
    if not regression:
        y = torch.bucketize(y, torch.tensor([-0.4, 0.4]))
    arrays = Arrays(x[:rows], y[:rows], x[rows:], y[rows:])
    outputs = 1 if regression else CLASSES

    def build(members: Sequence[Member]) -> StackedMLP:
        generators = [rng.generator(seed, rng.INITIALIZATION, m.seed) for m in members]
        return StackedMLP([m.params for m in members], FEATURES, outputs, generators)

    def column(members: Sequence[Member], name: str) -> torch.Tensor:
        return torch.tensor([float(m.params[name]) for m in members])  # type: ignore

    def loss(members: Sequence[Member]) -> ClassificationLoss | RegressionLoss:
        def has(name: str) -> torch.Tensor:
            return torch.tensor([m.params["loss"] == name for m in members])

        if regression:
            return RegressionLoss(column(members, "huber_delta"), has("mse"), has("mae"))
        gamma = column(members, "focal_gamma") * has("focal")
        return ClassificationLoss(gamma, column(members, "label_smoothing"))

    def metric(out: torch.Tensor) -> torch.Tensor:
        return (
            rmse(out.squeeze(-1), arrays.valid_y) if regression else accuracy(out, arrays.valid_y)
        )

    return Task(arrays, build, loss, metric, not regression, seed)
