"""A storage that goes away: training goes on, nothing is lost, and errors stay errors."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import nullcontext
from contextlib import suppress
import itertools
import math
from pathlib import Path
import random
import socket
import sqlite3
import sys
import time
from types import ModuleType
from types import SimpleNamespace
from typing import Any

import optuna
from optuna import Study
from optuna.exceptions import DuplicatedStudyError
from optuna.exceptions import StorageInternalError
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import RDBStorage
from optuna.trial import TrialState
import pytest
import sqlalchemy
from sqlalchemy import exc

from optuna_nnhp.storages import circuit_breaker
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.circuit_breaker import is_outage
from optuna_nnhp.storages.circuit_breaker import outage_reason
from optuna_nnhp.storages.journal_file import open_journal
from optuna_nnhp.storages.lease import LEASE_PREFIX
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import TrialLimitReached
from optuna_nnhp.study.recovery import CHECKPOINT
from optuna_nnhp.study.recovery import Recovery
from tests.postgresql import Database
from tests.storages.test_buffered import SPACE
from tests.storages.test_buffered import opened

KINDS = ("memory", "journal", "sqlite", "postgresql", "grpc")
SECRET = "postgresql://me:hunter2@host/db"


class Flaky(InMemoryStorage):
    """Stands for one behind a network that fails."""

    is_down = False

    def __getattribute__(self, name: str) -> Any:
        if name.split("_")[0] in ("get", "set", "create", "delete") and type(self).is_down:
            return self._fail
        return super().__getattribute__(name)

    def _fail(self, *_: Any, **__: Any) -> None:
        raise StorageInternalError(f"no answer from {SECRET}")


class Place:
    """A storage that many can open, and that can be made to go away."""

    def __init__(self, kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
        self.kind, self.path = kind, folder / f"study.{kind}"
        self.memory = InMemoryStorage() if kind == "grpc" else Flaky()
        self.server: Database | None = None
        self.proxy: Any = None
        self.port = 0
        if kind == "postgresql":
            self.server = request.getfixturevalue("postgresql")
        if kind == "grpc":
            pytest.importorskip("grpc", reason="grpcio is not installed")
            with socket.socket() as free:
                free.bind(("localhost", 0))
                self.port = free.getsockname()[1]
            self.serve()
            request.addfinalizer(lambda: self.proxy.stop(0).wait())
        if kind == "sqlite":
            opened("sqlite", folder)
            (folder / "study.db").rename(self.path)

    def open(self) -> BaseStorage:
        if self.server is not None:
            return RDBStorage(self.server.url)
        if self.kind == "journal":
            return open_journal(self.path)
        if self.kind == "sqlite":
            return RDBStorage(f"sqlite:///{self.path}?timeout=0.05")
        if self.kind == "grpc":
            proxy = optuna.storages.GrpcStorageProxy(host="localhost", port=self.port)
            proxy.wait_server_ready(timeout=20)  # it pauses after a failure, too
            return proxy
        return self.memory

    def serve(self) -> None:
        """Optuna's proxy, as another process would run it."""
        from optuna.storages._grpc.server import make_server

        self.proxy = make_server(self.memory, "localhost", self.port)
        self.proxy.start()

    @contextmanager
    def away(self) -> Generator[None, None, None]:
        if self.server is not None:
            self.server.stop()
            yield
            self.server.start()
        elif self.kind == "journal":
            self.path.rename(self.path.with_suffix(".moved"))
            yield
            assert not self.path.exists()
            self.path.with_suffix(".moved").rename(self.path)
        elif self.kind == "sqlite":
            lock = sqlite3.connect(self.path, isolation_level=None)
            lock.execute("BEGIN EXCLUSIVE")
            yield
            lock.rollback()
            lock.close()
        elif self.kind == "grpc":
            self.proxy.stop(0).wait()
            yield
            self.serve()
        else:
            Flaky.is_down = True
            try:
                yield
            finally:
                Flaky.is_down = False

    def worker(self, name: str = "here") -> Study:
        storage = BufferedStorage(self.open(), 100.0, trial_attrs={"worker": name})
        return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)

    def read(self) -> Study:
        """What anybody else sees."""
        return optuna.load_study(storage=self.open(), study_name="s")


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE", 0.02)
    return Place(request.param, tmp_path, request)


def deferred(study: Study) -> BufferedStorage:
    assert isinstance(study._storage, BufferedStorage)
    return study._storage


# --- What goes on ---


