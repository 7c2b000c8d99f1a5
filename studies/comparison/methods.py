"""The first part: all methods with the same time on the default space."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
import math
import os
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd

from optuna_nnhp import METHODS
from optuna_nnhp import clear_autotune_cache
from optuna_nnhp import optimize
from studies.comparison.data import Data
from studies.comparison.effort import Point
from studies.comparison.effort import best_values_of
from studies.comparison.effort import model_epochs
from studies.comparison.effort import reached
from studies.comparison.noise import Difference
from studies.comparison.noise import differences

BASELINE = "random"
WARM_UP = ("bayes", "bayes-gp")  # their first proposal imports large modules
BEATS = ("zoom", "bayes")  # methods that should be better than the baseline
# A grid over the whole space would be too large. It has these levels; all other parameters keep
# their defaults. The study visits as many points as the time allows, spread over the grid.
LEVELS: dict[str, Sequence[Any]] = {
    "learning_rate": (1e-3, 3e-3, 1e-2),
    "batch_size": (32, 64, 256),
    "hidden_layers": (1, 2, 4),
    "width": (64, 256),
    "dropout": (0.005, 0.1, 0.3),
    "weight_decay": (1e-7, 1e-2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "grid": {"levels": LEVELS, "method_options": {"partial": True}}
}


@dataclass(frozen=True)
class Run:
    """One study of the comparison.

    Args:
        data:
            Name of the data set.
        metric:
            The metric that the study optimized.
        maximize:
            Whether a greater value is better.
        method:
            The search method.
        seed:
            Random seed of the split, the proposals and the networks.
        best_values:
            Each new best value.
        test:
            Score of the best model on the test part; NaN if no trial has a value.
        trials:
            Number of trials that have ended.
        epochs:
            Model-epochs of all trials.
        seconds:
            Duration of the call.
    """

    data: str
    metric: str
    maximize: bool
    method: str
    seed: int
    best_values: tuple[Point, ...]
    test: float
    trials: int
    epochs: float
    seconds: float

    @property
    def value(self) -> float:
        """The best value; NaN if no trial has one."""
        return self.best_values[-1].value if self.best_values else math.nan


Runs = list[Run]


def run_order(
    data: Sequence[str], methods: Sequence[str], seeds: int
) -> Iterator[tuple[str, str, int]]:
    """Yield the order of the runs: each seed starts with another method, to balance drift.

    Example:
        >>> [method for _, method, _ in run_order(["digits"], ["grid", "random"], seeds=2)]
        ['grid', 'random', 'random', 'grid']
    """
    for seed in range(seeds):
        first = seed * len(methods) // seeds
        for method in (*methods[first:], *methods[:first]):
            for name in data:
                yield name, method, seed


@contextmanager
def empty_autotune_cache() -> Iterator[None]:
    """Let a study measure its cohort sizes itself, without those that other studies measured.

    The sizes are stored for each data set and split, so a later study would save the time.
    """
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
        clear_autotune_cache()
        yield


def run(data: Data, method: str, seed: int, timeout: float | None = None, **options: Any) -> Run:
    """Run a study in memory."""
    call: dict[str, Any] = {
        **{"X": data.X, "y": data.y, "task": data.task, "metric": data.metric},
        **{"method": method, "timeout": timeout, "seed": seed, "storage": None},
        **OPTIONS.get(method, {}),
    }
    with empty_autotune_cache():
        start = datetime.now()
        result = optimize(**(call | options))
    seconds = (datetime.now() - start).total_seconds()
    trials = result.study.get_trials(deepcopy=False)
    best_values = best_values_of(trials, start, maximize=data.maximize)
    test = result.score(data.X_test, data.y_test) if best_values else math.nan
    ended = sum(trial.state.is_finished() for trial in trials)
    epochs = sum(model_epochs(trials))
    head = (data.name, data.metric, data.maximize, method, seed)
    return Run(*head, best_values, test, ended, epochs, seconds)


def group_runs(runs: Runs, key: Callable[[Run], str]) -> dict[str, Runs]:
    """Group runs by a key; each group is sorted by seed."""
    groups = dict[str, Runs]()
    for one in sorted(runs, key=lambda one: one.seed):
        groups.setdefault(key(one), []).append(one)
    return groups


def compare_with_baseline(runs: Runs, baseline: str = BASELINE) -> dict[str, Difference]:
    """Return each method's difference from the baseline, if there is one, on one data set."""
    values = {
        m: [one.value for one in of] for m, of in group_runs(runs, lambda r: r.method).items()
    }
    if baseline not in values:
        return {}
    return differences(values, baseline, maximize=runs[0].maximize)


