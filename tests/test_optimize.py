"""Test `optimize` with all kinds of data, metrics and arguments."""

from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path
import random
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score
import torch

from optuna_nnhp import optimize
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from tests.tiny import DIVERGING
from tests.tiny import SHAPE
from tests.tiny import TINY
from tests.tiny import TRAIN_ROWS
from tests.tiny import Array
from tests.tiny import causes
from tests.tiny import classes
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda X, y: (X, y), id="numpy"),
        pytest.param(lambda X, y: (X.tolist(), y.tolist()), id="lists"),
        pytest.param(lambda X, y: (pd.DataFrame(X), pd.Series(y)), id="pandas"),
        pytest.param(lambda X, y: (torch.tensor(X), torch.tensor(y)), id="torch"),
    ],
)
def test_arrays_frames_and_tensors_give_the_same_study(
    convert: Callable[[Array, Array], Any],
) -> None:
    X, y = numbers()
    expected, result = tune(X, y, n_trials=2), tune(*convert(X, y), n_trials=2)
    # A list of Python floats is float64: the last bits of the features differ.
    assert result.best_value == pytest.approx(expected.best_value, rel=1e-4)
    np.testing.assert_allclose(result.predict(X), expected.predict(X), rtol=1e-4)


def test_csv_file_gives_the_same_study_as_its_frame(folder: Path) -> None:
    X, y = numbers()
    frame = pd.DataFrame(X.astype(np.float64), columns=["a", "b", "c"]).assign(price=y)
    frame.to_csv("homes.csv", index=False)
    of_file = tune("homes.csv", target="price", n_trials=2)
    of_path = tune(folder / "homes.csv", target="price", n_trials=2)
    of_frame = tune(frame[["a", "b", "c"]], frame["price"], n_trials=2)
    assert learning_curves(of_file) == learning_curves(of_frame) == learning_curves(of_path)
    assert [path.name for path in folder.iterdir()] == ["homes.csv"]


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        (["no", "yes"], None, "binary"),
        (["a", "b", "c"], None, "multiclass"),
        ([False, True], None, "binary"),
        ([3, 5, 8], None, "multiclass"),
        ([3, 5, 8], "regression", "regression"),
        ([3, 5, 8], "classification", "multiclass"),
        ([0.0, 1.0], "binary", "binary"),
        ([0.5, 1.5, 2.5], None, "regression"),
    ],
)
def test_task_is_inferred_from_the_labels(
    labels: list[Any], task: str | None, expected: str
) -> None:
    X, _ = classes()
    y = [labels[i % len(labels)] for i in range(len(X))]
    result = tune(X, y, task=task, n_trials=1)
    assert result.study.user_attrs["task"] == expected
    predicted = result.predict(X)
    assert predicted.shape == (len(X),)
    if expected == "regression":
        assert predicted.dtype == np.float64
    else:
        assert set(predicted.tolist()) <= set(labels)
        assert {type(label) for label in predicted.tolist()} == {type(labels[0])}


def test_text_labels_are_predicted_as_texts() -> None:
    X, y = classes()
    result = tune(n_trials=2, fixed=TINY | {"epochs": 40})
    predicted = result.predict(X)
    assert set(predicted.tolist()) == {"down", "up"}
    assert np.mean(predicted == y) > 0.8
    probabilities = result.predict_proba(X)
    assert probabilities.shape == (len(X), 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    winners = np.array(result.predictor.classes)[probabilities.argmax(1)]
    assert winners.tolist() == predicted.tolist()


def test_frame_with_numeric_and_categorical_columns() -> None:
    X, y = classes(120)
    source = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "number": X[:, 0].astype(np.float64),
            "gaps": np.where(source.random(120) < 0.3, np.nan, X[:, 1]),
            "town": source.choice(np.array(["Ulm", "Rome", None]), 120),
            "member": source.choice([True, False], 120),
            "since": pd.Timestamp("2020-02-01")
            + pd.to_timedelta(source.integers(0, 99, 120), "D"),
            "kind": pd.Categorical(source.choice(["a", "b"], 120)),
            "constant": 7,
            "same": "word",
        }
    )
    result = tune(frame, y, n_trials=2, fixed=TINY | {"epochs": 20})
    assert result.best_value > 0.8
    used = result.predictor.preprocessor.feature_names
    assert not any(name.startswith(("constant", "same")) for name in used)
    strange = frame.head(3).assign(town=["Oslo", "?", "Ulm"], gaps=[np.nan, 0.0, 1.0])
    assert set(result.predict(strange).tolist()) <= {"down", "up"}


