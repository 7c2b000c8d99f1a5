"""Test replays: stored weights and retraining reproduce the values of every trial."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
import pandas as pd
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import nn

import optuna_nnhp
from optuna_nnhp import Objective
from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp import replay
from optuna_nnhp.inspect.replay import EXAMPLE_TOLERANCE
from optuna_nnhp.inspect.replay import RELATIVE_TOLERANCE
from optuna_nnhp.inspect.replay import Replay
from optuna_nnhp.inspect.result import Result as ResultOf
from optuna_nnhp.study import environment
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import gpt
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.weight_files import BestWeights
from tests.templates.test_custom_network import TokenModel
from tests.templates.test_custom_network import convolutional
from tests.templates.test_custom_network import images
from tests.templates.test_custom_network import recurrent
from tests.templates.test_custom_network import token_model
from tests.templates.test_custom_network import tokens
from tests.templates.test_gpt import SMALL
from tests.templates.test_gpt import TEXT
from tests.tiny import DIFFERENT_LENGTHS
from tests.tiny import DIVERGING
from tests.tiny import SHAPE
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune

POPULATION: dict[str, Any] = {
    "method": "population",
    "method_options": {"size": 4, "generations": 4},
    "n_trials": 12,
}
GRADIENT: dict[str, Any] = {
    "method": "gradient",
    "method_options": {"starts": 2},
    "n_trials": 4,
}
TEXTS: dict[str, Any] = {"template": "gpt", "X": TEXT, "fixed": SMALL | {"iterations": 18}}
UNITS = {"units": CategoricalDistribution((4,))}


@pytest.fixture(autouse=True)
def short_generated_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "SAMPLE_TOKENS", 3)


def table_study(data: Callable[[], Any], **options: Any) -> dict[str, Any]:
    X, y = data()
    return {"X": X, "y": y, "n_trials": 6, "cohort_size": 3, **options}


# One study of each kind: the arguments of `optimize`.
STUDIES: dict[str, dict[str, Any]] = {
    "classes": table_study(classes, fixed=TINY, metric="log_loss"),
    "numbers": table_study(numbers, fixed={"epochs": 4}, method="random"),
    "one after the other": table_study(numbers, **DIFFERENT_LENGTHS),
    "pruned": table_study(numbers, fixed=SHAPE | {"epochs": 9}, n_trials=12, cohort_size=12),
    "diverged": table_study(numbers, fixed=DIVERGING, n_trials=2),
    "early stopping": table_study(numbers, fixed=SHAPE | {"epochs": 40, "patience": 1}),
    "rounds": table_study(lambda: numbers(30_000), fixed=TINY | {"batch_size": 256, "epochs": 2}),
    "steps": table_study(classes, fixed=SHAPE | {"iterations": 7}),
    "population": table_study(classes, fixed=SHAPE | {"epochs": 8}, cohort_size=None) | POPULATION,
    "gradient": table_study(numbers, fixed=SHAPE | {"epochs": 8}, cohort_size=None) | GRADIENT,
    "text": {**TEXTS, "n_trials": 4, "cohort_size": 2},
    "text, pruned": {**TEXTS, "n_trials": 5, "method": "random"},
    "text, population": {**TEXTS, **POPULATION, "n_trials": 4, "method_options": {"size": 2}},
    "convolutions": table_study(
        images, network=convolutional, space={"channels": CategoricalDistribution((4,))}
    )
    | {"fixed": {"epochs": 3}, "metric": "log_loss", "cohort_size": 1},
    "alone": table_study(tokens, network=recurrent, space={"rate": FloatDistribution(0.0, 0.5)})
    | {"fixed": {"epochs": 2}},
    "tied": table_study(
        tokens, network=token_model, space=UNITS, fixed={"epochs": 3}, cohort_size=1
    ),
}
SYNCHRONOUS = ("population", "gradient", "text, population")


def run_study(name: str, **more: Any) -> Result:
    options = {"storage": None, "device": "cpu", **STUDIES[name], **more}
    if name in SYNCHRONOUS:
        options.pop("cohort_size", None)
    return optimize(options.pop("template", "dnn"), options.pop("X"), **options)


def replay_trial(name: str, study: Any, number: int, **more: Any) -> Replay:
    """Replay a trial of one of `STUDIES`."""
    call = STUDIES[name]
    data = call["X"] if call.get("template") == "gpt" else (call["X"], call["y"])
    return replay(study, number, data, network=call.get("network"), **more)


def causes_of_study(name: str) -> set[str]:
    return {trial.user_attrs["cause"] for trial in trials(run_study(name))}


@pytest.mark.parametrize("name", STUDIES)
def test_every_trial_is_reproduced_exactly(name: str) -> None:
    result = run_study(name)
    for trial in trials(result):
        found = replay_trial(name, result.study, trial.number)
        assert found.differences == []
        assert found.is_reproduced, str(found)
        assert found.is_exact, str(found)
        assert found.first_difference is None, str(found)
        assert found.steps == len(trial.intermediate_values)
        if trial.state == TrialState.COMPLETE:
            assert found.retrained_value == found.best_value == trial.value


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "diverged"])
def test_stored_weights_have_exactly_the_best_value(name: str) -> None:
    result = run_study(name)
    found = result.replay()
    assert found.number == result.best_trial.number
    assert found.stored_value == found.best_value == result.best_value
    assert found.is_exact and found.is_reproduced


def test_studies_include_all_kinds_of_trial_end() -> None:
    assert causes_of_study("diverged") == {"diverged"}
    assert "early stopping" in causes_of_study("early stopping")
    assert "pruned" in causes_of_study("pruned")
    assert "pruned" in causes_of_study("text, pruned")


def test_trial_stopped_by_the_timeout_is_reproduced() -> None:
    X, y = numbers()
    tune(X, y, n_trials=1)  # imports what the timeout of the first study in a process includes
    result = tune(
        X, y, n_trials=None, timeout=0.8, fixed=TINY | {"epochs": 10_000, "patience": 1_000_000}
    )
    (number, *_) = [t.number for t in trials(result) if t.user_attrs["cause"] == "timeout"]
    found = replay(result.study, number, (X, y))
    assert found.steps > 0
    assert found.first_difference is None and found.is_exact


def test_trial_without_a_value_is_reproduced() -> None:
    X, y = numbers()
    result = tune(X, y, n_trials=1, fixed=DIVERGING | {"hidden_layers": 8})
    (trial,) = trials(result)
    assert trial.user_attrs["cause"] == "diverged" and not trial.intermediate_values
    found = replay(result.study, 0, (X, y))
    assert found.best_value is None
    assert not np.isfinite(found.retrained_value)
    assert found.is_reproduced and found.is_exact
    assert "Trial 0 has no value.\n" in str(found)
    assert "Retrained: again no value" in str(found)


# --- Storages ---


def references_to_study(path: Path) -> list[Any]:
    """Return all ways to pass the study "s" of a journal file."""
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    storage = optuna.storages.JournalStorage(backend)
    return [
        (path, "s"),
        (str(path), "s"),
        (storage, "s"),
        optuna.load_study(study_name="s", storage=storage),
    ]


def test_weights_beside_a_journal_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    result = tune(storage=path, study_name="s")
    for study in references_to_study(path):
        found = replay(study, result.best_trial.number, classes())
        assert found.stored_value == result.best_value
        assert found.is_exact


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_weights_beside_a_database_file_are_found(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    result = tune(storage=url, study_name="s")
    found = replay((url, "s"), result.best_trial.number, classes())
    assert found.stored_value == result.best_value and found.is_exact


def test_weights_of_a_user_storage_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the weights of such a storage are
    (tmp_path / "deep").mkdir()
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "deep" / "a.journal"))
    )
    result = tune(storage=storage, study_name="s")
    for study in (*references_to_study(tmp_path / "deep" / "a.journal"), result.study):
        assert replay(study, result.best_trial.number, classes()).stored_value is not None


@pytest.mark.parametrize("method", [{}, POPULATION, GRADIENT])
def test_trials_of_a_resumed_study_are_reproduced(method: dict[str, Any], tmp_path: Path) -> None:
    path, X, y = tmp_path / "a.journal", *numbers()
    options: dict[str, Any] = {"storage": path, "study_name": "s", "fixed": SHAPE | {"epochs": 8}}
    more = {name: value for name, value in method.items() if name != "n_trials"}
    optimize("dnn", X, y, n_trials=4, **options, **more)
    result = optimize("dnn", X, y, n_trials=8, **options, **more)
    for trial in trials(result):
        found = replay((path, "s"), trial.number, (X, y))
        assert found.is_exact and found.first_difference is None
    assert result.replay().stored_value == result.best_value


def test_trials_of_a_study_resumed_with_another_seed_are_reproduced(tmp_path: Path) -> None:
    (X, y), validation = numbers(), numbers(30, seed=1)
    options: dict[str, Any] = {"storage": tmp_path / "a.journal", "validation": validation}
    tune(X, y, n_trials=2, **options)
    result = tune(X, y, n_trials=4, seed=7, method="random", **options)
    assert [trial.user_attrs.get("seed") for trial in trials(result)] == [None, None, 7, 7]
    for trial in trials(result):
        found = replay(result.study, trial.number, (X, y), validation=validation)
        assert found.is_exact and found.first_difference is None
        assert result.replay(trial.number).is_exact


def test_stored_paths_are_used_if_no_data_are_given(tmp_path: Path) -> None:
    X, y = numbers()
    pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": y}).to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.txt").write_text(TEXT)
    result = optimize("dnn", tmp_path / "t.csv", target="y", fixed=TINY, n_trials=1, storage=None)
    assert replay(result.study, 0).is_exact
    assert replay(result.study, 0, tmp_path / "t.csv").is_exact
    fixed = TEXTS["fixed"]
    texts = optimize("gpt", str(tmp_path / "t.txt"), fixed=fixed, n_trials=1, storage=None)
    assert replay(texts.study, 0).is_exact
    (tmp_path / "t.txt").write_text(TEXT[:-9])
    with pytest.raises(ValueError, match="The data must be the study's, with the fingerprint"):
        replay(texts.study, 0)


def test_user_metric_must_be_given() -> None:
    X, y = classes()

    def own(truth: Any, predicted: Any) -> float:
        return float(np.mean(truth == predicted))

    result = tune(X, y, metric=own)
    assert replay(result.study, 0, (X, y), metric=own).is_exact
    with pytest.raises(ValueError, match="`metric` must be given"):
        replay(result.study, 0, (X, y))


def test_trials_of_an_objective_are_reproduced() -> None:
    objective = Objective("dnn", *numbers(), fixed=TINY, device="cpu")
    study = optuna.create_study(direction=objective.direction)
    study.optimize(objective, n_trials=3)
    for number in range(3):
        found = objective.result(study).replay(number)
        assert found.is_exact and found.first_difference is None and found.differences == []
    assert objective.result(study).replay().stored_value == study.best_value


# --- Errors ---


def changed_data(name: str) -> Any:
    X, y = classes()
    return {
        "value": (np.where(X[3, 1] == X, 0.0, X), y),
        "label": (X, np.where(np.arange(len(y)) == 3, "up", y)),
        "row": (X[:-1], y[:-1]),
        "order": (X[::-1], y[::-1]),
        "column": (X[:, [1, 0, 2]], y),
    }[name]


@pytest.mark.parametrize("name", ["value", "label", "row", "order", "column"])
def test_changed_data_are_rejected(name: str) -> None:
    result = tune(n_trials=1)
    with pytest.raises(ValueError, match="The data must be the study's, with the fingerprint"):
        replay(result.study, 0, changed_data(name))


def test_network_function_must_be_given() -> None:
    result = run_study("tied")

    def deeper(params: Mapping[str, Any]) -> nn.Module:
        return TokenModel(int(params["units"]))

    data = STUDIES["tied"]["X"], STUDIES["tied"]["y"]
    with pytest.raises(
        ValueError, match="`network` must be given: the study does not store the function"
    ):
        replay(result.study, 0, data)
    # The function may be another one as long as the values are the same.
    assert replay(result.study, 0, data, network=deeper).is_exact
    found = replay(result.study, 0, data, network=lambda p: nn.Sequential(TokenModel(p["units"])))
    assert found.is_exact  # the same network in a wrapper


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "`X` must be given: the study does not store it .ndarray of 80 x 3."),
        (classes()[0], r"`data` must be \(X, y\), or the path of a CSV file, but got ndarray"),
        ([*classes()], r"`data` must be \(X, y\), or the path of a CSV file, but got list"),
    ],
)
def test_missing_data_are_rejected(data: Any, message: str) -> None:
    result = tune(n_trials=1)
    with pytest.raises(ValueError, match=message):
        replay(result.study, 0, data)


@pytest.mark.parametrize("number", [3, -1, True, "0", 1.5, None])
def test_unknown_trial_is_rejected(number: Any) -> None:
    result = tune(n_trials=3)
    with pytest.raises(ValueError, match="The trial number must be below 3, the"):
        replay(result.study, number, classes())
    if number is not None:  # there None means the best trial
        with pytest.raises(ValueError, match="The trial number must be below 3"):
            result.replay(number)


def add(study: optuna.Study, **options: Any) -> int:
    """Add a trial that optuna_nnhp has not trained, and return its number."""
    study.add_trial(optuna.trial.create_trial(**options))
    return len(study.get_trials(deepcopy=False)) - 1


def test_trials_that_were_not_trained_are_rejected() -> None:
    study = tune(n_trials=1).study
    running = study.ask().number
    study.enqueue_trial({})
    failed = add(study, state=TrialState.FAIL, user_attrs={"cause": "error", "error": "no room"})
    for number, message in (
        (running, "A trial must be finished to be retrained, but trial 1 is RUNNING"),
        (2, "A trial must be finished to be retrained, but trial 2 is WAITING"),
        (failed, "must have been trained to be retrained, but trial 3 was not: FAIL, no room"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            replay(study, number, classes())
        assert "\n" not in str(error.value)


def test_study_of_another_program_is_rejected() -> None:
    study = optuna.create_study()
    number = add(study, value=1.0, intermediate_values={1: 1.0})
    with pytest.raises(ValueError, match="The study must be one that `optimize` started"):
        replay(study, number, classes())


def test_missing_study_or_storage_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"storage must exist, .*none\.journal"):
        replay((tmp_path / "none.journal", "s"), 0)
    assert not list(tmp_path.iterdir())
    tune(storage=tmp_path / "a.journal", study_name="first", n_trials=1)
    with pytest.raises(ValueError, match="'frst' is not a study of this storage; did you mean"):
        replay((tmp_path / "a.journal", "frst"), 0)


# --- Missing and changed weights ---


def weights_file(result: Result, folder: Path) -> Path:
    (path,) = folder.rglob("trial-*.safetensors")
    assert path.stem == f"trial-{result.best_trial.number}"
    return path


def test_replay_works_without_stored_weights(tmp_path: Path) -> None:
    result = tune(storage=tmp_path / "a.journal")
    weights_file(result, tmp_path).unlink()
    found = replay(result.study, result.best_trial.number, classes())
    assert found.stored_value is None
    assert found.is_exact and found.is_reproduced
    assert "Stored weights: none." in str(found)
    with pytest.raises(FileNotFoundError, match="`weights` must be an existing folder, but got"):
        replay(result.study, 0, classes(), weights=tmp_path / "nothing")


def test_folder_of_weights_can_be_given(tmp_path: Path) -> None:
    result = tune(storage=tmp_path / "a.journal")
    folder = weights_file(result, tmp_path).parent.rename(tmp_path / "elsewhere")
    number = result.best_trial.number
    assert replay(result.study, number, classes()).stored_value is None
    assert replay(result.study, number, classes(), weights=folder).stored_value is not None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_weights_are_rejected(share: float, tmp_path: Path) -> None:
    result = tune(storage=tmp_path / "a.journal")
    path = weights_file(result, tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    number = result.best_trial.number
    for call in (
        lambda: replay(result.study, number, classes()),
        lambda: ResultOf(result.study, result._problem, BestWeights(path.parent)).replay(),
    ):
        with pytest.raises(ValueError, match=rf"trial-{number}\.safetensors must") as error:
            call()
        assert "\n" not in str(error.value)


def test_weights_of_another_network_are_rejected(tmp_path: Path) -> None:
    result = tune(storage=tmp_path / "a.journal")
    path = weights_file(result, tmp_path)
    save_file({"0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=rf"{path.name} must hold this network's weights"):
        replay(result.study, result.best_trial.number, classes())


def test_changed_weights_are_not_exact(tmp_path: Path) -> None:
    result = tune(*numbers(), storage=tmp_path / "a.journal")
    path = weights_file(result, tmp_path)
    changed = load_file(path)
    changed["0.weight"][0] += 0.1
    BestWeights(path.parent)
    save_file(changed, path)
    found = result.replay()
    assert found.stored_value != found.best_value
    assert not found.is_exact and found.is_reproduced
    assert "NOT exactly" in str(found)


# --- Environments and tolerances ---


def test_differences_of_the_environment_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {**environment._process_environment(), "torch": "1.0.0", "cpu": "Abacus 9"}
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_process_environment", lambda: there)
        result = tune()
    found = replay(result.study, 0, classes())
    here = environment._process_environment()
    assert found.differences == [
        f"torch 1.0.0 then, {here['torch']} now",
        f"cpu Abacus 9 then, {here['cpu']} now",
    ]
    assert found.is_reproduced
    assert f"torch 1.0.0 then, {here['torch']} now; cpu Abacus 9" in str(found)
    assert str(found).endswith("Values may differ.")


def test_unknown_environment_is_a_difference() -> None:
    result = tune(n_trials=1)
    study = optuna.create_study(direction="maximize")
    for name, value in result.study.user_attrs.items():
        study.set_user_attr(name, value)
    (trial,) = trials(result)
    trial.user_attrs = {n: v for n, v in trial.user_attrs.items() if n != "environment"}
    study.add_trial(trial)
    found = replay(study, 0, classes())
    assert found.differences == ["the trial's environment is unknown"]
    assert found.is_reproduced


def test_value_that_is_not_reproduced_is_reported() -> None:
    X, y = numbers()
    result = tune(X, y)
    result._problem = DNNTemplate(X, y, fixed=TINY | {"batch_size": 16}, device="cpu")
    found = result.replay()
    assert not found.is_reproduced
    assert found.first_difference is not None
    step, recorded, retrained = found.first_difference
    assert step == 1 and recorded == result.best_trial.intermediate_values[1] != retrained
    assert "NOT within" in str(found)
    assert f"the learning curve differs from step 1 on, where {recorded:.7g} is" in str(found)


def test_tolerance_depends_on_the_metric() -> None:
    result = tune(*numbers())
    found = result.replay()
    assert found.tolerance == RELATIVE_TOLERANCE * result.best_value
    assert (
        tune(n_trials=1).replay().tolerance == EXAMPLE_TOLERANCE / 16
    )  # rows of the validation part
    losses = tune(n_trials=1, metric="log_loss")
    assert losses.replay().tolerance == RELATIVE_TOLERANCE * losses.best_value


def test_text_of_a_replay_has_four_lines(tmp_path: Path) -> None:
    lines = str(tune().replay()).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        *("Stored weights", "Retrained", "Environment")
    ]
    assert len(lines) == 4


def test_replay_is_immutable() -> None:
    found = tune(n_trials=1).replay()
    with pytest.raises(AttributeError):
        found.best_value = 2.0  # type: ignore[misc]
    assert isinstance(found, optuna_nnhp.inspect.replay.Replay)


def test_replay_uses_the_threads_of_the_trial_and_restores_them() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = tune(n_trials=1)
    finally:
        torch.set_num_threads(before)
    assert result.replay().differences == []
    assert torch.get_num_threads() == before


def test_problem_spec_is_enough_to_restore_a_result() -> None:
    X, y = classes()
    result = tune(X, y)
    problem = ProblemSpec.from_study(result.study, X, y, device="cpu").problem()
    fresh = ResultOf(result.study, problem, BestWeights(None))
    assert fresh.replay().stored_value is None
    assert fresh.score(X, y) == result.score(X, y)  # this retrains the trial
    assert fresh.replay().stored_value == result.best_value
