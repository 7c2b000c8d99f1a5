"""Test workers that run in executors: process pools, Dask, submitit, databases, proxies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
import multiprocessing
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest
from torch import nn

from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.config import WorkerResult
from optuna_nnhp.workers.control import CONTROL_KEY
from tests.postgresql import Database
from tests.tiny import ENVIRONMENT
from tests.tiny import TINY
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
TINY_WITHOUT_EPOCHS = {name: value for name, value in TINY.items() if name != "epochs"}


class EndedTrialsFile:
    """A callback that records in a file which process finished which trial.

    Each process waits after its first trial until ``processes`` processes have finished one.
    """

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self.path, self.processes = folder / "ended.txt", processes

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {trial.number}\n")
        limit = time.monotonic() + 60
        while len({process for process, _ in self.ended()}) < self.processes:
            assert time.monotonic() < limit
            time.sleep(0.02)

    def ended(self) -> list[tuple[int, int]]:
        """Return process and trial number, in the order in which the trials finished."""
        lines = self.path.read_text().splitlines()
        return [(int(process), int(number)) for process, number in map(str.split, lines)]


def check_once(
    result: Result, ended_trials: EndedTrialsFile, wanted: int, *, is_exact: bool = True
) -> None:
    """Check that other processes have trained each trial once, and the number of trials.

    Where starts are not exact, a trial over the limit waits again; see `set_trial_limit`.
    """
    ended = ended_trials.ended()
    begun = [t for t in trials(result) if is_exact or t.state != TrialState.WAITING]
    assert Counter(number for _, number in ended) == Counter(t.number for t in begun)
    assert os.getpid() not in {process for process, _ in ended}
    assert {t.state for t in begun} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(begun) == wanted


@pytest.mark.parametrize("storage", ["study.journal", "sqlite:///study.db"])
def test_two_processes_share_a_study(
    storage: str, folder: Path, pool: ProcessPoolExecutor
) -> None:
    ended_trials, options = EndedTrialsFile(folder, 2), {"cohort_size": 2}
    result = tune(
        X,
        Y,
        storage=storage,
        n_trials=13,
        workers=2,
        executor=pool,
        callbacks=[ended_trials],
        **options,
    )
    check_once(result, ended_trials, 13)
    assert len({process for process, _ in ended_trials.ended()}) == 2
    assert len({trial.user_attrs["worker"] for trial in trials(result)}) == 2
    assert trials(result)[0].user_attrs["baseline"]
    # No two of them proposed the same.
    assert len({tuple(t.params.items()) for t in trials(result)}) == 13
    best = result.best_trial.number
    assert [p.name for p in folder.rglob("trial-*.safetensors")] == [f"trial-{best}.safetensors"]
    assert result.replay().is_exact
    # The same call again does nothing; a call with more trials resumes the study.
    again = tune(X, Y, storage=storage, n_trials=13, workers=2, executor=pool, **options)
    assert (len(trials(again)), again.best_value) == (13, result.best_value)
    more = tune(X, Y, storage=storage, n_trials=15, workers=2, executor=pool, **options)
    assert len(trials(more)) == 15
    assert len({tuple(t.params.items()) for t in trials(more)}) == 15


def test_two_workers_try_each_grid_point_once(folder: Path, pool: ProcessPoolExecutor) -> None:
    ended_trials, levels = (
        EndedTrialsFile(folder, 2),
        {"dropout": [0.0, 0.1, 0.2], "momentum": [0.8, 0.9, 0.95, 0.99]},
    )
    options: dict[str, Any] = {"method": "grid", "levels": levels, "n_trials": None}
    fixed = TINY | {"optimizer": "sgd"}
    result = tune(X, Y, storage="g.journal", workers=2, executor=pool, callbacks=[ended_trials],
                  fixed=fixed, timeout=100.0, cohort_size=3, **options)  # fmt: skip
    check_once(result, ended_trials, 12)
    points = {(t.params["dropout"], t.params["momentum"]) for t in trials(result)}
    assert len(points) == 12
    assert len({process for process, _ in ended_trials.ended()}) == 2


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("population", {"size": 2, "generations": 2}),
        ("gradient", {"starts": 1}),
        ("zoom", {"round_size": 5}),
        ("quasi-random", {}),
    ],
)
def test_two_workers_share_a_study_with_every_method(
    method: str, options: dict[str, Any], folder: Path, pool: ProcessPoolExecutor
) -> None:
    ended_trials = EndedTrialsFile(folder)
    own = {"pruner": None} if method in ("population", "gradient") else {}
    options = {"method": method, "method_options": options, "callbacks": [ended_trials], **own}
    result = tune(X, Y, storage="m.journal", n_trials=8, workers=2, executor=pool, **options)
    check_once(result, ended_trials, 8)
    tuned = [name for name in ("learning_rate", "dropout") if name in result.best_params]
    assert len({tuple(t.params[n] for n in tuned) for t in trials(result)}) >= 6
    assert result.predict(X).shape == (80,)


def test_progress_bar_counts_trials_of_all_workers(
    folder: Path, pool: ProcessPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"n_trials": 5, "show_progress_bar": True}
    result = tune(X, Y, storage="b.journal", workers=2, executor=pool, **options)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("100%")
    assert f"5/5 trials, best {result.best_value:.6g}, 5 trials done, 0 running" in last


def test_local_functions_and_user_samplers_are_sent_to_workers(
    folder: Path, pool: ProcessPoolExecutor
) -> None:
    classes = 2

    def network(params: Mapping[str, Any]) -> nn.Module:
        return nn.Sequential(nn.Linear(3, params["units"]), nn.ReLU(), nn.LazyLinear(classes))

    result = optimize(
        network=network,
        X=X,
        y=Y > 1000,
        metric=lambda y, p: float(np.mean(y == p)),
        space={"units": IntDistribution(2, 8)},
        fixed={"epochs": 2},
        sampler=optuna.samplers.RandomSampler(seed=3),
        pruner=optuna.pruners.NopPruner(),
        n_trials=6,
        storage="own.journal",
        workers=2,
        executor=pool,
        device="cpu",
    )
    assert states(result) == [TrialState.COMPLETE] * 6
    # A user's sampler with its own seed proposes everything once.
    assert len({t.params["learning_rate"] for t in trials(result)}) == 6


def test_study_stop_in_one_worker_stops_all(folder: Path, pool: ProcessPoolExecutor) -> None:
    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 4:
            study.stop()

    options: dict[str, Any] = {"callbacks": [stop], "cohort_size": 1, "n_trials": 10**6}
    started = time.monotonic()
    result = tune(X, Y, storage="s.journal", workers=2, executor=pool, **options)
    assert time.monotonic() - started < 60
    count = len(trials(result))
    assert 5 <= count < 10**4
    assert set(states(result)) <= {TrialState.COMPLETE, TrialState.FAIL}
    # It was for that call only.
    more = tune(X, Y, storage="s.journal", workers=2, executor=pool, n_trials=count + 3)
    assert len(trials(more)) == count + 3


class RaisingCallback:
    """A callback that raises an error, in all processes or only in the first."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if self.path is None:
            raise ArithmeticError(f"trial {trial.number} is odd")
        try:
            self.path.open("x").close()
        except FileExistsError:
            return
        raise ArithmeticError(f"trial {trial.number} is odd")


