"""Test the result of a study: best trial, model, predictions, tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from torch import nn

from optuna_nnhp import Result
from optuna_nnhp import load
from tests.tiny import classes
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune


@pytest.fixture(scope="module")
def result() -> Result:
    return tune(n_trials=6, cohort_size=3)


def test_best_trial_is_that_of_optuna(result: Result) -> None:
    assert result.best_trial.number == result.study.best_trial.number
    assert result.best_value == result.study.best_value
    assert result.best_params == result.study.best_params


def test_best_params_are_a_copy(result: Result) -> None:
    result.best_params.clear()
    assert result.best_params


def test_model_is_a_plain_module_that_returns_logits(result: Result) -> None:
    model = result.model
    assert isinstance(model, nn.Module)
    assert not model.training
    features = torch.from_numpy(result.predictor.preprocessor.transform(classes()[0]))
    logits = model(features)
    assert logits.shape == (80, 2)
    probabilities = logits.double().softmax(-1).detach().numpy()
    np.testing.assert_array_equal(result.predict_proba(classes()[0]), probabilities)


def test_predictions_do_not_depend_on_the_other_rows(result: Result) -> None:
    X, _ = classes(200, seed=4)
    alone = np.concatenate([result.predict_proba(X[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, result.predict_proba(X)[:5], rtol=1e-5)


def test_trials_dataframe_has_one_row_per_trial(result: Result) -> None:
    frame = result.trials_dataframe()
    assert len(frame) == 6
    assert frame["value_accuracy"].max() == result.best_value
    columns = {"params_learning_rate", "user_attrs_train_loss", "user_attrs_cause", "state"}
    assert columns <= set(frame.columns)


def test_saved_model_predicts_the_same(result: Result, tmp_path: Path) -> None:
    X, y = classes(50, seed=2)
    loaded = load(result.save(tmp_path / "model"))
    assert np.array_equal(loaded.predict(X), result.predict(X))
    assert loaded.score(X, y) == result.score(X, y)


def test_result_includes_later_trials_of_the_study() -> None:
    storage = optuna.storages.InMemoryStorage()
    first = tune(*numbers(), n_trials=1, storage=storage)
    before = first.best_value
    more = tune(*numbers(), n_trials=12, storage=storage, method="random")
    assert len(trials(first)) == 12
    assert first.best_value == more.best_value <= before


def test_result_without_complete_trials_raises() -> None:
    study = tune(n_trials=1).study
    empty = optuna.create_study(direction=study.direction)
    result = tune(n_trials=1)
    result.study = empty
    with pytest.raises(
        RuntimeError, match=r"none of the study's 0 has: give it more time"
    ) as error:
        _ = result.best_value
    assert "\n" not in str(error.value)
    for read in ("best_trial", "best_params", "model", "predictor"):
        with pytest.raises(RuntimeError, match="A best trial must have finished"):
            getattr(result, read)


@pytest.mark.parametrize("maximize", [True, False])
def test_first_of_equal_trials_is_the_best(maximize: bool) -> None:
    result = tune(*(classes() if maximize else numbers()), n_trials=1)
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    for value in (0.5, 0.7, 0.7) if maximize else (0.5, 0.3, 0.3):
        study.add_trial(optuna.trial.create_trial(value=value))
    result.study = study
    assert result.best_trial.number == 1
