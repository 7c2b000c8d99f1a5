"""The first part: every method with the same seconds, on the default space."""

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
from studies.comparison.effort import course_of
from studies.comparison.effort import model_epochs
from studies.comparison.effort import reached
from studies.comparison.noise import Difference
from studies.comparison.noise import differences

BASELINE = "random"
WARM_UP = ("bayes", "bayes-gp")  # they import much when they first propose
BEATS = ("zoom", "bayes")  # what should be better than the baseline
# A grid over the whole space has no end: it takes these, all else keeps its default, and the
# part of it that fits into the time, spread over the grid.
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
    """One study.

    Args:
        data:
            Name of the data set.
        metric:
            What trials were judged by.
        maximize:
            Whether a greater value is better.
        method:
            How it proposed.
        seed:
            Of the split, the proposals and the networks.
        course:
            Its new best values.
        test:
            Score of its best model on the part put aside; NaN if no trial has a value.
        trials:
            That had ended.
        epochs:
            Model-epochs.
        seconds:
            Of the whole call.
    """

    data: str
    metric: str
    maximize: bool
    method: str
    seed: int
    course: tuple[Point, ...]
    test: float
    trials: int
    epochs: float
    seconds: float

    @property
    def value(self) -> float:
        """Its best value; NaN if no trial has one."""
        return self.course[-1].value if self.course else math.nan


Runs = list[Run]


def turns(
    data: Sequence[str], methods: Sequence[str], seeds: int
) -> Iterator[tuple[str, str, int]]:
    """Who runs when: with every seed another method is the first, so that drift hits all alike.

    Example:
        >>> [method for _, method, _ in turns(["digits"], ["grid", "random"], seeds=2)]
        ['grid', 'random', 'random', 'grid']
    """
    for seed in range(seeds):
        first = seed * len(methods) // seeds
        for method in (*methods[first:], *methods[:first]):
            for name in data:
                yield name, method, seed


@contextmanager
def nothing_measured() -> Iterator[None]:
    """Within, no cohort sizes of earlier studies are known, so that each study pays for its own.

    They are kept for each data set and split: the later of two studies would have them for free.
    """
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
        clear_autotune_cache()
        yield


def run(data: Data, method: str, seed: int, timeout: float | None = None, **options: Any) -> Run:
    """One study with a method, in memory."""
    call: dict[str, Any] = {
        **{"X": data.X, "y": data.y, "task": data.task, "metric": data.metric},
        **{"method": method, "timeout": timeout, "seed": seed, "storage": None},
        **OPTIONS.get(method, {}),
    }
    with nothing_measured():
        start = datetime.now()
        result = optimize(**(call | options))
    seconds = (datetime.now() - start).total_seconds()
    trials = result.study.get_trials(deepcopy=False)
    course = course_of(trials, start, maximize=data.maximize)
    test = result.score(data.X_test, data.y_test) if course else math.nan
    ended = sum(trial.state.is_finished() for trial in trials)
    epochs = sum(model_epochs(trials))
    head = (data.name, data.metric, data.maximize, method, seed)
    return Run(*head, course, test, ended, epochs, seconds)


def grouped(runs: Runs, key: Callable[[Run], str]) -> dict[str, Runs]:
    """Runs by something, as they come; each group ordered by seed."""
    groups = dict[str, Runs]()
    for one in sorted(runs, key=lambda one: one.seed):
        groups.setdefault(key(one), []).append(one)
    return groups


def compared(runs: Runs, baseline: str = BASELINE) -> dict[str, Difference]:
    """Every method's difference to the baseline, on one data set; none without a baseline."""
    values = {m: [one.value for one in of] for m, of in grouped(runs, lambda r: r.method).items()}
    if baseline not in values:
        return {}
    return differences(values, baseline, maximize=runs[0].maximize)


def table_of(runs: Runs, baseline: str = BASELINE) -> pd.DataFrame:
    """One row for each data set and method: medians over the seeds."""
    rows = []
    for data, of_data in grouped(runs, lambda one: one.data).items():
        found = compared(of_data, baseline)
        aims = {one.seed: one.value for one in of_data if one.method == baseline}
        for method, group in _in_order(grouped(of_data, lambda one: one.method)):
            rows.append(
                {"data": data, "metric": group[0].metric, "method": method}
                | _figures(group)
                | _to_the_best(group, aims, baseline)
                | _difference(found.get(method), baseline)
            )
    return pd.DataFrame(rows)


def _in_order(groups: dict[str, Runs]) -> list[tuple[str, Runs]]:
    """As the methods are listed, whoever ran first."""
    order = list(METHODS)
    return sorted(groups.items(), key=lambda item: order.index(item[0]))


def _figures(group: Runs) -> dict[str, float]:
    values = np.array([one.value for one in group])  # one that is NaN makes all of them NaN
    return {
        "best": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "unseen": float(np.median([one.test for one in group])),
        "trials": median(one.trials for one in group),
        "model-epochs": median(one.epochs for one in group),
    }


def _to_the_best(group: Runs, aims: dict[int, float], baseline: str) -> dict[str, Any]:
    """When the baseline's best value with the same seed was reached; infinite if never."""
    points = [
        reached(one.course, aims[one.seed], maximize=one.maximize)
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
    """Whether no method is worse than the baseline, and whether some are better."""
    found = [
        (method, data, difference)
        for data, of_data in grouped(runs, lambda one: one.data).items()
        for method, difference in compared(of_data).items()
    ]
    hopeful = [case for case in found if case[0] in BEATS]
    claimed = (
        (f"no method is worse than {BASELINE} beyond noise", found, ("equal", "better")),
        (f"{' and '.join(BEATS)} beat {BASELINE} on every data set", hopeful, ("better",)),
    )
    lines = []
    for text, cases, wanted in claimed:
        verdicts = [difference.verdict for *_, difference in cases]
        is_so = holds([verdict in (*wanted, "unknown") for verdict in verdicts])
        lacks = cases is hopeful and {*BEATS} - {method for method, *_ in cases}
        if is_so == "holds" and (lacks or not cases or "unknown" in verdicts):
            is_so = "cannot be said"
        told = [
            case
            for case in cases
            if cases is hopeful or case[2].verdict not in (*wanted, "unknown")
        ]
        lines.append("; ".join([f"{text}: {is_so}", *(_said(*case) for case in told)]) + ".")
    return lines


def holds(cases: Sequence[bool]) -> str:
    """Whether a claim holds that must do so in all of several cases.

    Example:
        >>> holds([True, False]), holds([True])
        ('does not hold', 'holds')
    """
    return "holds" if all(cases) else "does not hold"


def _said(method: str, data: str, found: Difference) -> str:
    return f"{method} on {data} {found.verdict} ({found.mean:+.4f}, noise {found.noise:.4f})"
