"""Parse table cells of any type as texts, numbers or timestamps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pandas as pd
from pandas.api import types

from optuna_nnhp.data.frames import MISSING_MARKERS

BOOLEAN_TEXTS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}


def is_text_column(series: pd.Series[Any], name: str = "X") -> bool:
    """Return whether cells are texts, not numbers, booleans, dates or time spans.

    Args:
        series:
            The column, **shape** (rows,).
        name:
            Name of the table in error messages.

    Raises:
        ValueError:
            If the cells are complex numbers.

    Example:
        >>> is_text_column(pd.Series(["a"])), is_text_column(pd.Series([1]))
        (True, False)
    """
    dtype = series.dtype
    if types.is_complex_dtype(dtype):
        raise _unsupported_type_error(series, str(dtype), name)
    if isinstance(dtype, pd.CategoricalDtype) or types.is_object_dtype(dtype):
        return True
    number = types.is_numeric_dtype(dtype) or types.is_timedelta64_dtype(dtype)
    return not (number or types.is_bool_dtype(dtype) or types.is_datetime64_any_dtype(dtype))


def factorize_texts(
    series: pd.Series[Any], name: str = "X"
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the distinct texts of a column, and the position of each row's text.

    Whole numbers lose their ``.0``: pandas turns integers into floats when a value is missing.

    Args:
        series:
            The column, **shape** (rows,).
        name:
            Name of the table in error messages.

    Returns:
        For each row the position of its text, **shape** (rows,), -1 where it is missing; and the
        texts in the order of their first row, **shape** (distinct,), without surrounding blanks.

    Raises:
        ValueError:
            If the cells are lists or the like.

    Example:
        >>> codes, values = factorize_texts(pd.Series(["b", "?", "a", " b"]))
        >>> codes.tolist(), values.tolist()
        ([0, -1, 1, 0], ['b', 'a'])
    """
    try:
        codes, distinct = pd.factorize(series)
    except TypeError:
        held = next((type(cell).__name__ for cell in series if not isinstance(cell, Hashable)), "")
        raise _unsupported_type_error(
            series, held or "cells that cannot be compared", name
        ) from None
    if types.is_object_dtype(series.dtype) and any(
        isinstance(cell, complex | np.complexfloating) for cell in distinct
    ):
        raise _unsupported_type_error(series, "complex numbers", name)
    if types.infer_dtype(series, skipna=True).startswith("mixed"):
        # For pandas, True and 1 are equal, so their text would depend on the order of the rows.
        codes, distinct = pd.factorize(series.map(_cell_to_text, na_action="ignore"))
    cells = np.asarray(distinct, dtype=object)
    if not isinstance(series.dtype, pd.StringDtype):
        cells = np.array([_cell_to_text(cell) for cell in cells], dtype=object)
    stripped = pd.Series(cells, dtype=object).str.strip()
    again, values = pd.factorize(stripped.where(~stripped.isin(MISSING_MARKERS), None))
    # A missing row has the index -1, which selects the appended -1.
    return np.append(again, -1)[codes].astype(np.int64), np.asarray(values, dtype=object)


def parse_numbers(values: NDArray[Any]) -> NDArray[np.float64]:
    """Parse texts as numbers; NaN for other texts.

    Args:
        values:
            Texts, **shape** (n,).

    Returns:
        **Shape** (n,).

    Example:
        >>> parse_numbers(np.array(["1e3", "one"], dtype=object)).tolist()
        [1000.0, nan]
    """
    parsed = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce")
    return np.asarray(parsed.to_numpy(np.float64, na_value=np.nan))


def parse_dates(values: NDArray[Any], date_format: str) -> pd.DatetimeIndex:
    """Parse texts as timestamps, NaT for other texts; UTC if a text has no time zone.

    Args:
        values:
            Texts, **shape** (n,).
        date_format:
            As for ``pandas.to_datetime``.

    Returns:
        Moments without a time zone, **shape** (n,).

    Example:
        >>> parse_dates(np.array(["31.12.2024"], dtype=object), "%d.%m.%Y")[0]
        Timestamp('2024-12-31 00:00:00')
    """
    cells = pd.Series(values, dtype=object)
    parsed = pd.to_datetime(cells, format=date_format, errors="coerce", utc=True)
    return pd.DatetimeIndex(parsed).tz_localize(None)


