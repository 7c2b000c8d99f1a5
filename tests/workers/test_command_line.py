"""Test `python -m optuna_nnhp worker`."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pandas as pd
import pytest
import torch
from torch import nn

import optuna_nnhp
from optuna_nnhp import optimize
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.workers import command_line
from optuna_nnhp.workers.command_line import main
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.config import WorkerResult
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import STOP
from optuna_nnhp.workers.control import send_control_message
from optuna_nnhp.workers.worker import run_worker
from tests.tiny import ENVIRONMENT
from tests.tiny import TINY
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
TEXT = "to be or not to be, that is the question\n" * 60


def build(params: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, params["units"]), nn.ReLU(), nn.Linear(params["units"], 1))


def error(y_true: Any, y_pred: Any) -> float:
    return float(np.abs(np.asarray(y_true) - np.asarray(y_pred)).max())


def worker(*words: object) -> int:
    """Run a worker of the study "s" and return its exit code."""
    return main(["worker", "--study", "s", "--storage", "s.journal", *map(str, words)])


def create_study(X: Any = X, y: Any = Y, **options: Any) -> None:
    """Create a study with two trials."""
    np.savez("data.npz", X=X, y=y)
    usual = {"storage": "s.journal", "study_name": "s", "n_trials": 2}
    tune(X, y, **(usual | options))


def load_study() -> optuna.Study:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend("s.journal")
    )
    return optuna.load_study(study_name="s", storage=storage)


def count_finished() -> int:
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return len(load_study().get_trials(states=done))


def test_worker_joins_a_study_until_it_has_n_trials(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_study()
    assert worker("--data", "data.npz", "--n-trials", 5, "--device", "cpu") == 0
    assert "study 's' finished." in capsys.readouterr().out
    assert count_finished() == 5
    result = tune(X, Y, storage="s.journal", study_name="s", n_trials=5)
    assert len(trials(result)) == 5  # the study is complete
    assert len({t.params["learning_rate"] for t in trials(result)}) == 5
    assert worker("--data", "data.npz") == 0  # the stored number of trials is reached
    assert count_finished() == 5
    assert worker("--data", "data.npz", "--timeout", 0.5) == 0  # then there is no limit on trials
    assert count_finished() > 5


@pytest.mark.parametrize("command", [STOP, INTERRUPT, RELEASE])
def test_earlier_control_messages_are_ignored(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study()
    message_id, seen = send_control_message(load_study(), command), list[str | None]()

    def record_config(config: WorkerConfig, problem: Any) -> WorkerResult:
        seen.append(config.last_message_id)
        return run_worker(config, problem)

    monkeypatch.setattr(command_line, "run_worker", record_config)
    assert worker("--data", "data.npz", "--n-trials", 5) == 0
    assert seen == [message_id] and count_finished() == 5


def test_worker_uses_the_stored_tuner_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study(trial_timeout=60.0, checkpoint_every=300.0)
    seen = list[Mapping[str, Any]]()

    def record_config(config: WorkerConfig, problem: Any) -> WorkerResult:
        seen.append(config.tuner_options)
        return WorkerResult(0)

    monkeypatch.setattr(command_line, "run_worker", record_config)
    assert worker("--data", "data.npz") == 0
    assert seen[0]["trial_timeout"] == 60 and seen[0]["checkpoint_every"] == 300


def test_missing_storage_is_not_created(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for storage in ("typo.journal", "sqlite:///typo.db"):
        assert main(["worker", "--study", "s", "--storage", storage]) == 2
        assert "must exist, but there is no file typo." in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match="must exist"):
            optuna_nnhp.replay((storage, "s"), 0)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04cut", "array"])
def test_unreadable_data_are_rejected(
    content: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_study()
    if content == "array":
        np.save("data.npy", X)
        Path("data.npy").rename("data.npz")
    else:
        Path("data.npz").write_bytes(content)
    assert worker("--data", "data.npz") == 2
    error = capsys.readouterr().err
    assert "`--data` must be" in error and error.count("\n") == 1


@pytest.mark.parametrize("source", ["def f(:", "import nothing_of_that_name", "x = y", "x = 1"])
def test_functions_that_cannot_be_imported_are_rejected(
    source: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study()
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"module_{abs(hash(source))}"
    Path(f"{name}.py").write_text(source)
    assert worker("--data", "data.npz", "--metric", f"{name}:f") == 2
    error = capsys.readouterr().err
    assert "`--metric` must name a function" in error and error.count("\n") == 1


def test_grid_method_is_rejected_for_other_studies(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_study()
    assert worker("--data", "data.npz", "--method", "grid", "--n-trials", 4) == 2
    assert "`method` must be 'grid' from the beginning of a study" in capsys.readouterr().err
    assert worker("--data", "data.npz", "--seed", -5) == 2
    assert "`seed` must be a whole number" in capsys.readouterr().err


def test_worker_reads_the_table_from_its_stored_path(folder: Path) -> None:
    pd.DataFrame(X, columns=list("abc")).assign(price=Y).to_csv("t.csv", index=False)
    options: dict[str, Any] = {"storage": "s.journal", "study_name": "s", "fixed": TINY}
    optimize("dnn", "t.csv", target="price", n_trials=1, **options)
    assert worker("--n-trials", 2, "--threads", 1, "--seed", 3) == 0
    Path("t.csv").rename("moved.csv")
    assert worker("--n-trials", 3) == 2
    assert worker("--n-trials", 3, "--data", "moved.csv") == 0
    assert worker("--n-trials", 4, "--data", "data.npz") == 2
    np.savez("data.npz", X=X.astype(np.float64), y=Y)
    assert worker("--n-trials", 4, "--data", "data.npz", "--target", "price") == 2
    assert count_finished() == 3


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_worker_reads_several_text_files(folder: Path, one_thread: None) -> None:
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(TEXT)
    fixed = {"iterations": 6, "context": 16, "width": 16, "layers": 1, "batch_tokens": 64}
    options: dict[str, Any] = {"storage": "s.journal", "study_name": "s", "fixed": fixed}
    optimize("gpt", TEXT + TEXT, n_trials=1, validation=TEXT, device="cpu", **options)
    assert worker("--n-trials", 2, "--data", "a.txt", "b.txt") == 2  # there is no validation text
    given = ("--data", "a.txt", "b.txt", "--validation", "b.txt")
    assert worker("--n-trials", 2, "--device", "cpu", *given) == 0
    assert count_finished() == 2


def test_worker_imports_user_network_and_metric(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize(
        network=build,
        X=X,
        y=Y,
        metric=error,
        direction="minimize",
        space={"units": IntDistribution(2, 4)},
        fixed={"epochs": 1},
        validation=(X[:9], Y[:9]),
        storage="s.journal",
        study_name="s",
        n_trials=1,
        device="cpu",
    )
    np.savez("data.npz", X=X, y=Y, X_val=X[:9], y_val=Y[:9])
    given = ["--data", "data.npz", "--n-trials", 2]
    for name in ("network", "metric"):
        assert worker(*given) == 2
        assert f"`{name}` must be given" in capsys.readouterr().err
        function = {"network": "build", "metric": "error"}[name]
        given += [f"--{name}", f"{__name__}:{function}"]
    assert worker(*given) == 0
    assert count_finished() == 2


def test_worker_resumes_a_grid(folder: Path) -> None:
    def stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        study.stop()

    options: dict[str, Any] = {"method": "grid", "levels": {"dropout": [0.1, 0.2, 0.3, 0.4]}}
    create_study(n_trials=None, timeout=99.0, cohort_size=1, callbacks=[stop], **options)
    assert count_finished() < 4
    assert worker("--data", "data.npz", "--timeout", 60) == 0
    points = [t.params["dropout"] for t in load_study().trials if t.state == TrialState.COMPLETE]
    assert sorted(points) == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--data", "other.npz"), "The data must be the study's, with the fingerprint"),
        (("--data", "nowhere.npz"), "No such file or directory: 'nowhere.npz'"),
        (("--data", "half.npz"), "`--data` must hold the arrays X and y, but half.npz has X."),
        (("--data", "pickled.npz"), "allow_pickle=False"),
        ((), "`X` must be given: the study does not store it (ndarray of 80 x 3)."),
        (("--timeout", 0), "`--timeout` must be more than 0, but got 0."),
        (("--threads", -1), "`--threads` must be more than 0, but got -1."),
        (("--data", "data.npz", "--device", "cuda:99"), "`device` must be usable here"),
        (("--data", "data.npz", "--method", "best"), "'best' is not a method"),
        (("--data", "data.npz", "--network", "math"), "must be like module:function, but got"),
        (("--data", "data.npz", "--network", "nowhere:f"), "No module named 'nowhere'"),
        (("--data", "data.npz", "--network", "math:pi"), "must be a function, but math:pi is"),
        (("--data", "data.npz", "--network", "math:sin"), "`network` must be given only for"),
        (("--study", "t"), "`--study` must name one of the storage's studies, 's', but got 't'."),
        (("--storage", "postgresql://me:secret@/no:where"), "me:***@"),
    ],
)
def test_invalid_arguments_are_rejected(
    words: tuple[object, ...], text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_study(n_trials=1)
    np.savez("other.npz", X=X + 1, y=Y)
    np.savez("half.npz", X=X)
    np.savez("pickled.npz", X=np.array([{}], dtype=object), y=Y)
    assert worker(*words) == 2
    output = capsys.readouterr().err
    assert text in output
    assert "secret" not in output
    assert count_finished() == 1


def test_missing_metadata_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_study(n_trials=None, timeout=1.0)
    assert worker("--data", "data.npz") == 2
    assert "`--timeout` or `--n-trials` must be given" in capsys.readouterr().err
    create_study(study_name="own", sampler=optuna.samplers.RandomSampler())
    assert worker("--study", "own", "--data", "data.npz") == 2
    assert (
        "`method` must be given, but is missing: the study's sampler, RandomSampler"
        in capsys.readouterr().err
    )
    assert worker("--study", "own", "--data", "data.npz", "--method", "random") == 0
    create_study(study_name="median", pruner=optuna.pruners.MedianPruner())
    assert worker("--study", "median", "--data", "data.npz") == 2
    assert "must be the default one or none, but it is MedianPruner" in capsys.readouterr().err
    optuna.create_study(study_name="plain", storage=load_study()._storage)
    assert worker("--study", "plain", "--data", "data.npz") == 2
    assert "The study must be one that `optimize` started" in capsys.readouterr().err


def test_error_in_training_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study(n_trials=1)

    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("the loop is broken")

    monkeypatch.setattr(WorkerConfig, "make_tuner", fail)
    assert worker("--data", "data.npz", "--n-trials", 2) == 1
    output = capsys.readouterr().err
    assert "ArithmeticError: the loop is broken" in output
    assert "in fail" in output


def test_help_explains_data_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["worker", "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    for text in ("--data arrays.npz", "Exit codes", "module:function", "grpc://host:port"):
        assert text in output
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


ENDLESS = TINY | {"epochs": 10**6, "patience": 10**6}


def test_ctrl_c_ends_running_trials_with_their_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_study(fixed=ENDLESS, n_trials=None, timeout=0.5)
    known = len(load_study().trials)

    def press() -> None:
        while not load_study().get_trials(states=(TrialState.RUNNING,)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert worker("--data", "data.npz", "--timeout", 600) == 130
    thread.join()
    assert "was interrupted" in capsys.readouterr().out
    new = load_study().trials[known:]
    assert "interrupted" in {trial.user_attrs.get("cause") for trial in new}
    assert TrialState.RUNNING not in {trial.state for trial in new}


def test_sigterm_requeues_running_trials(folder: Path) -> None:
    create_study(fixed=ENDLESS, n_trials=None, timeout=0.5)
    known = len(load_study().trials)
    command = [sys.executable, "-m", "optuna_nnhp", "worker", "--study", "s", "--storage"]
    command += ["s.journal", "--data", "data.npz", "--timeout", "600"]
    process = subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        while not load_study().get_trials(states=(TrialState.RUNNING,)):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "was told to shut down" in output
    new = load_study().trials[known:]
    released = [trial for trial in new if REQUEUED_BY in trial.user_attrs]
    assert {trial.state for trial in released} == {
        TrialState.WAITING
    }  # another worker resumes them
    assert TrialState.RUNNING not in {trial.state for trial in new}
