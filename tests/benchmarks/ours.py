"""The `optimize` side of the study benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import optuna

from optuna_nnhp import optimize
from optuna_nnhp.storages.open_storage import DEFAULT_STORAGE
from optuna_nnhp.study import method_config
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.policies.halving import HalvingPolicy
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.tuner import Tuner
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.workers import config
from tests.benchmarks.common import peak_memory
from tests.benchmarks.sides import Settings
from tests.benchmarks.sides import Side
from tests.benchmarks.sides import Watch
from tests.benchmarks.sides import load_sampler

CUT_SHORT = ("timeout", "interrupted")


def ours(settings: Settings) -> Side:
    """Run the side."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    load_sampler()
    table, start_mib = settings.table(), peak_memory()
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {} if settings.kept_sizes else {"XDG_CACHE_HOME": folder}),
        watched() as (watch, kept),
    ):
        result = optimize(
            "dnn",
            **table,
            fixed={"epochs": settings.epochs},
            n_trials=settings.trials,
            timeout=settings.timeout,
            method=settings.method,
            pruner=None if settings.pruning else optuna.pruners.NopPruner(),
            storage=storage_in(Path(folder), settings.storage),
            callbacks=[watch],
            seed=settings.seed,
        )
        seconds = watch.seconds
        peak_mib = peak_memory()
        trials, name = result.study.get_trials(deepcopy=False), result.study.user_attrs["metric"]
    (tuner,) = kept
    side = Side(name, tuner.problem.maximize, seconds)
    side.start_mib, side.peak_mib = start_mib, peak_mib
    side.epochs = float(sum(t.user_attrs.get("epochs", 0) for t in trials))
    side.count(trials, {t.number for t in trials if t.user_attrs.get("cause") in CUT_SHORT})
    watch.write(side, trials)
    side.best = side.told[-1][1] if side.told else None
    side.sections, side.occupancy = dict(tuner.timing.seconds), tuner.queue.occupancy
    return side


def storage_in(folder: Path, kind: str) -> str | None:
    """Return the storage argument for a kind of storage."""
    journal, database = str(folder / DEFAULT_STORAGE), f"sqlite:///{folder / 'study.db'}"
    return {"journal": journal, "sqlite": database, "memory": None}[kind]


@contextmanager
def watched() -> Iterator[tuple[Watch, list[Tuner]]]:
    """Within, the tuners that `optimize` makes are kept, and their trials' values noted."""
    watch, kept = Watch(), list[Tuner]()

    class Noting(HalvingPolicy):
        def decide(self, run: CohortRun, scores: Scores) -> dict[int, TrialOutcome]:
            for place, value in zip(scores.indices, scores.value, strict=True):
                watch.saw(run.cohort.members[place].number, value)
            return super().decide(run, scores)

    class Watched(Tuner):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            kept.append(self)

    with (
        mock.patch.object(config, "Tuner", Watched),
        mock.patch.object(method_config, "HalvingPolicy", Noting),
    ):
        yield watch, kept
