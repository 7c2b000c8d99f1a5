from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_nnhp.data.frames import MISSING_MARKERS
from optuna_nnhp.data.frames import align_columns
from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import check_consistent_length
from optuna_nnhp.data.frames import format_list
from optuna_nnhp.data.frames import read_csv


class Tensor:
    """Has the three methods of a tensor on another device that needs a gradient."""

    def __init__(self, values: np.ndarray[Any, Any], steps: tuple[str, ...] = ()) -> None:
        self.values = values
        self.steps = steps

    def detach(self) -> Tensor:
        return Tensor(self.values, (*self.steps, "detach"))

    def cpu(self) -> Tensor:
        return Tensor(self.values, (*self.steps, "cpu"))

    def numpy(self) -> np.ndarray[Any, Any]:
        assert self.steps == ("detach", "cpu")
        return self.values


def test_csv_becomes_table_and_target(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes("\ufeffage, city, y\n39, Köln, <=50K\n?, 'x', >50K\n1,NA,>50K\n".encode())
    X, y = read_csv(file, "y")
    assert X.columns.tolist() == ["age", "city"]
    assert X["age"].dtype == np.float64
    assert X["age"].isna().tolist() == [False, True, False]
    assert X["city"].isna().tolist() == [False, False, True]
    assert X["city"][0] == "Köln"
    assert y.tolist() == ["<=50K", ">50K", ">50K"]


@pytest.mark.parametrize("marker", MISSING_MARKERS)
def test_missing_markers_become_missing_values(tmp_path: Path, marker: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"a,b,y\n1,x,0\n{marker},{marker},1\n")
    X, _ = read_csv(file, "y")
    assert X.isna().to_numpy().tolist() == [[False, False], [True, True]]


def test_compressed_csv_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "t.csv.gz"
    file.write_bytes(gzip.compress(b"a,y\n1,2\n"))
    X, y = read_csv(str(file), "y")
    assert X.to_numpy().tolist() == [[1]]
    assert y.tolist() == [2]


@pytest.mark.parametrize(
    ("name", "content", "target", "message"),
    [
        ("t.csv", b"", "y", "The CSV file '.*t.csv' is empty"),
        ("t.csv", b"\n\n", "y", "is empty"),
        ("t.csv", b"a,y\n\xff\xfe,1\n", "y", r"must be UTF-8 text, but .* has the byte 0xff"),
        ("t.csv", b"a,y\n1,2,3\n4,5,6\n", "y", "must not be longer than its header"),
        ("t.csv", b"a,y\n1,2\n4,5,6\n", "y", "cannot be read: .*Expected 2 fields in line 3"),
        ("t.csv", b'a,y\n1,"2\n', "y", "cannot be read: .*EOF inside string"),
        ("t.csv.gz", b"not compressed", "y", "cannot be read: .*gzip"),
        (
            "t.csv",
            b"price,size\n1,2\n",
            "pric",
            r"'pric' is not a column .*did you mean 'price'\?",
        ),
        ("t.csv", b"a,b\n1,2\n", "y", r"'y' is not a column of .*\. Columns: 'a', 'b'\."),
        ("t.csv", b"y\n1\n", "y", "has no column besides the target 'y'"),
        ("t.csv", b"a,y\n", "y", "has a header, but no rows"),
        ("t.csv", b"a,a,y\n1,2,3\n", "y", "must be unique, but .* repeats 'a'"),
    ],
)
def test_invalid_csv_files_are_rejected(
    tmp_path: Path, name: str, content: bytes, target: str, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_csv(file, target)
    assert "\n" not in str(error.value)


def test_missing_csv_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"The CSV file '.*no.csv' does not exist"):
        read_csv(tmp_path / "no.csv", "y")
    with pytest.raises(ValueError, match="is a folder"):
        read_csv(tmp_path, "y")


def test_csv_errors_list_few_columns(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(",".join(f"column{i}" for i in range(5000)) + "\n")
    with pytest.raises(ValueError, match="and 4,990 more") as error:
        read_csv(file, "y")
    assert len(str(error.value)) < 500


def test_format_list_shortens_long_lists() -> None:
    assert len(format_list(["x" * 1000])) == 60


@pytest.mark.parametrize(
    "X",
    [
        np.array([[1.0, 2.0], [3.0, 4.0]]),
        [[1.0, 2.0], [3.0, 4.0]],
        ((1.0, 2.0), (3.0, 4.0)),
        [np.array([1.0, 2.0]), np.array([3.0, 4.0])],
        np.array([[1.0, 2.0], [3.0, 4.0]], dtype=object),
        Tensor(np.array([[1.0, 2.0], [3.0, 4.0]])),
        pd.DataFrame({"x0": [1.0, 3.0], "x1": [2.0, 4.0]}, index=[7, 7]),
    ],
)
def test_as_frame_accepts_tables_of_many_types(X: Any) -> None:
    expected = pd.DataFrame({"x0": [1.0, 3.0], "x1": [2.0, 4.0]})
    pd.testing.assert_frame_equal(as_frame(X), expected)


def test_as_frame_does_not_change_its_argument() -> None:
    X = pd.DataFrame({1: [1, 2], "b": np.array([1, None], dtype=object)}, index=[5, 6])
    before = X.copy()
    frame = as_frame(X)
    assert frame.columns.tolist() == ["1", "b"]
    assert frame["b"].dtype == np.float64
    pd.testing.assert_frame_equal(X, before)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"X must be 2-D \(rows, columns\), but has shape \(3,\)"),
        (np.zeros((2, 2, 2)), r"X must be 2-D .* \(2, 2, 2\)"),
        (pd.Series([1]), r"X must be 2-D .* \(1,\)"),
        (None, r"X must be 2-D .* \(\)"),
        ("file.csv", r"X must be 2-D .* \(\)"),
        ([], r"X must be 2-D .* \(0,\)"),
        ([[1, 2], [3]], "The rows of X must all have the same length"),
        (np.zeros((0, 3)), r"at least one row and one column, but has shape \(0, 3\)"),
        (np.zeros((3, 0)), r"at least one row and one column, but has shape \(3, 0\)"),
        (pd.DataFrame(), r"at least one row and one column, but has shape \(0, 0\)"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "must be unique, but X repeats 'a'"),
        (pd.DataFrame([[1, 2]], columns=["1", 1]), "must be unique, but X repeats '1'"),
    ],
)
def test_as_frame_rejects_invalid_tables(X: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_frame(X)


@pytest.mark.parametrize(
    "y",
    [
        [0, 1],
        (0, 1),
        range(2),
        [[0], [1]],
        np.array([0, 1]),
        np.array([[0], [1]]),
        Tensor(np.array([0, 1])),
        pd.Series([0, 1], index=["a", "b"]),
        pd.DataFrame({"y": [0, 1]}),
    ],
)
def test_as_target_accepts_columns_of_many_types(y: Any) -> None:
    series = as_target(y)
    assert series.dtype == np.int64
    assert series.tolist() == [0, 1]
    assert series.index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((3, 2)), r"y must be 1-D \(rows,\), but has shape \(3, 2\)"),
        (np.zeros((3, 1, 1)), r"y must be 1-D .* \(3, 1, 1\)"),
        (5, r"y must be 1-D .* \(\)"),
        ([], r"y must have at least one row"),
        ([[1], [2, 3]], "The rows of y must all have the same length"),
    ],
)
def test_as_target_rejects_invalid_columns(y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_target(y)


def test_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"X and y must .* but have 2 and 3"):
        check_consistent_length(as_frame([[1], [2]]), as_target([1, 2, 3]))


def test_align_columns_matches_by_name_or_position() -> None:
    X = pd.DataFrame({"c": [3], "b": [2], "a": [1]})
    assert align_columns(X, ["a", "b"], ["a"]).columns.tolist() == ["a", "b"]
    assert align_columns(X, ["a", "z"], ["a"]).columns.tolist() == ["a"]
    with pytest.raises(ValueError, match=r"X_val must have the columns .* but lacks 'y', 'z'"):
        align_columns(X, ["a", "y", "z"], ["a", "y", "z"], "X_val")
    with pytest.raises(ValueError, match="X must have 2 columns, but has 3"):
        align_columns([[1, 2, 3]], ["a", "b"], [])
