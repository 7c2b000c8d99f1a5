"""Metrics of all members of a cohort at once: the ``(k,)`` values a study compares.

Each metric takes the outputs of ``k`` members on the same ``n`` rows. Every member's value comes
from its own outputs alone, so it is the same, bit for bit on the CPU, in any cohort. A member
with an output that is not finite gets NaN from every metric; other members are unaffected.

Definitions are scikit-learn's (https://scikit-learn.org/stable/modules/model_evaluation.html);
where scikit-learn warns or raises on a degenerate target, the docstrings here give the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from functools import wraps
from numbers import Real
from typing import Any
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from optuna_nnhp.data.target import Target
from optuna_nnhp.errors import short_repr
from optuna_nnhp.errors import unknown_name

TASKS = ("binary", "multiclass", "regression")
DIRECTIONS = ("maximize", "minimize")
DEFAULTS = {"binary": "accuracy", "multiclass": "accuracy", "regression": "rmse"}
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Metric:
    """A metric of every member of a cohort.

    Args:
        name:
            The name, such as ``"accuracy"``.
        direction:
            ``"maximize"`` or ``"minimize"``.
        tasks:
            The tasks it supports: some of ``"binary"``, ``"multiclass"`` and ``"regression"``.
        compute:
            The function ``(outputs, target) -> values``.

    Shape:
        - classification: outputs are logits ``(k, n, classes)``, with two classes if binary;
          target is ``(n,)`` int64 class indices
        - regression: outputs ``(k, n)`` and target ``(n,)``, both in the target's own units
        - values: ``(k,)`` float64, on the outputs' device (on the CPU for MPS, which has no
          float64)

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 0.0]]])
        >>> METRICS["accuracy"].compute(logits, torch.tensor([0, 1]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    name: str
    direction: str
    tasks: tuple[str, ...]
    compute: Callable[[Tensor, Tensor], Tensor]


def _check_rows(outputs: Tensor, target: Tensor) -> None:
    # A target of (n, 1) would silently broadcast to (k, n, n).
    if target.ndim != 1 or len(target) == 0 or outputs.shape[1] != len(target):
        raise ValueError(
            f"The target must be (n,) with n at least 1 for outputs (k, n, ...), "
            f"but got {tuple(target.shape)} for {tuple(outputs.shape)}."
        )


def _float64_device(outputs: Tensor) -> torch.device:
    return torch.device("cpu") if outputs.device.type == "mps" else outputs.device


def _finite_members(outputs: Tensor) -> Tensor:
    return outputs.isfinite().flatten(1).all(1)


def _per_member(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap a metric: check rows, use a device with float64, give non-finite members NaN."""

    @wraps(compute)
    def wrapped(outputs: Tensor, target: Tensor) -> Tensor:
        _check_rows(outputs, target)
        device = _float64_device(outputs)
        outputs, target = outputs.detach().to(device), target.to(device)
        values = compute(outputs, target)
        return values.masked_fill(~_finite_members(outputs), torch.nan)

    return wrapped


def _mean(rows: Tensor) -> Tensor:
    """Return the mean of each row, ``(k, n) -> (k,)``, with equal rounding for every ``k``."""
    # Torch splits a reduction to one value between threads (from 32768 elements on), but never a
    # reduction to several. Without the second row, rounding would depend on the number of rows.
    return torch.cat([rows, rows]).mean(1)[:1] if len(rows) == 1 else rows.mean(1)


def _class_counts(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count hits ``(k, classes)``, predictions ``(k, classes)`` and targets ``(classes,)``.

    These counts suffice for all metrics here; a confusion matrix has ``classes ** 2`` entries.
    """
    predictions = logits.argmax(-1)
    zeros = torch.zeros_like(logits[:, 0], dtype=torch.int64)
    hits = zeros.scatter_add(1, predictions, (predictions == target).long())
    predicted = zeros.scatter_add(1, predictions, torch.ones_like(predictions))
    return hits, predicted, torch.bincount(target, minlength=logits.shape[-1])


@_per_member
def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the share of rows whose largest logit is that of the target class.

    Of equal logits the first one counts as the largest.

    Example:
        >>> accuracy(torch.tensor([[[2.0, 0.0], [3.0, 1.0]]]), torch.tensor([0, 1]))
        tensor([0.5000], dtype=torch.float64)
    """
    return (logits.argmax(-1) == target).sum(1).double() / len(target)


@_per_member
def balanced_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean recall of the classes present in the target.

    A class absent from the target has no recall and is left out, as in scikit-learn's
    ``balanced_accuracy_score``.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> balanced_accuracy(logits, torch.tensor([0, 0, 1, 1]))
        tensor([0.7500], dtype=torch.float64)
    """
    hits, _, actual = _class_counts(logits, target)
    return _mean(hits[:, actual > 0].double() / actual[actual > 0])


def _auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Compute the area under the ROC curve, ``(k, n), (n,) -> (k,)``; NaN for a single class.

    It is the share of (positive, negative) pairs in the right order, where equal scores count
    one half. This equals the formula with average ranks; it is exact, because pairs are counted
    in integers.
    """
    if bool(positive.all()) or not bool(positive.any()):
        return scores.new_full((len(scores),), torch.nan)
    positives = scores[:, positive].contiguous()
    # The target is shared, so only negatives are sorted: 33 ms for 64 x 5000 scores on one core;
    # ranks from searching all the scores took 89 ms.
    negatives = scores[:, ~positive].contiguous().sort(1).values
    below = torch.searchsorted(negatives, positives)
    below_or_equal = torch.searchsorted(negatives, positives, right=True)
    pairs = positives.shape[1] * negatives.shape[1]
    return (below + below_or_equal).sum(1).double() / (2 * pairs)


@_per_member
def roc_auc(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the area under the ROC curve; for several classes one-versus-rest, macro-averaged.

    Binary: the score is the margin ``logits[..., 1] - logits[..., 0]``. It orders rows as the
    probability of class 1 does, and also orders rows whose probability rounds to 1. Multiclass:
    the scores are softmax probabilities, as in ``roc_auc_score(multi_class="ovr")`` of
    scikit-learn. A class counts if some rows belong to it and some do not; the result is NaN if
    there is no such class.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 2.0]]])
        >>> roc_auc(logits, torch.tensor([0, 0, 1, 1]))
        tensor([0.8750], dtype=torch.float64)
    """
    if logits.shape[-1] == 2:
        return _auc(logits[..., 1].double() - logits[..., 0].double(), target == 1)
    # One class at a time: all at once would need several more float64 tensors (k, n, classes).
    scores = logits.double().softmax(-1)
    areas = torch.stack([_auc(scores[..., c], target == c) for c in range(scores.shape[-1])], 1)
    defined = ~areas[0].isnan()  # depends on the target alone, so it is the same in every row
    return _mean(areas[:, defined])


@_per_member
def log_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of the target, in nats.

    It is computed from the logits in float64 and is not clipped; scikit-learn's ``log_loss``
    takes probabilities and is bounded by about 36 nats per row.

    Example:
        >>> log_loss(torch.zeros(1, 3, 2), torch.tensor([0, 1, 1]))
        tensor([0.6931], dtype=torch.float64)
    """
    index = target.expand(len(logits), -1).unsqueeze(-1)
    return _mean(-logits.double().log_softmax(-1).gather(-1, index).squeeze(-1))


@_per_member
def f1(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the F1 score of class 1 if binary, else the macro average over classes.

    The average includes the classes present in the target or in the member's own predictions, as
    with scikit-learn's default labels; a score of 0 / 0 is 0 (``zero_division=0``).

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
        >>> f1(logits, torch.tensor([0, 1, 0]))
        tensor([0.6667], dtype=torch.float64)
    """
    hits, predicted, actual = _class_counts(logits, target)
    rows = predicted + actual
    scores = 2 * hits.double() / rows.clamp(min=1)
    if logits.shape[-1] == 2:
        return scores[:, 1]
    return scores.sum(1) / (rows > 0).sum(1)  # absent classes have score 0 and are not counted


@_per_member
def rmse(outputs: Tensor, target: Tensor) -> Tensor:
    """Compute the root of the mean squared error, in the target's units.

    Example:
        >>> rmse(torch.tensor([[1.0, 2.0], [4.0, 2.0]]), torch.tensor([1.0, 2.0]))
        tensor([0.0000, 2.1213], dtype=torch.float64)
    """
    return _mean((outputs.double() - target.double()).square()).sqrt()


@_per_member
def mae(outputs: Tensor, target: Tensor) -> Tensor:
    """Compute the mean absolute error, in the target's units.

    Example:
        >>> mae(torch.tensor([[1.0, 2.0], [4.0, 2.0]]), torch.tensor([1.0, 2.0]))
        tensor([0.0000, 1.5000], dtype=torch.float64)
    """
    return _mean((outputs.double() - target.double()).abs())


@_per_member
def r2(outputs: Tensor, target: Tensor) -> Tensor:
    """Compute the coefficient of determination, 1 - error / variance of the target.

    Follows scikit-learn's ``r2_score``: for a constant target it is 1 if every output equals the
    target, else 0. For a single row, which has no variance, it is NaN.

    Example:
        >>> r2(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([1.0, 3.0]))
        tensor([1., 0.], dtype=torch.float64)
    """
    target = target.double()
    error = _mean((outputs.double() - target).square())
    if len(target) == 1:
        return torch.full_like(error, torch.nan)
    # Not `variance == 0`: the mean of a constant such as 0.1 is not always 0.1.
    if bool(target.min() == target.max()):
        return (error == 0).double()
    deviation = target - _mean(target.unsqueeze(0))
    return 1 - error / _mean(deviation.square().unsqueeze(0))


_LABELS = ("binary", "multiclass")

METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", "maximize", _LABELS, accuracy),
    "balanced_accuracy": Metric("balanced_accuracy", "maximize", _LABELS, balanced_accuracy),
    "roc_auc": Metric("roc_auc", "maximize", _LABELS, roc_auc),
    "log_loss": Metric("log_loss", "minimize", _LABELS, log_loss),
    "f1": Metric("f1", "maximize", _LABELS, f1),
    "rmse": Metric("rmse", "minimize", ("regression",), rmse),
    "mae": Metric("mae", "minimize", ("regression",), mae),
    "r2": Metric("r2", "maximize", ("regression",), r2),
}


def resolve_metric(
    metric: str | Callable[[Array, Array], Any] | None,
    *,
    task: str,
    direction: str | None,
    target_decode: Callable[[Array], Array],
) -> Metric:
    """Return the metric that a study compares its trials by.

    The metric is a name of `METRICS`; or a function ``(y_true, y_pred) -> float``, such as those
    of ``sklearn.metrics``; or None for accuracy (classification) and rmse (regression). A
    function is called once per member with two ``(n,)`` arrays: original labels (the most
    probable class), as ``target_decode`` returns them, or numbers in the target's units. Its
    exceptions are not caught. Without a direction, a named metric has its own, and a function is
    maximized, which is scikit-learn's convention for scores.

    Raises:
        ValueError: If the task, the metric or the direction is unknown, or if the metric does not
            support the task or the direction. Also raised when the metric is computed, if a
            function does not return a number.

    Example:
        >>> resolve_metric(None, task="regression", direction=None, target_decode=np.asarray).name
        'rmse'
        >>> def hits(y_true, y_pred):
        ...     return (y_true == y_pred).sum()
        >>> species = np.array(["cat", "dog"])
        >>> metric = resolve_metric(
        ...     hits, task="binary", direction=None, target_decode=lambda index: species[index]
        ... )
        >>> metric.name, metric.direction
        ('hits', 'maximize')
        >>> metric.compute(torch.tensor([[[2.0, 0.0], [3.0, 1.0]]]), torch.tensor([0, 1]))
        tensor([1.], dtype=torch.float64)
    """
    if task not in TASKS:
        raise unknown_name("a task", task, TASKS)
    if direction is not None and direction not in DIRECTIONS:
        raise unknown_name("a direction", direction, DIRECTIONS)
    if metric is None or isinstance(metric, str):
        return _named_metric(DEFAULTS[task] if metric is None else metric, task, direction)
    if not callable(metric):
        raise ValueError(
            f"`metric` must be a name, a function or None, but got {short_repr(metric)}."
        )
    name = getattr(metric, "__name__", type(metric).__name__)
    decode = None if task == "regression" else target_decode
    compute = partial(_call_per_member, metric, name, decode)
    return Metric(name, direction or "maximize", (task,), compute)


def _named_metric(name: str, task: str, direction: str | None) -> Metric:
    fitting = [known.name for known in METRICS.values() if task in known.tasks]
    if name not in METRICS:
        raise unknown_name("a metric", name, fitting)
    if name not in fitting:
        raise ValueError(
            f"`metric` must fit the task {task!r} ({', '.join(fitting)}), but got "
            f"{short_repr(name)}."
        )
    metric = METRICS[name]
    if direction not in (None, metric.direction):
        raise ValueError(
            f"`direction` must be {metric.direction!r} for {name!r}, but got "
            f"{short_repr(direction)}."
        )
    return metric


def _call_per_member(
    function: Callable[[Array, Array], Any],
    name: str,
    decode: Callable[[Array], Array] | None,
    outputs: Tensor,
    target: Tensor,
) -> Tensor:
    """Call a user's function for each finite member; ``decode`` is None for regression."""
    _check_rows(outputs, target)
    finite = _finite_members(outputs)
    predictions = outputs.detach().cpu().double() if decode is None else outputs.argmax(-1).cpu()
    y_true = target.cpu().double().numpy() if decode is None else decode(target.cpu().numpy())
    values = []
    for y_pred, is_finite in zip(predictions.numpy(), finite.tolist(), strict=True):
        if is_finite:
            # Pass copies: the function may write to its arguments.
            y_pred = y_pred.copy() if decode is None else decode(y_pred)
            values.append(_as_number(function(y_true.copy(), y_pred), name))
        else:
            values.append(float("nan"))
    return torch.tensor(values, dtype=torch.float64, device=_float64_device(outputs))


def _as_number(value: Any, name: str) -> float:
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        raise ValueError(f"The metric {name!r} must return a number, but got {short_repr(value)}.")
    return float(value)


def to_target_units(target: Target, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Convert outputs and targets for metrics: numbers in their own units, float64.

    Shape:
        - outputs: ``(k, rows, classes)``, unchanged; or ``(k, rows, 1)``, to ``(k, rows)``.
        - truth: ``(rows,)``.
    """
    if target.task != "regression":
        return outputs, truth
    numbers = outputs.squeeze(-1).double() * target.scale + target.mean
    return numbers, truth.double() * target.scale + target.mean
