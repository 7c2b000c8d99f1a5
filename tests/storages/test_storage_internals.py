"""Each private part of Optuna that the storages use is as they expect it.

A test that fails here names the part that another version of Optuna has changed.
"""

from __future__ import annotations

from datetime import datetime
import json
import os
from pathlib import Path

import optuna
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.storages import _optuna_internals as internals


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.fixture
def journal(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


@pytest.fixture
def database(tmp_path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")


def trial() -> FrozenTrial:
    distribution = optuna.distributions.FloatDistribution(0, 1)
    return create_trial(
        params={"x": 0.5},
        distributions={"x": distribution},
        values=[1.0, 2.0],
        user_attrs={"a": 1},
        system_attrs={"b": 2},
        intermediate_values={1: 0.5},
    )


def test_frozen_trials_keep_their_fields_in_these_attributes() -> None:
    expected = trial()
    fields = set(vars(expected))
    assert {"_trial_id", "_number", "_params", "_distributions", "_user_attrs"} <= fields
    assert {"_system_attrs", "_values", "intermediate_values", "state"} <= fields
    assert expected.datetime_start is not None and expected.datetime_complete is not None
    for copy in (internals.copy_trial, internals.shallow_copy_trial):
        copied = copy(expected)
        assert copied == expected and vars(copied).keys() == fields
        copied._values, copied._number, copied._trial_id = [3.0, 4.0], 7, 8
        assert (copied.values, copied.number) == ([3.0, 4.0], 7)
        assert (expected.values, expected.number) == ([1.0, 2.0], -1)


def test_changes_to_a_copied_trial_do_not_reach_the_original() -> None:
    expected = trial()
    copied = internals.copy_trial(expected)
    for attribute in ("_params", "_distributions", "_user_attrs", "_system_attrs"):
        getattr(copied, attribute)["new"] = 1
    copied.intermediate_values[2] = 0.25
    assert copied.params["new"] == copied.user_attrs["new"] == copied.system_attrs["new"] == 1
    assert expected.params == {"x": 0.5}
    assert "new" not in expected.user_attrs and 2 not in expected.intermediate_values


def test_optunas_cache_holds_its_database_in_backend(tmp_path: Path) -> None:
    cached = optuna.storages.get_storage(f"sqlite:///{tmp_path / 'cached.db'}")
    assert isinstance(internals.without_cache(cached), RDBStorage)
    memory = InMemoryStorage()
    assert internals.without_cache(memory) is memory


def test_a_journal_storage_holds_its_file_path_and_lock(
    journal: JournalStorage, path: Path
) -> None:
    file = internals.journal_file(journal)
    assert file is not None
    assert internals.journal_path(file) == str(path)
    assert isinstance(internals.journal_lock(file), internals.BaseJournalFileLock)
    assert internals.journal_file(InMemoryStorage()) is None


def test_get_lock_file_acquires_and_releases(journal: JournalStorage, path: Path) -> None:
    file = internals.journal_file(journal)
    assert file is not None
    with internals.get_lock_file(internals.journal_lock(file)):
        assert os.path.lexists(f"{path}.lock")
    assert not os.path.lexists(f"{path}.lock")
    assert JournalFileSymlinkLock(str(path), 30).grace_period == 30


def test_journal_state_reads_trials_and_errors_of_own_entries(
    journal: JournalStorage, path: Path
) -> None:
    state = internals.JournalState(journal)
    study = optuna.create_study(storage=journal)
    first = study.ask()._trial_id
    with state.exclusive():
        assert journal._thread_lock.locked()
        assert state.sync() == {}
        assert list(state.trials) == [first]
        assert state.trials_of(study._study_id) == [state.trials[first]]
        assert state.trials_of(10**6) is None
        code = internals.JournalOperation.SET_TRIAL_USER_ATTR
        (entry,) = state.with_worker_id(
            [{"op_code": code, "trial_id": 10**6, "user_attr": {"a": 1}}]
        )
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        assert isinstance(state.sync()[10**6], KeyError)
        assert state.sync() == {}  # each entry is read once


def test_journal_entries_have_these_fields(journal: JournalStorage, path: Path) -> None:
    study = optuna.create_study(storage=journal)
    study.enqueue_trial({"x": 0.25})
    asked = study.ask()
    asked.suggest_float("x", 0, 1)
    asked.report(0.5, 1)
    asked.set_user_attr("a", 1)
    journal.set_trial_system_attr(asked._trial_id, "b", 2)
    study.set_user_attr("c", 3)
    journal.set_study_system_attr(study._study_id, "d", 4)
    study.tell(asked, 1.0)
    logs = [json.loads(line) for line in path.read_bytes().splitlines()]
    fields = {log["op_code"]: set(log) - {"op_code", "worker_id"} for log in logs}
    code = internals.JournalOperation
    assert fields[code.SET_TRIAL_PARAM] == {
        "trial_id",
        "param_name",
        "param_value_internal",
        "distribution",
    }
    assert fields[code.SET_TRIAL_INTERMEDIATE_VALUE] == {"trial_id", "step", "intermediate_value"}
    assert fields[code.SET_TRIAL_USER_ATTR] == {"trial_id", "user_attr"}
    assert fields[code.SET_TRIAL_SYSTEM_ATTR] == {"trial_id", "system_attr"}
    assert fields[code.SET_STUDY_USER_ATTR] == {"study_id", "user_attr"}
    assert fields[code.SET_STUDY_SYSTEM_ATTR] == {"study_id", "system_attr"}
    ends = {"trial_id", "state", "values", "datetime_complete"}
    assert fields[code.SET_TRIAL_STATE_VALUES] == ends
    assert {"study_id", "state", "user_attrs", "system_attrs"} <= fields[code.CREATE_TRIAL]


def test_the_tables_of_a_database_have_these_columns() -> None:
    tables = internals.load_tables()
    columns = {name: set(table.c.keys()) for name, table in vars(tables).items()}
    assert "study_id" in columns["studies"]
    trials = {"trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete"}
    assert columns["trials"] == trials
    for table, more in {
        "params": {"param_name", "param_value", "distribution_json"},
        "values": {"objective", "value", "value_type"},
        "intermediate_values": {"step", "intermediate_value", "intermediate_value_type"},
        "user_attrs": {"key", "value_json"},
        "system_attrs": {"key", "value_json"},
    }.items():
        assert {"trial_id", *more} <= columns[table], table
    for table in ("study_user_attrs", "study_system_attrs"):
        assert {"study_id", "key", "value_json"} <= columns[table], table


@pytest.mark.parametrize("value", [0.5, float("inf"), float("-inf")])
def test_a_database_keeps_infinite_values_as_kinds(value: float, database: RDBStorage) -> None:
    number, kind = internals.stored_value(value)
    assert (number == value) == (kind.name == "FINITE")
    assert internals.stored_intermediate_value(value)[1].name == kind.name
    assert internals.stored_intermediate_value(float("nan"))[1].name == "NAN"


def test_some_trials_of_a_database_are_read(database: RDBStorage) -> None:
    study = optuna.create_study(storage=database)
    ids = [study.ask()._trial_id for _ in range(4)]
    read = internals.read_trials(database, study._study_id, {ids[0]}, ids[2])
    assert [t._trial_id for t in read] == [ids[0], ids[3]]
    assert read[0].state == TrialState.RUNNING
    assert isinstance(read[0].datetime_start, datetime)


def test_a_database_knows_trials_whose_heartbeat_has_stopped(database: RDBStorage) -> None:
    assert isinstance(database, internals.BaseHeartbeat)
    study = optuna.create_study(storage=database)
    database.heartbeat_interval = 60
    assert internals.stale_trial_ids(database, study._study_id) == []


def test_studies_are_listed_as_frozen_studies(database: RDBStorage) -> None:
    study = optuna.create_study(storage=database)
    (frozen,) = database.get_all_studies()
    assert isinstance(frozen, internals.FrozenStudy)
    assert frozen._study_id == study._study_id
