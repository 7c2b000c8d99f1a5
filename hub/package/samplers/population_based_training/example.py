"""A regression by gradient descent whose step size changes while it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import optunahub

REGISTRY = Path(__file__).resolve().parents[2]
COLUMNS, STEPS = 20, 20

source = np.random.default_rng(0)
X = source.normal(size=(400, COLUMNS)) * np.geomspace(1.0, 0.03, COLUMNS)
y = X @ source.normal(size=COLUMNS)
states: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by trial: weights and velocity


def objective(trial: optuna.Trial) -> float:
    """Go on from the parent's weights for some steps; the error after them."""
    parent = trial.user_attrs["parent"]
    start = np.zeros(COLUMNS), np.zeros(COLUMNS)
    weights, velocity = start if parent is None else states[parent]
    rate = trial.suggest_float("rate", 1e-3, 1.0, log=True)
    momentum = trial.suggest_float("momentum", 0.0, 0.95)
    for _ in range(STEPS):
        slope = X.T @ (X @ weights - y) * 2 / len(y)
        velocity = momentum * velocity - rate * slope
        weights = weights + velocity
    states[trial.number] = weights, velocity
    return float(np.mean((X @ weights - y) ** 2))


def main() -> None:
    """Train a population and show the values that its best member had, one after the other."""
    # In a program of yours: optunahub.load_module("samplers/population_based_training")
    module = optunahub.load_local_module(
        "samplers/population_based_training", registry_root=str(REGISTRY)
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=module.PopulationSampler(size=8, seed=0))
    study.optimize(objective, n_trials=8 * 12)
    print(f"PopulationSampler: {study.best_value:.2g} after {len(study.trials)} trials")
    number: int | None = study.best_trial.number
    lineage = []
    while number is not None:
        lineage.append(study.trials[number])
        number = lineage[-1].user_attrs["parent"]
    for name in ("rate", "momentum"):
        print(f"{name}:", *(f"{trial.params[name]:.2f}" for trial in reversed(lineage)))


if __name__ == "__main__":
    main()
