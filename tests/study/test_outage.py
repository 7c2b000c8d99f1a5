"""A study trains while its storage is unavailable, and no result is lost."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
import signal
import sqlite3
import subprocess
import sys
import threading
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp import Result
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.study import tuner
from tests.tiny import DIFFERENT_LENGTHS
from tests.tiny import ENVIRONMENT
from tests.tiny import causes
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
# SQLite waits only 0.05 s for a lock, not five seconds.
STORAGE = "sqlite:///s.db?timeout=0.05"


class DatabaseLock:
    """A callback that locks the database when the first trial has ended."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.is_used = seconds, False

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if not self.is_used:
            self.lock()

    def lock(self) -> None:
        """Lock the database now."""
        self.is_used = True
        self.connection = sqlite3.connect("s.db", isolation_level=None, check_same_thread=False)
        self.connection.execute("BEGIN EXCLUSIVE")
        if self.seconds is not None:
            threading.Timer(self.seconds, self.unlock).start()

    def unlock(self) -> None:
        """Unlock the database."""
        self.connection.rollback()
        self.connection.close()


def run(**settings: Any) -> Result:
    settings = {"storage": STORAGE, "n_trials": 8, "cohort_size": 4, **settings}
    return tune(X, Y, **DIFFERENT_LENGTHS, **settings)


def test_training_continues_while_the_storage_is_unavailable(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    expected = run(storage=None)
    result = run(callbacks=[DatabaseLock(1.5)])
    assert states(result) == [TrialState.COMPLETE] * 8
    assert (
        learning_curves(result)[:4] == learning_curves(expected)[:4]
    )  # those that trained during the outage
    assert "database is locked" in log.text
    assert not list(folder.rglob("outbox-*"))


def test_unwritten_results_are_written_by_the_next_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, database_lock = run(storage=None), DatabaseLock(None)
    monkeypatch.setattr(tuner, "MAX_STORAGE_WAIT", 0.5)
    with pytest.raises(StorageUnavailable, match="Repeat the same call") as error:
        run(callbacks=[database_lock])
    (outbox,) = folder.rglob("outbox-*.json")
    assert outbox.name in str(error.value)
    database_lock.unlock()
    result = run()
    assert states(result) == [TrialState.COMPLETE] * 8
    assert learning_curves(result)[:4] == learning_curves(expected)[:4]
    assert causes(result) == ["finished"] * 8
    assert not list(folder.rglob("outbox-*"))


KILLED = """
import os, signal
from optuna_nnhp.study import checkpoints
from tests.study.test_outage import DatabaseLock, run

checkpoints.MAX_TIME_SHARE = 1e9  # as many as there can be
lock, ended = DatabaseLock(None), []


def note(study, trial):
    lock(study, trial)
    ended.append(trial.number)
    print(trial.number, flush=True)
    if len(ended) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


run(callbacks=[note], checkpoint_every=0.001)
"""


def test_trials_that_ended_during_an_outage_survive_a_kill(folder: Path) -> None:
    expected = run(storage=None)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = [int(number) for number in killed.stdout.split()]
    assert len(list(folder.rglob("outbox-*.json"))) == 1
    again = datetime.now()
    result = run()
    assert learning_curves(result)[:4] == learning_curves(expected)[:4]
    assert causes(result) == ["finished"] * 8
    early = [t.number for t in trials(result) if (t.datetime_complete or again) < again]
    assert set(early) >= set(ended[:2])  # the third one's end was not in a checkpoint yet
    assert not list(folder.rglob("outbox-*"))


def test_a_damaged_outbox_is_named_and_not_deleted(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    result = run(n_trials=2)
    (models,) = folder.glob("*.models/*")
    damaged = models / "outbox-somebody.json"
    damaged.write_text('{"content": ')
    assert len(trials(run(n_trials=4))) == 4
    assert "outbox-somebody.json must be a whole file" in log.text
    assert damaged.exists()
    assert len(trials(result)) == 4
