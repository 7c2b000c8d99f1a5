"""The write-behind storage: Optuna's whole contract, and what it promises besides."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
import copy
from dataclasses import dataclass
from dataclasses import field
import functools
from pathlib import Path
import pickle
import shutil
import sqlite3
import tempfile
import time
from typing import Any

import optuna
from optuna import Study
from optuna import create_study
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest
from sqlalchemy import Connection

from optuna_nnhp.storages import journal_file
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.write_buffer import without_token

KINDS = ("memory", "journal", "sqlite")


def opened(kind: str, folder: Path) -> BaseStorage:
    """A storage of its own, on the same data if there is any."""
    if kind == "memory":
        return InMemoryStorage()
    if kind == "journal":
        return JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    path = folder / "study.db"
    if not path.exists():
        shutil.copy(empty_database(), path)
    return optuna.storages.get_storage(f"sqlite:///{path}")


@functools.cache
def empty_database() -> Path:
    """A database with Optuna's tables: to make them takes half a second."""
    path = Path(tempfile.mkdtemp()) / "empty.db"
    atexit.register(shutil.rmtree, path.parent)
    RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BufferedStorage:
    return BufferedStorage(opened(request.param, tmp_path))


class TestContract(StorageTestCase):
    """Optuna's own tests of a storage."""


SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "layers": IntDistribution(1, 8),
    "loss": CategoricalDistribution(("mse", "mae")),
}


@dataclass
class Data:
    """One kind of storage, opened as often as there are processes."""

    kind: str
    folder: Path
    memory: InMemoryStorage = field(default_factory=InMemoryStorage)
    url: str = ""

    def open(self) -> BaseStorage:
        if self.url:
            return optuna.storages.get_storage(self.url)
        return self.memory if self.kind == "memory" else opened(self.kind, self.folder)

    def worker(self, flush_every: float = 100.0, **options: Any) -> Study:
        storage = BufferedStorage(self.open(), flush_every, **options)
        sampler = RandomSampler(seed=0)
        return create_study(storage=storage, study_name="s", sampler=sampler, load_if_exists=True)

    def trials(self) -> list[FrozenTrial]:
        """Return what any other process reads, without the tokens of operations."""
        study = optuna.load_study(storage=self.open(), study_name="s")
        return [without_token(trial) for trial in study.get_trials()]

    def states(self) -> str:
        return "".join(trial.state.name[0] for trial in self.trials())


@pytest.fixture(params=KINDS)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    return Data(request.param, tmp_path)


def deferred(study: Study) -> BufferedStorage:
    assert isinstance(study._storage, BufferedStorage)
    return study._storage