def test_column_with_many_texts_is_limited_and_logged(log: pytest.LogCaptureFixture) -> None:
    X, y = classes(500)
    frame = pd.DataFrame({"x": X[:, 0], "name": [f"customer {i}" for i in range(500)]})
    result = tune(frame, y, n_trials=1)
    assert states(result) == [TrialState.COMPLETE]
    assert any("'name' has 400 distinct texts" in line for line in log.messages)
    assert result.predictor.model.get_parameter("0.weight").shape[1] < 130


def test_validation_fraction_sets_the_number_of_rows() -> None:
    X, y = classes()
    result = tune(X, y, validation=0.5, n_trials=1)
    assert "40 training and 40 validation rows" in result.study.user_attrs["data"]


@pytest.mark.parametrize(
    "metric", ["accuracy", "balanced_accuracy", "roc_auc", "log_loss", "f1", "rmse", "mae", "r2"]
)
def test_stored_weights_have_the_best_value(metric: str, folder: Path) -> None:
    make = numbers if metric in ("rmse", "mae", "r2") else classes
    X, y = make()
    held_out = make(60, seed=1)
    result = tune(X, y, validation=held_out, metric=metric, storage="s.journal", n_trials=4)
    minimized = metric in ("log_loss", "rmse", "mae")
    assert result.study.direction.name == ("MINIMIZE" if minimized else "MAXIMIZE")
    values = [t.value for t in trials(result) if t.value is not None]
    assert result.best_value == (min(values) if minimized else max(values))
    exact = metric in ("accuracy", "balanced_accuracy", "f1")
    # A stack of several networks adds in another order than one plain network does.
    tolerance = 0.0 if exact else 1e-4
    assert result.score(*held_out) == pytest.approx(result.best_value, rel=tolerance)


def test_default_metric_depends_on_the_task() -> None:
    assert tune(n_trials=1).study.user_attrs["metric"] == "accuracy"
    result = tune(*numbers(), n_trials=1)
    assert result.study.user_attrs["metric"] == "rmse"
    assert result.study.direction == optuna.study.StudyDirection.MINIMIZE


def test_metric_can_be_a_function() -> None:
    def balanced(y_true: Array, y_pred: Array) -> float:
        assert set(y_true.tolist()) | set(y_pred.tolist()) <= {"down", "up"}
        return float(balanced_accuracy_score(y_true, y_pred, adjusted=False))

    X, y = classes()
    held_out = classes(60, seed=1)
    own = tune(X, y, validation=held_out, metric=balanced)
    named = tune(X, y, validation=held_out, metric="balanced_accuracy")
    assert own.study.user_attrs["metric"] == "balanced"
    assert own.best_value == named.best_value == own.score(*held_out)


def test_metric_function_can_be_minimized() -> None:
    def worst(y_true: Array, y_pred: Array) -> float:
        return float(np.abs(y_true - y_pred).max())

    held_out = numbers(60, seed=1)
    result = tune(*numbers(), validation=held_out, metric=worst, direction="minimize")
    assert result.best_value == min(t.value or 0.0 for t in trials(result))
    truth, predicted = held_out[1], result.predict(held_out[0])
    assert result.best_value == pytest.approx(worst(truth, predicted), rel=1e-4)


def test_error_of_a_user_metric_is_raised_and_leaves_no_running_trial() -> None:
    def broken(y_true: Array, y_pred: Array) -> float:
        raise ZeroDivisionError("of the user")

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ZeroDivisionError, match="of the user"):
        tune(metric=broken, storage=storage, cohort_size=3)
    left = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    assert [t.state for t in left] == [TrialState.FAIL] * 3
    assert {t.user_attrs["cause"] for t in left} == {"error"}


@pytest.mark.parametrize(("make", "task"), [(classes, "binary"), (numbers, "regression")])
@pytest.mark.parametrize("method", ["bayes", "bayes-gp", "random", "quasi-random"])
def test_first_trial_is_the_default_configuration(
    make: Callable[[], tuple[Array, Array]], task: str, method: str
) -> None:
    result = tune(*make(), method=method, fixed={"epochs": 1})
    space, _ = resolve_space(task, None, {"epochs": 1})
    assert trials(result)[0].params == default_params(task, space)
    assert trials(result)[0].params.keys() == space.keys()
    assert trials(result)[1].params != trials(result)[0].params