def test_training_continues_in_an_outage(place: Place, log: pytest.LogCaptureFixture) -> None:
    study = place.worker()
    storage = deferred(study)
    study.set_user_attr("known", 1)
    assert study.user_attrs == {"known": 1}
    with storage.prefetch_trials(3):
        trials = [study.ask(SPACE) for _ in range(3)]
    assert storage.is_available
    with place.away():
        trials[0].report(0.5, 1)
        trials[0].set_user_attr("cause", "finished")
        with storage.batch():
            study.tell(trials[0], 0.25)
        assert not storage.is_available
        study.tell(trials[1], 0.5)
        trials[2].report(0.75, 1)
        storage.flush()
        study.set_user_attr("note", {"a": [1, 2]})
        study.set_metric_names(["loss"])
        assert study.user_attrs == {"known": 1, "note": {"a": [1, 2]}}
        assert study.metric_names == ["loss"]
        assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
        assert (study.best_value, study.study_name) == (0.25, "s")
        assert study.get_trials()[2].intermediate_values == {1: 0.75}
        assert not storage.wait_until_available(0.1)
    assert "is available again" not in log.text
    assert storage.wait_until_available(10.0)
    assert storage.is_available
    read = place.read()
    assert read.user_attrs == {"known": 1, "note": {"a": [1, 2]}}
    assert read.metric_names == ["loss"]
    first, second, third = read.get_trials()
    assert (first.value, first.params, first.intermediate_values) == (
        0.25,
        trials[0].params,
        {1: 0.5},
    )
    assert first.user_attrs == {"worker": "here", "cause": "finished"}
    assert (second.value, third.intermediate_values) == (0.5, {1: 0.75})
    assert log.text.count("Running trials continue; their data is kept in memory") == 1
    assert log.text.count("The storage is available again after") == 1
    assert "Discarded" not in log.text
    assert "hunter2" not in log.text
    study.tell(trials[2], 1.0)
    assert study.ask().number == 3


def test_calls_that_need_an_answer_raise_storage_unavailable(place: Place) -> None:
    study = place.worker()
    storage = deferred(study)
    study.enqueue_trial({"rate": 0.5})
    with storage.prefetch_trials(1):
        trial = study.ask(SPACE)
    study.enqueue_trial({"rate": 0.25})
    waiting = study.get_trials()[1]._trial_id
    storage.flush()
    other = BufferedStorage(place.open())
    with place.away():
        questions: list[Callable[[], Any]] = [
            study.ask,
            lambda: study.enqueue_trial({"rate": 0.125}),
            lambda: storage.set_trial_state_values(waiting, TrialState.RUNNING),
            lambda: storage.set_trial_user_attr(waiting, "note", 1),
            lambda: storage.take_over({waiting: "nobody"}),
            lambda: storage.get_trial(10**6),
            lambda: storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "new"),
            lambda: other.get_all_trials(study._study_id),
            lambda: other.get_study_user_attrs(study._study_id),
        ]
        for question in questions:
            with pytest.raises(StorageUnavailable, match="The storage is unavailable: ") as caught:
                question()
            assert "hunter2" not in str(caught.value)
            assert caught.value.__cause__ is None
            assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert isinstance(caught.value, RuntimeError)
    assert storage.wait_until_available(10.0)
    study.tell(trial, 1.0)
    assert study.ask(SPACE).params["rate"] == 0.25
    assert [t.state.name for t in place.read().get_trials()][:2] == ["COMPLETE", "RUNNING"]


def test_an_outage_while_trials_are_taken_over_is_no_error(place: Place, tmp_path: Path) -> None:
    left = place.worker("gone").ask(SPACE)
    study = place.worker()
    storage = deferred(study)
    storage.set_study_system_attr(study._study_id, f"{LEASE_PREFIX}gone", {"ended": True})
    lease = Lease(storage.backend, study._study_id, "here")
    source: Any = SimpleNamespace(running={})
    recovery = Recovery(
        study,
        problem=None,  # type: ignore[arg-type]
        storage=storage,
        source=source,
        lease=lease,
        folder=tmp_path / "checkpoints",
    )
    assert recovery.lease.is_dead("gone")
    assert len(study.get_trials()) == 1
    with place.away():
        assert recovery.claim() == {}
        assert not storage.is_available
    assert storage.wait_until_available(10.0)
    assert [trial.number for trial in recovery.claim()["gone"]] == [left.number]
    (trial,) = place.read().get_trials()
    assert (trial.user_attrs["worker"], trial.user_attrs[CHECKPOINT]) == ("here", "gone")


