from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_nnhp.data import Preprocessor
from optuna_nnhp.data import prepare_table
from optuna_nnhp.data import read_csv
from optuna_nnhp.data.splits import train_validation_split


def people(n: int, seed: int = 0) -> tuple[pd.DataFrame, pd.Series[Any]]:
    random = np.random.default_rng(seed)
    X = pd.DataFrame(
        {
            "age": random.integers(17, 90, n).astype(float),
            "gain": np.where(random.random(n) < 0.9, 0, random.integers(100, 99999, n)),
            "work": random.choice(["private", "state", "none at all"], n),
        }
    )
    X.loc[random.random(n) < 0.1, "age"] = None
    return X, pd.Series(random.choice(["<=50K", ">50K"], n))


def test_classes_become_codes() -> None:
    X, y = people(200)
    data = prepare_table(X, y, seed=5)
    assert data.train_X.dtype == data.valid_X.dtype == np.float32
    assert data.train_y.dtype == data.valid_y.dtype == np.int64
    assert data.train_X.shape == (160, 6)
    assert data.valid_X.shape == (40, 6)
    train, train_y, valid, valid_y = train_validation_split(X, y, 0.2, "binary", 5)
    preprocessor = Preprocessor.fit(train)
    np.testing.assert_array_equal(data.train_X, preprocessor.transform(train))
    np.testing.assert_array_equal(data.valid_X, preprocessor.transform(valid))
    assert data.target.decode(data.train_y).tolist() == train_y.tolist()
    assert data.target.decode(data.valid_y).tolist() == valid_y.tolist()
    assert data.describe() == (
        "160 training and 40 validation rows, 3 columns: 2 numeric, 1 categorical -> 6 features, "
        "binary ('<=50K', '>50K')"
    )


def test_regression_is_standardised_by_the_training_part() -> None:
    X, _ = people(200)
    data = prepare_table(X, X["age"].fillna(0) * 1000 + 0.5)
    assert data.target.task == "regression"
    assert data.train_y.dtype == data.valid_y.dtype == np.float32
    assert abs(float(data.train_y.mean())) < 1e-6
    assert abs(float(data.valid_y.mean())) > 1e-6
    assert float(data.train_y.std()) == pytest.approx(1.0, abs=1e-5)


def state(data: Any) -> str:
    return json.dumps([data.preprocessor.to_json(), data.target.to_json()])


def test_nothing_is_learned_from_a_validation_fraction() -> None:
    X, y = people(200)
    data = prepare_table(X, y)
    # The rows' own numbers tell which of them are for validation.
    rows = train_validation_split(pd.DataFrame({"row": range(200)}), y, 0.2, "binary", 0)[2]["row"]
    changed = X.copy()
    changed.loc[rows, "age"] = 1e6
    changed.loc[rows, "gain"] = -1e9
    changed.loc[rows, "work"] = [f"unseen {i}" for i in rows]
    other = prepare_table(changed, y)
    assert state(other) == state(data)
    np.testing.assert_array_equal(other.train_X, data.train_X)
    np.testing.assert_array_equal(other.train_y, data.train_y)
    assert not np.array_equal(other.valid_X, data.valid_X)
    assert other.fingerprint != data.fingerprint


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_nothing_is_learned_from_a_validation_pair(task: str) -> None:
    X, labels = people(200)
    X_val, labels_val = people(50, seed=1)
    y = labels if task == "classification" else X["gain"] * 0.1
    y_val = labels_val if task == "classification" else X_val["gain"] * 0.1
    data = prepare_table(X, y, task=task, validation=(X_val, y_val))
    wild = X_val.assign(age=None, gain=1e9, work="unseen")
    other = prepare_table(X, y, task=task, validation=(wild, y_val[::-1]))
    assert data.train_X.shape[0] == 200
    assert state(other) == state(data)
    np.testing.assert_array_equal(other.train_X, data.train_X)
    np.testing.assert_array_equal(other.train_y, data.train_y)


def test_a_class_may_have_one_row_if_the_validation_part_is_given() -> None:
    data = prepare_table([[1], [2], [3]], ["a", "b", "b"], validation=([[4]], ["a"]))
    assert data.valid_y.tolist() == [0]


def test_a_column_without_values_in_the_training_part_is_dropped() -> None:
    X, y = people(100)
    row = int(
        train_validation_split(pd.DataFrame({"row": range(100)}), y, 0.2, "binary", 0)[2][
            "row"
        ].iloc[0]
    )
    sparse = X.assign(rare=pd.Series({row: 1.0}).reindex(range(100)))
    data = prepare_table(sparse, y)
    np.testing.assert_array_equal(data.valid_X, prepare_table(X, y).valid_X)