def test_defaults_outside_the_space_are_clipped_or_sampled() -> None:
    space = {
        "learning_rate": FloatDistribution(0.01, 0.1, log=True),
        "dropout": FloatDistribution(0.0, 0.6, step=0.15),
        "optimizer": CategoricalDistribution(("sgd", "adam")),
    }
    params = trials(tune(space=space, n_trials=1))[0].params
    assert params["learning_rate"] == 0.01
    assert params["dropout"] / 0.15 == pytest.approx(round(params["dropout"] / 0.15))
    assert params["optimizer"] in ("sgd", "adam")


def test_all_trials_respect_space_and_fixed() -> None:
    space = {
        "width": CategoricalDistribution((16, 40, 200)),
        "hidden_layers": IntDistribution(1, 2),
        "epochs": IntDistribution(1, 3),
    }
    fixed = {"batch_size": 32, "normalization": "none", "dropout": 0.0}
    result = tune(space=space, fixed=fixed, n_trials=12, cohort_size=4, method="random")
    for trial in trials(result):
        assert trial.params["width"] in (16, 40, 200)
        assert trial.params["hidden_layers"] in (1, 2)
        assert trial.user_attrs["epochs"] == trial.params["epochs"]
        assert not fixed.keys() & trial.params.keys()
    assert len({t.params["width"] for t in trials(result)}) > 1
    assert result.study.user_attrs["fixed"]["dropout"] == 0.0


def test_each_parameter_has_the_same_distribution_in_all_trials() -> None:
    result = tune(n_trials=6, fixed={"epochs": 1}, cohort_size=3)
    first = trials(result)[0].distributions
    assert all(t.distributions == first for t in trials(result))


def test_trials_have_all_user_attributes() -> None:
    trial = trials(tune(n_trials=1))[0]
    attributes = trial.user_attrs
    assert attributes["epochs"] == 4
    assert attributes["iterations"] == math.ceil(TRAIN_ROWS / 32) * 4
    assert len(attributes["train_loss"]) == len(attributes["validation_loss"]) == 4
    assert np.isfinite([*attributes["train_loss"], *attributes["validation_loss"]]).all()
    assert attributes["best_value"] == trial.value == max(trial.intermediate_values.values())
    assert trial.intermediate_values[attributes["best_epoch"]] == trial.value
    assert list(trial.intermediate_values) == [1, 2, 3, 4]  # one step per epoch
    assert attributes["weights"] == 3 * 16 + 16 + 16 * 2 + 2
    assert attributes["seconds"] >= 0
    assert attributes["cause"] == "finished"


@pytest.mark.parametrize(("batch_size", "per_epoch"), [(30, 3), (64, 1), (1000, 1)])
def test_iterations_count_the_last_smaller_batch(batch_size: int, per_epoch: int) -> None:
    result = tune(n_trials=1, fixed=TINY | {"batch_size": batch_size})
    assert trials(result)[0].user_attrs["iterations"] == 4 * per_epoch


@pytest.mark.parametrize(("iterations", "epochs"), [(30, 15), (7, 4), (1, 1)])
def test_iterations_can_be_the_budget(iterations: int, epochs: int) -> None:
    fixed = SHAPE | {"iterations": iterations, "patience": 100}
    result = tune(fixed=fixed, cohort_size=2)
    for trial in trials(result):
        assert trial.user_attrs["iterations"] == iterations
        assert trial.user_attrs["epochs"] == epochs  # two steps each, the last one cut
        assert trial.state == TrialState.COMPLETE


def test_early_stopped_trial_is_complete_with_its_best_value() -> None:
    fixed = SHAPE | {"epochs": 60, "patience": 3}
    result = tune(*numbers(), fixed=fixed, n_trials=8, method="random")
    stopped = [t for t in trials(result) if t.user_attrs["cause"] == "early stopping"]
    assert stopped
    for trial in stopped:
        epochs, best = trial.user_attrs["epochs"], trial.user_attrs["best_epoch"]
        assert trial.state == TrialState.COMPLETE
        assert best == epochs - 3 < 57
        assert trial.value == trial.intermediate_values[best] == trial.user_attrs["best_value"]
        assert len(trial.user_attrs["validation_loss"]) == epochs