def test_a_restart_between_two_calls_causes_no_outage(
    postgresql: Database, tmp_path: Path, request: pytest.FixtureRequest, log: Any
) -> None:
    place = Place("postgresql", tmp_path, request)
    study = place.worker()
    trial = study.ask(SPACE)
    for number in range(1, 4):
        postgresql.restart()
        if number == 1:
            study.tell(trial, 1.0)
        if number == 2:
            assert len(study.get_trials()) == 2
        assert study.ask(SPACE).number == number
        assert deferred(study).is_available
    assert "is unavailable" not in log.text


# --- What may have been written ---


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("does_wait", [False, True], ids=["new", "waiting"])
def test_a_trial_is_not_lost_between_its_start_and_the_answer(
    does_wait: bool, is_late: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = place.worker()
    storage = deferred(study)
    if does_wait:
        study.enqueue_trial({"layers": 3})
        study.enqueue_trial({"layers": 5})
    study.get_trials()
    adapter = storage._buffer.adapter
    original = adapter.apply

    def broken(ops: Sequence[Operation]) -> list[Outcome]:
        if is_late:
            original(ops)
        raise StorageInternalError("the connection is gone")

    with monkeypatch.context() as patch, storage.prefetch_trials(2):
        patch.setattr(adapter, "apply", broken)
        with pytest.raises(StorageUnavailable, match="the connection is gone"):
            study.ask(SPACE)
    assert storage.wait_until_available(10.0)
    storage.flush()
    assert not [t for t in place.read().get_trials() if t.state == TrialState.RUNNING]
    with storage.prefetch_trials(2):
        trials = [study.ask(SPACE) for _ in range(2)]
    assert [trial.number for trial in trials] == [0, 1]
    if does_wait:
        assert [trial.params["layers"] for trial in trials] == [3, 5]
    for trial in trials:
        study.tell(trial, 1.0)
    read = place.read().get_trials()
    assert [t.state.name for t in read] == ["COMPLETE"] * 2
    assert {t.user_attrs["worker"] for t in read} == {"here"}


def test_trials_whose_start_was_in_doubt_are_used_first(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = place.worker()
    storage = deferred(study)
    study.get_trials()
    adapter = storage._buffer.adapter
    original = adapter.apply

    def broken(ops: Sequence[Operation]) -> list[Outcome]:
        original(ops)
        raise StorageInternalError("the connection is gone")

    with storage.prefetch_trials(3):
        with monkeypatch.context() as patch:
            patch.setattr(adapter, "apply", broken)
            with pytest.raises(StorageUnavailable):
                study.ask(SPACE)
        time.sleep(0.05)
        numbers = [study.ask(SPACE).number for _ in range(3)]
    assert numbers == [0, 1, 2]
    assert len(place.read().get_trials()) == 3


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["memory", "journal", "sqlite"])
def test_random_outages_lose_nothing(
    kind: str,
    seed: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    """Every writing may fail before or after it has happened, and every reading."""
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE", 0.0)
    place = Place(kind, tmp_path, request)
    study, dice = place.worker(), random.Random(seed)
    storage = deferred(study)
    for layers in range(1, 4):
        study.enqueue_trial({"layers": layers})
    storage.set_trial_limit(study._study_id, 30)
    adapter, told, running = storage._buffer.adapter, dict[int, float](), list[optuna.Trial]()
    write, read = adapter.apply, adapter.read

    def failing(ops: Sequence[Operation]) -> list[Outcome]:
        luck = dice.random()
        if luck < 0.3:
            raise OSError("before")
        outcomes = write(ops)
        if luck < 0.6:
            raise OSError("after")
        return outcomes

    def failing_read(*arguments: Any) -> Any:
        if dice.random() < 0.3:
            raise OSError("reading")
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "apply", failing)
        patch.setattr(adapter, "read", failing_read)
        for step in range(60):
            with (
                suppress(StorageUnavailable, TrialLimitReached),
                storage.prefetch_trials(dice.randint(1, 4)),
            ):
                for _ in range(2):
                    running.append(study.ask(SPACE))
            for trial in running:
                trial.report(trial.number, step)
            dice.shuffle(running)
            with storage.batch() if dice.random() < 0.5 else nullcontext():
                for trial in running[2:]:
                    study.tell(trial, trial.number / 2)
                    told[trial.number] = trial.number / 2
            running = running[:2]
    assert storage.wait_until_available(10.0)
    storage.flush()
    while True:
        with suppress(TrialLimitReached):
            running.append(study.ask(SPACE))
            continue
        break
    for trial in running:
        study.tell(trial, trial.number / 2)
        told[trial.number] = trial.number / 2
    trials = place.read().get_trials()
    begun = [trial for trial in trials if trial.state != TrialState.WAITING]
    assert {trial.number: trial.value for trial in begun} == told
    assert len(begun) == 30
    assert {trial.state for trial in begun} == {TrialState.COMPLETE}
    assert [t.params["layers"] for t in trials[:3]] == [1, 2, 3]
    assert "Discarded" not in log.text


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_commit_whose_answer_is_lost_counts(
    kind: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE", 0.02)
    study = Place(kind, tmp_path, request).worker()
    trial = study.ask(SPACE)
    commit = sqlalchemy.Connection._commit_impl

    def lost(self: sqlalchemy.Connection) -> None:
        commit(self)
        raise exc.OperationalError("COMMIT", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as patch:
        patch.setattr(sqlalchemy.Connection, "_commit_impl", lost)
        study.tell(trial, 0.5)
        study.set_user_attr("note", 1)
    assert not deferred(study).is_available
    assert deferred(study).wait_until_available(10.0)
    assert (study.best_value, study.user_attrs) == (0.5, {"note": 1})
    assert "Discarded" not in log.text
    assert study.ask().number == 1


def test_a_disk_that_is_full_can_be_read(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE", 0.02)
    place = Place("journal", tmp_path, request)
    study = place.worker()
    trial, other = study.ask(SPACE), study.ask(SPACE)
    optuna.load_study(storage=place.open(), study_name="s").set_user_attr("theirs", 1)
    storage = deferred(study)
    calls = []

    def full(*_: Any) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("optuna_nnhp.storages.journal_file.append_lines", full)
        study.tell(trial, 1.0)
        for _ in range(5):
            time.sleep(0.03)
            assert study.user_attrs == {"theirs": 1}
            storage.refresh()
            assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "RUNNING"]
            assert not storage.is_available
        assert storage.wait_until_available(0.0) is False
        storage._buffer.pending.clear()  # nothing to write: a question is worth it all the same
        assert storage.wait_until_available(10.0)
        with pytest.raises(StorageUnavailable, match="No space left on device"):
            study.ask()
    assert log.text.count("is unavailable") == 1
    assert len(calls) < 6
    storage.wait_until_available(10.0)
    study.tell(other, 1.0)
    assert storage.wait_until_available(10.0)
    assert "is available again" in log.text


# --- When ---


def test_attempts_follow_the_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, attempts, slept = 1000.0, list[float](), list[float]()

    def sleep(seconds: float) -> None:
        nonlocal clock
        slept.append(seconds)
        clock += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "sleep", sleep)
    storage = BufferedStorage(InMemoryStorage(), trial_attrs={"worker": "here"})
    study = optuna.create_study(storage=storage)
    trial = study.ask(SPACE)

    def broken(ops: Sequence[Operation]) -> list[Outcome]:
        attempts.append(clock)
        raise OSError("no route to host")

    monkeypatch.setattr(storage._buffer.adapter, "apply", broken)
    study.tell(trial, 1.0)
    for _ in range(1000):  # none of these sleeps, or asks
        study.set_user_attr("note", 1)
        storage.flush()
        study.get_trials()
    assert (attempts, slept) == ([1000.0], [])
    assert not storage.wait_until_available(150.0)
    waited = [after - before for before, after in itertools.pairwise(attempts)]
    assert waited == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0])
    assert max(slept) <= 0.1
    asked = list[int]()
    assert not storage.wait_until_available(math.inf, lambda: len(asked) > 3 or asked.append(1))  # type: ignore[func-returns-value]