def test_error_of_all_remote_workers_is_raised(folder: Path, pool: ProcessPoolExecutor) -> None:
    with pytest.raises(ArithmeticError, match=r"trial \d is odd") as caught:
        tune(
            X,
            Y,
            storage="e.journal",
            workers=2,
            executor=pool,
            callbacks=[RaisingCallback()],
            n_trials=9,
        )
    assert "in __call__" in caught.value.__notes__[0]  # where it was raised


def test_other_workers_continue_when_one_fails(
    folder: Path, pool: ProcessPoolExecutor, log: pytest.LogCaptureFixture
) -> None:
    fault = RaisingCallback(folder / "done")
    options: dict[str, Any] = {"callbacks": [fault], "cohort_size": 1, "n_trials": 7}
    result = tune(X, Y, storage="f.journal", workers=2, executor=pool, **options)
    assert TrialState.RUNNING not in states(result)
    assert len([t for t in trials(result) if t.state == TrialState.COMPLETE]) >= 6
    assert any("failed, the others continue: trial" in line for line in log.messages)


def call_later(function: Any, seconds: float, *args: Any) -> Any:
    time.sleep(seconds)
    return function(*args)


class DelayedExecutor:
    """An executor that starts the second worker later, like the queue of a cluster."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def submit(self, function: Any, /, *args: Any) -> Any:
        return self.pool.submit(call_later, function, 2.0 * args[0].worker, *args)


def test_timeout_starts_when_each_worker_starts(folder: Path, pool: ProcessPoolExecutor) -> None:
    options: dict[str, Any] = {"n_trials": None, "timeout": 1.5, "workers": 2}
    result = tune(X, Y, storage="t.journal", executor=DelayedExecutor(pool), **options)
    started = [trial for trial in trials(result) if trial.state != TrialState.WAITING]
    assert len({trial.user_attrs["worker"] for trial in started}) == 2
    begun = [trial.datetime_start for trial in started]
    assert None not in begun
    assert max(begun) - min(begun) > timedelta(seconds=1.8)
    assert TrialState.RUNNING not in states(result)


def test_postgresql_restarts_under_four_workers(
    postgresql: Database, folder: Path, pool: ProcessPoolExecutor
) -> None:
    ended_trials = EndedTrialsFile(folder, 4)

    def restart() -> None:
        while (
            not ended_trials.path.exists()
            or len({process for process, _ in ended_trials.ended()}) < 4
        ):
            time.sleep(0.05)
        postgresql.restart()

    thread = threading.Thread(target=restart)
    thread.start()
    options: dict[str, Any] = {"fixed": TINY | {"epochs": 150}, "cohort_size": 2}
    result = tune(X, Y, storage=postgresql.url, n_trials=40, workers=4, executor=pool,
                  callbacks=[ended_trials], **options)  # fmt: skip
    thread.join(60)
    check_once(result, ended_trials, 40)
    assert len({process for process, _ in ended_trials.ended()}) == 4


@pytest.fixture
def proxy(folder: Path) -> Iterator[str]:
    """Start Optuna's gRPC proxy of a database and yield its address."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = (
        "from optuna.storages import RDBStorage, run_grpc_proxy_server;"
        f"run_grpc_proxy_server(RDBStorage('sqlite:///p.db'), host='localhost', port={port})"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        yield f"grpc://localhost:{port}"
    finally:
        process.kill()
        process.wait()


