"""How a database is read: what others run is read in full only now and then."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
import pytest

from optuna_nnhp.storages import rdb_adapter
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.rdb_adapter import RdbAdapter


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


def test_what_others_run_is_read_again_only_after_a_while(
    storage: RDBStorage, clock: Clock
) -> None:
    study, (first, second) = others(storage, 2)
    writer = RdbAdapter(storage)
    assert [t._trial_id for t in writer.read(study, set(), -1)] == [first, second]
    assert len(writer.read(study, {first, second}, second)) == 2  # it took a second
    storage.set_trial_intermediate_value(first, 1, 0.5)
    assert writer.read(study, {first, second}, second) == []
    clock.now += rdb_adapter.SELDOM
    again, _ = writer.read(study, {first, second}, second)
    assert again.intermediate_values == {1: 0.5}


def test_the_first_reading_of_a_long_study_does_not_count(
    storage: RDBStorage, clock: Clock
) -> None:
    study, ids = others(storage, 3)
    writer = RdbAdapter(storage)
    writer.read(study, set(), -1)
    assert len(writer.read(study, set(ids), ids[-1])) == 3


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING])
def test_what_has_changed_its_state_is_read_at_once(
    storage: RDBStorage, clock: Clock, state: TrialState
) -> None:
    study, (first, second) = others(storage, 2)
    writer = RdbAdapter(storage)
    for _ in range(2):
        writer.read(study, {first, second}, -1)
    storage.set_trial_state_values(second, state, [1.0])
    found = writer.read(study, {first, second}, second)
    assert [(t._trial_id, t.state) for t in found] == [(second, state)]


def test_new_trials_are_read_at_once(storage: RDBStorage, clock: Clock) -> None:
    study, (first,) = others(storage, 1)
    writer = RdbAdapter(storage)
    for _ in range(2):
        writer.read(study, {first}, -1)
    new = storage.create_new_trial(study)
    assert [t._trial_id for t in writer.read(study, {first}, first)] == [new]


def test_what_has_ended_meanwhile_and_was_never_read_is_read(
    storage: RDBStorage, clock: Clock
) -> None:
    study, (first, second) = others(storage, 2)
    writer = RdbAdapter(storage)
    writer.read(study, {first}, second)
    storage.set_trial_state_values(second, TrialState.FAIL)
    found = writer.read(study, {first, second}, second)
    assert [(t._trial_id, t.state) for t in found] == [(second, TrialState.FAIL)]


def test_who_takes_a_trial_over_reads_what_its_last_owner_wrote(
    storage: RDBStorage, clock: Clock
) -> None:
    study, (first,) = others(storage, 1)
    storage.set_trial_user_attr(first, "worker", "gone")
    writer = RdbAdapter(storage)
    for _ in range(2):
        writer.read(study, {first}, -1)
    storage.set_trial_intermediate_value(first, 1, 0.5)
    batch = Batch(study_id=study, takes={first: "gone"}, mark={"worker": "me"})
    assert writer.write(batch).taken == [first]
    (found,) = writer.read(study, {first}, first)
    assert found.intermediate_values == {1: 0.5} and found.user_attrs == {"worker": "me"}
