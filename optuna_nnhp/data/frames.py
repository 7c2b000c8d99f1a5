"""Convert CSV files, arrays, DataFrames, tensors and lists to pandas objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence
from collections.abc import Sized
from difflib import get_close_matches
from io import BytesIO
import os
from pathlib import Path
import re
from typing import Any
import warnings
import zlib

import numpy as np
import pandas as pd

# pandas' own list and "?" (used by the UCI repository). In a categorical column nothing is lost,
# because missing values are a category of their own.
MISSING_MARKERS = (
    *("", "?", "#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null", "NaT"),
)
MAX_LISTED = 10
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zip", ".xz", ".zst", ".tar")  # that pandas reads
CHUNK_BYTES = 2**20  # bytes at a time
_LONE_CARRIAGE_RETURN = re.compile(rb"\r(?!\n)")


def format_list(names: Iterable[object], quote: bool = True) -> str:
    """Format names for an error or log line, at most ``MAX_LISTED`` of them.

    Args:
        names:
            The names.
        quote:
            Whether to write each name in quotes, as Python does.

    Example:
        >>> format_list(["a", "b"])
        "'a', 'b'"
        >>> format_list(range(12), quote=False)
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    items = list(names)
    # A cell can hold a long text; the message must stay one line.
    shown = [repr(item) if quote else str(item) for item in items[:MAX_LISTED]]
    shown = [text if len(text) <= 60 else text[:57] + "..." for text in shown]
    more = f" and {len(items) - MAX_LISTED:,} more" if len(items) > MAX_LISTED else ""
    return ", ".join(shown) + more


