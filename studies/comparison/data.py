"""Load the data sets of the comparison, which are available offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.datasets import make_friedman1
from sklearn.model_selection import train_test_split

from optuna_nnhp import METRICS

Array = NDArray[Any]

DATA = ("digits", "friedman")
ROWS, NOISE = 2000, 1.0  # of friedman; the expected error of the best model is the noise
TEST_SHARE = 0.2
# Accuracy takes few values: after a second, most methods have reached the best one.
METRIC, OTHER_METRIC = "log_loss", "accuracy"  # of the digits


@dataclass(frozen=True)
class Data:
    """A data set with a part that no study sees.

    Args:
        name:
            One of `DATA`.
        task:
            ``"multiclass"`` or ``"regression"``.
        metric:
            The metric that the study optimizes.
        maximize:
            Whether a greater value is better.
        X:
            Features, for the study.
        y:
            Target, for the study.
        X_test:
            Features of the test part.
        y_test:
            Target of the test part.
    """

    name: str
    task: str
    metric: str
    maximize: bool
    X: Array
    y: Array
    X_test: Array
    y_test: Array


def load(name: str, seed: int, metric: str = METRIC) -> Data:
    """Load a data set and split off its test part.

    Args:
        name:
            One of `DATA`.
        seed:
            Random seed of the split.
        metric:
            Metric of studies on the digits.

    Example:
        >>> data = load("digits", seed=0)
        >>> data.metric, data.X.shape, data.X_test.shape
        ('log_loss', (1437, 64), (360, 64))
    """
    if name == "digits":
        X, y = load_digits(return_X_y=True)
        head, classes = ("multiclass", metric, METRICS[metric].direction == "maximize"), y
    else:
        X, y = make_friedman1(ROWS, noise=NOISE, random_state=0)
        head, classes = ("regression", "rmse", False), None
    X, X_test, y, y_test = train_test_split(
        np.asarray(X), y, test_size=TEST_SHARE, stratify=classes, random_state=seed
    )
    return Data(name, *head, X, y, X_test, y_test)
