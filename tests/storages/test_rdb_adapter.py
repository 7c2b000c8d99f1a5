"""How a database is read: what others run is read in full only now and then."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
import pytest
from sqlalchemy import event

from optuna_nnhp.storages import rdb_adapter
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.rdb_adapter import RdbAdapter

NOON = datetime(2026, 1, 1, 12)
START = TrialChange(state=TrialState.RUNNING, started=NOON)


class Clock:
    """A clock that goes a second on with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def storage(tmp_path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{tmp_path / 's.db'}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rdb_adapter, "time", clock)
    return clock


def others(storage: RDBStorage, count: int) -> tuple[int, list[int]]:
    """A study whose trials others run."""
    study = optuna.create_study(storage=storage)
    return study._study_id, [study.ask()._trial_id for _ in range(count)]


def test_running_trials_of_others_are_read_again_after_the_interval(
    storage: RDBStorage, clock: Clock
) -> None:
    study, (first, second) = others(storage, 2)
    adapter = RdbAdapter(storage)
    assert [t._trial_id for t in adapter.read(study, set(), -1)] == [first, second]
    assert len(adapter.read(study, {first, second}, second)) == 2  # it took a second
    storage.set_trial_intermediate_value(first, 1, 0.5)
    assert adapter.read(study, {first, second}, second) == []
    clock.now += rdb_adapter.FULL_READ_INTERVAL
    again, _ = adapter.read(study, {first, second}, second)
    assert again.intermediate_values == {1: 0.5}


def test_the_first_reading_of_a_long_study_does_not_extend_the_interval(
    storage: RDBStorage, clock: Clock
) -> None:
    study, ids = others(storage, 3)
    adapter = RdbAdapter(storage)
    adapter.read(study, set(), -1)
    assert len(adapter.read(study, set(ids), ids[-1])) == 3


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING])
def test_trials_with_a_new_state_are_read_at_once(
    storage: RDBStorage, clock: Clock, state: TrialState
) -> None:
    study, (first, second) = others(storage, 2)
    adapter = RdbAdapter(storage)
    for _ in range(2):
        adapter.read(study, {first, second}, -1)
    storage.set_trial_state_values(second, state, [1.0])
    found = adapter.read(study, {first, second}, second)
    assert [(t._trial_id, t.state) for t in found] == [(second, state)]


def test_new_trials_are_read_at_once(storage: RDBStorage, clock: Clock) -> None:
    study, (first,) = others(storage, 1)
    adapter = RdbAdapter(storage)
    for _ in range(2):
        adapter.read(study, {first}, -1)
    new = storage.create_new_trial(study)
    assert [t._trial_id for t in adapter.read(study, {first}, first)] == [new]


def test_ended_trials_that_were_never_read_are_read(storage: RDBStorage, clock: Clock) -> None:
    study, (first, second) = others(storage, 2)
    adapter = RdbAdapter(storage)
    adapter.read(study, {first}, second)
    storage.set_trial_state_values(second, TrialState.FAIL)
    found = adapter.read(study, {first, second}, second)
    assert [(t._trial_id, t.state) for t in found] == [(second, TrialState.FAIL)]


def test_a_takeover_reads_the_values_of_the_last_owner(storage: RDBStorage, clock: Clock) -> None:
    study, (first,) = others(storage, 1)
    storage.set_trial_user_attr(first, "worker", "gone")
    adapter = RdbAdapter(storage)
    for _ in range(2):
        adapter.read(study, {first}, -1)
    storage.set_trial_intermediate_value(first, 1, 0.5)
    change = TrialChange(user_attrs={"worker": "me"})
    assert adapter.apply([Op(study, first, change, if_owner=("gone", "me"))]) == [Applied(first)]
    (found,) = adapter.read(study, {first}, first)
    assert found.intermediate_values == {1: 0.5} and found.user_attrs == {"worker": "me"}


def test_a_transaction_asks_the_database_once_for_all_trials(storage: RDBStorage) -> None:
    study = optuna.create_study(storage=storage)
    adapter, statements = RdbAdapter(storage), list[str]()
    event.listen(storage.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    start = TrialChange(state=TrialState.RUNNING, started=NOON, user_attrs={"worker": "me"})
    ops = [Op(study._study_id, None, start, limit=100) for _ in range(16)]
    created = adapter.apply(ops)
    assert [o.number for o in created if isinstance(o, Applied)] == list(range(16))
    # SQLite's lock, the study, its counts, trials, their ids, user attributes, tokens.
    assert len(statements) == 7
    ends = [
        Op(
            study._study_id,
            trial._trial_id,
            TrialChange(
                params={"x": (0.5, FloatDistribution(0, 1))},
                intermediate_values={1: 0.5},
                user_attrs={"cause": "finished"},
                state=TrialState.COMPLETE,
                values=[1.0],
                completed=NOON,
            ),
        )
        for trial in study.get_trials()
    ]
    statements.clear()
    assert all(isinstance(outcome, Applied) for outcome in adapter.apply(ends))
    # SQLite's lock, trials, five tables (tokens are system attributes), states.
    assert len(statements) == 8
    assert [t.value for t in study.get_trials()] == [1.0] * 16


def test_an_end_is_written_once_and_recognized_by_its_token(storage: RDBStorage) -> None:
    study, (first, second) = others(storage, 2)
    adapter = RdbAdapter(storage)
    change = TrialChange(state=TrialState.COMPLETE, values=[1.0], completed=NOON)
    op = Op(study, first, change)
    assert adapter.apply([op]) == [Applied(first)]
    assert adapter.apply([op]) == [Applied(first, is_repeated=True)]
    (same_values,) = adapter.apply([Op(study, first, change)])  # of another process
    assert isinstance(same_values, UpdateFinishedTrialError)
    no_trial, no_study = adapter.apply([Op(study, 10**6, change), Op(10**6, None, START)])
    assert isinstance(no_trial, KeyError) and isinstance(no_study, KeyError)
    # Operations on one trial follow each other: it waits, and is started again.
    waits = Op(study, second, TrialChange(state=TrialState.WAITING))
    starts = Op(study, second, START, if_state=(TrialState.WAITING,))
    assert adapter.apply([waits, starts]) == [Applied(second), Applied(second)]
    assert storage.get_trial(second).state == TrialState.RUNNING
