"""The third part: population-based training compared with the best fixed schedule."""

from __future__ import annotations

from typing import Any

import optuna
import pandas as pd

from optuna_nnhp import catalogue
from studies.comparison.data import Data
from studies.comparison.fixed import all_but
from studies.comparison.methods import Runs
from studies.comparison.methods import compare_with_baseline
from studies.comparison.methods import group_runs
from studies.comparison.methods import holds_in_all
from studies.comparison.methods import run
from studies.comparison.methods import table_of as methods_table

SIZE, GENERATIONS = 16, 10
FIXED_SCHEDULE, POPULATION = "random", "population"


def both(data: Data, seed: int, epochs: int) -> Runs:
    """Run random search and a population with the same hyperparameters and model-epochs.

    Only parameters that can change while a network trains are tuned; all others have their
    defaults. Every network of random search is trained to the end.
    """
    generations, known = min(GENERATIONS, epochs), catalogue()
    mutable = set(known["name"][known["mutable"]])
    usual: dict[str, Any] = {
        "fixed": all_but(data, mutable, epochs),
        "pruner": optuna.pruners.NopPruner(),
    }
    sizes = {"size": SIZE, "generations": generations}
    sides: dict[str, dict[str, Any]] = {
        FIXED_SCHEDULE: {"n_trials": SIZE},
        POPULATION: {"n_trials": SIZE * generations, "method_options": sizes},
    }
    order = list(sides) if seed % 2 == 0 else list(sides)[::-1]
    return [run(data, method, seed, **usual, **sides[method]) for method in order]


def table_of(runs: Runs) -> pd.DataFrame:
    """Return a table with both methods on each data set."""
    return methods_table(runs, FIXED_SCHEDULE)


def claims(runs: Runs) -> list[str]:
    """Say whether the population is better than the best fixed schedule on some data set."""
    cases, verdicts = list[str](), list[str]()
    for data, of_data in group_runs(runs, lambda one: one.data).items():
        found = compare_with_baseline(of_data, FIXED_SCHEDULE)[POPULATION]
        verdicts.append(found.verdict)
        cases.append(
            f"{found.verdict} on {data} ({found.mean:+.4f}, noise {found.noise:.4f}, "
            f"{found.seeds} seeds)"
        )
    is_so = holds_in_all(["better" in verdicts])
    if "better" not in verdicts and "unknown" in verdicts:
        is_so = "cannot be said"
    return [
        "population beats the best fixed schedule of the same budget on at least one data set: "
        f"{is_so}; {'; '.join(cases)}."
    ]
