"""Convert a table to a float32 array, with rules learned only from the training part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from functools import cached_property
import logging
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pandas as pd

from optuna_nnhp.data.columns import COLUMN_KINDS
from optuna_nnhp.data.columns import Column
from optuna_nnhp.data.columns import category_codes
from optuna_nnhp.data.columns import check_values
from optuna_nnhp.data.columns import fit_column
from optuna_nnhp.data.columns import numeric_features
from optuna_nnhp.data.frames import align_columns
from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.frames import format_list
from optuna_nnhp.data.scaling import Scaler

if TYPE_CHECKING:
    from sklearn.preprocessing import OneHotEncoder

logger = logging.getLogger(f"optuna.{__name__}")

# Rows that are converted at a time; this limits the memory of float64 copies.
CHUNK_ROWS = 65536


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """Converts tables like the training part to arrays without missing values.

    There are three blocks of features: numbers (numeric and boolean columns, parts of dates; see
    ``Scaler``); 0/1 for "this number is missing", for columns that have gaps in the training part;
    and 0/1 for each category (``OneHotEncoder``), where missing is a category of its own.

    Args:
        columns:
            The fitted columns, in the table's order.
        scaler:
            The fitted scaler of the numeric features; None if there are none.

    Example:
        >>> frame = pd.DataFrame({"size": [1.0, None, 3.0], "town": ["Ulm", "Rome", "Ulm"]})
        >>> preprocessor = Preprocessor.fit(frame)
        >>> preprocessor.feature_names
        ['size', 'size=<missing>', 'town=Rome', 'town=Ulm']
        >>> preprocessor.transform(frame).round(1).tolist()[1]
        [0.0, 1.0, 1.0, 0.0]
        >>> preprocessor.describe()
        '2 columns: 1 numeric, 1 categorical -> 4 features'
    """

    columns: tuple[Column, ...]
    scaler: Scaler | None

    @classmethod
    def fit(cls, X: Any) -> Preprocessor:
        """Learn columns and scales from the training part.

        Args:
            X:
                The table, **shape** (rows, columns); anything that ``as_frame`` takes.

        Raises:
            ValueError:
                If a column has no value, infinite numbers or unreadable cells, or none varies.

        Example:
            >>> Preprocessor.fit([[1, "a"], [2, "b"]]).feature_names
            ['x0', 'x1=a', 'x1=b']
        """
        frame = as_frame(X)
        check_values(frame)
        return fit_preprocessor(frame)

    @cached_property
    def numeric_columns(self) -> tuple[Column, ...]:
        """The columns with numeric features."""
        return tuple(c for c in self.columns if c.kind in ("numeric", "boolean", "date"))

    @cached_property
    def categorical_columns(self) -> tuple[Column, ...]:
        """The categorical columns."""
        return tuple(c for c in self.columns if c.kind == "categorical")

    @cached_property
    def feature_names(self) -> list[str]:
        """One name for each feature: ``size``, ``day.month``, ``size=<missing>``, ``town=Ulm``."""
        names = [f"{c.name}.{p}" if p else c.name for c in self.numeric_columns for p in c.parts]
        names += [f"{c.name}=<missing>" for c in self.numeric_columns if c.missing]
        for column in self.categorical_columns:
            values = [*column.categories, *["<infrequent>"] * column.infrequent]
            names += [f"{column.name}={v}" for v in [*values, *["<missing>"] * column.missing]]
        return names

    @cached_property
    def _category_encoder(self) -> OneHotEncoder:
        """The encoder of category codes as 0/1 columns; -1 (unseen) becomes zeros."""
        from sklearn.preprocessing import OneHotEncoder  # slow to import

        widths = [column.one_hot_width for column in self.categorical_columns]
        encoder = OneHotEncoder(
            categories=[np.arange(width) for width in widths],
            handle_unknown="ignore",
            sparse_output=False,
            dtype=np.float32,
        )
        return encoder.fit(np.zeros((1, len(widths)), dtype=np.int64))

    def transform(self, X: Any, name: str = "X") -> NDArray[np.float32]:
        """Return the features of any rows.

        Args:
            X:
                A table, **shape** (rows, columns). A DataFrame is matched by names: extra columns
                are ignored, the order is free, constant columns may be absent. Anything else is
                matched by position.
            name:
                Its name in error messages.

        Returns:
            **Shape** (rows, features), without NaN. A row's features do not depend on the other
            rows.

        Raises:
            ValueError:
                If a column is absent, or has an infinite number or unreadable cells.

        Example:
            >>> preprocessor = Preprocessor.fit([[0.0, "a"], [2.0, "b"]])
            >>> preprocessor.transform([[1.0, "never seen"]]).tolist()
            [[0.0, 0.0, 0.0]]
        """
        needed = [column.name for column in (*self.numeric_columns, *self.categorical_columns)]
        frame = align_columns(X, [column.name for column in self.columns], needed, name)
        values, absent = numeric_block(self.numeric_columns, frame, name)
        codes = [category_codes(c, frame[c.name], name) for c in self.categorical_columns]
        features = np.empty((len(frame), len(self.feature_names)), dtype=np.float32)
        first, second = values.shape[1], values.shape[1] + absent.shape[1]
        features[:, first:second] = absent
        for start in range(0, len(frame), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            if self.scaler is not None:
                features[rows, :first] = self.scaler.transform(values[rows])
            if codes:
                block = np.column_stack([column[rows] for column in codes])
                features[rows, second:] = self._category_encoder.transform(block)
        return features

    def describe(self) -> str:
        """Describe the columns and the number of features in one line.

        Example:
            >>> Preprocessor.fit([[1, 5], [2, 5]]).describe()
            '2 columns: 1 numeric, 1 constant -> 1 features'
        """
        counts = Counter(column.kind for column in self.columns)
        kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in COLUMN_KINDS if counts[kind])
        return f"{len(self.columns):,} columns: {kinds} -> {len(self.feature_names):,} features"

    def to_json(self) -> dict[str, Any]:
        """Return the fitted state as plain JSON.

        Example:
            >>> Preprocessor.fit([["a"], ["b"]]).to_json()["scaler"] is None
            True
        """
        columns = [
            {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(column).items()}
            for column in self.columns
        ]
        scaler = None if self.scaler is None else self.scaler.to_json()
        return {"columns": columns, "scaler": scaler}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Preprocessor:
        """Restore what ``to_json`` returned; ``transform`` returns the same bits.

        Args:
            state:
                The dict that ``to_json`` returned.

        Example:
            >>> preprocessor = Preprocessor.fit([["a"], ["b"]])
            >>> Preprocessor.from_json(preprocessor.to_json()).columns == preprocessor.columns
            True
        """
        columns = []
        for column in state["columns"]:
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in column.items()
            }
            columns.append(Column(**fields))
        scaler = None if state["scaler"] is None else Scaler.from_json(state["scaler"])
        return cls(tuple(columns), scaler)


def fit_preprocessor(frame: pd.DataFrame) -> Preprocessor:
    """Fit a `Preprocessor` to a part of a table that has been checked.

    A column without a value in this part counts as constant and is dropped.

    Args:
        frame:
            The training part, **shape** (rows, columns).

    Raises:
        ValueError:
            If no column varies.

    Example:
        >>> fit_preprocessor(pd.DataFrame({"a": [1, 2], "b": [None, None]})).feature_names
        ['a']
    """
    columns = tuple(fit_column(frame[name]) for name in frame)
    constant = [column.name for column in columns if column.kind == "constant"]
    if len(constant) == len(columns):
        raise ValueError(
            f"At least one column of X must vary in the training part, but none of "
            f"{format_list(constant)} does."
        )
    if constant:
        logger.info(
            f"Dropped columns that do not vary in the training part: {format_list(constant)}."
        )
    preprocessor = Preprocessor(columns, None)
    values, _ = numeric_block(preprocessor.numeric_columns, frame)
    return Preprocessor(columns, Scaler.fit(values) if values.shape[1] else None)


def numeric_block(
    columns: tuple[Column, ...], frame: pd.DataFrame, name: str = "X"
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return numeric features before scaling, and the missing indicators.

    Args:
        columns:
            The columns with number features.
        frame:
            The table, **shape** (rows, columns).
        name:
            Its name in error messages.

    Returns:
        Numbers, **shape** (rows, number features), NaN where missing; and 0/1, **shape**
        (rows, columns with gaps in the training part).

    Example:
        >>> numeric_block((Column("a", "numeric", ("",)),), pd.DataFrame({"a": [7]}))[0].tolist()
        [[7.0]]
    """
    values = [np.empty((len(frame), 0))]
    absent = [np.empty((len(frame), 0), dtype=bool)]
    for column in columns:
        numbers, missing = numeric_features(column, frame[column.name], name)
        values.append(numbers)
        if column.missing:
            absent.append(missing[:, None])
    return np.hstack(values), np.hstack(absent)