def test_waiting_for_an_available_storage_returns_at_once() -> None:
    storage = BufferedStorage(InMemoryStorage())
    assert storage.is_available
    assert storage.wait_until_available(0.0, lambda: True)


def test_a_stale_connection_is_retried_once(log: pytest.LogCaptureFixture) -> None:
    calls = list[int]()

    def question() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise exc.OperationalError(
                "SELECT 1", {}, Exception("gone"), connection_invalidated=True
            )
        return 7

    assert CircuitBreaker().call(question) == 7
    assert len(calls) == 2
    assert log.text == ""
    calls.clear()
    with pytest.raises(StorageUnavailable, match="gone"):
        CircuitBreaker().call(question, retry=False)


# --- What is an outage ---


def sql(kind: type[exc.DBAPIError], invalidated: bool = False) -> Exception:
    return kind("INSERT", {}, Exception("text"), connection_invalidated=invalidated)


def wrapped(cause: Exception) -> Exception:
    error = StorageInternalError("typically invalid data")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError("disk"), True),
        (TimeoutError("lock"), True),
        (ConnectionRefusedError("server"), True),
        (StorageInternalError("?"), True),
        (sql(exc.OperationalError), True),
        (sql(exc.InterfaceError), True),
        (sql(exc.InternalError), True),
        (sql(exc.DBAPIError), True),
        (exc.TimeoutError("pool"), True),
        (wrapped(exc.PendingRollbackError("Optuna asks again in a broken session")), True),
        (wrapped(sql(exc.OperationalError)), True),
        (wrapped(OSError("disk")), True),
        (RuntimeError("Error: did not possess lock"), True),
        (sql(exc.ProgrammingError, invalidated=True), True),
        (sql(exc.ProgrammingError), False),
        (sql(exc.IntegrityError), False),
        (wrapped(sql(exc.DataError)), False),
        (wrapped(exc.InvalidRequestError("bug")), False),
        (KeyError("study"), False),
        (ValueError("value"), False),
        (TypeError("set"), False),
        (RuntimeError("bug"), False),
        (UpdateFinishedTrialError("trial"), False),
        (DuplicatedStudyError("study"), False),
    ],
)
def test_outages_and_errors_are_distinguished(error: Exception, expected: bool) -> None:
    assert is_outage(error) == expected

    def question() -> None:
        raise error

    with pytest.raises(StorageUnavailable if expected else type(error)):
        CircuitBreaker().call(question)


