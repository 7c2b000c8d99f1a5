"""A study in a real PostgreSQL, started for these tests alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
import time

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
import pytest

from optuna_nnhp.storages import circuit_breaker
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.operations import TrialLimitReached
from tests.postgresql import Database
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune


def test_a_study_can_be_resumed(postgresql: Database, folder: Path) -> None:
    X, y = numbers()
    first = tune(X, y, storage=postgresql.url, n_trials=4, cohort_size=2)
    course = learning_curves(first)
    assert course == learning_curves(tune(X, y, storage=None, n_trials=4, cohort_size=2))
    assert [path.name for path in folder.iterdir()] == ["optuna_nnhp.models"]
    again = tune(X, y, storage=postgresql.url, n_trials=4)
    assert again.best_value == first.best_value
    assert np.array_equal(again.predict(X), first.predict(X))
    more = tune(X, y, storage=postgresql.url, n_trials=6)
    assert learning_curves(more)[:4] == course
    assert len(trials(more)) == 6


MOST = 60


def work(url: str, name: str, ready: Barrier) -> list[int]:
    """Train until there is nothing left, whatever the database does."""
    storage = BufferedStorage(RDBStorage(url), 0.01, trial_attrs={"worker": name})
    study = optuna.load_study(
        storage=storage, study_name="s", sampler=optuna.samplers.RandomSampler()
    )
    storage.set_trial_limit(study._study_id, MOST)
    study.get_trials()
    ready.wait()
    numbers = list[int]()
    while True:
        trials = list[optuna.Trial]()
        try:
            with storage.prefetch_trials(3):
                trials += (study.ask() for _ in range(3))
        except TrialLimitReached:
            if not trials:
                break
        except StorageUnavailable:
            storage.wait_until_available(60.0)
        for step in range(3):
            time.sleep(0.01)
            for trial in trials:
                trial.report(trial.number + step, step)
            storage.flush_if_due()
        with storage.batch():
            for trial in trials:
                study.tell(trial, float(trial.number))
        numbers += [trial.number for trial in trials]
    assert storage.wait_until_available(60.0)
    return numbers


def test_four_workers_finish_although_the_database_is_killed(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE", 0.05)
    study = optuna.create_study(storage=postgresql.url, study_name="s")
    for number in range(3):
        study.enqueue_trial({"x": number})
    ready = Barrier(5)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(work, postgresql.url, f"w{n}", ready) for n in range(4)]
        ready.wait()
        for pause in (0.0, 0.3):
            postgresql.stop()
            time.sleep(pause)
            postgresql.start()
            time.sleep(0.1)
    numbers = [number for run in runs for number in run.result()]
    read = optuna.load_study(storage=postgresql.url, study_name="s").get_trials()
    begun = [t for t in read if t.state != TrialState.WAITING]
    assert sorted(numbers) == [trial.number for trial in begun]
    assert len(begun) == MOST
    for trial in begun:
        assert (trial.state, trial.value) == (TrialState.COMPLETE, float(trial.number))
        assert trial.intermediate_values == {step: trial.number + step for step in range(3)}
    assert "is unavailable" in log.text
    assert "Discarded" not in log.text
