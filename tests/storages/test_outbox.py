"""What could not be written is kept in a file, and the next run writes it."""

from __future__ import annotations

from datetime import datetime
import json
import math
from pathlib import Path

import optuna
from optuna import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp.storages import circuit_breaker
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.lease import lock_worker
from optuna_nnhp.storages.lease import unlock_worker
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.outbox import Outbox
from optuna_nnhp.storages.outbox import SavedOp
from optuna_nnhp.storages.outbox import read_outbox
from optuna_nnhp.storages.outbox import replay_outbox
from optuna_nnhp.storages.outbox import write_outbox
from tests.storages.test_buffered import SPACE
from tests.storages.test_outages import KINDS
from tests.storages.test_outages import Place
from tests.storages.test_outages import deferred


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE", 0.02)
    return Place(request.param, tmp_path, request)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """Where it is kept."""
    return tmp_path / "study.models"


NOON = datetime(2026, 1, 1, 12)
ODD = {"losses": [1.0, math.nan, -math.inf], "text": '"</script>\x00\u2028é', "none": None}


def give_up(place: Place, box: Path, worker: str = "host:17:ab") -> Path:
    """A run that ends while the storage is away."""
    study = place.worker(worker)
    storage = deferred(study)
    with storage.prefetch_trials(4):
        trials = [study.ask(SPACE) for _ in range(4)]
    storage.flush()
    with place.away():
        for step, value in enumerate([0.5, math.nan, math.inf]):
            trials[0].report(value, step)
        trials[0].set_user_attr("odd", ODD)
        study.tell(trials[0], 0.1)
        trials[1].report(0.25, 1)
        study.tell(trials[1], state=TrialState.PRUNED)
        trials[2].set_user_attr("cause", "interrupted")
        study.tell(trials[2], state=TrialState.FAIL)
        trials[3].report(-math.inf, 7)
        trials[3].suggest_float("more", 0.0, 1.0)
        study.set_user_attr("timing", {"seconds": math.inf})
        storage.set_study_system_attr(study._study_id, "note", [1])
        place.told = study.get_trials()  # type: ignore[attr-defined]
        path = storage.save_outbox(box)
    assert path is not None
    return path


def read(place: Place) -> tuple[Study, list[FrozenTrial]]:
    study = place.read()
    return study, study.get_trials()