def read_csv(path: str | os.PathLike[str], target: str) -> tuple[pd.DataFrame, pd.Series[Any]]:
    """Read a comma-separated file whose first line names the columns.

    Args:
        path:
            The file, UTF-8; may be compressed in any way pandas knows by its ending.
        target:
            The column to predict.

    Returns:
        The other columns, **shape** (rows, columns - 1), and the target, **shape** (rows,).
        The texts in ``MISSING_MARKERS`` are missing values; blanks after a comma are dropped.

    Raises:
        FileNotFoundError:
            If there is no such file.
        ValueError:
            If the file is empty, is not UTF-8, is not a table, names a column twice, lacks the
            target, or has no other column or no row.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "homes.csv"
        ...     _ = file.write_text("rooms, town, price\\n3, Ulm, 200\\n?, Rome, 500\\n")
        ...     X, y = read_csv(file, "price")
        >>> X["rooms"].tolist(), X["town"].tolist(), y.tolist()
        ([3.0, nan], ['Ulm', 'Rome'], [200, 500])
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"The CSV file {str(file)!r} does not exist.")
    if file.is_dir():
        raise ValueError(f"The path must be that of a CSV file, but {str(file)!r} is a folder.")
    # Read the header first, so that a wrong target raises before a large file is read.
    header = _parse_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False)
    names = [str(name).strip() for name in header.iloc[0]]
    _check_header(names, target, file)
    frame = _parse_csv(
        file, header=0, names=names, index_col=False, na_values=list(MISSING_MARKERS)
    ).reset_index(drop=True)
    if frame.empty:
        raise ValueError(f"The CSV file {str(file)!r} has a header, but no rows.")
    return frame.drop(columns=target), frame[target]


def _parse_csv(file: Path, **options: Any) -> pd.DataFrame:
    """Call ``pandas.read_csv`` and raise one-line errors."""
    name = repr(str(file))
    try:
        with warnings.catch_warnings():
            # For rows longer than the header pandas only warns, and drops their last fields.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # low_memory=True guesses types chunk by chunk and can mix them in one column.
            frame: pd.DataFrame = pd.read_csv(
                _normalize_line_ends(file),
                skipinitialspace=True,
                encoding="utf-8-sig",
                low_memory=False,
                **options,
            )
    except pd.errors.EmptyDataError:
        raise ValueError(f"The CSV file {name} is empty.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A CSV file must be UTF-8 text, but {name} has the byte "
            f"0x{error.object[error.start]:02x} at position {error.start}."
        ) from None
    except pd.errors.ParserWarning:
        raise ValueError(
            f"The rows of a CSV file must not be longer than its header, but those of {name} are."
        ) from None
    except (pd.errors.ParserError, ValueError, OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The CSV file {name} cannot be read: {reason}") from error
    return frame


def _normalize_line_ends(file: Path) -> Path | BytesIO:
    """Return the file, or its corrected content if pandas would misread its line ends.

    After an empty line that ends with a single carriage return, pandas shifts the cells of the
    next row to the left if the first one is empty.
    """
    if file.suffix.lower() in COMPRESSED_SUFFIXES:
        return file
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if _LONE_CARRIAGE_RETURN.search(chunk + stream.peek(1)[:1]):
                content = file.read_bytes()
                return BytesIO(content.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    return file


def _check_header(names: list[str], target: str, file: Path) -> None:
    """Raise ValueError unless the names are unique and hold the target and another column."""
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise ValueError(
            f"Column names must be unique, but {str(file)!r} repeats {format_list(duplicates)}."
        )
    if target not in names:
        suggestions = get_close_matches(str(target), names, n=3)
        hint = f"; did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else "."
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            hint += " Is the file separated by something else than commas?"
        raise ValueError(
            f"The target {target!r} is not a column of {str(file)!r}{hint} "
            f"Columns: {format_list(names)}."
        )
    if len(names) == 1:
        raise ValueError(f"{str(file)!r} has no column besides the target {target!r}.")


def as_frame(X: Any, name: str = "X") -> pd.DataFrame:
    """Convert a table to a DataFrame with unique text names and rows counted from 0.

    Args:
        X:
            DataFrame, NumPy array, tensor or list of rows, **shape** (rows, columns). Columns
            without names are called ``x0``, ``x1``, ...
        name:
            Its name in error messages.

    Returns:
        The table, **shape** (rows, columns); cells are not copied where pandas can avoid it.

    Raises:
        ValueError:
            If it is not two-dimensional, is empty, or two columns share a name.

    Example:
        >>> as_frame([[1, "a"], [2, "b"]]).columns.tolist()
        ['x0', 'x1']
    """
    if isinstance(X, pd.DataFrame):
        frame = X.set_axis([str(column) for column in X.columns], axis=1).reset_index(drop=True)
        duplicates = frame.columns[frame.columns.duplicated()].unique()
        if len(duplicates):
            raise ValueError(
                f"Column names must be unique, but {name} repeats {format_list(duplicates)}."
            )
    else:
        values = _array_or_list(X, name)
        shape = _shape_of(values, name)
        if len(shape) != 2:
            raise ValueError(f"{name} must be 2-D (rows, columns), but has shape {shape}.")
        frame = pd.DataFrame(values, columns=pd.Index([f"x{i}" for i in range(shape[1])]))
    if 0 in frame.shape:
        raise ValueError(
            f"{name} must have at least one row and one column, but has shape {frame.shape}."
        )
    changed = {
        str(c): _infer_dtype(frame[c], f"Column {str(c)!r} of {name}")
        for c in frame
        if frame[c].dtype == object or not getattr(frame[c].dtype, "isnative", True)
    }
    return frame.assign(**changed) if changed else frame


def as_target(y: Any, name: str = "y") -> pd.Series[Any]:
    """Convert labels or numbers to a Series with rows counted from 0.

    Args:
        y:
            Series, one-column DataFrame, NumPy array, tensor or list, **shape** (rows,) or
            (rows, 1).
        name:
            Its name in error messages.

    Returns:
        The values, **shape** (rows,).

    Raises:
        ValueError:
            If it has another shape or is empty.

    Example:
        >>> as_target([[1], [0]]).tolist()
        [1, 0]
    """
    values = _array_or_list(y, name)
    shape = _shape_of(values, name)
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
        raise ValueError(f"{name} must be 1-D (rows,), but has shape {shape}.")
    if shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, but has shape {shape}.")
    if isinstance(values, pd.DataFrame):
        series = values.iloc[:, 0]
    elif isinstance(values, np.ndarray):
        series = pd.Series(values.reshape(-1))
    elif isinstance(values, list) and len(shape) == 2:
        series = pd.Series([row[0] for row in values])
    else:
        series = pd.Series(values)
    return _infer_dtype(series.reset_index(drop=True), name)


def check_consistent_length(X: Sized, y: Sized, names: Sequence[str] = ("X", "y")) -> None:
    """Check that there is one label for each row.

    Args:
        X:
            The table, **shape** (rows, columns).
        y:
            The labels, **shape** (rows,).
        names:
            Their names in the error message.

    Raises:
        ValueError:
            If the lengths differ.

    Example:
        >>> check_consistent_length(as_frame([[1], [2]]), as_target([0, 1]))
    """
    if len(X) != len(y):
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same number of rows, "
            f"but have {len(X):,} and {len(y):,}."
        )


def align_columns(
    X: Any, columns: Sequence[str], needed: Iterable[str], name: str = "X"
) -> pd.DataFrame:
    """Select and order a table's columns as in another table.

    Args:
        X:
            The table, **shape** (rows, columns). A DataFrame is matched by names (extra columns
            are dropped, the order is free), anything else by position.
        columns:
            The names of the columns to return.
        needed:
            Names of columns that must be present; other columns may be absent.
        name:
            Name of the table in error messages.

    Raises:
        ValueError:
            If a needed column is absent, or the number of unnamed columns differs.

    Example:
        >>> align_columns([[1, 2]], ["a", "b"], ["a", "b"]).columns.tolist()
        ['a', 'b']
    """
    frame = as_frame(X, name)
    if not isinstance(X, pd.DataFrame):
        if frame.shape[1] != len(columns):
            raise ValueError(
                f"{name} must have {len(columns):,} columns, but has {frame.shape[1]:,}."
            )
        return frame.set_axis(list(columns), axis=1)
    absent = [column for column in needed if column not in frame.columns]
    if absent:
        raise ValueError(
            f"{name} must have the columns of the training data, but lacks {format_list(absent)}."
        )
    return frame[[column for column in columns if column in frame.columns]]


def as_array(values: Any, name: str) -> Any:
    """Convert a tensor to an array, and an array to the native byte order; return others as is.

    Args:
        values:
            Anything.
        name:
            Its name in error messages.

    Raises:
        ValueError:
            If a tensor is sparse or has no data, or an array has structured cells.

    Example:
        >>> as_array(np.array([1, 2], dtype=">i4"), "X").dtype.isnative
        True
    """
    if hasattr(values, "detach"):
        kind = str(getattr(values, "dtype", ""))
        plain = values.float() if kind == "torch.bfloat16" else values  # which NumPy lacks
        try:
            return plain.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} must be a tensor that NumPy can hold (dense, with data), but is of "
                f"{kind}, {values.layout} on {values.device}."
            ) from error
    if isinstance(values, np.ndarray):
        if values.dtype.names:
            raise ValueError(
                f"{name} must have cells of one type, but these have the fields "
                f"{format_list(values.dtype.names)}: use a DataFrame."
            )
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    return values


def _array_or_list(values: Any, name: str) -> Any:
    """Convert tensors to arrays and other sequences to lists; keep pandas and NumPy objects."""
    values = as_array(values, name)
    return list(values) if isinstance(values, tuple | range) else values


def _infer_dtype(series: pd.Series[Any], what: str) -> pd.Series[Any]:
    """Convert cells of one type to that type."""
    if isinstance(series.dtype, np.dtype) and not series.dtype.isnative:
        return series.astype(series.dtype.newbyteorder("="))
    try:
        series.isna()
    except ArithmeticError:  # the only thing that cannot be asked whether it is missing
        raise ValueError(
            f"{what} must hold numbers, texts, booleans or dates, but holds Decimal('sNaN')."
        ) from None
    return series.infer_objects()


def _shape_of(values: Any, name: str) -> tuple[int, ...]:
    """Return the shape, or raise ValueError for rows of different lengths."""
    try:
        return tuple(np.shape(values))
    except ValueError:
        raise ValueError(f"The rows of {name} must all have the same length.") from None
