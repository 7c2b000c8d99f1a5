"""Storages that go away while a study runs: training goes on, and nothing is lost."""

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
from tests.tiny import courses
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
# A lock that is held is noticed at once, not after five seconds.
STORAGE = "sqlite:///s.db?timeout=0.05"


class Away:
    """A callback that locks the database when the first trial has ended."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.is_used = seconds, False

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if not self.is_used:
            self.lock()

    def lock(self) -> None:
        """Lock it now."""
        self.is_used = True
        self.connection = sqlite3.connect("s.db", isolation_level=None, check_same_thread=False)
        self.connection.execute("BEGIN EXCLUSIVE")
        if self.seconds is not None:
            threading.Timer(self.seconds, self.back).start()

    def back(self) -> None:
        """Let go of it."""
        self.connection.rollback()
        self.connection.close()


def run(**wishes: Any) -> Result:
    wishes = {"storage": STORAGE, "n_trials": 8, "cohort_size": 4, **wishes}
    return tune(X, Y, **DIFFERENT_LENGTHS, **wishes)


def test_training_goes_on_without_the_storage(folder: Path, log: pytest.LogCaptureFixture) -> None:
    wanted = run(storage=None)
    result = run(callbacks=[Away(1.5)])
    assert states(result) == [TrialState.COMPLETE] * 8
    assert courses(result)[:4] == courses(wanted)[:4]  # who trained while it was away
    assert "database is locked" in log.text
    assert not list(folder.rglob("outbox-*"))


def test_what_a_storage_has_not_got_waits_for_the_next_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, away = run(storage=None), Away(None)
    monkeypatch.setattr(tuner, "MAX_STORAGE_WAIT", 0.5)
    with pytest.raises(StorageUnavailable, match="the same call goes on") as error:
        run(callbacks=[away])
    (kept,) = folder.rglob("outbox-*.json")
    assert kept.name in str(error.value)
    away.back()
    result = run()
    assert states(result) == [TrialState.COMPLETE] * 8
    assert courses(result)[:4] == courses(wanted)[:4]
    assert causes(result) == ["finished"] * 8
    assert not list(folder.rglob("outbox-*"))


KILLED = """
import os, signal
from optuna_nnhp.study import checkpoints
from tests.study.test_outage import Away, run

checkpoints.MAX_TIME_SHARE = 1e9  # as many as there can be
away, ended = Away(None), []


def note(study, trial):
    away(study, trial)
    ended.append(trial.number)
    print(trial.number, flush=True)
    if len(ended) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


run(callbacks=[note], checkpoint_every=0.001)
"""


def test_what_ended_while_the_storage_was_away_survives_a_kill(folder: Path) -> None:
    wanted = run(storage=None)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = [int(number) for number in killed.stdout.split()]
    assert len(list(folder.rglob("outbox-*.json"))) == 1
    again = datetime.now()
    result = run()
    assert courses(result)[:4] == courses(wanted)[:4]
    assert causes(result) == ["finished"] * 8
    early = [t.number for t in trials(result) if (t.datetime_complete or again) < again]
    assert set(early) >= set(ended[:2])  # the third one's end was not in a checkpoint yet
    assert not list(folder.rglob("outbox-*"))


def test_a_damaged_file_is_named_and_stays(folder: Path, log: pytest.LogCaptureFixture) -> None:
    result = run(n_trials=2)
    (models,) = folder.glob("*.models/*")
    damaged = models / "outbox-somebody.json"
    damaged.write_text('{"content": ')
    assert len(trials(run(n_trials=4))) == 4
    assert "outbox-somebody.json must be a whole file" in log.text
    assert damaged.exists()
    assert len(trials(result)) == 4
