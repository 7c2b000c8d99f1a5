from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import pickle
import re
from typing import Any
import warnings

import numpy as np
import pytest
from scipy.special import softmax  # type: ignore[import-untyped]
from sklearn import metrics as oracle
from sklearn.exceptions import UndefinedMetricWarning
import torch
from torch import Tensor

from optuna_nnhp.training.metrics import METRICS
from optuna_nnhp.training.metrics import Metric
from optuna_nnhp.training.metrics import resolve_metric

Array = np.ndarray[Any, Any]

K = 7
TOLERANCE = 1e-12  # relative; both sides work in float64
CLASSIFICATION = ["accuracy", "balanced_accuracy", "roc_auc", "log_loss", "f1"]
REGRESSION = ["rmse", "mae", "r2"]


def _roc_auc(y: Array, logits: Array) -> float:
    if logits.shape[1] == 2:
        return float(oracle.roc_auc_score(y, logits[:, 1] - logits[:, 0]))
    probabilities = softmax(logits, axis=1)
    present = np.unique(y)
    if len(present) == logits.shape[1]:
        return float(oracle.roc_auc_score(y, probabilities, multi_class="ovr"))
    # scikit-learn raises here, so its binary score of each class present is the oracle.
    return float(np.mean([oracle.roc_auc_score(y == c, probabilities[:, c]) for c in present]))


def _f1(y: Array, logits: Array) -> float:
    average = "binary" if logits.shape[1] == 2 else "macro"
    return float(oracle.f1_score(y, logits.argmax(1), average=average, zero_division=0))


ORACLES: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda y, z: oracle.accuracy_score(y, z.argmax(1)),
    "balanced_accuracy": lambda y, z: oracle.balanced_accuracy_score(y, z.argmax(1)),
    "roc_auc": _roc_auc,
    "log_loss": lambda y, z: oracle.log_loss(y, softmax(z, axis=1), labels=range(z.shape[1])),
    "f1": _f1,
    "rmse": oracle.root_mean_squared_error,
    "mae": oracle.mean_absolute_error,
    "r2": oracle.r2_score,
}


