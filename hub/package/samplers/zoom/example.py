"""Zoom in on a smooth valley with a choice in it, and show how close the box has come."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import optunahub

REGISTRY = Path(__file__).resolve().parents[2]


def objective(trial: optuna.Trial) -> float:
    """Costs that are least at a rate of 0.003, 0.2 of noise and the smooth shape."""
    rate = trial.suggest_float("rate", 1e-6, 1.0, log=True)
    noise = trial.suggest_float("noise", 0.0, 0.9)
    shape = trial.suggest_categorical("shape", ["smooth", "rough", "flat"])
    penalty = {"smooth": 0.0, "rough": 0.3, "flat": 0.6}[shape]
    return math.log10(rate / 0.003) ** 2 + 4 * (noise - 0.2) ** 2 + penalty


def main() -> None:
    """Compare with random search over as many trials."""
    # In a program of yours: optunahub.load_module("samplers/zoom")
    module = optunahub.load_local_module("samplers/zoom", registry_root=str(REGISTRY))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for sampler in (module.ZoomSampler(seed=0), optuna.samplers.RandomSampler(seed=0)):
        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=200)
        name = type(sampler).__name__
        print(f"{name}: {study.best_value:.2g} after {len(study.trials)} trials")
        print(study.best_params)


if __name__ == "__main__":
    main()