def to_numbers(
    series: pd.Series[Any], boolean: bool = False, name: str = "X"
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Convert cells to numbers; time spans become seconds.

    Args:
        series:
            The cells, **shape** (rows,).
        boolean:
            Whether texts are read as true and false instead of as numbers.
        name:
            Name of the table in error messages.

    Returns:
        Numbers, **shape** (rows,), NaN where missing or unreadable; and which cells are not
        missing, **shape** (rows,).

    Example:
        >>> values, present = to_numbers(pd.Series(["True", None, "maybe"]), boolean=True)
        >>> values.tolist(), present.tolist()
        ([1.0, nan, nan], [True, False, True])
    """
    present = series.notna().to_numpy()
    if types.is_timedelta64_dtype(series.dtype):
        return series.dt.total_seconds().to_numpy(np.float64), present
    if types.is_datetime64_any_dtype(series.dtype):
        return np.full(len(series), np.nan), present
    if not is_text_column(series, name):
        return series.to_numpy(np.float64, na_value=np.nan), present
    codes, values = factorize_texts(series, name)
    if boolean:
        parsed = np.array([BOOLEAN_TEXTS.get(text.lower(), np.nan) for text in values], np.float64)
    else:
        parsed = parse_numbers(values)
    return np.append(parsed, np.nan)[codes], codes >= 0


def to_timestamps(
    series: pd.Series[Any], date_format: str, name: str = "X"
) -> tuple[pd.DatetimeIndex, NDArray[np.bool_]]:
    """Convert cells to timestamps in UTC.

    Args:
        series:
            The cells, **shape** (rows,).
        date_format:
            Format of the texts, as for ``pandas.to_datetime``.
        name:
            Name of the table in error messages.

    Returns:
        Moments without a time zone, **shape** (rows,), NaT where missing or unreadable; and which
        cells are not missing, **shape** (rows,).

    Example:
        >>> timestamps, present = to_timestamps(pd.Series(["2024-12-31", None, "soon"]), "ISO8601")
        >>> timestamps.isna().tolist(), present.tolist()
        ([False, True, True], [True, False, True])
    """
    if isinstance(series.dtype, pd.PeriodDtype):
        return pd.DatetimeIndex(series.dt.to_timestamp()), series.notna().to_numpy()
    if types.is_datetime64_any_dtype(series.dtype):
        timestamps = pd.DatetimeIndex(series)
        present = series.notna().to_numpy()
        return (timestamps if timestamps.tz is None else timestamps.tz_convert(None)), present
    codes, values = factorize_texts(series, name)
    # A missing row has the index -1, which selects the appended NaT.
    parsed = np.append(parse_dates(values, date_format).to_numpy(), np.datetime64("NaT"))
    return pd.DatetimeIndex(parsed[codes]), codes >= 0


def date_parts(timestamps: pd.DatetimeIndex, parts: tuple[str, ...]) -> NDArray[np.float64]:
    """Return parts of dates as numbers.

    Args:
        timestamps:
            **Shape** (rows,), without a time zone.
        parts:
            ``"days"`` since 1970, with fraction, ``"weekday"`` (Monday is 0), or attributes of
            ``pandas.DatetimeIndex``.

    Returns:
        **Shape** (rows, parts), NaN where the moment is missing.

    Example:
        >>> date_parts(pd.DatetimeIndex(["1970-01-02 12:00"]), ("year", "days")).tolist()
        [[1970.0, 1.5]]
    """
    values = np.empty((len(timestamps), len(parts)))
    for i, part in enumerate(parts):
        if part == "days":
            # Nanoseconds, the old unit of pandas, cannot represent the year 9999.
            values[:, i] = timestamps.as_unit("us").asi8 / 86_400_000_000
        else:
            values[:, i] = getattr(timestamps, "day_of_week" if part == "weekday" else part)
    values[np.asarray(timestamps.isna())] = np.nan
    return values


def _cell_to_text(cell: object) -> str:
    if type(cell) not in (str, int, float, bool):
        # For one row pandas may infer another type, but the text must be that of a column of many
        # rows.
        cell = np.asarray(pd.Series([cell], dtype=object).infer_objects(), dtype=object)[0]
    if isinstance(cell, float | np.floating) and float(cell).is_integer():
        return str(int(cell))
    return str(cell)


def _unsupported_type_error(series: pd.Series[Any], held: str, name: str) -> ValueError:
    return ValueError(
        f"The columns of {name} must hold numbers, texts, booleans or dates, "
        f"but {str(series.name)!r} holds {held}."
    )