def _classification(
    n: int, classes: int, *, ties: bool = False, absent: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of K members of growing skill and a target with every class except ``absent``."""
    generator = torch.Generator().manual_seed(1000 * n + classes)
    kept = torch.tensor([c for c in range(classes) if c != absent])
    target = kept[torch.arange(n) % len(kept)][torch.randperm(n, generator=generator)]
    skill = torch.linspace(0, 2, K)[:, None, None]
    logits = 2 * torch.randn(K, n, classes, generator=generator)
    logits = logits + skill * torch.nn.functional.one_hot(target, classes)
    if absent is not None:
        logits[3:, :, absent] -= 20  # from member 3 on it is not predicted either
    # Equal rows, not rounded logits: the softmax of two orders of the same logits may differ in
    # the last bit, and there torch and scipy need not agree.
    return (logits[:, torch.arange(n) % 13] if ties else logits), target


def _regression(n: int, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    target = offset + torch.randn(n, generator=generator)
    return target + 0.5 * torch.randn(K, n, generator=generator), target


CASES: dict[str, tuple[Tensor, Tensor]] = {
    "binary": _classification(83, 2),
    "binary ties": _classification(83, 2, ties=True),
    "binary small": _classification(2, 2),
    "five": _classification(121, 5),
    "five ties": _classification(121, 5, ties=True),
    "five absent": _classification(121, 5, absent=3),
    "five absent ties": _classification(121, 5, ties=True, absent=0),
    "five small": _classification(5, 5),
    "plain": _regression(97),
    "two rows": _regression(2),
    "far from zero": _regression(97, offset=1e5),
    "constant": (torch.tensor([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0]]), torch.full((3,), 3.0)),
}
TABLE = [(c, m) for c in list(CASES)[:8] for m in CLASSIFICATION]
TABLE += [(c, m) for c in list(CASES)[8:] for m in REGRESSION]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.parametrize(("case", "name"), TABLE)
def test_equals_scikit_learn(case: str, name: str) -> None:
    outputs, target = CASES[case]
    values = METRICS[name].compute(outputs, target)
    y = target.double().numpy() if name in REGRESSION else target.numpy()
    expected = [ORACLES[name](y, member) for member in outputs.double().numpy()]
    assert values.dtype == torch.float64
    assert values.shape == (len(outputs),)
    np.testing.assert_allclose(values.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_table_covers_every_metric() -> None:
    assert set(METRICS) == set(ORACLES) == {name for _, name in TABLE}
    assert all(name == metric.name for name, metric in METRICS.items())


def _example(name: str) -> tuple[Tensor, Tensor]:
    return CASES["plain" if name in REGRESSION else "five"]


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_member_is_nan_and_alone(name: str, bad: float) -> None:
    outputs, target = _example(name)
    spoiled = outputs.clone()
    spoiled[2].view(-1)[4] = bad  # one number of one member
    spoiled[5] = bad  # all of another
    before, after = (METRICS[name].compute(o, target) for o in (outputs, spoiled))
    others = [0, 1, 3, 4, 6]
    assert after[[2, 5]].isnan().all()
    assert not before.isnan().any()
    assert torch.equal(after[others], before[others])


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.usefixtures("two_threads")
def test_member_does_not_depend_on_other_members(name: str) -> None:
    # Above 32768 elements torch splits a sum to one value between threads.
    outputs, target = _regression(40_000) if name in REGRESSION else _classification(40_000, 3)
    together = METRICS[name].compute(outputs, target)
    alone = [METRICS[name].compute(outputs[i : i + 1], target) for i in range(K)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_outputs_are_accumulated_in_float64(name: str) -> None:
    outputs, target = _example(name)
    half = outputs.to(torch.bfloat16)
    exact = METRICS[name].compute(half.double(), target)
    torch.testing.assert_close(METRICS[name].compute(half, target), exact, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", METRICS)
def test_strides_and_gradients_do_not_matter(name: str) -> None:
    outputs, target = _example(name)
    expected = METRICS[name].compute(outputs, target)
    strided = outputs.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    values = METRICS[name].compute(strided, target)
    assert not values.requires_grad
    torch.testing.assert_close(values, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("only", [0, 1])
def test_roc_auc_of_a_single_class_is_nan(classes: int, only: int) -> None:
    target = torch.full((4,), only)
    with pytest.warns(UndefinedMetricWarning):  # scikit-learn says the same of two classes
        assert np.isnan(oracle.roc_auc_score(target.numpy(), np.arange(4)))
    assert METRICS["roc_auc"].compute(torch.randn(2, 4, classes), target).isnan().all()


def test_roc_auc_keeps_order_where_probabilities_saturate() -> None:
    logits = torch.zeros(1, 3, 2)
    logits[0, :, 1] = torch.tensor([50.0, 60.0, 70.0])
    target = torch.tensor([0, 1, 1])
    assert METRICS["roc_auc"].compute(logits, target).item() == 1.0


def test_log_loss_is_not_clipped() -> None:
    logits = torch.tensor([[[1000.0, 0.0]]])
    assert METRICS["log_loss"].compute(logits, torch.tensor([1])).item() == 1000.0


def test_f1_never_predicted_and_never_there_is_zero() -> None:
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert METRICS["f1"].compute(logits, torch.tensor([0, 0])).item() == 0.0


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1])
def test_r2_of_a_constant_target(value: float) -> None:
    # 0.1 is a constant whose float64 mean need not be 0.1.
    target = torch.full((11,), value, dtype=torch.float64)
    outputs = torch.stack([target, target + 1])
    assert METRICS["r2"].compute(outputs, target).tolist() == [1.0, 0.0]


def test_r2_of_one_row_is_nan() -> None:
    with pytest.warns(UndefinedMetricWarning):
        assert np.isnan(oracle.r2_score([1.0], [1.0]))
    assert METRICS["r2"].compute(torch.ones(2, 1), torch.ones(1)).isnan().all()


@pytest.mark.parametrize("shape", [(3, 1), (2,), (0,)])
def test_target_that_would_broadcast_is_an_error(shape: tuple[int, ...]) -> None:
    user = resolve_metric(
        lambda y, p: 0.0, task="regression", direction=None, target_decode=np.asarray
    )
    for metric in (METRICS["rmse"], user):
        with pytest.raises(ValueError, match=r"must be \(n,\) .* but got \(.*\) for \(2, 3\)\."):
            metric.compute(torch.zeros(2, 3), torch.zeros(shape))


def _resolve(metric: Any, task: str = "multiclass", direction: str | None = None) -> Metric:
    labels = np.array(["ant", "bee", "cat", "dog", "eel"])
    return resolve_metric(
        metric, task=task, direction=direction, target_decode=lambda index: labels[index]
    )


@pytest.mark.parametrize(
    ("task", "name"), [("binary", "accuracy"), ("multiclass", "accuracy"), ("regression", "rmse")]
)
def test_default_metric(task: str, name: str) -> None:
    assert _resolve(None, task) is METRICS[name]


@pytest.mark.parametrize("name", METRICS)
def test_named_metric_with_its_own_direction(name: str) -> None:
    task = METRICS[name].tasks[0]
    assert _resolve(name, task) is METRICS[name]
    assert _resolve(name, task, METRICS[name].direction) is METRICS[name]


@pytest.mark.parametrize(
    ("metric", "task", "direction", "message"),
    [
        ("acuracy", "binary", None, "'acuracy' is not a metric; did you mean 'accuracy'"),
        ("mse", "regression", None, "Known: rmse, mae, r2."),
        (
            "accuracy",
            "regression",
            None,
            "`metric` must fit the task 'regression' (rmse, mae, r2), but got 'accuracy'.",
        ),
        ("r2", "binary", None, "(accuracy, balanced_accuracy, roc_auc, log_loss, f1), but got"),
        (
            "log_loss",
            "binary",
            "maximize",
            "`direction` must be 'minimize' for 'log_loss', but got 'maximize'.",
        ),
        (None, "regression", "maximize", "`direction` must be 'minimize' for 'rmse'"),
        (None, "binary", "max", "'max' is not a direction. Known: maximize, minimize."),
        (max, "binary", "upwards", "'upwards' is not a direction"),
        (None, "ranking", None, "'ranking' is not a task"),
        (3, "binary", None, "`metric` must be a name, a function or None, but got 3."),
    ],
)
def test_errors(metric: Any, task: str, direction: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _resolve(metric, task, direction)


def test_function_gets_original_labels_once_per_member() -> None:
    calls: list[tuple[Array, Array]] = []

    def share_of_bees(y_true: Array, y_pred: Array) -> float:
        calls.append((y_true, y_pred))
        return float((y_pred == "bee").mean())

    logits, target = CASES["five"]
    metric = _resolve(share_of_bees)
    values = metric.compute(logits, target)
    labels = np.array(["ant", "bee", "cat", "dog", "eel"])
    assert (metric.name, metric.direction, metric.tasks) == (
        "share_of_bees",
        "maximize",
        ("multiclass",),
    )
    assert len(calls) == K
    for (y_true, y_pred), member in zip(calls, logits.numpy(), strict=True):
        np.testing.assert_array_equal(y_true, labels[target.numpy()])
        np.testing.assert_array_equal(y_pred, labels[member.argmax(1)])
    expected = (logits.argmax(-1) == 1).double().mean(1)
    torch.testing.assert_close(values, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(
    ("function", "case", "task", "name"),
    [
        (oracle.accuracy_score, "five", "multiclass", "accuracy"),
        (oracle.root_mean_squared_error, "far from zero", "regression", "rmse"),
    ],
)
def test_function_of_scikit_learn_equals_ours(
    function: Any, case: str, task: str, name: str
) -> None:
    outputs, target = CASES[case]
    theirs = _resolve(function, task, METRICS[name].direction)
    assert theirs.direction == METRICS[name].direction
    torch.testing.assert_close(
        theirs.compute(outputs, target),
        METRICS[name].compute(outputs, target),
        rtol=TOLERANCE,
        atol=0,
    )


def test_function_is_not_called_for_a_non_finite_member() -> None:
    outputs, target = CASES["plain"]
    outputs = outputs.clone()
    outputs[3, 0] = torch.nan
    values = _resolve(oracle.mean_absolute_error, "regression").compute(outputs, target)
    assert values.isnan().tolist() == [i == 3 for i in range(K)]


def test_function_that_writes_to_its_arguments_changes_nothing() -> None:
    def destructive(y_true: Array, y_pred: Array) -> float:
        error = float(np.abs(y_true - y_pred).mean())
        y_true[:] = y_pred[:] = 1e9
        return error

    outputs, target = (tensor.double() for tensor in CASES["plain"])
    kept = outputs.clone(), target.clone()
    values = _resolve(destructive, "regression").compute(outputs, target)
    torch.testing.assert_close(values, METRICS["mae"].compute(*kept), rtol=TOLERANCE, atol=0)
    assert torch.equal(outputs, kept[0])
    assert torch.equal(target, kept[1])


@pytest.mark.parametrize("value", [2, True, 2.0, np.float32(2), np.array(2.0), torch.tensor(2)])
def test_function_may_return_any_number(value: Any) -> None:
    values = _resolve(lambda y, p: value).compute(*CASES["five"])
    assert values.tolist() == [float(value)] * K


@pytest.mark.parametrize("value", [None, "0.5", [0.5], np.array([0.5]), 1j, {"f1": 0.5}])
def test_function_that_returns_no_number_is_named(value: Any) -> None:
    def chatty(y_true: Array, y_pred: Array) -> Any:
        return value

    message = f"The metric 'chatty' must return a number, but got {value!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        _resolve(chatty).compute(*CASES["five"])


def test_function_error_is_not_hidden() -> None:
    def broken(y_true: Array, y_pred: Array) -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        _resolve(broken).compute(*CASES["five"])


@pytest.mark.parametrize("name", METRICS)
def test_metric_survives_pickling(name: str) -> None:
    assert pickle.loads(pickle.dumps(METRICS[name])) == METRICS[name]


def test_no_warnings_on_degenerate_targets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in CLASSIFICATION:
            METRICS[name].compute(torch.zeros(2, 1, 3), torch.tensor([2]))
