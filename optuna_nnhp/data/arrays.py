"""Prepare arrays of any number of dimensions: images, tokens, signals."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pandas as pd

from optuna_nnhp.data.frames import as_array
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import check_consistent_length
from optuna_nnhp.data.splits import is_validation_pair
from optuna_nnhp.data.splits import train_validation_split
from optuna_nnhp.data.supervised import SupervisedData
from optuna_nnhp.data.supervised import encode_targets
from optuna_nnhp.data.supervised import fingerprint
from optuna_nnhp.data.target import check_target
from optuna_nnhp.data.target import resolve_task

ARRAY_KIND = "array"  # kind of preprocessing in JSON; tables have another one


@dataclass(frozen=True)
class ArrayPreprocessor:
    """Checks arrays and converts their type; the counterpart of a table's `Preprocessor`.

    Args:
        shape:
            Shape of one example.
        dtype:
            ``"float32"``, or ``"int64"`` for whole numbers such as tokens.

    Example:
        >>> inputs = ArrayPreprocessor((8, 8), "float32")
        >>> inputs.transform(np.zeros((3, 8, 8))).dtype
        dtype('float32')
    """

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def fit(cls, X: Any) -> ArrayPreprocessor:
        """Learn the shape and type of one example from an array.

        Raises:
            ValueError:
                If it has no examples, or something else than numbers.
        """
        array = _as_array(X, "X")
        dtype = "int64" if array.dtype.kind in "iu" else "float32"
        return cls(array.shape[1:], dtype)

    def transform(self, X: Any, name: str = "X") -> NDArray[Any]:
        """Convert an array to the type that a network takes.

        Args:
            X:
                NumPy array or tensor, **shape** (examples, *shape).
            name:
                Its name in error messages.

        Raises:
            ValueError:
                If its shape or type of numbers differs, or a number is not finite.
        """
        array = _as_array(X, name)
        if array.shape[1:] != self.shape:
            wanted = ", ".join(["examples", *map(str, self.shape)])
            raise ValueError(f"{name} must have shape ({wanted}), but has {array.shape}.")
        if self.dtype == "int64" and array.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold whole numbers, but holds {array.dtype}.")
        with np.errstate(over="ignore"):
            typed = np.ascontiguousarray(array, dtype=self.dtype)
        non_finite = ~np.isfinite(typed).reshape(len(typed), -1).all(1)
        if non_finite.any():
            raise ValueError(
                f"{name} must be finite and within float32's range, but "
                f"{non_finite.sum():,} examples "
                f"are not, the first is number {non_finite.argmax():,}."
            )
        return typed

    def describe(self) -> str:
        """Describe the examples in a few words.

        Example:
            >>> ArrayPreprocessor((1, 8, 8), "float32").describe()
            'each of shape (1, 8, 8), float32'
        """
        return f"each of shape {self.shape}, {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON.

        Example:
            >>> ArrayPreprocessor((8,), "int64").to_json()
            {'kind': 'array', 'shape': [8], 'dtype': 'int64'}
        """
        return {"kind": ARRAY_KIND, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> ArrayPreprocessor:
        """Restore what ``to_json`` returned.

        Args:
            state:
                The dict that ``to_json`` returned.
        """
        return cls(tuple(state["shape"]), str(np.dtype(state["dtype"])))


def prepare_arrays(
    X: Any,
    y: Any,
    *,
    task: str | None = None,
    validation: float | Sequence[Any] = 0.2,
    seed: int = 0,
) -> SupervisedData:
    """Check and split arrays; the counterpart of `prepare_table`.

    Args:
        X:
            NumPy array or tensor of numbers, **shape** (examples, ...). Fractions become float32
            and whole numbers int64; nothing is standardized.
        y:
            Labels or numbers, **shape** (examples,) or (examples, 1).
        task:
            As in `prepare_table`.
        validation:
            The fraction of examples to validate on, or (X_val, y_val).
        seed:
            Random seed of the split.

    Raises:
        ValueError:
            If the array or the labels cannot be used; the error says why.

    Example:
        >>> data = prepare_arrays(np.zeros((10, 1, 8, 8)), ["no", "yes"] * 5)
        >>> data.train_X.shape, data.valid_X.shape
        ((8, 1, 8, 8), (2, 1, 8, 8))
    """
    inputs = ArrayPreprocessor.fit(X)
    array, labels = inputs.transform(X), as_target(y)
    check_consistent_length(array, labels)
    check_target(labels)
    resolved_task, rows = resolve_task(labels, task), pd.DataFrame({"row": np.arange(len(array))})
    if is_validation_pair(validation):
        X_val, y_val = validation  # type: ignore[misc]
        train_X, valid_X = array, inputs.transform(X_val, "X_val")
        train_labels, valid_labels = labels, as_target(y_val, "y_val")
        check_consistent_length(valid_X, valid_labels, ("X_val", "y_val"))
        check_target(valid_labels, "y_val")
    else:
        train, train_labels, valid, valid_labels = train_validation_split(
            rows, labels, validation, resolved_task, seed
        )
        train_X, valid_X = array[train["row"].to_numpy()], array[valid["row"].to_numpy()]
    target, train_y, valid_y = encode_targets(
        train_labels, valid_labels, resolved_task, validation, task
    )
    mark = fingerprint([train_X, train_y, valid_X, valid_y], target)
    return SupervisedData(train_X, train_y, valid_X, valid_y, inputs, target, mark)


def _as_array(X: Any, name: str) -> NDArray[Any]:
    """Return an array of numbers with at least one example."""
    if np.ma.is_masked(X):
        raise ValueError(f"{name} must have no masked numbers, but has {X.mask.sum():,}.")
    array = np.asarray(as_array(X, name))
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, but holds {array.dtype}.")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} must have at least one example, but has shape {array.shape}.")
    return array