def table_of(runs: Runs, baseline: str = BASELINE) -> pd.DataFrame:
    """Return a table with one row per data set and method: medians over the seeds."""
    rows = []
    for data, of_data in group_runs(runs, lambda one: one.data).items():
        found = compare_with_baseline(of_data, baseline)
        aims = {one.seed: one.value for one in of_data if one.method == baseline}
        for method, group in _in_order(group_runs(of_data, lambda one: one.method)):
            rows.append(
                {"data": data, "metric": group[0].metric, "method": method}
                | _figures(group)
                | _to_the_best(group, aims, baseline)
                | _difference(found.get(method), baseline)
            )
    return pd.DataFrame(rows)


def _in_order(groups: dict[str, Runs]) -> list[tuple[str, Runs]]:
    """Return the groups in the order of `METHODS`."""
    order = list(METHODS)
    return sorted(groups.items(), key=lambda item: order.index(item[0]))


def _figures(group: Runs) -> dict[str, float]:
    values = np.array([one.value for one in group])  # one NaN makes the median NaN
    return {
        "best": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "unseen": float(np.median([one.test for one in group])),
        "trials": median(one.trials for one in group),
        "model-epochs": median(one.epochs for one in group),
    }


def _to_the_best(group: Runs, aims: dict[int, float], baseline: str) -> dict[str, Any]:
    """Return when the baseline's best value with the same seed was reached, infinity if never."""
    points = [
        reached(one.best_values, aims[one.seed], maximize=one.maximize)
        for one in group
        if one.seed in aims
    ]
    if not points:
        return {}
    return {
        f"s to {baseline}'s": median(math.inf if p is None else p.seconds for p in points),
        "reached": f"{sum(p is not None for p in points)}/{len(points)}",
    }


def _difference(found: Difference | None, baseline: str) -> dict[str, Any]:
    if found is None:
        return {}
    return {f"gain on {baseline}": found.mean, "noise": found.noise, "is": found.verdict}


def claims(runs: Runs) -> list[str]:
    """Say whether no method is worse than the baseline, and whether some are better."""
    found = [
        (method, data, difference)
        for data, of_data in group_runs(runs, lambda one: one.data).items()
        for method, difference in compare_with_baseline(of_data).items()
    ]
    hopeful = [case for case in found if case[0] in BEATS]
    claimed = (
        (f"no method is worse than {BASELINE} beyond noise", found, ("equal", "better")),
        (f"{' and '.join(BEATS)} beat {BASELINE} on every data set", hopeful, ("better",)),
    )
    lines = []
    for text, cases, wanted in claimed:
        verdicts = [difference.verdict for *_, difference in cases]
        is_so = holds_in_all([verdict in (*wanted, "unknown") for verdict in verdicts])
        lacks = cases is hopeful and {*BEATS} - {method for method, *_ in cases}
        if is_so == "holds" and (lacks or not cases or "unknown" in verdicts):
            is_so = "cannot be said"
        shown = [
            case
            for case in cases
            if cases is hopeful or case[2].verdict not in (*wanted, "unknown")
        ]
        lines.append("; ".join([f"{text}: {is_so}", *(_case_text(*case) for case in shown)]) + ".")
    return lines


def holds_in_all(cases: Sequence[bool]) -> str:
    """Say whether a claim holds in all cases.

    Example:
        >>> holds_in_all([True, False]), holds_in_all([True])
        ('does not hold', 'holds')
    """
    return "holds" if all(cases) else "does not hold"


def _case_text(method: str, data: str, found: Difference) -> str:
    return f"{method} on {data} {found.verdict} ({found.mean:+.4f}, noise {found.noise:.4f})"
