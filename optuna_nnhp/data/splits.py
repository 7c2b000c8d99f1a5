"""Split rows into a training and a validation part."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pandas as pd

from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import check_consistent_length
from optuna_nnhp.data.frames import format_list

SplitParts = tuple[pd.DataFrame, "pd.Series[Any]", pd.DataFrame, "pd.Series[Any]"]
SEED_LIMIT = 2**32


def is_validation_pair(validation: object) -> bool:
    """Return whether the validation part is given as (X_val, y_val), not as a fraction.

    Args:
        validation:
            A pair, or a fraction in (0, 1).

    Raises:
        ValueError:
            If it is neither.

    Example:
        >>> is_validation_pair(0.2), is_validation_pair(([[1]], [0]))
        (False, True)
    """
    if isinstance(validation, tuple | list):
        if len(validation) != 2:
            raise ValueError(
                f"`validation` must be a fraction or (X_val, y_val), "
                f"but got a {type(validation).__name__} of {len(validation)}."
            )
        return True
    if isinstance(validation, bool) or not isinstance(validation, int | float | np.floating):
        raise ValueError(
            "`validation` must be a fraction or (X_val, y_val), "
            f"but got {type(validation).__name__}."
        )
    if not 0 < validation < 1:
        raise ValueError(f"`validation` must be between 0 and 1, but got {validation}.")
    return False


def train_validation_split(
    X: pd.DataFrame,
    y: pd.Series[Any],
    validation: float | Sequence[Any],
    task: str,
    seed: int,
) -> SplitParts:
    """Divide the rows into a training and a validation part.

    With a fraction, the rows are drawn at random. For classification the draw is stratified, and
    every class is in both parts.

    Args:
        X:
            The table, **shape** (rows, columns).
        y:
            The labels, **shape** (rows,).
        validation:
            The fraction of rows to validate on, rounded up to whole rows, or the validation part
            (X_val, y_val) itself.
        task:
            ``"binary"``, ``"multiclass"`` or ``"regression"``.
        seed:
            Random seed of the split, from 0 to 2**32 - 1.

    Returns:
        Training table and labels, validation table and labels, rows counted from 0.

    Raises:
        ValueError:
            If ``validation`` is neither, or there are too few rows for both parts.

    Example:
        >>> X, y = pd.DataFrame({"a": range(10)}), pd.Series([0, 1] * 5)
        >>> [len(part) for part in train_validation_split(X, y, 0.25, "binary", seed=0)]
        [7, 7, 3, 3]
    """
    from sklearn.model_selection import train_test_split  # slow to import

    if is_validation_pair(validation):
        X_val, y_val = validation  # type: ignore[misc]
        valid_X, valid_y = as_frame(X_val, "X_val"), as_target(y_val, "y_val")
        check_consistent_length(valid_X, valid_y, ("X_val", "y_val"))
        return X, y, valid_X, valid_y
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1, but got {seed}.")
    valid = ceil(len(y) * validation)  # type: ignore[operator]
    codes = None if task == "regression" else pd.factorize(y)[0]
    _check_part_sizes(y, codes, valid)
    train_rows, valid_rows = train_test_split(
        np.arange(len(y)), test_size=valid, random_state=seed, stratify=codes
    )
    if codes is not None:
        # scikit-learn keeps the proportions, but a part may have no row of a small class.
        _move_missing_classes(train_rows, valid_rows, codes)
        _move_missing_classes(valid_rows, train_rows, codes)
    tables = [X.iloc[rows].reset_index(drop=True) for rows in (train_rows, valid_rows)]
    labels = [y.iloc[rows].reset_index(drop=True) for rows in (train_rows, valid_rows)]
    return tables[0], labels[0], tables[1], labels[1]


def _check_part_sizes(y: pd.Series[Any], codes: NDArray[np.int64] | None, valid: int) -> None:
    """Raise ValueError unless both parts have enough rows, with every class in both."""
    train = len(y) - valid
    if codes is None:
        if train < 2:
            raise ValueError(
                f"The training part must have at least 2 rows, but of {len(y):,} rows "
                f"{valid:,} are for validation."
            )
        return
    counts = np.bincount(codes)
    if counts.min() < 2:
        singletons = pd.unique(y[counts[codes] == 1]).tolist()
        raise ValueError(
            f"Every class must have at least 2 rows, one for each part, but "
            f"{format_list(singletons)} "
            "has 1 (task='regression' if y is a quantity)."
        )
    if min(train, valid) < len(counts):
        raise ValueError(
            f"Each part must have a row for each of the {len(counts):,} classes, but {len(y):,} "
            f"rows give {train:,} for training and {valid:,} for validation."
        )


def _move_missing_classes(
    have: NDArray[np.int64], lack: NDArray[np.int64], codes: NDArray[np.int64]
) -> None:
    """Exchange rows so that ``lack`` gets one of each class that it lacks.

    Stratified drawing rounds numbers of rows: a fifth of a class with two rows may be no row. The
    parts are changed in place and keep their sizes. ``have`` loses no class, because it has at
    least two rows of each class that ``lack`` has not.
    """
    classes = int(codes.max()) + 1
    for absent in np.flatnonzero(np.bincount(codes[lack], minlength=classes) == 0):
        commonest = np.bincount(codes[lack], minlength=classes).argmax()
        give = int(np.flatnonzero(codes[have] == absent)[0])
        take = int(np.flatnonzero(codes[lack] == commonest)[0])
        have[give], lack[take] = lack[take], have[give]
