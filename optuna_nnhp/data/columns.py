"""Columns of a table: their kind, and their conversion to numbers or category codes."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pandas as pd
from pandas.api import types

from optuna_nnhp.data.frames import format_list
from optuna_nnhp.data.parsing import date_parts
from optuna_nnhp.data.parsing import factorize_texts
from optuna_nnhp.data.parsing import is_text_column
from optuna_nnhp.data.parsing import parse_dates
from optuna_nnhp.data.parsing import parse_numbers
from optuna_nnhp.data.parsing import to_numbers
from optuna_nnhp.data.parsing import to_timestamps

logger = logging.getLogger(f"optuna.{__name__}")

MAX_CATEGORIES = 100  # of a column, including the infrequent one
COLUMN_KINDS = ("numeric", "boolean", "categorical", "date", "constant")
DATE_PARTS = ("year", "month", "day", "weekday", "hour", "days")
# Tried in this order; all texts of a column must have the same format. If day and month cannot be
# distinguished (no day above 12), the month comes first.
DATE_FORMATS = (
    *("ISO8601", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S"),
    *("%m/%d/%Y", "%m/%d/%Y %H:%M", "%m/%d/%Y %H:%M:%S"),
    *("%d/%m/%Y", "%d/%m/%Y %H:%M", "%d/%m/%Y %H:%M:%S"),
    *("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d-%m-%Y"),
    *("%d %b %Y", "%d-%b-%Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y"),
)
# Squares of numbers above 1e154 or below 1e-162 are outside float64's range. No measured number is
# above 1e100, and numbers below 1e-100 are taken as 0.
MAX_MAGNITUDE, MIN_MAGNITUDE = 1e100, 1e-100
N_SNIFFED_TEXTS = 100


@dataclass(frozen=True)
class Column:
    """A column's kind and features, learned from the training part.

    Args:
        name:
            Its name.
        kind:
            One of ``COLUMN_KINDS``; a constant column has no features.
        parts:
            Its number features: ``("",)`` for a number or boolean, names from ``DATE_PARTS`` for a
            date; without those that are constant.
        missing:
            Whether a 0/1 feature states that the cell is missing.
        categories:
            The texts that have a feature of their own, sorted.
        infrequent:
            Whether all other texts, including unseen ones, share one more feature.
        date_format:
            How a date's texts are written, one of ``DATE_FORMATS``.

    Example:
        >>> Column("town", "categorical", categories=("Rome", "Ulm"), missing=True).one_hot_width
        3
    """

    name: str
    kind: str
    parts: tuple[str, ...] = ()
    missing: bool = False
    categories: tuple[str, ...] = ()
    infrequent: bool = False
    date_format: str = ""

    @property
    def one_hot_width(self) -> int:
        """The number of 0/1 features of a categorical column.

        Example:
            >>> Column("town", "categorical", categories=("Rome", "Ulm")).one_hot_width
            2
        """
        return len(self.categories) + self.infrequent + self.missing


def check_values(frame: pd.DataFrame, name: str = "X") -> None:
    """Check that each column has a value and none is infinite.

    Args:
        frame:
            The table, **shape** (rows, columns).
        name:
            Its name in error messages.

    Raises:
        ValueError:
            If a column has no value at all, or an infinite one.

    Example:
        >>> check_values(pd.DataFrame({"a": [1.0, None], "b": ["x", "y"]}))
    """
    empty = [str(column) for column in frame if _all_missing(frame[column])]
    if empty:
        raise ValueError(
            f"Every column of {name} must have a value, but these have none: {format_list(empty)}."
        )
    check_finite(frame, name)


def check_finite(frame: pd.DataFrame, name: str = "X") -> None:
    """Check that no number is infinite.

    Args:
        frame:
            The table, **shape** (rows, columns).
        name:
            Its name in error messages.

    Raises:
        ValueError:
            If one is.

    Example:
        >>> check_finite(pd.DataFrame({"a": [1.0, float("inf")]}))
        Traceback (most recent call last):
        ...
        ValueError: Numbers must be finite, but column 'a' of X has 1 infinite, the first in row 1.
    """
    for column in frame:
        if types.is_float_dtype(frame[column].dtype):
            values = frame[column].to_numpy(np.float64, na_value=np.nan)
            _check_finite(values, str(column), name)


def fit_column(series: pd.Series[Any]) -> Column:
    """Infer a column's kind and features from the training part.

    Args:
        series:
            The column, **shape** (rows,).

    Raises:
        ValueError:
            If a cell is infinite, or not a number, text, boolean or date.

    Example:
        >>> fit_column(pd.Series(["1", "2.5", None], name="size"))
        Column(name='size', kind='numeric', parts=('',), missing=True, categories=(), \
infrequent=False, date_format='')
    """
    kind, date_format = infer_column_kind(series)
    if kind == "categorical":
        return _fit_categories(series)
    parts = DATE_PARTS if kind == "date" else ("",)
    column = Column(str(series.name), kind, parts, date_format=date_format)
    values, absent = numeric_features(column, series)
    if absent.all():
        return replace(column, kind="constant", parts=())
    present = values[~absent]
    varying = present.min(axis=0) != present.max(axis=0)
    kept = tuple(part for part, varies in zip(parts, varying, strict=True) if varies)
    missing = bool(absent.any())
    if not kept and not missing:
        return replace(column, kind="constant", parts=())
    return replace(column, parts=kept, missing=missing)


def infer_column_kind(series: pd.Series[Any]) -> tuple[str, str]:
    """Infer the kind of a column, and the format of its dates.

    A column of texts is boolean, numeric or a date if all its texts can be read as true/false,
    numbers, or dates in one of ``DATE_FORMATS``. Pandas categoricals are always categorical.

    Args:
        series:
            The column, **shape** (rows,).

    Returns:
        One of ``COLUMN_KINDS`` except "constant", and one of ``DATE_FORMATS`` or "".

    Example:
        >>> infer_column_kind(pd.Series(["31.12.2024", "1.1.2025"]))
        ('date', '%d.%m.%Y')
    """
    dtype = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return "categorical", ""
    if types.is_datetime64_any_dtype(dtype) or isinstance(dtype, pd.PeriodDtype):
        return "date", DATE_FORMATS[0]
    if not is_text_column(series):
        return ("boolean" if types.is_bool_dtype(dtype) else "numeric"), ""
    _, values = factorize_texts(series)
    if not len(values):
        return "numeric", ""
    if len(values) <= 4 and {text.lower() for text in values} <= {"true", "false"}:
        return "boolean", ""
    # For most columns of words, the first texts already show that they are words.
    head = values[:N_SNIFFED_TEXTS]
    if not np.isnan(parse_numbers(head)).any() and not np.isnan(parse_numbers(values)).any():
        return "numeric", ""
    if any(character.isdigit() for character in head[0]):
        for date_format in DATE_FORMATS:
            if parse_dates(head, date_format).notna().all() and (
                parse_dates(values, date_format).notna().all()
            ):
                return "date", date_format
    return "categorical", ""


def numeric_features(
    column: Column, series: pd.Series[Any], name: str = "X"
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the numeric features of a numeric, boolean or date column.

    A cell that cannot be read (a word among numbers) counts as missing, and one warning is logged.

    Args:
        column:
            The fitted column.
        series:
            The cells, **shape** (rows,).
        name:
            Name of the table in error messages.

    Returns:
        Numbers, **shape** (rows, parts), NaN where missing; and where they are missing,
        **shape** (rows,). Dates count ``days`` since 1970 in UTC; time spans are in seconds.

    Raises:
        ValueError:
            If a number is infinite.

    Example:
        >>> column = Column("size", "numeric", parts=("",))
        >>> values, absent = numeric_features(column, pd.Series(["2", None]))
        >>> values.tolist(), absent.tolist()
        ([[2.0], [nan]], [False, True])
    """
    if column.kind == "date":
        timestamps, present = to_timestamps(series, column.date_format, name)
        values = date_parts(timestamps, column.parts)
        absent = np.asarray(timestamps.isna())
    else:
        flat, present = to_numbers(series, column.kind == "boolean", name)
        _check_finite(flat, column.name, name)
        absent = np.isnan(flat)
        flat = np.where(np.abs(flat) < MIN_MAGNITUDE, 0.0, flat)
        values = np.repeat(
            np.clip(flat, -MAX_MAGNITUDE, MAX_MAGNITUDE)[:, None], len(column.parts), axis=1
        )
    unreadable = absent & present
    if unreadable.any():
        logger.warning(
            f"Column {column.name!r} of {name} is {column.kind}, but {unreadable.sum():,} "
            f"of its cells "
            f"are not; they count as missing. The first one is "
            f"{series.iloc[int(unreadable.argmax())]!r}."
        )
    return values, absent


