"""Studies are stored where `storage` says, and the same call continues them."""

from __future__ import annotations

from collections.abc import Callable
import itertools
import os
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
import pytest

from optuna_nnhp import Result
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.storages import lease
from optuna_nnhp.storages.open_storage import models_folder
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.study import tuner
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.weight_files import BestWeights
from tests.tiny import DIFFERENT_LENGTHS
from tests.tiny import ENVIRONMENT
from tests.tiny import SHAPE
from tests.tiny import TINY
from tests.tiny import causes
from tests.tiny import classes
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()


def journal() -> JournalStorage:
    return JournalStorage(JournalFileBackend("own.log"))


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets one element for every round that a cohort trains."""
    trained: list[int] = []
    original = Cohort.train_round

    def counted(cohort: Cohort, *args: Any) -> Any:
        trained.append(cohort.rounds_done[0])
        return original(cohort, *args)

    monkeypatch.setattr(Cohort, "train_round", counted)
    return trained


def stored_weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("trial-*.safetensors"))


@pytest.mark.parametrize(
    ("storage", "models"),
    [
        pytest.param(lambda: "optuna_nnhp.journal", "optuna_nnhp.models", id="default"),
        pytest.param(lambda: Path("sub") / "a.journal", "sub/a.models", id="path"),
        pytest.param(lambda: "sqlite:///study.db", "study.models", id="sqlite"),
        pytest.param(journal, "optuna_nnhp.models", id="own"),
    ],
)
def test_the_same_call_again_trains_nothing_and_returns_the_same_model(
    storage: Callable[[], Any], models: str, folder: Path, epochs: list[int]
) -> None:
    (folder / "sub").mkdir()
    first = tune(X, Y, storage=storage(), n_trials=5)
    assert [path.parent.parent for path in stored_weights(folder)] == [folder / models]
    predicted, trained, course = first.predict(X), len(epochs), learning_curves(first)

    again = tune(X, Y, storage=storage(), n_trials=5)
    assert again.best_trial.value == first.best_value
    assert again.best_params == first.best_params
    assert np.array_equal(again.predict(X), predicted)
    assert learning_curves(again) == course
    assert len(epochs) == trained

    more = tune(X, Y, storage=storage(), n_trials=8)
    assert len(trials(more)) == 8
    assert learning_curves(more)[:5] == course
    assert more.best_value <= again.best_value
    assert len(stored_weights(folder)) == 1  # only the best one's are kept


def test_missing_weights_are_retrained(
    folder: Path, epochs: list[int], log: pytest.LogCaptureFixture
) -> None:
    first = tune(X, Y, storage="s.journal", n_trials=6, cohort_size=3)
    predicted, best = first.predict(X), first.best_trial
    shutil.rmtree("s.models")
    trained = len(epochs)
    again = tune(X, Y, storage="s.journal", n_trials=6)
    np.testing.assert_allclose(again.predict(X), predicted, rtol=1e-4)
    assert len(epochs) - trained == best.user_attrs["best_epoch"]
    assert f"The weights of trial {best.number} are missing: retraining it." in log.text
    assert "this time" not in log.text
    again.predict(X)
    assert len(epochs) - trained == best.user_attrs["best_epoch"]  # kept from then on
    assert len(stored_weights(folder)) == 1


def test_lost_weights_are_trained_again_with_the_trials_own_seed(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"validation": numbers(50, seed=3), "storage": "s.journal"}
    settings["fixed"] = TINY | {"dropout": 0.5}
    first = tune(X, Y, **settings, seed=1)
    shutil.rmtree("s.models")
    other = tune(X, Y, **settings, seed=2)
    assert "began with the seed 1 and continues with 2" in log.text
    _ = other.model
    assert (
        f"The weights of trial {first.best_trial.number} are missing: retraining it." in log.text
    )
    assert "reached" not in log.text  # a trial is trained again with the seed it had


def test_a_study_in_memory_writes_no_file(folder: Path) -> None:
    result = tune(X, Y, storage=None)
    assert result.predict(X).shape == (80,)
    assert list(folder.iterdir()) == []


def test_studies_of_one_name_in_two_storages_have_separate_weights(folder: Path) -> None:
    tables = [numbers(seed=seed)[0] for seed in (0, 1)]
    stores = [JournalStorage(JournalFileBackend(f"{name}.log")) for name in "ab"]
    results = [
        tune(table, Y, storage=store, study_name="../same", n_trials=1)
        for table, store in zip(tables, stores, strict=True)
    ]
    assert len(stored_weights(folder / "optuna_nnhp.models")) == 2
    for result, table, store in zip(results, tables, stores, strict=True):
        again = tune(table, Y, storage=store, study_name="../same", n_trials=1)
        assert np.array_equal(again.predict(X), result.predict(X))
    assert not np.array_equal(results[0].predict(X), results[1].predict(X))


def test_other_data_make_another_study_in_the_same_file(folder: Path) -> None:
    one, two = tune(X, Y, storage="s.journal"), tune(X, Y + 1000, storage="s.journal")
    three = tune(*classes(), storage="s.journal")
    assert len({r.study.study_name for r in (one, two, three)}) == 3
    assert [len(trials(r)) for r in (one, two, three)] == [3, 3, 3]
    assert len(stored_weights(folder)) == 3


@pytest.mark.parametrize("method", ["bayes", "random", "quasi-random"])
def test_a_continued_study_does_not_repeat_its_parameters(method: str) -> None:
    def run(storage: optuna.storages.BaseStorage, n_trials: int) -> Result:
        return tune(X, Y, storage=storage, n_trials=n_trials, method=method)

    storages = [optuna.storages.InMemoryStorage() for _ in range(2)]
    results = [run(storage, n_trials) for n_trials in (4, 8) for storage in storages]
    assert len({t.params["learning_rate"] for t in trials(results[3])}) == 8
    assert learning_curves(results[2]) == learning_curves(results[3])  # and is the same each time


def test_optuna_can_load_the_study(folder: Path) -> None:
    result = tune(X, Y, storage="sqlite:///s.db", study_name="homes")
    study = optuna.load_study(study_name="homes", storage="sqlite:///s.db")
    assert study.best_params == result.best_params
    assert study.best_value == result.best_value
    assert {"template", "task", "metric", "data", "budget"} <= study.user_attrs.keys()


def test_an_enqueued_trial_is_trained(folder: Path) -> None:
    result = tune(X, Y, storage="s.journal", n_trials=2)
    result.study.enqueue_trial({"learning_rate": 0.0123})
    assert trials(tune(X, Y, storage="s.journal", n_trials=3))[2].params["learning_rate"] == 0.0123


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fixed": TINY | {"epochs": 5}},
            r"another value of `epochs`: 4, but this one has 5; choose another `study_name`\.",
        ),
        ({"fixed": SHAPE | {"iterations": 10}}, "another value of `epochs`: 4, but this .* 50"),
        (
            {"fixed": TINY | {"dropout": 0.1}},
            r"another range of `dropout`: FloatDistribution\(.*\), but this one has 0\.1;",
        ),
        (
            {"space": {"dropout": FloatDistribution(0.0, 0.5)}},
            r"another range of `dropout`: FloatDistribution\(high=0\.6, .*FloatDistribution",
        ),
        (
            {"space": {"width": FloatDistribution(0.0, 0.5)}, "fixed": {}},
            "`width` must be",
        ),
        ({"metric": "mae"}, "another metric: 'rmse', but this one has 'mae'"),
        ({"y": Y + 1.0}, "another fingerprint: "),
        ({"y": np.where(Y > 1000, "a", "b")}, "another task: 'regression', but .* 'binary'"),
        ({"seed": 1}, "another fingerprint: "),  # which rows validate follows from the seed
    ],
)
def test_a_study_name_of_another_problem_is_rejected(
    settings: dict[str, Any], message: str, folder: Path
) -> None:
    before = learning_curves(tune(X, Y, storage="s.journal", study_name="s"))
    with pytest.raises(ValueError, match=message) as error:
        tune(X, **({"y": Y, "storage": "s.journal", "study_name": "s"} | settings))
    assert "\n" not in str(error.value)
    assert learning_curves(tune(X, Y, storage="s.journal", study_name="s")) == before


def test_a_study_that_optuna_nnhp_did_not_make_is_rejected(folder: Path) -> None:
    study = optuna.create_study(study_name="s", storage="sqlite:///s.db")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match="its trials are not optuna_nnhp's; choose another"):
        tune(X, Y, storage="sqlite:///s.db", study_name="s")


def test_a_study_of_another_template_is_rejected(folder: Path) -> None:
    result = tune(X, Y, storage="s.journal", study_name="s")
    result.study.set_user_attr("template", "gpt")
    with pytest.raises(ValueError, match="another template: 'gpt', but this one has 'dnn'"):
        tune(X, Y, storage="s.journal", study_name="s")


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_an_empty_study_of_another_direction_is_rejected(
    folder: Path, directions: list[str]
) -> None:
    optuna.create_study(study_name="s", storage=open_storage("s.journal"), directions=directions)
    with pytest.raises(ValueError, match="another direction: m"):
        tune(X, Y, storage="s.journal", study_name="s", n_trials=1)


def test_a_study_of_another_direction_is_rejected(folder: Path) -> None:
    def own(y_true: Any, y_pred: Any) -> float:
        return 0.0

    tune(X, Y, storage="s.journal", study_name="s", metric=own, n_trials=1)
    with pytest.raises(ValueError, match="another direction: maximize; choose"):
        tune(X, Y, storage="s.journal", study_name="s", metric=own, direction="minimize")


KILLED = """
import os, signal
from optuna.distributions import IntDistribution
from tests.tiny import TINY, numbers, tune

