"""What property tests found: data that were read wrongly, or refused in no words of ours."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from optuna_nnhp.data.arrays import ArrayPreprocessor
from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import read_csv
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.supervised import prepare_table
from optuna_nnhp.data.target import Target
from optuna_nnhp.data.target import resolve_task


@pytest.mark.parametrize(
    "cell",
    [
        datetime.timedelta(-3, 5),
        np.float32(0.1),
        np.timedelta64(5, "s"),
        datetime.date(2024, 1, 1),
    ],
    ids=repr,
)
def test_a_cell_is_parsed_the_same_in_one_row_and_in_many(cell: Any) -> None:
    cells = pd.Series(["x", cell, "y", cell], dtype=object)
    preprocessor = Preprocessor.fit(pd.DataFrame({"a": cells}))
    alone = pd.DataFrame({"a": pd.Series([cell], dtype=object)})
    whole = preprocessor.transform(pd.DataFrame({"a": cells}))
    assert preprocessor.transform(alone).tolist() == whole[1:2].tolist()
    assert whole[1].sum() == 1.0


def test_an_empty_first_cell_after_an_empty_line_stays_the_first(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for ends in (b"\r", b"\n\r"):
        path.write_bytes(b"a,b\n1,2\n" + ends + b",3\n4,5\n")
        X, y = read_csv(path, "b")
        assert y.tolist() == [2, 3, 5] and X["a"].isna().tolist() == [False, True, False]


def test_numbers_whose_square_underflows_are_zero() -> None:
    with pytest.raises(ValueError, match="At least one column of X must vary"):
        Preprocessor.fit(pd.DataFrame({"a": [1e-166, 2e-261, 1e-200]}))


def test_float16_labels_are_classes() -> None:
    y = as_target(np.array([1, 2, 1], dtype=np.float16))
    assert Target.fit(y, "binary").encode(y).tolist() == [0, 1, 0]


def test_other_byte_orders_are_converted() -> None:
    X, y = np.arange(20.0).reshape(10, 2), [0, 1] * 5
    expected = prepare_table(X, y)
    for other in (X.astype(">f8"), pd.DataFrame(X.astype(">f8"), columns=["x0", "x1"])):
        found = prepare_table(other, np.array(y, dtype=">i4"))
        assert found.train_X.tolist() == expected.train_X.tolist()
        assert found.train_y.tolist() == expected.train_y.tolist()


def test_bfloat16_tensors_are_converted() -> None:
    tensor = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)
    assert as_frame(tensor)["x0"].tolist() == [1.0, 2.0]
    assert ArrayPreprocessor.fit(tensor).dtype == "float32"


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.zeros(3, 2).to_sparse(), r"X must be a tensor that NumPy can hold \(dense, with d"),
        (torch.zeros(3, 2, device="meta"), "X must be a tensor that NumPy can hold .* on meta"),
        (np.zeros(3, dtype=[("a", float)]), "X must have cells of one type, .* the fields 'a'"),
        (pd.DataFrame({"a": [Decimal("sNaN"), 1]}), "Column 'a' of X must hold numbers"),
        (pd.DataFrame({"a": ["x", 1j]}), "must hold numbers, .* 'a' holds complex numbers"),
    ],
    ids=["sparse", "meta", "fields", "sNaN", "complex"],
)
def test_unsupported_data_is_rejected(X: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessor.fit(X)


def test_masked_arrays_are_rejected() -> None:
    with pytest.raises(ValueError, match="X must have no masked numbers, but has 2"):
        ArrayPreprocessor.fit(np.ma.masked_less(np.array([[1.0], [-1.0], [-2.0]]), 0))


def test_a_task_that_is_not_a_string_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"is not a task; |is not a task\. Known"):
        resolve_task(as_target(["a", "b"]), np.array([1, 2]))  # type: ignore[arg-type]
