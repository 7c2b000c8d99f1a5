"""Default values of the parameters that the second and third part do not tune."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from optuna_nnhp import Objective
from studies.comparison.data import Data


def defaults(data: Data) -> dict[str, Any]:
    """Return the defaults of all parameters that are tuned on a data set.

    Example:
        >>> from studies.comparison.data import load
        >>> defaults(load("friedman", seed=0))["batch_size"]
        64
    """
    return dict(Objective("dnn", data.X, data.y, task=data.task, metric=data.metric).defaults)


def all_but(data: Data, tuned: Collection[str], epochs: int) -> dict[str, Any]:
    """Return the defaults of the parameters that are not tuned, without early stopping.

    Example:
        >>> from studies.comparison.data import load
        >>> fixed = all_but(load("friedman", seed=0), ["learning_rate"], epochs=50)
        >>> "learning_rate" in fixed, fixed["patience"]
        (False, 50)
    """
    kept = {name: value for name, value in defaults(data).items() if name not in tuned}
    return kept | {"epochs": epochs, "patience": epochs}