def kill(study, trial):
    os.kill(os.getpid(), signal.SIGKILL)

tune(*numbers(), storage="s.journal", n_trials=8, cohort_size=4, callbacks=[kill],
     method="random", space={"epochs": IntDistribution(1, 9)},
     fixed={n: v for n, v in TINY.items() if n != "epochs"})
"""


def test_running_trials_of_a_killed_process_are_continued(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    # Killed after the first ends; trials of more epochs still run.
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env=ENVIRONMENT, check=False, timeout=100
    )
    assert done.returncode == -9
    storage = open_storage("s.journal")
    left = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    assert len(left) == 4
    running = {t.number for t in left if t.state == TrialState.RUNNING}
    finished = {t.number: t.value for t in left if t.state == TrialState.COMPLETE}
    assert running and finished
    assert running | finished.keys() == {0, 1, 2, 3}

    result = tune(X, Y, storage="s.journal", n_trials=8, **DIFFERENT_LENGTHS)
    assert f"has left: {', '.join(map(str, sorted(running)))}." in log.text
    assert {n: trials(result)[n].value for n in finished} == finished
    assert states(result) == [TrialState.COMPLETE] * 8
    assert result.best_value == min(t.value for t in trials(result) if t.value is not None)


@pytest.mark.parametrize("kind", ["dead", "alive", "of another program"])
def test_only_trials_of_dead_workers_are_taken_over(kind: str) -> None:
    worker = "" if kind == "of another program" else lease.new_worker_name()
    result = tune(X, Y, n_trials=1)
    trial = result.study.ask()
    trial.set_user_attr(WORKER, worker)
    if worker:
        assert lease.lock_worker(worker)
    if kind == "dead":  # the kernel closes the file of a process that ends
        os.close(lease._locked.pop((os.getpid(), worker)))
    again = tune(X, Y, storage=result.study._storage, n_trials=1)
    if kind == "alive":
        lease.unlock_worker(worker)
    expected = TrialState.COMPLETE if kind == "dead" else TrialState.RUNNING
    assert states(again) == [TrialState.COMPLETE, expected]


def test_a_trial_of_a_worker_without_a_lease_is_taken_over_after_the_duration_of_a_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = tune(X, Y, n_trials=1)
    result.study.ask().set_user_attr(WORKER, "another-machine:17:0123abcd")
    storage = result.study._storage

    early = tune(X, Y, storage=storage, n_trials=1, timeout=0.1)
    assert states(early) == [TrialState.COMPLETE, TrialState.RUNNING]

    monkeypatch.setattr(tuner, "POLL_INTERVAL", 0)
    monkeypatch.setattr(lease, "_now", itertools.count(1e6).__next__)  # a second for each look
    late = tune(X, Y, storage=storage, n_trials=1)
    assert states(late) == [TrialState.COMPLETE] * 2
    assert lease._now() > 1e6 + lease.LEASE_DURATION


WORKER_SCRIPT = """
import os, pathlib, time
from tests.tiny import numbers, tune

