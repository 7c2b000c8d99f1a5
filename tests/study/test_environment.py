"""The environment of a trial is recorded once, without personal data."""

from __future__ import annotations

import json
from pathlib import Path
import pickle

import optuna
from optuna.storages import InMemoryStorage
import pytest
import torch

from optuna_nnhp.engine import mlp
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.study import environment
from optuna_nnhp.study.environment import ENVIRONMENT
from optuna_nnhp.study.environment import describe_environment
from optuna_nnhp.study.environment import differences
from optuna_nnhp.study.environment import environment_key
from optuna_nnhp.study.environment import record_earlier_environment
from optuna_nnhp.study.environment import record_environment
from optuna_nnhp.study.environment import trial_environments
from optuna_nnhp.study.open_study import open_study
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import GPTTemplate
from tests.templates.test_custom_network import make_problem as own_problem
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import trials
from tests.tiny import tune

NAMES = {
    *("optuna_nnhp", "torch", "numpy", "optuna", "python"),
    *("system", "cpu", "instructions", "device", "threads", "engine"),
}


def problem() -> DNNTemplate:
    X, y = classes()
    return DNNTemplate(X, y, fixed=TINY, device="cpu")


def recorded_environments(study: optuna.Study) -> dict[str, object]:
    """Return the environments that a study has recorded, by key."""
    start = f"{ENVIRONMENT}:"
    return {
        name.removeprefix(start): value
        for name, value in study.user_attrs.items()
        if name.startswith(start)
    }


def test_an_environment_has_the_listed_fields_and_no_others() -> None:
    found = describe_environment(problem())
    assert found.keys() == NAMES  # no host, no user, no path
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"] and found["instructions"]
    assert json.loads(json.dumps(found)) == found


def test_the_environment_names_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    if mlp.load_library() is not None:
        assert describe_environment(problem())["engine"] == "compiled"
        assert (
            describe_environment(GPTTemplate("to be or not " * 99, device="cpu"))["engine"]
            == "compiled"
        )
    assert describe_environment(own_problem())["engine"] == "torch"
    monkeypatch.setattr(mlp, "load_library", lambda: None)
    assert describe_environment(problem())["engine"] == "torch"
    compiling = own_problem()
    compiling.compile = True
    assert describe_environment(compiling)["engine"] == "torch.compile"


def test_every_trial_names_its_environment(tmp_path: Path) -> None:
    result = tune(n_trials=4, storage=tmp_path / "a.journal")
    tune(n_trials=5, storage=tmp_path / "a.journal")
    (key,) = recorded_environments(result.study)
    assert key == environment_key(describe_environment(problem()))
    assert [trial.user_attrs[ENVIRONMENT] for trial in trials(result)] == [key] * 5
    assert trial_environments(result.study, trials(result)[4]) == [describe_environment(problem())]


def test_trials_of_workers_with_different_threads_have_different_environments(
    tmp_path: Path,
) -> None:
    path, before = tmp_path / "a.journal", torch.get_num_threads()
    try:
        for threads, count in ((1, 2), (2, 4)):
            torch.set_num_threads(threads)
            result = tune(n_trials=count, storage=path)
    finally:
        torch.set_num_threads(before)
    assert len(recorded_environments(result.study)) == 2
    found = [trial_environments(result.study, trial) for trial in trials(result)]
    assert [place["threads"] for (place,) in found] == [1, 1, 2, 2]


def test_the_environment_is_looked_up_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = describe_environment(problem())
    monkeypatch.setattr(environment, "_cpu_model", lambda: 1 / 0)
    assert describe_environment(problem()) == first


def test_a_trial_that_moved_names_all_its_environments() -> None:
    study = optuna.create_study()
    for key in ("a", "b", "c"):
        study.set_user_attr(f"{ENVIRONMENT}:{key}", {"torch": key})
    trial = study.ask()
    for before, now in (("a", "b"), ("b", "b"), ("b", "c")):
        trial.set_user_attr(ENVIRONMENT, before)
        left = study.get_trials()[0]
        trial.set_user_attr(ENVIRONMENT, now)  # by the storage, with the takeover
        record_earlier_environment(trial, left)
    study.tell(trial, 1.0)
    found = [place["torch"] for place in trial_environments(study, study.best_trial)]
    assert found == ["c", "b", "a"]


def test_trials_with_an_unknown_environment_have_none() -> None:
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={ENVIRONMENT: "gone"}))
    assert trial_environments(study, study.best_trial) == []


def test_a_trial_records_its_seed_if_it_differs_from_the_studys() -> None:
    storage = BufferedStorage(InMemoryStorage(), trial_attrs={"worker": "me"})
    sampler, pruner = optuna.samplers.RandomSampler(), optuna.pruners.NopPruner()
    study = open_study(problem(), storage, "s", sampler, pruner)
    key = record_environment(study, problem())
    assert storage.trial_attrs == {"worker": "me", ENVIRONMENT: key}
    record_environment(study, problem().with_seed(3))
    assert storage.trial_attrs == {"worker": "me", ENVIRONMENT: key, "seed": 3}
    record_environment(study, problem())
    assert study.ask().user_attrs == {"worker": "me", ENVIRONMENT: key}


def test_a_storage_with_trial_attributes_can_be_pickled() -> None:
    storage = BufferedStorage(InMemoryStorage(), trial_attrs={"worker": "me"})
    assert pickle.loads(pickle.dumps(storage)).trial_attrs == {"worker": "me"}


def test_differences_between_environments_are_listed() -> None:
    then: dict[str, str | int] = {"torch": "1", "threads": 2, "old": "x"}
    now: dict[str, str | int] = {"torch": "2", "threads": 2, "new": "y"}
    assert differences(then, now) == [
        *("torch 1 then, 2 now", "new unknown then, y now", "old x then, unknown now")
    ]
    assert differences(now, now) == []


def test_a_users_own_buffered_storage_keeps_its_attributes() -> None:
    storage = BufferedStorage(InMemoryStorage(), trial_attrs={"seed": 7})
    study = optuna.create_study(storage=storage)
    record_environment(study, problem())
    assert study.ask().user_attrs == {"seed": 7}


def test_an_attribute_of_trials_that_is_missing_can_be_removed() -> None:
    storage = BufferedStorage(InMemoryStorage(), trial_attrs={"worker": "me"})
    storage.set_trial_attr("seed", None)
    assert storage.trial_attrs == {"worker": "me"}
