from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_nnhp.data.columns import MAX_CATEGORIES
from optuna_nnhp.data.columns import Column
from optuna_nnhp.data.columns import category_codes
from optuna_nnhp.data.columns import check_values
from optuna_nnhp.data.columns import fit_column
from optuna_nnhp.data.columns import infer_column_kind
from optuna_nnhp.data.columns import numeric_features
from optuna_nnhp.data.parsing import factorize_texts


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, 2], "numeric"),
        ([1.5, None], "numeric"),
        (["1", "2.5", " -3e4 "], "numeric"),
        (["20240101", "20240102"], "numeric"),
        (["1999", "2024"], "numeric"),
        (["1", "?", None], "numeric"),
        (pd.Series([1, None], dtype="Int64"), "numeric"),
        (pd.Series([0, 1], dtype=pd.SparseDtype(int)), "numeric"),
        (pd.to_timedelta(["1h", "2h"]), "numeric"),
        ([True, False], "boolean"),
        ([True, None, False], "boolean"),
        (["True", "FALSE", "?"], "boolean"),
        (pd.Series([True, None], dtype="boolean"), "boolean"),
        (["yes", "no"], "categorical"),
        (["a", 1, None], "categorical"),
        (["may", "june"], "categorical"),
        (["1-2-3", "4-5-6"], "categorical"),
        (["10:30", "11:45"], "categorical"),
        (["1.2.3", "1.10.0"], "categorical"),
        (["A4", "B5"], "categorical"),
        (["2024-01-01", "soon"], "categorical"),
        (["2024-01-01", "31.12.2024"], "categorical"),
        (["2024-13-01", "2024-14-01"], "categorical"),
        (pd.Categorical([1, 2]), "categorical"),
        (pd.Categorical(["2024-01-01"]), "categorical"),
        (pd.cut(pd.Series([1, 2]), 2), "categorical"),
        (["2024-01-01", None, "2023-12-31"], "date"),
        (["2024-01-01T10:00:00Z", "2024-01-01 12:00"], "date"),
        (["12/31/2024", "1/5/2024"], "date"),
        (["31/12/2024", "1/5/2024"], "date"),
        (["1.2.2024", "31.12.2024 "], "date"),
        (["3 Jan 2024", "14 Feb 2023"], "date"),
        (["2024-01-01", "9999-12-31"], "date"),
        (pd.to_datetime(["2024-01-01"]), "date"),
        (pd.to_datetime(["2024-01-01"]).tz_localize("Europe/Berlin"), "date"),
        (pd.period_range("2024-01", periods=2, freq="M"), "date"),
        ([datetime.date(2024, 1, 1), None], "date"),
    ],
)
def test_column_kinds_are_inferred(cells: Any, kind: str) -> None:
    assert infer_column_kind(pd.Series(cells))[0] == kind


@pytest.mark.parametrize(
    ("cells", "held"),
    [([[1], [2]], "list"), (["a", {}], "dict"), ([1j, 2j], "complex128")],
)
def test_unsupported_cells_are_rejected(cells: list[Any], held: str) -> None:
    message = f"The columns of X must hold .* but 'c' holds {held}"
    with pytest.raises(ValueError, match=message):
        fit_column(pd.Series(cells, name="c"))


@pytest.mark.parametrize(
    ("cells", "written"),
    [
        (["5/1/2024", "6/2/2024"], ["2024-05-01", "2024-06-02"]),
        (["5/13/2024", "6/2/2024"], ["2024-05-13", "2024-06-02"]),
        (["13/5/2024", "2/6/2024"], ["2024-05-13", "2024-06-02"]),
        (["2024-01-01T00:30:00+02:00", "2024-06-02"], ["2023-12-31", "2024-06-02"]),
    ],
)
def test_date_formats_are_inferred(cells: list[str], written: list[str]) -> None:
    column = fit_column(pd.Series(cells, name="d"))
    days, _ = numeric_features(column, pd.Series(cells))
    expected = pd.to_datetime(written)
    month = days[:, column.parts.index("month")]
    np.testing.assert_array_equal(month, expected.month)
    whole = np.floor(days[:, column.parts.index("days")])
    np.testing.assert_array_equal(whole, (expected - pd.Timestamp(0)).days)


def test_constant_date_parts_are_dropped() -> None:
    cells = pd.Series(["2024-02-29 18:00", "2024-03-01 18:00", None], name="d")
    column = fit_column(cells)
    # Year and hour are constant here.
    assert column.parts == ("month", "day", "weekday", "days")
    assert column.missing
    values, absent = numeric_features(column, cells)
    assert values[0].tolist() == [2, 29, 3, 19782.75]
    assert np.isnan(values[2]).all()
    assert absent.tolist() == [False, False, True]
    # The same dates in another guise.
    stamps, _ = numeric_features(column, pd.to_datetime(cells))
    np.testing.assert_array_equal(stamps, values)
    zoned, _ = numeric_features(column, pd.to_datetime(cells).dt.tz_localize("UTC"))
    np.testing.assert_array_equal(zoned, values)


