"""Make studies with the attributes that the tuner writes, without training."""

from __future__ import annotations

import datetime
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

SPACE: dict[str, BaseDistribution] = {
    "weight_init": CategoricalDistribution(["kaiming_normal", "xavier_uniform"]),
    "hidden_layers": IntDistribution(1, 4),
    "width": IntDistribution(16, 256, log=True),
    "activation": CategoricalDistribution(["relu", "gelu", "tanh"]),
    "optimizer": CategoricalDistribution(["adam", "sgd", "rmsprop"]),
    "momentum": FloatDistribution(0.0, 0.99),
    "learning_rate": FloatDistribution(1e-5, 1.0, log=True),
    "batch_size": CategoricalDistribution([16, 32, 64]),
    "dropout": FloatDistribution(0.0, 0.5),
    "weight_decay": FloatDistribution(1e-6, 0.1, log=True),
}


def curve(
    rng: np.random.Generator, params: dict[str, object], epochs: int, maximized: bool
) -> np.ndarray:
    rate = np.log10(float(str(params["learning_rate"])))
    quality = np.exp(-((rate + 2.5) ** 2) / 2.0) * (0.9 + 0.1 * rng.random())
    rise = 1.0 - np.exp(-np.arange(1, epochs + 1) / (2.0 + 6.0 * rng.random()))
    accuracy = 0.1 + 0.88 * quality * rise + rng.normal(0.0, 0.006, epochs)
    return np.asarray(accuracy if maximized else -np.log(np.clip(accuracy, 1e-3, 0.999)))


def trial(
    rng: np.random.Generator,
    state: TrialState,
    maximized: bool,
    space: dict[str, BaseDistribution],
) -> FrozenTrial:
    params: dict[str, object] = {}
    for name, found in space.items():
        if isinstance(found, CategoricalDistribution):
            params[name] = found.choices[int(rng.integers(len(found.choices)))]
        else:
            assert isinstance(found, FloatDistribution | IntDistribution)
            scale, back = (np.log, np.exp) if found.log else (np.asarray, np.asarray)
            value = float(back(rng.uniform(scale(found.low), scale(found.high))))
            params[name] = round(value) if isinstance(found, IntDistribution) else value
    epochs = int(rng.integers(15, 51)) if state == TrialState.COMPLETE else int(rng.integers(1, 9))
    values = curve(rng, params, epochs, maximized)
    best = int(values.argmax() if maximized else values.argmin())
    causes = {
        TrialState.COMPLETE: "finished" if epochs == 50 else "early stopping",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "diverged",
    }
    attrs = {
        "train_loss": np.exp(-np.arange(epochs) / 9.0).tolist(),
        "validation_loss": np.exp(-np.arange(epochs) / 10.0).tolist(),
        "best_epoch": best + 1,
        "best_value": float(values[best]),
        "epochs": epochs,
        "iterations": epochs * 45,
        "seconds": 0.05 * epochs,
        "weights": 12_345,
        "cause": causes.get(state),
    }
    failed = state in (TrialState.FAIL, TrialState.RUNNING)
    now = datetime.datetime(2026, 1, 1, 12, 0, 0)
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=state,
        value={
            TrialState.COMPLETE: float(values[best]),
            TrialState.PRUNED: float(values[-1]),
        }.get(state),
        datetime_start=now,
        datetime_complete=None if state == TrialState.RUNNING else now,
        params=params,
        distributions=dict(space),
        user_attrs={"cause": "diverged"} if state == TrialState.FAIL else {} if failed else attrs,
        system_attrs={},
        intermediate_values={} if failed else dict(enumerate(values.tolist(), start=1)),
    )


def make_study(
    complete: int = 12,
    pruned: int = 20,
    *,
    failed: int = 2,
    direction: Literal["maximize", "minimize"] = "maximize",
    name: str = "digits",
    storage: optuna.storages.BaseStorage | str | None = None,
    space: dict[str, BaseDistribution] | None = None,
    seed: int = 0,
) -> optuna.Study:
    space = SPACE if space is None else space
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction=direction, study_name=name, storage=storage)
    attrs = {
        "template": "dnn",
        "task": "multiclass",
        "metric": "accuracy" if direction == "maximize" else "cross_entropy",
        "data": "1437 training and 360 validation rows, 64 columns: 64 numeric -> 61 features, "
        "10 classes",
        "budget": "up to 50 epochs a trial, early stopping after 16 epochs without improvement",
        "space": {key: distribution_to_json(found) for key, found in space.items()},
        "fixed": {"loss": "cross_entropy", "label_smoothing": 0.0},
        "seed": 1,
        "version": "0.1.0",
    }
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    states = (
        [TrialState.COMPLETE] * complete
        + [TrialState.PRUNED] * pruned
        + [TrialState.FAIL] * failed
    )
    rng.shuffle(states)
    study.add_trials([trial(rng, s, direction == "maximize", space) for s in states])
    return study
