"""Encode targets (classes as codes, numbers standardized), and decode predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray
import pandas as pd

from optuna_nnhp.data.frames import format_list
from optuna_nnhp.errors import unknown_name

Label: TypeAlias = str | int | float | bool

TASKS = ("binary", "multiclass", "regression")
MAX_INTEGER_CLASSES = 20
# Larger than needed in any unit, and its square is within float64's range.
MAX_ABS_TARGET = 1e30


def check_target(y: pd.Series[Any], name: str = "y") -> None:
    """Check that all values are present, finite, and of one type.

    Args:
        y:
            The labels, **shape** (rows,).
        name:
            Their name in error messages.

    Raises:
        ValueError:
            If a value is missing or infinite, or the labels have several types or a type that JSON
            does not have (dates, tuples).

    Example:
        >>> check_target(pd.Series(["yes", None, "no"]))
        Traceback (most recent call last):
        ...
        ValueError: y must have no missing values, but has 1, the first in row 1.
    """
    missing = y.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{name} must have no missing values, but has {missing.sum():,}, "
            f"the first in row {missing.argmax():,}."
        )
    values = _to_numpy(y)
    if values.dtype.kind == "f":
        invalid = ~(np.abs(values.astype(np.float64)) <= MAX_ABS_TARGET)
        if invalid.any():
            raise ValueError(
                f"{name} must be finite and within ±{MAX_ABS_TARGET:g}, but "
                f"{invalid.sum():,} values are "
                f"not, the first in row {invalid.argmax():,}: {values[invalid][0]}."
            )
    elif values.dtype.kind == "O":
        kinds = sorted({type(value).__name__ for value in values})  # also integers beyond int64
        if kinds != ["str"]:
            raise ValueError(
                f"{name} must hold numbers, texts or booleans of one type, "
                f"but holds {format_list(kinds, quote=False)}."
            )
    elif values.dtype.kind not in "biu":
        raise ValueError(f"{name} must hold numbers, texts or booleans, but holds {y.dtype}.")


def infer_task(y: pd.Series[Any]) -> str:
    """Infer the task from the labels.

    Texts, booleans and pandas categoricals are classes. Numbers are classes if all are whole
    numbers, and there are two distinct ones, or at most ``MAX_INTEGER_CLASSES`` with at least two
    rows per class on average. Everything else is a regression.

    Args:
        y:
            The labels, **shape** (rows,), without missing values.

    Returns:
        ``"binary"``, ``"multiclass"`` or ``"regression"``.

    Example:
        >>> infer_task(pd.Series([0, 1, 1, 0]))
        'binary'
        >>> infer_task(pd.Series([0.5, 1.5, 2.5]))
        'regression'
    """
    values = _to_numpy(y)
    distinct = len(pd.unique(values))
    if values.dtype.kind in "iuf" and not isinstance(y.dtype, pd.CategoricalDtype):
        whole = values.dtype.kind != "f" or bool((values == np.floor(values)).all())
        few = distinct <= MAX_INTEGER_CLASSES and len(values) >= 2 * distinct
        if not whole or not (few or distinct == 2):
            return "regression"
    return "binary" if distinct == 2 else "multiclass"


def resolve_task(y: pd.Series[Any], task: str | None, name: str = "y") -> str:
    """Return the given or the inferred task, and check that it suits the labels.

    Args:
        y:
            The labels, **shape** (rows,), without missing values.
        task:
            One of ``TASKS``, ``"classification"``, or None to infer it.
        name:
            Name of the labels in error messages.

    Returns:
        ``"binary"``, ``"multiclass"`` or ``"regression"``.

    Raises:
        ValueError:
            If there is no such task, it does not suit the labels, or all labels are equal.

    Example:
        >>> resolve_task(pd.Series(["a", "b", "c"]), "classification")
        'multiclass'
    """
    if task is not None and (not isinstance(task, str) or task not in (*TASKS, "classification")):
        raise unknown_name("a task", task, (*TASKS, "classification"))
    values = _to_numpy(y)
    distinct = pd.unique(values)
    if len(distinct) == 1:
        raise ValueError(
            f"{name} must have at least two distinct values, "
            f"but every row is {np.asarray(distinct).tolist()[0]!r}."
        )
    if task is None:
        return infer_task(y)
    if task == "regression" and values.dtype.kind not in "iuf":
        held = "texts" if values.dtype.kind == "O" else "booleans"
        raise ValueError(f"{name} must hold numbers for a regression, but holds {held}.")
    if task == "binary" and len(distinct) != 2:
        raise ValueError(
            f"{name} must have 2 classes for the task 'binary', but has {len(distinct):,}: "
            f"{format_list(np.asarray(distinct).tolist())}."
        )
    if task == "classification":
        return "binary" if len(distinct) == 2 else "multiclass"
    return task


@dataclass(frozen=True)
class Target:
    """The encoding of labels for a network, learned from the training part.

    Args:
        task:
            ``"binary"``, ``"multiclass"`` or ``"regression"``.
        classes:
            The labels in order, as they were given; empty for regression.
        mean:
            Mean of the training part, in the target's unit; 0 for classes.
        scale:
            Standard deviation of the training part, in the target's unit; 1 for classes.

    Example:
        >>> target = Target.fit(pd.Series(["no", "yes", "no"]), "binary")
        >>> target.encode(pd.Series(["yes", "no"])).tolist()
        [1, 0]
        >>> target.decode([1, 0]).tolist()
        ['yes', 'no']
    """

    task: str
    classes: tuple[Label, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, y: pd.Series[Any], task: str) -> Target:
        """Learn the classes, or mean and standard deviation.

        Args:
            y:
                The training part's labels, **shape** (rows,).
            task:
                One of ``TASKS``.

        Example:
            >>> Target.fit(pd.Series([1.0, 3.0]), "regression")
            Target(task='regression', classes=(), mean=2.0, scale=1.0)
        """
        values = _to_numpy(y)
        if task == "regression":
            numbers = values.astype(np.float64)
            # If the training part is constant, the constant is predicted.
            return cls(task, mean=float(numbers.mean()), scale=float(numbers.std()) or 1.0)
        return cls(task, classes=tuple(np.sort(pd.unique(values)).tolist()))

    def encode(self, y: pd.Series[Any], name: str = "y") -> NDArray[np.int64 | np.float32]:
        """Encode labels for the network.

        Args:
            y:
                The labels, **shape** (rows,), without missing values.
            name:
                Their name in error messages.

        Returns:
            Codes (int64) or standardized numbers (float32), **shape** (rows,).

        Raises:
            ValueError:
                If a label is not one of ``classes``, or for regression not a number.

        Example:
            >>> Target("regression", mean=2.0, scale=4.0).encode(pd.Series([10, 2])).tolist()
            [2.0, 0.0]
        """
        values = _to_numpy(y)
        if self.task != "regression":
            codes = pd.Index(self._classes_array()).get_indexer(pd.Index(values))
            unknown_labels = pd.unique(values[codes < 0]).tolist()
            if unknown_labels:
                raise ValueError(
                    f"The labels of {name} must be among {format_list(self.classes)}, "
                    f"but {(codes < 0).sum():,} rows have {format_list(unknown_labels)}."
                )
            return np.asarray(codes, dtype=np.int64)
        if values.dtype.kind not in "iuf":
            raise ValueError(f"{name} must hold numbers for a regression, but holds {y.dtype}.")
        with np.errstate(over="ignore"):
            scaled = ((values.astype(np.float64) - self.mean) / self.scale).astype(np.float32)
        invalid = ~np.isfinite(scaled)
        if invalid.any():
            raise ValueError(
                f"{name} must be within float32's range once divided by the training part's "
                f"standard deviation {self.scale:g}, but {values[invalid][0]} is not."
            )
        return np.asarray(scaled)

    def decode(self, encoded: ArrayLike) -> NDArray[Any]:
        """Decode what ``encode`` returned.

        Args:
            encoded:
                Codes or standardized numbers, of any **shape**.

        Returns:
            The labels in their original type (texts as ``object``), or numbers in the target's
            unit (float64); same **shape**.

        Example:
            >>> Target("binary", classes=(False, True)).decode([0, 1]).tolist()
            [False, True]
        """
        if self.task == "regression":
            return np.asarray(encoded, dtype=np.float64) * self.scale + self.mean
        return np.asarray(self._classes_array()[np.asarray(encoded)])

    def describe(self) -> str:
        """Describe the target in one line.

        Example:
            >>> Target("binary", classes=("no", "yes")).describe()
            "binary ('no', 'yes')"
        """
        if self.task == "regression":
            return f"regression (mean {self.mean:.4g}, standard deviation {self.scale:.4g})"
        return f"{self.task} ({format_list(self.classes)})"

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON.

        Example:
            >>> Target("binary", classes=(0, 1)).to_json()
            {'task': 'binary', 'classes': [0, 1], 'mean': 0.0, 'scale': 1.0}
        """
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Target:
        """Restore what ``to_json`` returned.

        Args:
            state:
                The dict that ``to_json`` returned.

        Example:
            >>> target = Target("regression", mean=0.1, scale=3.0)
            >>> Target.from_json(target.to_json()) == target
            True
        """
        return cls(state["task"], tuple(state["classes"]), state["mean"], state["scale"])

    def _classes_array(self) -> NDArray[Any]:
        """Return the classes as an array, **shape** (classes,)."""
        text = isinstance(self.classes[0], str)
        return np.array(self.classes, dtype=object if text else None)


def _to_numpy(y: pd.Series[Any]) -> NDArray[Any]:
    """Return the values without pandas' extension types: bool, int, float, datetime or object.

    Labels from a CSV file and from a DataFrame must be equal, also if pandas stores one of them
    with a nullable or categorical type.
    """
    if isinstance(y.dtype, pd.CategoricalDtype | pd.StringDtype):
        y = y.astype(object).infer_objects()
    if isinstance(y.dtype, pd.StringDtype):
        return np.array([str(text) for text in y], dtype=object)  # not NumPy's str_
    if pd.api.types.is_extension_array_dtype(y.dtype) and y.dtype.kind in "biuf":
        return y.to_numpy(dtype=np.dtype(y.dtype.kind + "8" if y.dtype.kind != "b" else "?"))
    values = y.to_numpy()
    return values.astype(np.float64) if values.dtype == np.float16 else values  # has no index
