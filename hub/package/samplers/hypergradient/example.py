"""Ridge regression whose penalties follow the exact gradient of the validation error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import optunahub

REGISTRY = Path(__file__).resolve().parents[2]
COLUMNS, USEFUL, TRAIN = 30, 5, 40

source = np.random.default_rng(0)
X = source.normal(size=(200, COLUMNS))
y = X[:, :USEFUL].sum(axis=1) + source.normal(size=200)


def objective(trial: optuna.Trial) -> float:
    """Validation error with one penalty for the useful columns and one for the rest."""
    names = ["useful"] * USEFUL + ["rest"] * (COLUMNS - USEFUL)
    penalties = {n: trial.suggest_float(n, 1e-3, 1e3, log=True) for n in ("useful", "rest")}
    matrix = X[:TRAIN].T @ X[:TRAIN] + np.diag([penalties[name] for name in names])
    weights = np.linalg.solve(matrix, X[:TRAIN].T @ y[:TRAIN])
    errors = X[TRAIN:] @ weights - y[TRAIN:]
    # The weights solve `matrix @ weights = ...`, so d weights = -matrix^-1 @ (d matrix) @ weights.
    adjoint = np.linalg.solve(matrix, X[TRAIN:].T @ errors * 2 / len(errors))
    slopes = dict.fromkeys(penalties, 0.0)
    for name, weight, part in zip(names, weights, adjoint, strict=True):
        slopes[name] -= float(weight * part)
    trial.set_user_attr("hypergradient", slopes)
    return float(np.mean(errors**2))


def main() -> None:
    """Compare with random search over as many trials."""
    # In a program of yours: optunahub.load_module("samplers/hypergradient")
    module = optunahub.load_local_module("samplers/hypergradient", registry_root=str(REGISTRY))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    adam = module.HypergradientSampler(starts=2, seed=0)
    for sampler in (adam, optuna.samplers.RandomSampler(seed=0)):
        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=60)
        name = type(sampler).__name__
        print(f"{name}: {study.best_value:.4f} after {len(study.trials)} trials")
        print(study.best_params)


if __name__ == "__main__":
    main()
