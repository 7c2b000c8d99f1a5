"""Convert a user's table to the arrays that networks are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
import json
import logging
from typing import Any
from typing import Protocol
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
import pandas as pd

from optuna_nnhp.data.columns import check_finite
from optuna_nnhp.data.columns import check_values
from optuna_nnhp.data.frames import align_columns
from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import check_consistent_length
from optuna_nnhp.data.preprocessor import fit_preprocessor
from optuna_nnhp.data.splits import is_validation_pair
from optuna_nnhp.data.splits import train_validation_split
from optuna_nnhp.data.target import Target
from optuna_nnhp.data.target import check_target
from optuna_nnhp.data.target import resolve_task

EncodedTarget: TypeAlias = NDArray[np.int64 | np.float32]

logger = logging.getLogger(f"optuna.{__name__}")


class InputPreprocessor(Protocol):
    """Converts a user's data to the arrays that a network takes."""

    def transform(self, X: Any, name: str = "X") -> NDArray[Any]:
        """Return arrays of any rows, **shape** (rows, ...)."""

    def describe(self) -> str:
        """Describe the inputs in a few words."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON."""


@dataclass(frozen=True, eq=False)
class SupervisedData:
    """A table, or an array of examples, ready for training.

    Args:
        train_X:
            For a table, features without NaN, float32, **shape** (training rows, features). For an
            array, its examples, float32 or int64, **shape** (training rows, ...).
        train_y:
            Class codes (int64) or standardized numbers (float32), **shape** (training rows,).
        valid_X:
            As ``train_X``, **shape** (validation rows, ...).
        valid_y:
            As ``train_y``, **shape** (validation rows,).
        preprocessor:
            Converts new rows to features; learned from the training part. For an array it only
            checks them.
        target:
            Converts predictions to labels or the target's unit; learned from the training part.
        fingerprint:
            Twelve hexadecimal digits that depend on all arrays, labels and units.

    Example:
        >>> data = prepare_table([[1.0, "a"], [2.0, "b"]] * 5, ["no", "yes"] * 5)
        >>> data.train_X.shape, data.valid_X.shape, data.valid_y.tolist()
        ((8, 3), (2, 3), [0, 1])
    """

    train_X: NDArray[Any]
    train_y: NDArray[np.int64 | np.float32]
    valid_X: NDArray[Any]
    valid_y: NDArray[np.int64 | np.float32]
    preprocessor: InputPreprocessor
    target: Target
    fingerprint: str

    def describe(self) -> str:
        """Describe the data in one line.

        Example:
            >>> prepare_table([[1.0], [2.0]] * 5, ["no", "yes"] * 5).describe()
            "8 training and 2 validation rows, 1 columns: 1 numeric -> 1 features, \
binary ('no', 'yes')"
        """
        return (
            f"{len(self.train_y):,} training and {len(self.valid_y):,} validation rows, "
            f"{self.preprocessor.describe()}, {self.target.describe()}"
        )


def prepare_table(
    X: Any,
    y: Any,
    *,
    task: str | None = None,
    validation: float | Sequence[Any] = 0.2,
    seed: int = 0,
) -> SupervisedData:
    """Check a table, split it, and fit and apply the preprocessing.

    Everything is checked first. Nothing is learned from the validation part.

    Args:
        X:
            DataFrame, NumPy array, tensor or list of rows, **shape** (rows, columns).
        y:
            Labels or numbers, **shape** (rows,) or (rows, 1).
        task:
            ``"binary"``, ``"multiclass"``, ``"classification"`` (either of them),
            ``"regression"``, or None to infer it from ``y``; see ``infer_task``.
        validation:
            The fraction of rows to validate on, or (X_val, y_val).
        seed:
            Random seed of the split, from 0 to 2**32 - 1.

    Raises:
        ValueError:
            If the table or the labels cannot be used; the error says why.

    Example:
        >>> data = prepare_table(
        ...     [[1.0], [2.0], [3.0]], [0.5, 1.5, 2.5], validation=([[4.0]], [3.5])
        ... )
        >>> data.valid_X.round(2).tolist(), data.target.decode(data.valid_y).round(4).tolist()
        ([[1.899999976158142]], [3.5])
    """
    frame, labels = as_frame(X), as_target(y)
    check_consistent_length(frame, labels)
    pair = is_validation_pair(validation)
    check_target(labels)
    resolved_task = resolve_task(labels, task)
    check_values(frame)
    train, train_labels, valid, valid_labels = train_validation_split(
        frame, labels, validation, resolved_task, seed
    )
    if pair:
        # A fraction of X has been checked; a pair may have other columns or infinite numbers.
        columns = list(frame.columns)
        valid = align_columns(validation[0], columns, columns, "X_val")  # type: ignore[index]
        check_finite(valid, "X_val")
        check_target(valid_labels, "y_val")
    # Labels come before features, so that unknown labels raise an error before the slow part.
    target, train_y, valid_y = encode_targets(
        train_labels, valid_labels, resolved_task, validation, task
    )
    preprocessor = fit_preprocessor(train)
    train_X = preprocessor.transform(train)
    valid_X = preprocessor.transform(valid, "X_val" if pair else "X")
    mark = fingerprint([train_X, train_y, valid_X, valid_y], target)
    return SupervisedData(train_X, train_y, valid_X, valid_y, preprocessor, target, mark)


def encode_targets(
    train: pd.Series[Any],
    valid: pd.Series[Any],
    resolved_task: str,
    validation: object,
    task: str | None,
) -> tuple[Target, EncodedTarget, EncodedTarget]:
    """Encode the labels of both parts for a network.

    Args:
        train:
            Labels of the training part, from which the encoding is learned, **shape** (training
            rows,).
        valid:
            Labels of the validation part, **shape** (validation rows,).
        resolved_task:
            The task.
        validation:
            As the user gave it, for the text of errors.
        task:
            As the user gave it; if None, a log line says which task was inferred.

    Raises:
        ValueError:
            If the validation part has labels that the training part does not have.

    Example:
        >>> train, valid = as_target(["no", "no", "yes"]), as_target(["yes"])
        >>> target, train_y, valid_y = encode_targets(train, valid, "binary", 0.2, "binary")
        >>> train_y.tolist(), valid_y.tolist()
        ([0, 0, 1], [1])
    """
    target = Target.fit(train, resolved_task)
    codes = (
        target.encode(train),
        target.encode(valid, "y_val" if is_validation_pair(validation) else "y"),
    )
    if task is None:
        logger.info(f"Inferred task: {target.describe()}; pass `task=` to override.")
    return target, *codes


def fingerprint(arrays: Sequence[NDArray[Any]], target: Target) -> str:
    """Return a short hash of arrays and their target.

    Args:
        arrays:
            Of any **shapes**.
        target:
            The encoding of the labels.

    Returns:
        Twelve hexadecimal digits (BLAKE2b over types, shapes, content and target).

    Example:
        >>> fingerprint([np.zeros(2)], Target("regression")) == fingerprint(
        ...     [np.zeros(3)], Target("regression")
        ... )
        False
    """
    digest = blake2b(json.dumps(target.to_json()).encode(), digest_size=6)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