@pytest.mark.parametrize(
    "module, name", [("grpc", "RpcError"), ("redis.exceptions", "RedisError")]
)
def test_errors_of_optional_drivers_are_outages(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed(Exception):
        def details(self) -> str:
            return f"failed to connect to {SECRET}"

    assert not is_outage(Failed())
    fake = ModuleType(module)
    setattr(fake, name, Failed)
    monkeypatch.setitem(sys.modules, module, fake)
    assert is_outage(Failed())
    assert outage_reason(Failed()) == "failed to connect to postgresql://me:***@host/db"


def test_errors_of_a_working_storage_are_raised_unchanged(place: Place) -> None:
    study = place.worker()
    storage = deferred(study)
    trial = study.ask(SPACE)
    study.tell(trial, 1.0)
    for down in (False, True):
        with place.away() if down else nullcontext():
            with pytest.raises(UpdateFinishedTrialError):
                trial.report(0.5, 1)
            with pytest.raises(ValueError):
                study.tell(trial, 1.0)
            if place.kind != "memory":
                with pytest.raises(TypeError):
                    study.set_user_attr("bad", {1, 2})
        assert storage.wait_until_available(10.0)
    with pytest.raises(KeyError):
        storage.get_all_trials(10**6)
    with pytest.raises(KeyError):
        storage.set_study_user_attr(10**6, "note", 1)
    with pytest.raises(DuplicatedStudyError):
        storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "s")
    assert storage.is_available


def test_a_rejection_ends_an_outage(log: pytest.LogCaptureFixture) -> None:
    breaker, errors = CircuitBreaker(), [OSError("away"), KeyError("no such study")]

    def question() -> None:
        raise errors.pop(0)

    with pytest.raises(StorageUnavailable):
        breaker.call(question)
    breaker._retry_at = -math.inf
    with pytest.raises(KeyError):
        breaker.call(question)
    assert breaker.is_available


def test_a_pending_attribute_of_a_deleted_study_is_discarded(
    place: Place, log: pytest.LogCaptureFixture
) -> None:
    study = place.worker()
    study.get_trials()
    with place.away():
        study.set_user_attr("note", 1)
    optuna.delete_study(storage=place.open(), study_name="s")
    assert deferred(study).wait_until_available(10.0)
    assert "Discarded the attribute 'note' of a study" in log.text


def test_passwords_in_errors_of_drivers_are_hidden(log: pytest.LogCaptureFixture) -> None:
    def question() -> None:
        raise OSError("FATAL: no user with password hunter2 at host\nDETAIL: hunter2")

    with pytest.raises(StorageUnavailable) as caught:
        CircuitBreaker(SECRET).call(question)
    assert "hunter2" not in str(caught.value) + log.text
    assert outage_reason(OSError()) == "OSError"