pathlib.Path(f"ready-{os.getpid()}").touch()
while len(list(pathlib.Path().glob("ready-*"))) < 2:
    time.sleep(0.001)
slow = [lambda study, trial: time.sleep(0.1)]
tune(*numbers(), storage="s.journal", n_trials=12, callbacks=slow)
"""


def test_two_processes_share_a_study(folder: Path) -> None:
    command = [sys.executable, "-c", WORKER_SCRIPT]
    workers = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(2)]
    assert [worker.wait(100) for worker in workers] == [0, 0]
    result = tune(X, Y, storage="s.journal", n_trials=1)
    assert len(trials(result)) == 12  # together
    assert set(causes(result)) <= {"finished", "diverged"}
    assert len({t.user_attrs[WORKER] for t in trials(result)}) == 2
    complete = [t for t in trials(result) if t.state == TrialState.COMPLETE]
    assert result.best_value == min(t.value for t in complete if t.value is not None)
    assert result.predict(X).shape == (80,)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("none/s.journal", "none/s.journal cannot: .*No such file"),
        (".", r"\. cannot: it is a folder"),
        ("table.csv", r"table\.csv cannot: "),
        ("sqlite:///none/s.db", "sqlite:///none/s.db cannot: .*unable to open"),
        ("foo://s", "foo://s cannot: "),
        ("postgresql://me:secret@localhost:1/s", r"postgresql://me:\*\*\*@localhost:1/s cannot: "),
    ],
)
def test_storages_that_cannot_be_written_are_rejected(
    storage: str, message: str, folder: Path
) -> None:
    (folder / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=message) as error:
        tune(X, Y, storage=storage)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert (folder / "table.csv").read_text() == "a,b\n1,2\n"
    assert [p.name for p in folder.iterdir()] == ["table.csv"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("postgresql://me@host/s", "postgresql://me@host/s"),
        ("mysql+pymysql://me:a:b!@host:3306/s", "mysql+pymysql://me:***@host:3306/s"),
        ("cannot reach postgresql://u:p@h/d now", "cannot reach postgresql://u:***@h/d now"),
    ],
)
def test_passwords_are_hidden(text: str, expected: str) -> None:
    assert hide_passwords(text) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.journal", "a.models"),
        ("sqlite:///x/y.db", "x/y.models"),
        ("sqlite:////tmp/y.db", "/tmp/y.models"),
        ("sqlite:///y.db?timeout=9", "y.models"),
    ],
)
def test_models_are_stored_beside_the_storage(given: str, expected: str, folder: Path) -> None:
    (folder / "x").mkdir()
    if given.startswith("sqlite:////"):
        storage: Any = object.__new__(optuna.storages.RDBStorage)
        storage.url = given  # without making the file
    else:
        storage = open_storage(given)
    assert models_folder(storage, given) == Path(expected)


@pytest.mark.parametrize("given", [None, "sqlite://", "sqlite:///:memory:"])
def test_a_study_in_memory_has_no_folder_of_weights(given: str | None) -> None:
    assert models_folder(open_storage(given), given) is None


def test_a_study_in_a_storage_object_in_memory_can_be_continued(folder: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    first, again = tune(X, Y, storage=storage), tune(X, Y, storage=storage)
    assert learning_curves(first) == learning_curves(again)
    np.testing.assert_allclose(first.predict(X), again.predict(X), rtol=1e-4)
    assert list(folder.iterdir()) == []


def test_a_full_disk_loses_no_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(BestWeights, "save", full)
        result = tune(storage="s.journal", n_trials=3)
    assert all(t.state.is_finished() for t in trials(result))
    assert "could not be stored: [Errno 28] No space left on device" in log.text
    assert result.predictor.best_value == result.best_value  # trained again