def test_two_workers_share_a_study_through_a_grpc_proxy(
    proxy: str, folder: Path, pool: ProcessPoolExecutor
) -> None:
    ended_trials = EndedTrialsFile(folder)
    options: dict[str, Any] = {"callbacks": [ended_trials], "n_trials": 8, "cohort_size": 2}
    result = tune(X, Y, storage=proxy, workers=2, executor=pool, **options)
    check_once(result, ended_trials, 8, is_exact=False)


def test_two_workers_share_a_study_with_dask(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    ended_trials = EndedTrialsFile(folder, 2)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=True, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor()
        options = {"n_trials": 8, "workers": 2, "cohort_size": 1, "callbacks": [ended_trials]}
        result = tune(X, Y, storage="sqlite:///d.db", executor=executor, **options)
    check_once(result, ended_trials, 8)
    assert len({process for process, _ in ended_trials.ended()}) == 2


def test_two_workers_share_a_study_with_submitit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    ended_trials, executor = (
        EndedTrialsFile(folder, 2),
        submitit.AutoExecutor(folder="jobs", cluster="local"),
    )
    executor.update_parameters(timeout_min=5)
    result = tune(X, Y, storage="j.journal", n_trials=8, workers=2, callbacks=[ended_trials],
                  executor=executor, cohort_size=1)  # fmt: skip
    check_once(result, ended_trials, 8)
    assert len({process for process, _ in ended_trials.ended()}) == 2


# --- Executors that fail ---


class InlineExecutor:
    """An executor that runs calls at once in this process."""

    def submit(self, function: Any, /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


class DyingExecutor(InlineExecutor):
    """An executor whose first processes die; later ones finish at once."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.calls = deaths, 0

    def submit(self, function: Any, /, *args: Any) -> Future[Any]:
        self.calls += 1
        future: Future[Any] = Future()
        if self.calls <= self.deaths:
            future.set_exception(BrokenProcessPool("killed by the system"))
        else:
            future.set_result(WorkerResult(args[0].worker))
        return future


def test_executor_must_not_run_calls_in_the_callers_process(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="in other processes, but this one runs them in the caller"
    ):
        tune(X, Y, storage="i.journal", executor=InlineExecutor())


def test_dead_worker_is_replaced(folder: Path, log: pytest.LogCaptureFixture) -> None:
    executor = DyingExecutor(3)
    tune(X, Y, storage="d.journal", executor=executor)
    assert executor.calls == 4
    lines = [line for line in log.messages if "Worker 0 died" in line]
    assert len(lines) == 3
    assert all("killed by the system (a new worker takes over its trials)" in x for x in lines)


class RemoteExecutor(InlineExecutor):
    """An executor whose only worker waits for a control message."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def submit(self, function: Any, /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(target=self._wait, args=(future, args[0])).start()
        return future

    def _wait(self, future: Future[Any], config: WorkerConfig) -> None:
        study = optuna.load_study(
            study_name=config.study_name, storage=open_storage(config.storage)
        )
        while CONTROL_KEY not in study._storage.get_study_system_attrs(study._study_id):
            time.sleep(0.02)
        message = study._storage.get_study_system_attrs(study._study_id)[CONTROL_KEY]
        self.commands.append(message["command"])
        future.set_result(WorkerResult(config.worker, stopped_by=message["command"]))


@pytest.mark.parametrize(
    ("number", "what"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "release")]
)
def test_signal_to_the_caller_is_sent_to_remote_workers(
    number: signal.Signals, what: str, folder: Path
) -> None:
    executor = RemoteExecutor()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    result = tune(X, Y, storage="w.journal", executor=executor)
    timer.join()
    assert executor.commands == [what]
    assert len(trials(result)) == 1  # the default configuration, which waits


def test_remote_workers_are_replaced_after_the_callers_timeout(folder: Path) -> None:
    executor = DyingExecutor(100)
    with pytest.raises(RuntimeError, match="but all have died"):
        tune(X, Y, storage="n.journal", executor=executor, n_trials=None, timeout=1e-6)
    assert executor.calls == 4


def test_worker_is_not_replaced_after_too_many_deaths(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    executor = DyingExecutor(100)
    text = "At least one worker must finish, but all have died"
    with pytest.raises(RuntimeError, match=text) as caught:
        tune(X, Y, storage="n.journal", executor=executor, workers=2)
    assert isinstance(caught.value.__cause__, BrokenProcessPool)
    assert executor.calls == 8
    assert sum("not replaced: this was its death number 4" in line for line in log.messages) == 2


def test_thread_pools_and_forking_pools_are_rejected(folder: Path) -> None:
    with (
        ThreadPoolExecutor(2) as threads,
        pytest.raises(ValueError, match="in other processes, but got a ThreadPoolExecutor"),
    ):
        tune(X, Y, storage="x.journal", executor=threads)
    if sys.platform != "win32":
        with (
            ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as forks,
            pytest.raises(
                ValueError, match="forks the caller, whose threads are missing in the copy"
            ),
        ):
            tune(X, Y, storage="x.journal", executor=forks)
    assert not list(folder.iterdir())


def test_unpicklable_argument_is_named_in_the_error(
    folder: Path, pool: ProcessPoolExecutor
) -> None:
    lock = threading.Lock()

    def callback(study: optuna.Study, trial: FrozenTrial) -> None:
        lock.acquire()

    with pytest.raises(ValueError, match="`callbacks` must be something that can be sent to"):
        tune(X, Y, storage="c.journal", executor=pool, callbacks=[callback])
