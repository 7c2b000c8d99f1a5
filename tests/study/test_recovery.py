"""After a kill, the same call continues the same trials from their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import NopPruner
from optuna.trial import TrialState
import pytest

from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.rdb_adapter import RdbAdapter
from optuna_nnhp.study import recovery
from optuna_nnhp.study.checkpoints import Checkpoints
from optuna_nnhp.study.checkpoints import checkpoint_folder
from optuna_nnhp.study.checkpoints import load_newest_checkpoint
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.training.cohort import Cohort
from tests.tiny import DIFFERENT_LENGTHS
from tests.tiny import ENVIRONMENT
from tests.tiny import SHAPE
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import tune

LONG = SHAPE | {"epochs": 12, "patience": 10**6}
KINDS = ("dnn", "own", "gpt", "population", "gradient")
# What another process runs: `tune` with the given options, killed by itself at some moment.
SCRIPT = """
import json, os, signal, sys
import numpy as np
import optuna
from torch import nn
from optuna_nnhp import optimize
from optuna_nnhp.study import checkpoints, recovery
from optuna_nnhp.training.cohort import Cohort
from tests.tiny import SHAPE, TINY, numbers

checkpoints.MAX_TIME_SHARE = 1e9  # as many as there can be

kind, how, wanted, options = json.loads(sys.argv[1])
seen = 0


def note() -> None:
    global seen
    seen += 1
    if seen == wanted:
        os.kill(os.getpid(), getattr(signal, how))


def after_each_call(kind, name):
    original = getattr(kind, name)

    def method(self, *args):
        found = original(self, *args)
        note()
        return found

    setattr(kind, name, method)


X, y = numbers(200)
long = {"epochs": 12, "patience": 10**6}
usual = {"checkpoint_every": 0.001, "pruner": optuna.pruners.NopPruner(), "device": "cpu"}
if kind == "gpt":  # in the middle of a round too
    after_each_call(Cohort, "_backward")
    text = "".join(f"{n} and {n + 1} make {2 * n + 1}. " for n in range(300))
    fixed = {"width": 16, "layers": 1, "context": 16, "batch_tokens": 64, "iterations": 54}
    X, y, usual["template"], usual["fixed"] = text, None, "gpt", fixed
elif kind == "own":
    after_each_call(Cohort, "_backward")
    usual["network"] = lambda params: nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(params["dropout"]), nn.Linear(8, 1)
    )
    usual |= {"fixed": long | {"batch_size": 64}, "cohort_size": 3}
elif kind == "poison":
    recovery.QUARANTINE_DEATHS, recovery.MAX_WORKER_DEATHS = 2, 4
    original = Cohort.train_round

    def train_round(self, *args):
        if any(member.number == 1 for member in self.members):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    Cohort.train_round = train_round
    usual |= {"fixed": SHAPE | long}
elif kind == "dnn":
    after_each_call(Cohort, "train_round")
    usual |= {"fixed": SHAPE | long, "cohort_size": 6}
else:
    after_each_call(Cohort, "train_round")
    del usual["pruner"]
    usual |= {"fixed": SHAPE | long | {"optimizer": "adam", "activation": "relu"}}
    usual |= {"method": kind}
    if kind == "population":
        usual |= {"method_options": {"size": 4, "generations": 3}}