def same(a: object, b: object) -> bool:
    """Equal, where no number equals no number."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def test_the_next_run_replays_the_outbox(
    place: Place, box: Path, log: pytest.LogCaptureFixture
) -> None:
    path = give_up(place, box)
    assert [p.name for p in box.iterdir()] == ["outbox-host_17_ab.json"] == [path.name]
    assert {t.state for t in read(place)[1]} == {TrialState.RUNNING}

    study = place.worker("other")
    assert replay_outbox(deferred(study), box) == 4
    assert list(box.iterdir()) == []
    told, (seen, trials) = place.told, read(place)  # type: ignore[attr-defined]
    assert same(seen.user_attrs, {"timing": {"seconds": math.inf}})
    assert seen._storage.get_study_system_attrs(seen._study_id)["note"] == [1]
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    for trial, expected in zip(trials, told, strict=True):
        assert (trial.number, trial.values) == (expected.number, expected.values)
        assert (trial.params, trial.distributions) == (expected.params, expected.distributions)
        assert same(trial.user_attrs, expected.user_attrs)
        assert same(trial.intermediate_values, expected.intermediate_values)
        if place.kind not in ("memory", "grpc"):  # they take their own times
            assert trial.datetime_complete == expected.datetime_complete
    assert same(trials[0].user_attrs["odd"], ODD)
    assert study.get_trials()[0].value == 0.1
    assert "Discarded" not in log.text
    assert replay_outbox(deferred(study), box) == 0
    # It is still the dead worker's, and can be taken over with all it has.
    assert deferred(study).take_over({trials[3]._trial_id: "host:17:ab"}) == [trials[3]._trial_id]
    assert study.get_trials()[3].intermediate_values == {7: -math.inf}


def test_a_trial_that_has_ended_is_not_changed_by_the_replay(
    place: Place, box: Path, log: pytest.LogCaptureFixture
) -> None:
    give_up(place, box)
    other = place.read()
    other.tell(0, 0.5)
    study = place.worker("other")
    third = study.get_trials()[3]._trial_id
    assert deferred(study).take_over({third: "host:17:ab"}) == [third]
    assert replay_outbox(deferred(study), box) == 2
    discarded = "Discarded the changes of worker host:17:ab to trial {}: The trial with the id"
    assert log.text.count(discarded.format(0)) == log.text.count("is already COMPLETE") == 1
    assert discarded.format(3) in log.text and "was taken over by other." in log.text
    trials = read(place)[1]
    assert (trials[0].value, trials[0].intermediate_values) == (0.5, {})
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert list(box.iterdir()) == []


def test_operations_that_were_written_are_not_repeated(
    place: Place, box: Path, log: pytest.LogCaptureFixture
) -> None:
    path = give_up(place, box)
    text = path.read_text(encoding="utf-8")
    study = place.worker("other")
    replay_outbox(deferred(study), box)
    path.write_text(text, encoding="utf-8")  # killed before the file was deleted
    assert replay_outbox(deferred(study), box) == 1  # the one that runs
    assert "Discarded" not in log.text


def test_the_outbox_is_deleted_if_its_changes_are_written(place: Place, box: Path) -> None:
    study = place.worker()
    storage = deferred(study)
    trial = study.ask(SPACE)
    storage.flush()
    assert storage.save_outbox(box) is None
    assert not box.exists()
    with place.away():
        study.tell(trial, 1.0)
        path = storage.save_outbox(box)
        assert storage.save_outbox(box) == path
        assert path is not None
    assert storage.wait_until_available(10.0)
    assert not path.exists()
    assert read(place)[1][0].value == 1.0


def test_a_file_of_a_worker_that_lives_is_not_replayed(place: Place, box: Path) -> None:
    path = give_up(place, box, "host:17:alive")
    other = deferred(place.worker("host:18:cd"))
    assert lock_worker("host:17:alive")
    try:
        assert replay_outbox(other, box) == 0
    finally:
        unlock_worker("host:17:alive")
    assert path.exists()
    assert replay_outbox(other, box) == 4


def test_the_outbox_is_kept_in_an_outage(place: Place, box: Path) -> None:
    path = give_up(place, box)
    study = place.worker("other")
    with place.away(), pytest.raises(StorageUnavailable):
        replay_outbox(deferred(study), box)
    assert path.exists()
    assert deferred(study).wait_until_available(10.0)
    assert replay_outbox(deferred(study), box) == 4


@pytest.fixture
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> BufferedStorage:
    """A study with two running trials of two workers."""
    place = Place("journal", tmp_path, request)
    for name in "ab":
        study = place.worker(name)
        study.ask(SPACE)
        deferred(study).flush()
    return deferred(place.worker("c"))


def saved(change: TrialChange, number: int = 0, study: str = "s") -> SavedOp:
    return SavedOp(study, Op(-1, -1, change), number)


def ended(value: float, study: str = "s") -> SavedOp:
    change = TrialChange(state=TrialState.COMPLETE, values=[value], completed=NOON)
    return saved(change, study=study)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"COMPLETE"', '"PRUNED"'),
        lambda text: text.replace('"version": 2', '"version": 3'),
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"content": 1, "checksum": 2}',
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_is_refused_and_stays(
    damage: object, storage: BufferedStorage, box: Path
) -> None:
    path = write_outbox(box, Outbox("a", [ended(1.0)]))
    assert callable(damage)
    text = damage(path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    failed = TrialChange(state=TrialState.FAIL, completed=NOON)
    write_outbox(box, Outbox("b", [saved(failed, 1)]))
    with pytest.raises(ValueError, match=r"outbox-a\.json must be a whole file of version 2, but"):
        replay_outbox(storage, box)
    assert [p.name for p in box.iterdir()] == ["outbox-a.json"]  # the other one is replayed
    assert [t.state.name for t in storage.get_all_trials(0)] == ["RUNNING", "FAIL"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("state", "DELETED"),
        ("params", {"x": 1}),
        ("intermediate_values", [["a", "b"]]),
        ("values", ["x"]),
        ("completed", "yesterday"),
        ("completed", None),
    ],
)
def test_an_invalid_file_with_the_right_checksum_is_refused(
    name: str, value: object, box: Path
) -> None:
    path = write_outbox(box, Outbox("a", [ended(1.0)]))
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["content"]["operations"][0][name] = value
    from optuna_nnhp.storages.outbox import _checksum

    whole["checksum"] = _checksum(whole["content"])
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match=r"outbox-a\.json"):
        read_outbox(path)


def test_an_outbox_of_another_storage_is_kept(storage: BufferedStorage, box: Path) -> None:
    path = write_outbox(box, Outbox("a", [ended(1.0), ended(2.0, "elsewhere")]))
    assert replay_outbox(storage, box) == 1
    assert path.exists()
    kept = read_outbox(path).ops[1]
    assert (kept.study, kept.op.change) == ("elsewhere", ended(2.0).op.change)
    assert [t.state.name for t in storage.get_all_trials(0)] == ["COMPLETE", "RUNNING"]
    assert replay_outbox(storage, box.parent / "nowhere") == 0


def test_a_warning_names_a_trial_that_does_not_exist(
    storage: BufferedStorage, box: Path, log: pytest.LogCaptureFixture
) -> None:
    write_outbox(box, Outbox("a", [saved(TrialChange(user_attrs={"x": 1}), 7)]))
    assert replay_outbox(storage, box) == 0
    assert "Discarded the changes of worker a to trial 7: No trial 7 exists" in log.text


def test_a_workers_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    worker = "../../x:\0" + "y" * 300
    path = write_outbox(tmp_path / "box", Outbox(worker, [ended(1.0)]))
    assert path.parent == tmp_path / "box"
    assert path.name.startswith("outbox-.._.._x_y")
    assert len(path.name) < 120
    assert read_outbox(path).worker == worker


def test_a_worker_without_name_can_save_and_replay_an_outbox(
    tmp_path: Path, request: pytest.FixtureRequest, box: Path
) -> None:
    place = Place("journal", tmp_path, request)
    study = optuna.create_study(storage=BufferedStorage(place.open()), study_name="s")
    trial = study.ask()
    with place.away():
        study.tell(trial, 1.0)
        assert deferred(study).save_outbox(box) is not None
    assert replay_outbox(deferred(place.worker("other")), box) == 1
    assert place.read().best_value == 1.0


def test_the_file_is_deleted_by_the_end_that_writes_its_operations(
    place: Place, box: Path
) -> None:
    study = place.worker("host:17:ab")
    trial = study.ask(SPACE)
    trial.report(0.5, 1)
    path = deferred(study).save_outbox(box)
    assert path is not None and path.exists()
    study.tell(trial, 0.1)
    study.get_trials()
    assert not path.exists()