def test_far_dates_keep_their_distance() -> None:
    cells = pd.Series(["9999-12-31", "0001-01-01"], name="d")
    values, _ = numeric_features(fit_column(cells), cells)
    assert values[0, -1] - values[1, -1] == 3652058


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([True, False, None], [1, 0, np.nan]),
        (["TRUE", "false", "?"], [1, 0, np.nan]),
        ([1, 0, None], [1, 0, np.nan]),
        ([1.0, 0.0, np.nan], [1, 0, np.nan]),
        (pd.Series([True, False, None], dtype="boolean"), [1, 0, np.nan]),
        (["1", "0", ""], [1, 0, np.nan]),
    ],
)
def test_boolean_texts_are_read(cells: Any, expected: list[float]) -> None:
    values, absent = numeric_features(Column("b", "boolean", ("",)), pd.Series(cells))
    np.testing.assert_array_equal(values[:, 0], expected)
    assert absent.tolist() == [False, False, True]


def test_unreadable_cells_count_as_missing(log: pytest.LogCaptureFixture) -> None:
    column = fit_column(pd.Series(["1", "2"], name="n"))
    values, absent = numeric_features(column, pd.Series(["3", "many", "many", None]), "X_val")
    np.testing.assert_array_equal(values[:, 0], [3, np.nan, np.nan, np.nan])
    assert absent.tolist() == [False, True, True, True]
    assert [record.getMessage() for record in log.records] == [
        "Column 'n' of X_val is numeric, but 2 of its cells are not; they count as missing. "
        "The first one is 'many'."
    ]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([7, 7], Column("c", "constant", date_format="")),
        (["x", "x"], Column("c", "constant")),
        ([None, None], Column("c", "constant")),
        ([7, None], Column("c", "numeric", missing=True)),
        (["x", None], Column("c", "categorical", missing=True, categories=("x",))),
    ],
)
def test_constant_columns_have_no_features(cells: list[Any], expected: Column) -> None:
    assert fit_column(pd.Series(cells, name="c")) == expected


def test_whole_floats_are_the_same_category_as_integers() -> None:
    column = fit_column(pd.Series(pd.Categorical([1, 2, 3]), name="c"))
    assert column.categories == ("1", "2", "3")
    assert category_codes(column, pd.Series([3.0, None, 1.0])).tolist() == [2, -1, 0]


def test_unseen_and_missing_cells_have_codes() -> None:
    few = Column("c", "categorical", categories=("a", "b"))
    assert category_codes(few, pd.Series(["b", "z", None])).tolist() == [1, -1, -1]
    many = Column("c", "categorical", categories=("a", "b"), infrequent=True)
    assert category_codes(many, pd.Series(["b", "z", None])).tolist() == [1, 2, 2]
    full = Column("c", "categorical", categories=("a", "b"), infrequent=True, missing=True)
    assert category_codes(full, pd.Series(["b", "z", None])).tolist() == [1, 2, 3]
    # All missing is fine at prediction, whatever type pandas gives it.
    assert category_codes(full, pd.Series([None, np.nan])).tolist() == [3, 3]


def test_texts_are_factorized() -> None:
    codes, values = factorize_texts(pd.Series(["a ", "NA", "a", None, 2.0, 2, True], dtype=object))
    assert codes.tolist() == [0, -1, 0, -1, 1, 1, 2]
    assert values.tolist() == ["a", "2", "True"]


@pytest.mark.parametrize("cells", [[1, True, "x"], [True, 1, "x"]])
def test_true_and_one_are_different_texts(cells: list[Any]) -> None:
    codes, values = factorize_texts(pd.Series(cells, dtype=object))
    assert values[codes].tolist() == [str(cell) for cell in cells]


def test_frequent_categories_are_kept(log: pytest.LogCaptureFixture) -> None:
    often = [f"often{i:02}" for i in range(30) for _ in range(5)]
    twice = [f"twice{i:03}" for i in range(300) for _ in range(2)]
    once = [f"once{i}" for i in range(500)]
    column = fit_column(pd.Series([*once, *twice, *often], name="c"))
    assert column.infrequent
    assert len(column.categories) == MAX_CATEGORIES - 1
    assert set(often) <= set(column.categories)
    assert not set(once) & set(column.categories)
    assert len(log.records) == 1
    assert "'c' has 830 distinct texts: the 99 most" in log.text


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"a": [1.0, 2.0], "b": [np.nan, np.nan]}, "Every column of X .* these have none: 'b'"),
        ({"a": ["?", None], "b": [None, None]}, "Every column of X .* these have none: 'a', 'b'"),
        ({"a": [1.0, np.inf, -np.inf]}, "column 'a' of X has 2 infinite, the first in row 1"),
        ({"a": pd.array([1.0, np.inf], dtype="Float64")}, "column 'a' of X has 1 infinite"),
    ],
)
def test_invalid_columns_are_rejected(frame: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_values(pd.DataFrame(frame))


def test_infinity_as_text_is_rejected() -> None:
    with pytest.raises(ValueError, match="column 'a' of X has 1 infinite, the first in row 1"):
        fit_column(pd.Series(["1", "inf"], name="a"))