def test_fingerprint_changes_with_the_data() -> None:
    X, y = people(100)
    data = prepare_table(X, y)
    assert len(data.fingerprint) == 12
    assert int(data.fingerprint, 16) >= 0
    assert prepare_table(X.copy(), y.copy()).fingerprint == data.fingerprint
    marks = {
        data.fingerprint,
        prepare_table(X, y, seed=1).fingerprint,
        prepare_table(X, y.replace(">50K", "rich")).fingerprint,
        prepare_table(X, y, task="multiclass").fingerprint,
        prepare_table(X.assign(age=X["age"] ** 2), y).fingerprint,
    }
    assert len(marks) == 5


def test_arrays_and_lists_give_the_same() -> None:
    random = np.random.default_rng(0)
    X, y = random.normal(size=(50, 3)), random.integers(0, 2, 50)
    marks = {
        prepare_table(X, y).fingerprint,
        prepare_table(X.tolist(), y.tolist()).fingerprint,
        prepare_table(pd.DataFrame(X), pd.Series(y)).fingerprint,
        prepare_table(X.astype(object), y[:, None]).fingerprint,
    }
    assert len(marks) == 1


def test_csv_files_are_prepared(tmp_path: Path) -> None:
    X, y = people(100)
    file = tmp_path / "people.csv"
    X.assign(income=y).to_csv(file, index=False, na_rep="?")
    assert prepare_table(*read_csv(file, "income")).fingerprint == prepare_table(X, y).fingerprint


def test_inferred_task_is_logged(log: pytest.LogCaptureFixture) -> None:
    prepare_table([[1], [2]] * 5, [0, 1] * 5)
    assert log.messages == ["Inferred task: binary (0, 1); pass `task=` to override."]


GOOD_X = [[float(i), i % 3] for i in range(10)]
GOOD_Y = [0, 1] * 5


@pytest.mark.parametrize(
    ("X", "y", "options", "message"),
    [
        (GOOD_X, GOOD_Y[:9], {}, "X and y must have the same number of rows, .* 10 and 9"),
        ([1, 2], [0, 1], {}, "X must be 2-D"),
        (GOOD_X, [[0, 1]] * 10, {}, "y must be 1-D"),
        (GOOD_X, [0.0, np.nan] * 5, {}, "y must have no missing values, but has 5"),
        (GOOD_X, [1] * 10, {}, "at least two distinct values"),
        (GOOD_X, [0] * 9 + [1], {}, "one for each part, but 1 has 1"),
        (GOOD_X, GOOD_Y, {"task": "clasification"}, "did you mean 'classification'"),
        (GOOD_X, ["a", "b"] * 5, {"task": "regression"}, "y must hold numbers for a regression"),
        ([[1.0, None]] * 10, GOOD_Y, {}, "Every column of X .* these have none: 'x1'"),
        ([[np.inf, 1.0]] * 10, GOOD_Y, {}, "column 'x0' of X has 10 infinite, .* row 0"),
        ([[1.0, 1.0]] * 10, GOOD_Y, {}, "must vary in the training part"),
        (GOOD_X, GOOD_Y, {"validation": 2}, "`validation` must be between 0 and 1, but got 2"),
        (GOOD_X, GOOD_Y, {"validation": 0.05}, "each of the 2 classes, but 10 rows give 9"),
        (GOOD_X, GOOD_Y, {"seed": -1}, "`seed` must be from 0"),
        (GOOD_X, GOOD_Y, {"validation": ([[1.0]], [0])}, "X_val must have 2 columns, but has 1"),
        (
            GOOD_X,
            GOOD_Y,
            {"validation": (pd.DataFrame({"x0": [1]}), [0])},
            "X_val must have .* but lacks 'x1'",
        ),
        (
            GOOD_X,
            GOOD_Y,
            {"validation": ([[1.0, -np.inf]], [0])},
            "column 'x1' of X_val has 1 infinite",
        ),
        (
            GOOD_X,
            GOOD_Y,
            {"validation": (GOOD_X, [0, None] * 5)},
            "y_val must have no missing values, but has 5, the first in row 1",
        ),
        (GOOD_X, GOOD_Y, {"validation": ([[1, 2]], [7])}, "labels of y_val .* 1 rows have 7"),
        (GOOD_X, GOOD_Y, {"validation": (GOOD_X, [0])}, "X_val and y_val must .* 10 and 1"),
    ],
)
def test_invalid_data_is_rejected(X: Any, y: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prepare_table(X, y, **options)
    assert "\n" not in str(error.value)
