"""Data, settings and results of both sides of the study benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from sklearn.datasets import make_classification
from sklearn.datasets import make_friedman1

ROWS, COLUMNS, CLASSES = 20_000, 16, 26
DATA = ("digits", "classes", "regression")
Course = list[tuple[float, float]]  # seconds since the start, and best value from then on


@dataclass(frozen=True)
class Settings:
    """One run of one side.

    Args:
        data:
            One of `DATA`, or the path of a CSV file.
        target:
            Column of the CSV file that is to be predicted.
        seed:
            Of the sampler, the split and the networks.
        timeout:
            Seconds, the preparation of the data included; None if trials are counted.
        trials:
            How many trials; None if time is measured.
        epochs:
            Budget of a trial.
        storage:
            ``"journal"``, ``"sqlite"`` or ``"memory"``; plain Optuna always has the memory.
        threads:
            torch's threads for plain Optuna; None for its default.
        method:
            How ours proposes.
        pruning:
            Whether ours prunes.
        kept_sizes:
            Whether ours knows the cohort sizes that earlier studies measured on this machine;
            otherwise it measures them as part of the call.
    """

    data: str
    target: str | None = None
    seed: int = 0
    timeout: float | None = None
    trials: int | None = None
    epochs: int = 50
    storage: str = "journal"
    threads: int | None = None
    method: str = "bayes"
    pruning: bool = True
    kept_sizes: bool = False

    def table(self) -> dict[str, Any]:
        """Return the unprepared data, which are the same for both sides and all seeds."""
        if self.data == "digits":
            X, y = load_digits(return_X_y=True)
        elif self.data == "classes":
            X, y = make_classification(
                ROWS,
                COLUMNS,
                n_informative=COLUMNS,
                n_redundant=0,
                n_classes=CLASSES,
                n_clusters_per_class=2,
                class_sep=2.0,
                random_state=0,
            )
            return {"X": X, "y": y, "task": "classification"}
        elif self.data == "regression":
            X, y = make_friedman1(ROWS, COLUMNS, noise=0.5, random_state=0)
        else:
            return {"X": self.data, "target": self.target}
        return {"X": X, "y": y}


def load_sampler() -> None:
    """Import what Optuna's sampler imports at its first proposal, before the study.

    It takes a second in a new process, on both sides.
    """
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=2))
    study.optimize(lambda trial: trial.suggest_float("x", 0.1, 1, log=True), n_trials=4)


@dataclass
class Side:
    """The result of one run of one side.

    Attributes:
        metric: What trials are judged by.
        maximize: Whether a greater value is better.
        seconds: The whole call, the preparation of the data included.
        complete: Trials that ended COMPLETE.
        pruned: Trials that a pruner ended.
        cut_short: Trials that the timeout ended, those of them that led and so are COMPLETE too.
        failed: Trials that failed otherwise.
        epochs: Passes over the data, of all networks together.
        best: The study's best value.
        told: When Optuna was told of each new best value.
        seen: When a trial that became COMPLETE first had each new best value.
        peak_mib: The most memory of the process.
        start_mib: The same before the call: Python, its libraries and the data.
        sections: Seconds by section of `Tuner.timing`; only of ours.
        occupancy: Members over slots; only of ours.
    """

    metric: str
    maximize: bool
    seconds: float = 0.0
    complete: int = 0
    pruned: int = 0
    cut_short: int = 0
    failed: int = 0
    epochs: float = 0.0
    best: float | None = None
    told: Course = field(default_factory=list)
    seen: Course = field(default_factory=list)
    peak_mib: float = 0.0
    start_mib: float = 0.0
    sections: dict[str, float] = field(default_factory=dict)
    occupancy: float | None = None

    @property
    def finished(self) -> int:
        """Return the number of complete and pruned trials."""
        return self.complete + self.pruned

    def count(self, trials: list[FrozenTrial], cut_short: set[int]) -> None:
        """Count trials by their ends; those cut short, given by number, apart."""
        whole = [t for t in trials if t.number not in cut_short]
        self.cut_short = len(cut_short)
        self.complete = sum(t.state == TrialState.COMPLETE for t in whole)
        self.pruned = sum(t.state == TrialState.PRUNED for t in whole)
        self.failed = sum(t.state == TrialState.FAIL for t in whole)

    def reached(self, course: Course, value: float) -> float | None:
        """Return the seconds until the best value was at least as good as a value."""
        for seconds, best in course:
            if best >= value if self.maximize else best <= value:
                return seconds
        return None


@dataclass
class Watch:
    """Records when each trial had which value.

    Attributes:
        values: Seconds since the start, trial and value of every evaluation.
        told: Seconds at which Optuna was told of a trial's end.
    """

    values: list[tuple[float, int, float]] = field(default_factory=list)
    told: dict[int, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def saw(self, number: int, value: float) -> None:
        self.values.append((self.seconds, number, value))

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As a callback of a study."""
        self.told[trial.number] = self.seconds

    def write(self, side: Side, trials: list[FrozenTrial]) -> None:
        """The courses of a study's best value, once it has ended."""
        complete = {t.number: t.value for t in trials if t.state == TrialState.COMPLETE}
        told = sorted((s, n) for n, s in self.told.items() if n in complete)
        for seconds, number in told:
            _note(side, side.told, seconds, complete[number])
        for seconds, number, value in self.values:
            if number in complete:
                _note(side, side.seen, seconds, value)


def _note(side: Side, course: Course, seconds: float, value: float | None) -> None:
    """Add to a course if the value is a new best one."""
    if value is None or not math.isfinite(value):
        return
    if not course or (value > course[-1][1] if side.maximize else value < course[-1][1]):
        course.append((seconds, value))