def category_codes(column: Column, series: pd.Series[Any], name: str = "X") -> NDArray[np.int64]:
    """Return the category code of each cell of a categorical column.

    Args:
        column:
            The fitted column.
        series:
            The cells, **shape** (rows,).
        name:
            Name of the table in error messages.

    Returns:
        Codes, **shape** (rows,): the categories in order, then "infrequent", then "missing", if
        the column has them. Texts not seen in training are infrequent, or -1 if the column has
        no infrequent category.

    Example:
        >>> column = Column("town", "categorical", categories=("Rome", "Ulm"), missing=True)
        >>> category_codes(column, pd.Series(["Ulm", None, "Oslo"])).tolist()
        [1, 2, -1]
    """
    codes, values = factorize_texts(series, name)
    known = pd.Index(column.categories, dtype=object).get_indexer(pd.Index(values, dtype=object))
    other = len(column.categories) if column.infrequent else -1
    missing = column.one_hot_width - 1 if column.missing else other
    return np.append(np.where(known < 0, other, known), missing)[codes].astype(np.int64)


def _fit_categories(series: pd.Series[Any]) -> Column:
    """Return a column's categories, at most ``MAX_CATEGORIES`` with the infrequent one."""
    name = str(series.name)
    codes, values = factorize_texts(series)
    missing = bool((codes < 0).any())
    if len(values) <= MAX_CATEGORIES:
        if len(values) + missing < 2:
            return Column(name, "constant")
        return Column(name, "categorical", missing=missing, categories=tuple(sorted(values)))
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    max_categories = MAX_CATEGORIES - 1
    # A text that occurs once is useless, and sorting a million texts takes a second.
    min_count = max(2, int(np.partition(counts, -max_categories)[-max_categories]))
    often = [(int(counts[i]), str(values[i])) for i in np.flatnonzero(counts >= min_count)]
    kept = tuple(sorted(text for _, text in sorted(often)[-max_categories:]))
    logger.warning(
        f"Column {name!r} has {len(values):,} distinct texts: the {len(kept)} most frequent that "
        "occur at least twice are categories, all others count as one."
    )
    if not kept and not missing:
        return Column(name, "constant")
    return Column(name, "categorical", missing=missing, categories=kept, infrequent=True)


def _all_missing(series: pd.Series[Any]) -> bool:
    """Return whether no cell has a value; look at the first thousand cells first."""
    present = series.dropna()
    if present.empty or not is_text_column(series):
        return present.empty
    return not len(factorize_texts(present.iloc[:1000])[1]) and not len(
        factorize_texts(present)[1]
    )


def _check_finite(values: NDArray[np.float64], column: str, name: str) -> None:
    infinite = np.isinf(values)
    if infinite.any():
        raise ValueError(
            f"Numbers must be finite, but column {column!r} of {name} has {infinite.sum():,} "
            f"infinite, the first in row {infinite.argmax():,}."
        )
