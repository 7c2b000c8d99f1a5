"""Test workers on this machine (`workers=`): killed workers, signals, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest
import torch

from optuna_nnhp import optimize
from tests.tiny import ENVIRONMENT
from tests.tiny import TINY
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
ENDLESS = TINY | {"epochs": 10**6, "patience": 10**6}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_killed_worker_is_replaced(folder: Path, log: pytest.LogCaptureFixture) -> None:
    notes = folder / "notes.txt"

    def rows() -> list[list[int]]:
        return [list(map(int, row.split())) for row in notes.read_text().splitlines()]

    def callback(
        study: optuna.Study, trial: FrozenTrial
    ) -> None:  # sent to the workers by its code
        with notes.open("a") as file:
            count = torch.get_num_threads()
            file.write(f"{trial.number} {os.getpid()} {os.getppid()} {count}\n")
        if len({process for _, process, *_ in rows()}) == 2:  # while others of its cohort run
            os.kill(os.getpid(), signal.SIGKILL)
        limit = time.monotonic() + 60
        while len({process for _, process, *_ in rows()}) < 3:  # the new one too
            assert time.monotonic() < limit
            time.sleep(0.02)

    space = {"epochs": IntDistribution(1, 9)}
    fixed = {name: value for name, value in TINY.items() if name != "epochs"}
    options: dict[str, Any] = {"space": space, "fixed": fixed, "method": "random"}
    with threads(6):
        result = tune(X, Y, storage="sqlite:///k.db", n_trials=14, workers=2, cohort_size=3,
                      callbacks=[callback], **options)  # fmt: skip
    assert states(result) == [TrialState.COMPLETE] * 14
    assert [t.number for t in trials(result)] == list(range(14))
    (line,) = [line for line in log.messages if "died" in line]
    assert "a new worker takes over its trials" in line
    # Each trial finished once; callbacks that the killed worker had not called are lost.
    assert set(Counter(number for number, *_ in rows()).values()) == {1}
    assert {row[2] for row in rows()} == {os.getpid()}
    assert {row[3] for row in rows()} == {3}
    assert result.predict(X).shape == (80,)


class Fault(RuntimeError):
    """An error that cannot be unpickled."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)


def test_error_in_a_local_worker_is_raised_in_the_caller(folder: Path) -> None:
    def callback(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 1:
            raise Fault(1, "this callback is broken")

    options: dict[str, Any] = {"fixed": TINY, "workers": 2, "callbacks": [callback]}
    with pytest.raises(RuntimeError, match="Fault: this callback is broken") as caught:
        tune(X, Y, storage="e.journal", n_trials=10**6, cohort_size=1, **options)
    assert "in callback" in caught.value.__notes__[0]
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend("e.journal")
    )
    (name,) = optuna.get_all_study_names(storage)
    left = optuna.load_study(study_name=name, storage=storage).trials
    assert TrialState.RUNNING not in {trial.state for trial in left}


SCRIPT = f"""
import sys
from tests.tiny import numbers, trials, tune

if __name__ == "__main__":
    def ended(study, trial):
        print("ended", trial.number, flush=True)

    options = {{"n_trials": 10**6, "fixed": {TINY}, "callbacks": [ended], "cohort_size": 2}}
    result = tune(*numbers(), storage="t.journal", study_name="t", workers=2, **options)
    print("result", len(trials(result)), result.best_value, flush=True)
"""


@contextmanager
def caller() -> Iterator[subprocess.Popen[str]]:
    """Start a process with two workers, one of which has finished a trial."""
    Path("caller.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "caller.py"],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("ended")
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def workers_of(process: int) -> list[int]:
    """Return the worker processes of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z" and "popen_loky_posix" in command:
            found.append(int(path.name))
    return found


def final_states() -> set[TrialState]:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend("t.journal")
    )
    return {t.state for t in optuna.load_study(study_name="t", storage=storage).trials}


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")


@needs_proc
def test_ctrl_c_ends_all_workers_and_returns_a_result(folder: Path) -> None:
    with caller() as process:
        assert len(workers_of(process.pid)) == 2
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        word, count, best = output.splitlines()[-1].split()
        assert (word, int(count) > 1, float(best) > 0) == ("result", True, True)
    assert TrialState.RUNNING not in final_states()


@needs_proc
def test_workers_end_when_their_caller_is_gone(folder: Path) -> None:
    with caller() as process:
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.kill()
        limit = time.monotonic() + 30
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < limit
            time.sleep(0.1)
    assert TrialState.RUNNING not in final_states()  # requeued


def test_in_memory_storages_are_rejected(folder: Path) -> None:
    for storage in (None, "sqlite://", optuna.storages.InMemoryStorage()):
        with pytest.raises(ValueError, match="`storage` must be one that several processes can"):
            optimize("dnn", X, Y, n_trials=2, workers=2, storage=storage)
    assert not list(folder.iterdir())