@pytest.fixture
def writings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A text for every append to a journal and every commit of a database."""
    counted: list[str] = []
    append_lines = journal_file.append_lines
    monkeypatch.setattr(
        journal_file,
        "append_lines",
        lambda path, lines: (counted.append("append"), append_lines(path, lines))[1],
    )
    commit = Connection._commit_impl

    def committed(self: Connection) -> None:
        driver = self.connection.driver_connection
        if isinstance(driver, sqlite3.Connection) and driver.in_transaction:  # not only read
            counted.append("commit")
        commit(self)

    monkeypatch.setattr(Connection, "_commit_impl", committed)
    return counted


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_cohort_is_written_once_at_its_start_and_once_a_round(
    kind: str, tmp_path: Path, writings: list[str]
) -> None:
    data = Data(kind, tmp_path)
    study = data.worker(trial_attrs={"worker": "here"})
    study.get_trials()
    writings.clear()
    with deferred(study).prefetch_trials(20):
        trials = [study.ask(SPACE) for _ in range(20)]
    assert len(writings) == 1
    for step in range(3):
        for trial in trials:
            trial.report(0.5, step)
            trial.set_user_attr("cause", "finished")
    assert len(writings) == 1
    with deferred(study).batch():
        for trial in trials[:15]:
            study.tell(trial, 1.0)
        assert len(writings) == 1
    assert len(writings) == 2
    with deferred(study).batch(), deferred(study).prefetch_trials(15):
        study.tell(trials[15], 1.0)
        trials += [study.ask(SPACE) for _ in range(15)]
    assert len(writings) == 3
    writings.clear()
    assert data.states() == "C" * 16 + "R" * 19
    assert all(trial.params.keys() == SPACE.keys() for trial in data.trials()[:20])
    assert {trial.user_attrs["worker"] for trial in data.trials()} == {"here"}


def test_an_end_is_durable_when_tell_returns(data: Data) -> None:
    study = data.worker()
    trial, other = study.ask(SPACE), study.ask(SPACE)
    trial.report(0.5, 1)
    trial.set_user_attr("losses", [1.0, 0.5])
    study.tell(trial, 0.25)
    assert data.states() == "CR"
    read = data.trials()[0]
    assert (read.params, read.intermediate_values, read.value) == (trial.params, {1: 0.5}, 0.25)
    assert read.user_attrs == {"losses": [1.0, 0.5]}
    if data.kind != "memory":  # it takes its own times
        assert read == study.get_trials()[0]
    with deferred(study).batch(), deferred(study).batch():
        study.tell(other, 0.5)
        assert study.trials[1].state == TrialState.COMPLETE
        assert data.states() == "CR"
    assert data.states() == "CC"


def test_an_error_in_a_batch_does_not_lose_ends(data: Data) -> None:
    study = data.worker()
    trial = study.ask(SPACE)
    with pytest.raises(RuntimeError, match="stop"), deferred(study).batch():
        study.tell(trial, 0.5)
        raise RuntimeError("stop")
    assert data.states() == "C"


def test_changes_are_written_when_they_reach_the_maximum_age(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    study, reader = data.worker(2.0), data.worker(2.0)
    trial = study.ask(SPACE)
    assert len(reader.get_trials()) == 1
    busy = reader.ask()
    trial.report(0.5, 1)
    deferred(study).flush_if_due()
    assert data.trials()[0].intermediate_values == {}
    clock += 2.1
    deferred(study).flush_if_due()
    assert data.trials()[0].intermediate_values == {1: 0.5}
    assert reader.get_trials()[0].intermediate_values == {1: 0.5}
    trial.report(0.25, 2)
    clock += 2.1
    study.get_trials()  # any call will do
    assert data.trials()[0].intermediate_values == {1: 0.5, 2: 0.25}
    assert len(reader.get_trials()) == 2
    study.ask()
    assert len(reader.get_trials()) == 2
    deferred(reader).refresh()
    assert len(reader.get_trials()) == 3
    study.ask()
    assert len(reader.get_trials()) == 3
    reader.tell(busy, 1.0)
    assert len(reader.get_trials()) == 4  # nothing runs there that would make it hurry


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_workers_never_share_a_number_or_an_enqueued_trial(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgresql").url if kind == "postgresql" else ""
    data = Data(kind, tmp_path, url=url)
    first = data.worker()
    for layers in range(1, 9):
        first.enqueue_trial({"layers": layers})
    workers = [data.worker() for _ in range(3)]

    def ask(study: Study) -> list[tuple[int, int]]:
        asked = []
        for _ in range(3):
            with deferred(study).prefetch_trials(5):
                trials = [study.ask(SPACE) for _ in range(4)]
            with deferred(study).batch():
                for trial in trials:
                    study.tell(trial, 1.0)
            asked += [(trial.number, trial.params["layers"]) for trial in trials]
        return asked

    with ThreadPoolExecutor(3) as pool:
        asked = [pair for pairs in pool.map(ask, workers) for pair in pairs]
    numbers = [number for number, _ in asked]
    assert len(set(numbers)) == 36
    assert set(range(8)) <= set(numbers)
    assert all(layers == number + 1 for number, layers in asked if number < 8)
    trials = data.trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.value == 1.0 for trial in trials if trial.number in numbers)
    rest = {trial.state for trial in trials if trial.number not in numbers}
    assert rest <= {TrialState.WAITING}
    for study in workers:
        deferred(study).refresh()
        assert study.get_trials() == trials


def test_unused_prefetched_trials_are_waiting_afterwards(data: Data) -> None:
    study = data.worker(trial_attrs={"worker": "here"})
    study.enqueue_trial({"layers": 3})
    study.enqueue_trial({"layers": 5})
    with pytest.raises(RuntimeError, match="stop"), deferred(study).prefetch_trials(4):
        assert study.ask(SPACE).params["layers"] == 3
        assert data.states() == "RR"
        assert [t.state.name for t in study.trials] == ["RUNNING", "WAITING"]
        raise RuntimeError("stop")
    assert data.states() == "RW"
    with deferred(study).prefetch_trials(4):
        assert [study.ask(SPACE).number for _ in range(2)] == [1, 2]
        assert data.states() == "RRRRR"
        assert len(study.trials) == 3  # what nobody has asked for does not exist here
    assert data.states() == "RRRWW"
    waiting = data.trials()[3]
    assert waiting.user_attrs == {"worker": None}
    other = data.worker(trial_attrs={"worker": "there"})
    trial = other.ask(SPACE)
    assert (trial.number, set(trial.params)) == (3, set(SPACE))
    deferred(other).flush()
    assert data.trials()[3].user_attrs == {"worker": "there"}
    assert data.states() == "RRRRW"


def test_negative_arguments_raise_value_error() -> None:
    storage = BufferedStorage(InMemoryStorage())
    with pytest.raises(ValueError, match="`n_trials` must be at least 0, but got -1"):
        storage.prefetch_trials(-1).__enter__()
    with pytest.raises(ValueError, match="`flush_every` must be at least 0 seconds, but got -1"):
        BufferedStorage(InMemoryStorage(), -1)


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
def test_changes_of_a_failed_write_are_written_by_the_next_one(
    data: Data, is_late: bool, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    study = data.worker()
    with deferred(study).prefetch_trials(2):
        trial, other = study.ask(SPACE), study.ask(SPACE)
    other.report(0.5, 1)
    adapter = deferred(study)._buffer.adapter
    original = adapter.apply

    def broken(ops: Sequence[Operation]) -> list[Outcome]:
        if is_late:  # written, but the answer is lost
            original(ops)
        raise StorageInternalError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "apply", broken)
        study.tell(trial, 0.5)
        assert not deferred(study).is_available
        deferred(study).flush()
        assert study.trials[0].value == 0.5
    assert data.states() == ("CR" if is_late else "RR")
    assert deferred(study).wait_until_available(5.0)
    assert data.states() == "CR"
    assert data.trials()[0].value == 0.5
    assert data.trials()[1].intermediate_values == {1: 0.5}
    assert "Discarded" not in log.text
    assert log.text.count("The storage is unavailable: the disk is full. Running trials") == 1
    assert log.text.count("The storage is available again after") == 1
    study.tell(other, 1.0)
    assert data.states() == "CC"


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_batch_is_written_completely_or_not_at_all(kind: str, tmp_path: Path) -> None:
    data = Data(kind, tmp_path)
    study = data.worker()
    with deferred(study).prefetch_trials(2):
        trials = [study.ask(SPACE) for _ in range(2)]
    deferred(study).flush()
    deferred(study)._buffer.change(trials[1]._trial_id).user_attrs["bad"] = {1, 2}
    with pytest.raises(TypeError), deferred(study).batch():
        for trial in trials:
            study.tell(trial, 1.0)
    assert data.states() == "RR"
    del deferred(study)._buffer.change(trials[1]._trial_id).user_attrs["bad"]
    deferred(study).flush()
    assert data.states() == "CC"


def test_a_trial_ended_by_another_process_is_not_changed(
    data: Data, log: pytest.LogCaptureFixture
) -> None:
    study = data.worker()
    with deferred(study).prefetch_trials(4):
        trials = [study.ask(SPACE) for _ in range(4)]
    other = optuna.load_study(storage=data.open(), study_name="s")
    other.tell(0, state=TrialState.FAIL)
    other.tell(1, state=TrialState.FAIL)
    trials[0].report(0.5, 1)
    with deferred(study).batch():
        study.tell(trials[1], 0.5)
        study.tell(trials[2], 0.5)
    assert "Discarded the changes to trial 1" in log.text
    study.get_trials()
    other.tell(3, state=TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        study.tell(trials[3], 0.5)
    assert data.states() == "FFCF"
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL", "COMPLETE", "FAIL"]
    assert data.trials()[0].intermediate_values == {}


def test_changes_to_trials_of_other_processes_are_written_at_once(data: Data) -> None:
    study, other = data.worker(), data.worker()
    trial = study.ask(SPACE)
    storage = deferred(other)
    storage.set_trial_user_attr(trial._trial_id, "note", "seen")
    storage.set_trial_system_attr(trial._trial_id, "artifacts:1", "there")
    storage.set_trial_intermediate_value(trial._trial_id, 7, 0.5)
    storage.set_trial_param(trial._trial_id, "more", 0.5, FloatDistribution(0, 1))
    deferred(study).flush()
    read = data.trials()[0]
    assert (read.user_attrs, read.intermediate_values) == ({"note": "seen"}, {7: 0.5})
    assert read.system_attrs == {"artifacts:1": "there"}
    assert read.params == {**trial.params, "more": 0.5}
    assert other.get_trials()[0].user_attrs == {"note": "seen"}
    assert storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    assert data.states() == "F"


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_attributes_are_returned_unchanged_and_must_be_json(kind: str, tmp_path: Path) -> None:
    data = Data(kind, tmp_path)
    study = data.worker()
    trial, losses = study.ask(), [1.0]
    trial.set_user_attr("losses", losses)
    trial.set_user_attr("pair", (1, 2))
    losses.append(0.5)
    for key in ("set_trial_user_attr", "set_trial_system_attr"):
        with pytest.raises(TypeError):
            getattr(deferred(study), key)(trial._trial_id, "bad", {1})
    assert study.get_trials()[0].user_attrs == {"losses": [1.0], "pair": [1, 2]}
    study.tell(trial, 1.0)
    assert data.trials()[0].user_attrs == {"losses": [1.0], "pair": [1, 2]}


def test_many_trials_are_added_at_once(tmp_path: Path, writings: list[str]) -> None:
    for kind in ("journal", "sqlite"):
        data = Data(kind, tmp_path)
        study = data.worker()
        study.get_trials()
        writings.clear()
        waiting = [
            create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": {"layers": n}})
            for n in range(1, 6)
        ]
        deferred(study).create_new_trials(study._study_id, waiting)
        assert len(writings) == 1
        assert data.states() == "WWWWW"
        writings.clear()
        with deferred(study).prefetch_trials(5):
            assert [study.ask(SPACE).params["layers"] for _ in range(5)] == [1, 2, 3, 4, 5]
        assert len(writings) == 1
        with pytest.raises(KeyError):
            deferred(study).create_new_trials(study._study_id + 1, waiting)


def test_a_finished_trial_is_added_as_it_is(data: Data) -> None:
    study = data.worker()
    values = {"params": {"layers": 3}, "distributions": {"layers": SPACE["layers"]}}
    study.add_trials([create_trial(value=1.0, **values), create_trial(value=2.0)])
    assert [t.value for t in study.trials] == [1.0, 2.0]
    assert study.ask(SPACE).number == 2
    assert study.best_params == {"layers": 3}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_pickled_storage_has_all_data_and_writes_nothing_twice(
    data: Data, again: Callable[[BufferedStorage], BufferedStorage]
) -> None:
    study = data.worker()
    trial = study.ask(SPACE)
    trial.report(0.5, 1)
    twin = again(deferred(study))
    assert twin.get_all_trials(study._study_id)[0].intermediate_values == {1: 0.5}
    twin.flush()
    twin.remove_session()
    study.tell(trial, 1.0)


def test_remove_session_writes_all_changes(data: Data) -> None:
    study = data.worker()
    study.ask(SPACE)
    assert data.trials()[0].params == {}
    deferred(study).remove_session()
    assert data.trials()[0].params.keys() == SPACE.keys()


def test_a_deleted_study_raises_key_error(data: Data) -> None:
    study, other = data.worker(), data.worker()
    trial = study.ask(SPACE)
    other.get_trials()
    optuna.delete_study(storage=deferred(other), study_name="s")
    with pytest.raises(KeyError):
        deferred(other).get_all_trials(study._study_id)
    with pytest.raises(KeyError):
        deferred(other).get_trial(trial._trial_id + 100)
    if data.kind == "sqlite":  # a journal's trials stay when their study goes
        with pytest.raises(KeyError):
            study.tell(trial, 1.0)


def test_samplers_propose_the_same_as_with_the_backend(data: Data) -> None:
    def proposals(storage: BaseStorage) -> list[dict[str, Any]]:
        study = create_study(storage=storage, sampler=TPESampler(seed=0))
        for _ in range(6):
            around = (
                storage.prefetch_trials(4)
                if isinstance(storage, BufferedStorage)
                else nullcontext()
            )
            with around:
                trials = [study.ask(SPACE) for _ in range(4)]
            for trial in trials:
                trial.report(1.0, 1)
                study.tell(trial, trial.params["rate"] + trial.params["layers"])
        return [trial.params for trial in study.get_trials()]

    assert proposals(BufferedStorage(data.open())) == proposals(InMemoryStorage())


def test_heartbeats_come_from_the_database(tmp_path: Path) -> None:
    database = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}", heartbeat_interval=60)
    storage = BufferedStorage(database)
    study = create_study(storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert is_heartbeat_enabled(storage)
    with pytest.warns(UserWarning, match="Heartbeat"):
        trial = study.ask()
    storage.record_heartbeat(trial._trial_id)
    assert storage._get_stale_trial_ids(study._study_id) == []
    assert storage.get_heartbeat_stale_trial_callback() is None
    plain = BufferedStorage(InMemoryStorage())
    assert not is_heartbeat_enabled(plain)
    plain.record_heartbeat(0)
    assert plain._get_stale_trial_ids(0) == []
    assert plain.get_heartbeat_stale_trial_callback() is None


def test_threads_of_one_study_can_share_a_storage(data: Data) -> None:
    study = data.worker()
    study.optimize(
        lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_int("n", 0, 5),
        n_trials=12,
        n_jobs=3,
    )
    assert data.states() == "C" * 12
    assert all(t.value == sum(t.params.values()) for t in data.trials())
