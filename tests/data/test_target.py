from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.target import Target
from optuna_nnhp.data.target import check_target
from optuna_nnhp.data.target import infer_task
from optuna_nnhp.data.target import resolve_task


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (["a", "b", "a"], "binary"),
        (["a", "b", "c"], "multiclass"),
        (["1.5", "2.5", "3.5"], "multiclass"),
        ([True, False], "binary"),
        ([0, 1], "binary"),
        ([-1.0, 1.0], "binary"),
        ([0.5, 1.0], "regression"),
        (list(range(20)) * 2, "multiclass"),
        (list(range(21)) * 10, "regression"),
        (list(range(10)), "regression"),
        ([1.0, 2.0, 3.0] * 2, "multiclass"),
        ([1.0, 2.0, 3.5] * 2, "regression"),
        (pd.Categorical(range(30)), "multiclass"),
        (pd.Series([0, 1], dtype="Int64"), "binary"),
        (pd.Series([0.5, 1.5], dtype="Float64"), "regression"),
        (pd.Series([True, False], dtype="boolean"), "binary"),
        (np.array([0, 1], dtype=np.uint8), "binary"),
    ],
)
def test_task_is_inferred(y: Any, task: str) -> None:
    assert infer_task(as_target(y)) == task
    assert resolve_task(as_target(y), None) == task


@pytest.mark.parametrize(
    ("y", "task", "expected"),
    [
        ([0, 1], "regression", "regression"),
        ([0.5, 1.5], "classification", "binary"),
        ([0.5, 1.5, 2.5], "classification", "multiclass"),
        ([0, 1], "binary", "binary"),
        ([0, 1], "multiclass", "multiclass"),
    ],
)
def test_given_task_is_checked(y: list[float], task: str, expected: str) -> None:
    assert resolve_task(as_target(y), task) == expected


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        ([0, 1], "regresion", "'regresion' is not a task; did you mean 'regression'"),
        (["a", "b"], "regression", "y must hold numbers for a regression, but holds texts"),
        ([True, False], "regression", "y must hold numbers for a regression, but holds booleans"),
        ([0, 1, 2], "binary", "y must have 2 classes for the task 'binary', but has 3: 0, 1, 2"),
        (["a", "a"], None, "y must have at least two distinct values, but every row is 'a'"),
        ([1.5, 1.5], "regression", "at least two distinct values, but every row is 1.5"),
    ],
)
def test_invalid_tasks_are_rejected(y: list[Any], task: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_task(as_target(y), task)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0.0, np.nan, np.nan], "y must have no missing values, but has 2, the first in row 1"),
        (["a", None], "no missing values, but has 1, the first in row 1"),
        (pd.Series([1, None], dtype="Int64"), "no missing values, but has 1"),
        (pd.Categorical(["a", None]), "no missing values, but has 1"),
        ([0.0, 1.0, np.inf, -np.inf], "but 2 values are not, the first in row 2: inf"),
        ([0.0, 1e31], r"within ±1e\+30, but 1 values are not, the first in row 1"),
        ([1, "a"], "of one type, but holds int, str"),
        ([(1, 2), (3, 4, 5)], "must all have the same length"),
        (pd.to_datetime(["2024-01-01"]), "texts or booleans, but holds datetime64"),
        ([1j, 2j], "but holds complex128"),
    ],
)
def test_invalid_labels_are_rejected(y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_target(as_target(y))


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (["no", "yes", "no"], str),
        (pd.Series(["no", "yes"], dtype="string"), str),
        (np.array(["no", "yes"]), str),
        (pd.Categorical(["no", "yes"], categories=["yes", "no"]), str),
        ([True, False], bool),
        (pd.Series([True, False], dtype="boolean"), bool),
        ([3, 1, 2], int),
        (pd.Series([3, 1], dtype="Int64"), int),
        (np.array([3, 1], dtype=np.uint8), int),
        ([1.0, -1.0], float),
    ],
)
def test_decode_restores_labels(y: Any, kind: type) -> None:
    series = as_target(y)
    target = Target.fit(series, "multiclass")
    target = Target.from_json(json.loads(json.dumps(target.to_json())))
    codes = target.encode(series)
    assert codes.dtype == np.int64
    assert set(codes.tolist()) == set(range(len(target.classes)))
    labels = target.decode(codes).tolist()
    assert labels == series.tolist()
    assert {type(label) for label in labels} == {type(label) for label in target.classes} == {kind}


def test_classes_are_sorted() -> None:
    assert Target.fit(pd.Series([10, 9, 8, 10]), "multiclass").classes == (8, 9, 10)


def test_regression_targets_are_standardized() -> None:
    y = pd.Series(np.random.default_rng(0).normal(1e6, 3.0, 1000))
    target = Target.fit(y, "regression")
    encoded = target.encode(y)
    assert encoded.dtype == np.float32
    assert abs(encoded.mean()) < 1e-6
    assert encoded.std() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(target.decode(encoded), y, rtol=0, atol=1e-5)
    again = Target.from_json(json.loads(json.dumps(target.to_json())))
    assert again == target
    assert again.encode(y).tobytes() == encoded.tobytes()


def test_constant_regression_target_has_scale_one() -> None:
    target = Target.fit(pd.Series([2.0, 2.0]), "regression")
    assert target.encode(pd.Series([2.0, 3.0])).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("target", "y", "message"),
    [
        (
            Target("multiclass", ("a", "b")),
            ["a", "c", "d", "c"],
            "y_val must be among 'a', 'b', but 3 rows have 'c', 'd'",
        ),
        (Target("binary", (0, 1)), ["0", "1"], "among 0, 1, but 2 rows have '0', '1'"),
        (Target("binary", (0, 1)), [0.5, 1.0], "but 1 rows have 0.5"),
        (Target("regression"), ["a"], "y_val must hold numbers for a regression, but holds str"),
        (Target("regression", scale=1e-20), [1e30], "y_val must be within float32's range"),
    ],
)
def test_unknown_labels_are_rejected(target: Target, y: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target.encode(as_target(y), "y_val")


def test_integers_and_whole_floats_are_the_same_labels() -> None:
    assert Target("binary", (0, 1)).encode(pd.Series([1.0, 0.0])).tolist() == [1, 0]
