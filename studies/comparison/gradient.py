"""The second part: hypergradients that start from a poor learning rate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
import math
from statistics import median
import time
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial
import pandas as pd

from optuna_nnhp import optimize
from studies.comparison.data import Data
from studies.comparison.effort import model_epochs
from studies.comparison.fixed import all_but
from studies.comparison.fixed import defaults
from studies.comparison.methods import holds_in_all

RANGE = FloatDistribution(1e-6, 10.0, log=True)
RATES = (5e-4, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)  # of the sweep
POOR = (1e-5, 1.0)
WITHIN = 0.02  # of the best rate's loss
ONLY, EVERYTHING = "the rate", "all it can"
MOVED = (
    "learning_rate",
    "momentum",
    "weight_decay",
    "l1",
    "dropout",
    "label_smoothing",
)  # by default


@dataclass(frozen=True)
class GradientRun:
    """One run with hypergradients, compared with a sweep over the learning rate.

    Args:
        data:
            Name of the data set.
        seed:
            Random seed of the split and the networks.
        start:
            The first learning rate.
        moved:
            Which parameters the run moved.
        loss:
            Its smallest validation loss.
        rate:
            The last learning rate.
        best:
            The smallest validation loss of the sweep.
        best_rate:
            The learning rate with this loss.
        again:
            Loss with the same rate and other initial weights, because the best of several runs is
            also the luckiest.
        epochs:
            Model-epochs of the run.
        seconds:
            Duration of the run.
        sweep_seconds:
            Duration of the sweep.
    """

    data: str
    seed: int
    start: float
    moved: str
    loss: float
    rate: float
    best: float
    best_rate: float
    again: float
    epochs: float
    seconds: float
    sweep_seconds: float

    @property
    def excess(self) -> float:
        """The loss above the sweep's, as a fraction of the sweep's."""
        return self.loss / self.best - 1


class Tuned:
    """Runs a study in memory whose trials start from given learning rates.

    Args:
        data:
            The data set.
        seed:
            Random seed of the split and the networks.
        epochs:
            Budget of a trial.
        names:
            The parameters that are tuned; all others keep their defaults.
    """

    def __init__(self, data: Data, seed: int, epochs: int, names: Collection[str]) -> None:
        known = defaults(data)
        self._begins = {name: value for name, value in known.items() if name in names}
        self._call: dict[str, Any] = {
            **{"X": data.X, "y": data.y, "task": data.task, "metric": data.metric, "seed": seed},
            **{"space": {"learning_rate": RANGE}, "fixed": all_but(data, names, epochs)},
            **{"pruner": optuna.pruners.NopPruner(), "study_name": "rates"},
            "storage": optuna.storages.InMemoryStorage(),
        }
        self.seconds = 0.0

    def train(self, n_trials: int, **options: Any) -> list[FrozenTrial]:
        """Train until the study has this many trials, and return all of them."""
        started = time.monotonic()
        self._study = optimize(**self._call, n_trials=n_trials, **options).study
        self.seconds = time.monotonic() - started
        return self._study.get_trials(deepcopy=False)

    def add(self, rate: float, **options: Any) -> FrozenTrial:
        """Add a trial that starts with a learning rate and the defaults of all other parameters.

        The study must have a trial already, because its first trial is the default configuration.
        """
        self._study.enqueue_trial({**self._begins, "learning_rate": rate})
        return self.train(len(self._study.get_trials(deepcopy=False)), **options)[-1]


def run_gradients(data: Data, seed: int, epochs: int) -> list[GradientRun]:
    """Run a sweep over the learning rate, and hypergradients from poor rates."""
    only = Tuned(data, seed, epochs, ["learning_rate"])
    swept = only.train(len(RATES), method="grid", levels={"learning_rate": RATES})
    seconds = only.seconds
    best = min(swept, key=_least)
    rate = best.params["learning_rate"]
    sweep = _least(best), rate, _least(only.add(rate, method="random"))
    everything = Tuned(data, seed, epochs, MOVED)
    everything.train(1, method="random")
    found = []
    for moved, tuned in ((ONLY, only), (EVERYTHING, everything)):
        for start in POOR:
            trial = tuned.add(start, method="gradient", method_options={"starts": 1})
            spent = sum(model_epochs([trial]))
            reached = (_least(trial), _last_rate(trial))
            times = (spent, tuned.seconds, seconds)
            found.append(GradientRun(data.name, seed, start, moved, *reached, *sweep, *times))
    return found


def _least(trial: FrozenTrial) -> float:
    """Return the smallest validation loss of a trial, infinity if it has none."""
    losses = trial.user_attrs.get("validation_loss", [])
    return min((loss for loss in losses if math.isfinite(loss)), default=math.inf)


def _last_rate(trial: FrozenTrial) -> float:
    _, values, _ = trial.user_attrs["schedule"][-1]
    return float(values["learning_rate"])


def table_of(found: list[GradientRun]) -> pd.DataFrame:
    """Return a table with one row per run."""
    rows = [
        {
            **{"data": d.data, "seed": d.seed, "moved": d.moved, "from": d.start, "to": d.rate},
            **{"loss": d.loss, "best of sweep": d.best, "its rate": d.best_rate},
            **{"excess %": 100 * d.excess, "that rate again": d.again},
            **{"model-epochs": d.epochs, "s": d.seconds, "s of sweep": d.sweep_seconds},
        }
        for d in sorted(found, key=lambda d: (d.data, d.moved != ONLY, d.start, d.seed))
    ]
    return pd.DataFrame(rows)


def claims(found: list[GradientRun]) -> list[str]:
    """Say whether the median loss over the seeds is within 2 % of the sweep's."""
    lines = []
    for moved in (ONLY, EVERYTHING):
        cases, middles = list[str](), list[float]()
        for data, start in sorted({(d.data, d.start) for d in found}):
            excess = [
                100 * d.excess for d in found if (d.data, d.start, d.moved) == (data, start, moved)
            ]
            middles.append(median(excess))
            cases.append(
                f"{data} from {start:g}: {middles[-1]:+.1f} % ({min(excess):+.1f} to "
                f"{max(excess):+.1f})"
            )
        answer = holds_in_all([m <= 100 * WITHIN for m in middles])
        lines.append(
            f"gradient, moving {moved}, gets within {WITHIN:.0%} of the best rate's validation "
            f"loss in one run: {answer}; {'; '.join(cases)}."
        )
    return lines