@pytest.mark.parametrize("cohort_size", [None, 1, 4])
def test_same_seed_gives_the_same_study(cohort_size: int | None) -> None:
    options: dict[str, Any] = {"n_trials": 6, "pruner": None, "cohort_size": cohort_size}
    first, second = tune(**options, seed=5), tune(**options, seed=5)
    assert learning_curves(first) == learning_curves(second)
    assert first.predict_proba(classes()[0]).tolist() == (
        second.predict_proba(classes()[0]).tolist()
    )
    other = tune(**options, seed=6)
    assert learning_curves(other) != learning_curves(first)
    assert trials(other)[1].params != trials(first)[1].params


def test_global_random_generators_have_no_effect() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = tune()
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert learning_curves(tune()) == learning_curves(first)


def test_callbacks_are_called_once_per_trial() -> None:
    calls: list[tuple[str, int, TrialState]] = []

    def record(name: str) -> Callable[[optuna.Study, FrozenTrial], None]:
        return lambda study, trial: calls.append((name, trial.number, trial.state))

    result = tune(callbacks=[record("a"), record("b")], n_trials=5, cohort_size=2, pruner=None)
    for name in ("a", "b"):
        called = sorted(number for n, number, _ in calls if n == name)
        assert called == [0, 1, 2, 3, 4]
    assert all(state == states(result)[number] for _, number, state in calls)


@pytest.mark.parametrize(
    ("budget", "unit"), [({"n_trials": 2}, "trials"), ({"timeout": 0.3}, "s")]
)
def test_progress_bar_shows_trials_and_best_value(
    budget: dict[str, float], unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(**({"n_trials": None} | budget), show_progress_bar=True)
    shown = capsys.readouterr().err
    assert f" {unit}, best " in shown
    assert "trials done, 0 running" in shown
    tune(n_trials=1)
    assert "trials done" not in capsys.readouterr().err


def test_timeout_alone_ends_a_study() -> None:
    result = tune(n_trials=None, timeout=1)
    assert len(trials(result)) > 3
    assert TrialState.RUNNING not in states(result)  # others may be waiting for the next call


def test_networks_are_on_the_given_device() -> None:
    result = tune(n_trials=1, device=torch.device("cpu"))
    assert next(result.model.parameters()).device.type == "cpu"


def test_study_has_the_given_name_and_its_storage_is_logged(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    result = tune(storage="a.journal", study_name="weather", n_trials=1)
    assert result.study.study_name == "weather"
    assert any("Storing the study 'weather' in a.journal." in line for line in log.messages)
    names = [p.name for p in folder.iterdir()]
    assert sorted(names) == ["a.journal", "a.models"]


@pytest.mark.parametrize(
    "options",
    [
        {"n_trials": np.int64(1)},
        {"cohort_size": np.int64(1)},
        {"trial_timeout": np.float32(60)},
        {"method": "zoom", "method_options": {"round_size": np.int64(5)}},
    ],
    ids=str,
)
def test_a_study_in_a_file_takes_numbers_of_numpy(options: dict[str, Any], folder: Path) -> None:
    result = tune(**{"storage": "a.journal", "n_trials": 1, **options})
    assert len(trials(result)) == 1


def test_diverged_trials_are_pruned_and_the_study_continues() -> None:
    space = {"learning_rate": CategoricalDistribution((0.002, 100.0))}
    fixed = {name: value for name, value in DIVERGING.items() if name != "learning_rate"}
    result = tune(*numbers(), space=space, fixed=fixed, n_trials=12, method="random")
    diverged = [t for t in trials(result) if t.user_attrs["cause"] == "diverged"]
    assert 0 < len(diverged) < 12
    assert len(trials(result)) == 12
    for trial in diverged:
        assert trial.params["learning_rate"] == 100.0
        assert trial.state == TrialState.PRUNED
        assert all(math.isfinite(v) for v in trial.intermediate_values.values())
    assert math.isfinite(result.best_value)


def test_study_ends_even_if_all_trials_diverge() -> None:
    result = tune(*numbers(), fixed=DIVERGING)
    assert states(result) == [TrialState.PRUNED] * 3
    assert causes(result) == ["diverged"] * 3
    with pytest.raises(RuntimeError, match="none of the study's 3 has"):
        _ = result.best_params


def test_default_template_and_storage(folder: Path) -> None:
    X, y = classes()
    result = optimize(X=X, y=y, n_trials=2, fixed=TINY)
    assert sorted(p.name for p in folder.iterdir()) == [
        "optuna_nnhp.journal",
        "optuna_nnhp.models",
    ]
    assert result.study.user_attrs["template"] == "dnn"