result = optimize(X=X, y=y, **{"n_trials": 4, **usual, **options})
print("done", result.best_value, flush=True)
"""
TRIALS = {"dnn": 6, "own": 3, "gpt": 1, "population": 4, "gradient": 3, "poison": 2}


def run(kind: str, storage: str, how: str = "SIGKILL", at: int = 0, **options: Any) -> Any:
    options = {"storage": storage, "n_trials": TRIALS[kind], **options}
    arguments = json.dumps([kind, how, at, options])
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@functools.cache
def records_without_kill(kind: str) -> list[Any]:
    """Return the records of the trials of a study that is not killed."""
    before, folder = Path.cwd(), tempfile.mkdtemp()
    os.chdir(folder)
    try:
        assert run(kind, "whole.journal").returncode == 0
        return trial_records("whole.journal")
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def load_study(storage: str) -> optuna.Study:
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    return optuna.load_study(study_name=None, storage=backend)


def trial_records(storage: str) -> list[Any]:
    """Return what a study has stored about its trials, without times."""
    return [
        (
            t.number,
            t.state,
            t.values,
            t.params,
            t.intermediate_values,
            *(t.user_attrs.get(n) for n in ("cause", "train_loss", "best_epoch", "schedule")),
        )
        for t in load_study(storage).trials
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_study_ends_with_the_same_results(kind: str, folder: Path) -> None:
    moments = {"dnn": (4, 5), "own": (7,), "gpt": (20,)}
    for at in moments.get(kind, (3,)):
        killed = run(kind, "cut.journal", at=at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert TrialState.RUNNING in [t.state for t in load_study("cut.journal").trials]
    last = run(kind, "cut.journal")
    assert last.returncode == 0, last.stderr
    assert "Continuing trials that" in last.stderr
    assert trial_records("cut.journal") == records_without_kill(kind)
    assert not list(folder.glob("*.models/*/checkpoints/*"))


def test_without_a_checkpoint_trials_start_again_under_their_numbers(folder: Path) -> None:
    run("dnn", "cut.journal", at=6)
    for path in folder.glob("cut.models/*/checkpoints/*/*"):
        path.unlink()
    assert run("dnn", "cut.journal").returncode == 0
    assert trial_records("cut.journal") == records_without_kill("dnn")


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(folder: Path, harm: str) -> None:
    run("dnn", "cut.journal", at=6)
    paths = sorted(folder.glob("cut.models/*/checkpoints/*/*.safetensors"))
    assert len(paths) == 2  # the newest two
    newest_one, content = paths[-1], paths[-1].read_bytes()
    if harm == "gone":
        newest_one.unlink()
    elif harm == "cut":
        newest_one.write_bytes(content[:-7])
    else:
        newest_one.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    last = run("dnn", "cut.journal")
    assert "Skipped a checkpoint that cannot be used" in last.stderr
    assert newest_one.name in last.stderr
    assert trial_records("cut.journal") == records_without_kill("dnn")


def test_a_trial_that_kills_every_worker_fails_and_its_cohort_finishes(
    folder: Path,
) -> None:
    settings: dict[str, Any] = {"n_trials": 4, "cohort_size": 4, "checkpoint_every": 60.0}
    lasts = [run("poison", "s.journal", **settings)]
    while lasts[-1].returncode == -signal.SIGKILL and len(lasts) < 12:
        lasts.append(run("poison", "s.journal", **settings))
    assert lasts[-1].returncode == 0, lasts[-1].stderr
    # The first worker and MAX_WORKER_DEATHS that took the trial over are killed.
    assert len(lasts) == 6
    found = load_study("s.journal").trials
    assert [t.user_attrs["cause"] for t in found] == ["finished", "killed"] + ["finished"] * 3
    assert [t.state.name for t in found] == ["COMPLETE", "FAIL"] + ["COMPLETE"] * 3


@pytest.mark.parametrize("kind", ["own", "gpt", "population", "gradient"])
def test_trials_requeued_by_sigterm_continue_in_the_next_call(kind: str, folder: Path) -> None:
    at = {"own": 8, "gpt": 20}.get(kind, 4)
    ended = run(kind, "cut.journal", how="SIGTERM", at=at)
    states = [t.state for t in load_study("cut.journal").trials]
    assert TrialState.RUNNING not in states, ended.stderr
    assert TrialState.WAITING in states
    assert "are left as they are" in ended.stderr
    owners = {t.user_attrs.get(REQUEUED_BY) for t in load_study("cut.journal").trials} - {None}
    (checkpoints,) = folder.glob("cut.models/*/checkpoints")
    for owner in owners:
        assert load_newest_checkpoint(checkpoints, str(owner)) is not None
    last = run(kind, "cut.journal")
    assert last.returncode == 0, last.stderr
    assert trial_records("cut.journal") == records_without_kill(kind)
    assert not list(folder.glob("*.models/*/checkpoints/*"))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_same_call_continues_after_an_error(folder: Path, error: type[BaseException]) -> None:
    def broken(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        raise error("of the user")

    settings: dict[str, Any] = {**DIFFERENT_LENGTHS, "cohort_size": 3, "storage": "s.journal"}
    expected = learning_curves(tune(**{**settings, "storage": None}))
    with pytest.raises(error, match="of the user"):
        tune(**settings, callbacks=[broken])
    states = [t.state for t in load_study("s.journal").trials]
    assert set(states) == {TrialState.COMPLETE, TrialState.WAITING}
    assert learning_curves(tune(**settings)) == expected


def test_a_takeover_whose_answer_is_lost_takes_place_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("dnn", "sqlite:///cut.db", at=4).returncode == -signal.SIGKILL
    original, lost = RdbAdapter.apply, list[int]()

    def apply(adapter: RdbAdapter, ops: Sequence[Operation]) -> list[Outcome]:
        outcomes = original(adapter, ops)
        is_takeover = any(isinstance(op, Op) and op.if_owner is not None for op in ops)
        if is_takeover and not lost:
            lost.extend(o.trial_id for o in outcomes if isinstance(o, Applied) and o.trial_id >= 0)
            raise StorageInternalError("The connection was lost after the commit.")
        return outcomes

    monkeypatch.setattr(RdbAdapter, "apply", apply)
    finish_in = functools.partial(tune, *numbers(200), storage="sqlite:///cut.db")
    study = finish_in(n_trials=6, fixed=LONG, cohort_size=6, pruner=NopPruner()).study
    assert len(lost) == 6
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 6


def finish_study(storage: str, **settings: Any) -> list[Any]:
    """Continue in this process the study "dnn" that `run` has started."""
    usual: dict[str, Any] = {
        "fixed": LONG,
        "cohort_size": 6,
        "pruner": NopPruner(),
        "device": "cpu",
    }
    tune(*numbers(200), storage=storage, **{"n_trials": TRIALS["dnn"], **usual, **settings})
    return trial_records(storage)


def test_a_cohort_of_a_checkpoint_is_divided_if_it_does_not_fit_into_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dnn", "cut.journal", at=4)
    original, sizes = DNNTemplate.cohort, list[int]()

    def cohort(problem: DNNTemplate, members: Any) -> Cohort:
        if len(members) > 2:
            raise MemoryError
        sizes.append(len(members))
        return original(problem, members)

    monkeypatch.setattr(DNNTemplate, "cohort", cohort)
    assert finish_study("cut.journal") == records_without_kill("dnn")
    assert 2 in sizes


def test_trials_start_again_if_their_checkpoint_cannot_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("A snapshot must have the cohort's tensors.")

    alone: dict[str, Any] = {"cohort_size": 1, "n_trials": 1}
    expected = finish_study("whole.journal", **alone)
    run("dnn", "cut.journal", at=4, **alone)
    monkeypatch.setattr(recovery, "restore_cohort", refuse)
    assert finish_study("cut.journal", **alone) == expected
    assert "their checkpoint cannot be used" in log.text


def test_released_trials_count_towards_n_trials(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dnn", "cut.journal", how="SIGTERM", at=4)
    with monkeypatch.context() as patch:  # a worker that does not see them yet
        patch.setattr(recovery.Recovery, "released_trials", lambda self: [])
        finish_study("cut.journal")
    assert [t.state for t in load_study("cut.journal").trials] == [TrialState.WAITING] * 6
    assert finish_study("cut.journal") == records_without_kill("dnn")


def test_a_living_worker_keeps_its_trials(folder: Path) -> None:
    first = subprocess.Popen(
        [
            *(sys.executable, "-c", SCRIPT),
            json.dumps(
                ["own", "SIGSTOP", 30, {"storage": "s.journal", "n_trials": 3, "cohort_size": 3}]
            ),
        ],
        env=ENVIRONMENT,
    )
    try:
        until = time.monotonic() + 60
        while "T (stopped)" not in Path(f"/proc/{first.pid}/status").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        second = run("own", "s.journal", n_trials=5)
        assert second.returncode == 0, second.stderr
        assert "Going on with" not in second.stderr
        states = [t.state for t in load_study("s.journal").trials]
        assert states == [TrialState.RUNNING] * 3 + [TrialState.COMPLETE] * 2
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(60) == 0
    finally:
        first.kill()
    assert {t.state for t in load_study("s.journal").trials} == {TrialState.COMPLETE}


def test_checkpoints_take_at_most_their_share_of_the_time(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me", interval=10.0)
    assert checkpoints.is_due()  # the first one is written soon
    checkpoints.write([])
    assert not checkpoints.is_due()
    checkpoints._last -= 11
    assert checkpoints.is_due()
    checkpoints._cost = 1.0  # too much for eleven seconds
    assert not checkpoints.is_due()
    checkpoints._last -= 50
    assert checkpoints.is_due()
    checkpoints.write([])
    assert not checkpoints.is_due()
    checkpoints.mark_trial_ended()
    checkpoints._last -= 1 + 50 * checkpoints._cost
    assert checkpoints.is_due()
    assert not Checkpoints(None, "me").is_enabled
    assert not Checkpoints(tmp_path, "me", None).write([])


def test_a_full_disk_does_not_stop_the_study(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert not Checkpoints(blocked, "me").write([])
    assert "The checkpoint could not be written" in log.text


def test_only_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me:1")
    for _ in range(5):
        assert checkpoints.write([], {"n": checkpoints.written})
    names = sorted(path.name for path in checkpoint_folder(tmp_path, "me:1").iterdir())
    assert names == [f"00000{n}.{kind}" for n in (3, 4) for kind in ("json", "safetensors")]
    found = load_newest_checkpoint(tmp_path, "me:1")
    assert found is not None
    assert found.loop == {"n": 4}
    checkpoints.clear()
    assert load_newest_checkpoint(tmp_path, "me:1") is None


def test_a_second_kill_during_recovery_loses_nothing(folder: Path) -> None:
    run("dnn", "cut.journal", at=6)
    fatal = SCRIPT.replace(
        "X, y = numbers(200)",
        "recovery.restore_cohort = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "X, y = numbers(200)",
    )
    arguments = json.dumps(["dnn", "SIGKILL", 0, {"storage": "cut.journal", "n_trials": 6}])
    killed = subprocess.run([sys.executable, "-c", fatal, arguments], env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL
    last = run("dnn", "cut.journal", how="SIGKILL", at=4)  # three more rounds, and it is killed
    assert last.returncode == -signal.SIGKILL
    (*_, path) = sorted(folder.glob("cut.models/*/checkpoints/*/*.json"), key=os.path.getmtime)
    done = json.loads(path.read_text())["metadata"]["cohorts"][0]["cohort"]["rounds_done"]
    assert min(done) >= 6  # it did not begin anew
    assert run("dnn", "cut.journal").returncode == 0
    assert trial_records("cut.journal") == records_without_kill("dnn")


def test_asking_for_a_trial_never_returns_a_released_one(folder: Path) -> None:
    run("dnn", "cut.journal", how="SIGTERM", at=4)
    storage = BufferedStorage(open_storage("cut.journal"), trial_attrs={"worker": "other"})
    study = optuna.load_study(study_name=None, storage=storage)
    assert len(storage.requeued_trials(study._study_id)) == 6
    with storage.prefetch_trials(3):
        assert [study.ask().number for _ in range(3)] == [6, 7, 8]
