from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_nnhp.data.splits import train_validation_split


def table(n: int) -> pd.DataFrame:
    return pd.DataFrame({"row": np.arange(n)})


@pytest.mark.parametrize("task", ["binary", "regression"])
@pytest.mark.parametrize(("fraction", "valid"), [(0.2, 20), (0.201, 21), (0.9, 90)])
def test_split_returns_all_rows_once(task: str, fraction: float, valid: int) -> None:
    y = pd.Series(np.arange(100) % 2)
    train_X, train_y, valid_X, valid_y = train_validation_split(
        table(100), y, fraction, task, seed=3
    )
    assert len(valid_X) == valid
    rows = np.concatenate([train_X["row"], valid_X["row"]])
    assert sorted(rows.tolist()) == list(range(100))
    np.testing.assert_array_equal(train_y, train_X["row"] % 2)
    np.testing.assert_array_equal(valid_y, valid_X["row"] % 2)
    assert valid_X.index.tolist() == valid_y.index.tolist() == list(range(valid))


def test_seed_determines_the_split() -> None:
    y = pd.Series(np.arange(100) % 2)
    rows = [
        train_validation_split(table(100), y, 0.2, "binary", seed)[2]["row"].tolist()
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]


def test_classes_are_stratified() -> None:
    y = pd.Series(["a"] * 90 + ["b"] * 10)
    _, _, _, valid_y = train_validation_split(table(100), y, 0.3, "binary", seed=0)
    assert valid_y.value_counts().to_dict() == {"a": 27, "b": 3}


@pytest.mark.parametrize("fraction", [0.2, 0.8])
@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_in_both_parts(fraction: float, seed: int) -> None:
    y = pd.Series(np.repeat(["a", "b", "c", "d", "e"], [90, 2, 3, 2, 3]))
    train_X, train_y, valid_X, valid_y = train_validation_split(
        table(100), y, fraction, "multiclass", seed
    )
    assert set(train_y) == set(valid_y) == set("abcde")
    assert len(valid_y) == round(100 * fraction)
    assert len({*train_X["row"], *valid_X["row"]}) == 100
    assert y[train_X["row"]].tolist() == train_y.tolist()


def test_smallest_splits_have_every_class() -> None:
    y = pd.Series(np.repeat(np.arange(10), 2))
    for seed in range(10):
        _, train_y, _, valid_y = train_validation_split(table(20), y, 0.5, "multiclass", seed)
        assert sorted(train_y) == sorted(valid_y) == list(range(10))


def test_given_validation_part_is_used() -> None:
    X, y = table(3), pd.Series([0, 1, 1])
    train_X, train_y, valid_X, valid_y = train_validation_split(
        X, y, ([[7]], [1]), "binary", seed=0
    )
    assert train_X is X
    assert train_y is y
    assert valid_X.to_numpy().tolist() == [[7]]
    assert valid_y.tolist() == [1]


@pytest.mark.parametrize(
    ("y", "validation", "task", "message"),
    [
        ([0, 1] * 5, 0.0, "binary", "`validation` must be between 0 and 1, but got 0.0"),
        ([0, 1] * 5, 1, "binary", "must be between 0 and 1, but got 1"),
        ([0, 1] * 5, float("nan"), "binary", "must be between 0 and 1, but got nan"),
        ([0, 1] * 5, True, "binary", r"a fraction or \(X_val, y_val\), but got bool"),
        ([0, 1] * 5, "0.2", "binary", r"a fraction or \(X_val, y_val\), but got str"),
        ([0, 1] * 5, (1, 2, 3), "binary", "but got a tuple of 3"),
        ([0, 1] * 5, ([[1], [2]], [0]), "binary", "X_val and y_val must .* have 2 and 1"),
        ([0, 1] * 5, ([1, 2], [0, 1]), "binary", "X_val must be 2-D"),
        ([0, 1] * 5, ([[1]], [[0, 1]]), "binary", "y_val must be 1-D"),
        (["a", "b", "a"], 0.2, "binary", "at least 2 rows, one for each part, but 'b' has 1"),
        ([0, 1, 2] * 3, 0.2, "multiclass", "of the 3 classes, but 9 rows give 7 .* and 2 for"),
        ([0, 1, 2] * 3, 0.8, "multiclass", "of the 3 classes, but 9 rows give 1 .* and 8 for"),
        ([0.5, 1.5], 0.2, "regression", "at least 2 rows, but of 2 rows 1 are for validation"),
    ],
)
def test_invalid_splits_are_rejected(
    y: list[Any], validation: Any, task: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_validation_split(table(len(y)), pd.Series(y), validation, task, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_invalid_seeds_are_rejected(seed: int) -> None:
    with pytest.raises(ValueError, match="`seed` must be from 0"):
        train_validation_split(table(4), pd.Series([0, 1, 0, 1]), 0.5, "binary", seed)
