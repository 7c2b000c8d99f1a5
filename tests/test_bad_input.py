"""Test that invalid input raises an error of one line, before anything is trained or stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import pandas as pd
import pytest

from optuna_nnhp import optimize
from optuna_nnhp.training.cohort import Cohort
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import numbers

X, LABELS = classes()
_, NUMBERS = numbers()


def with_value(array: Any, place: Any, value: Any) -> Any:
    changed = array.copy()
    changed[place] = value
    return changed


# Arguments, type of the error, pattern of its message.
Row = tuple[dict[str, Any], type[Exception], str]
DATA: dict[str, Row] = {
    "no data": ({"X": None, "y": None}, ValueError, "`X` and `y` must both be given"),
    "no labels": ({"y": None}, ValueError, "`X` and `y` must both be given"),
    "empty array": ({"X": np.zeros((0, 3)), "y": []}, ValueError, "X must have at least one row"),
    "empty list": ({"X": [], "y": []}, ValueError, r"X must be 2-D \(rows, columns\)"),
    "empty frame": ({"X": pd.DataFrame()}, ValueError, "X must have at least one row and one col"),
    "no labels in y": ({"y": []}, ValueError, "y must have at least one row"),
    "one dimension": ({"X": X[:, 0]}, ValueError, r"X must be 2-D .* has shape \(80,\)"),
    "three dimensions": ({"X": X[None]}, ValueError, r"X must be 2-D .* \(1, 80, 3\)"),
    "labels in columns": ({"y": X}, ValueError, r"y must be 1-D \(rows,\), but has shape \(80, 3"),
    "lengths": ({"y": LABELS[:-1]}, ValueError, "X and y must .* but have 80 and 79"),
    "NaN in y": (
        {"y": with_value(NUMBERS, 3, np.nan)},
        ValueError,
        "y must have no missing values, but has 1, the first in row 3",
    ),
    "None in y": (
        {"y": [None, *LABELS[1:]]},
        ValueError,
        "y must have no missing values, but has 1, the first in row 0",
    ),
    "infinity in y": (
        {"y": with_value(NUMBERS, 5, np.inf)},
        ValueError,
        "y must be finite .* the first in row 5: inf",
    ),
    "one class": ({"y": ["a"] * 80}, ValueError, "at least two distinct values, but .* 'a'"),
    "constant numbers": ({"y": [2.5] * 80}, ValueError, "at least two distinct values, but .*2.5"),
    "a class of one": (
        {"y": with_value(LABELS, 7, "c")},
        ValueError,
        "Every class must have at least 2 rows, .* but 'c' has 1",
    ),
    "more classes than rows allow": (
        {"y": [str(i // 2) for i in range(80)]},
        ValueError,
        "Each part must have a row for each of the 40 classes",
    ),
    "y of two types": ({"y": ["a", 1] * 40}, ValueError, "of one type, but holds int, str"),
    "a column of NaN": (
        {"X": with_value(X, (slice(None), 1), np.nan)},
        ValueError,
        "Every column of X must have a value, but these have none: 'x1'",
    ),
    "a column of None": (
        {"X": pd.DataFrame({"a": X[:, 0], "b": None})},
        ValueError,
        "Every column of X must have a value, but these have none: 'b'",
    ),
    "infinity in X": (
        {"X": with_value(X, (4, 2), np.inf)},
        ValueError,
        "Numbers must be finite, but column 'x2' of X has 1 infinite, the first in row 4",
    ),
    "two columns of one name": (
        {"X": pd.DataFrame(X, columns=["a", "b", "a"])},
        ValueError,
        "Column names must be unique, but X repeats 'a'",
    ),
    "regression of texts": (
        {"task": "regression"},
        ValueError,
        "y must hold numbers for a regression",
    ),
    "binary with three": (
        {"y": ["a", "b", "c", "d"] * 20, "task": "binary"},
        ValueError,
        "y must have 2 classes for the task 'binary', but has 4",
    ),
    "unknown task": ({"task": "clasification"}, ValueError, "did you mean 'classification'"),
}
VALIDATION: dict[str, Row] = {
    "share above 1": (
        {"validation": 1.5},
        ValueError,
        "`validation` must be between 0 and 1, but",
    ),
    "share of 0": ({"validation": 0.0}, ValueError, "`validation` must be between 0 and 1"),
    "negative share": ({"validation": -0.2}, ValueError, "`validation` must be between 0 and 1"),
    "a text": ({"validation": "some"}, ValueError, r"a fraction or \(X_val, y_val\), but got str"),
    "three tables": ({"validation": (X, X, X)}, ValueError, "but got a tuple of 3"),
    "lengths": (
        {"validation": (X, LABELS[:5])},
        ValueError,
        "X_val and y_val must .* but have 80 and 5",
    ),
    "columns": (
        {"validation": (X[:, :2], LABELS)},
        ValueError,
        "X_val must have 3 columns, but has 2",
    ),
    "labels never seen": (
        {"validation": (X[:2], ["up", "left"])},
        ValueError,
        "The labels of y_val must be among 'down', 'up', but 1 rows have 'left'",
    ),
    "NaN": ({"validation": (X[:2], ["up", None])}, ValueError, "y_val must have no missing"),
    "empty": ({"validation": (X[:0], LABELS[:0])}, ValueError, "X_val must have at least one row"),
}
FILES: dict[str, Row] = {
    "no file": (
        {"X": "none.csv", "y": None, "target": "price"},
        FileNotFoundError,
        r"The CSV file 'none\.csv' does not exist",
    ),
    "a folder": ({"X": Path(), "y": None, "target": "y"}, ValueError, r"'\.' is a folder"),
    "empty": (
        {"X": "empty.csv", "y": None, "target": "price"},
        ValueError,
        r"The CSV file 'empty\.csv' is empty",
    ),
    "no rows": ({"X": "header.csv", "y": None, "target": "price"}, ValueError, "but no rows"),
    "not text": (
        {"X": "image.csv", "y": None, "target": "price"},
        ValueError,
        r"must be UTF-8 text, but 'image\.csv' has the byte 0x89 at position 0",
    ),
    "no such column": (
        {"X": "homes.csv", "y": None, "target": "prise"},
        ValueError,
        r"'prise' is not a column of 'homes\.csv'; did you mean 'price'\? Columns: 'size', ",
    ),
    "nothing near": (
        {"X": "homes.csv", "y": None, "target": "xyz"},
        ValueError,
        "'xyz' is not a column .* Columns: 'size', 'price'",
    ),
    "no target": ({"X": "homes.csv", "y": None}, ValueError, "`target` must name the column"),
    "a target without a file": (
        {"target": "price"},
        ValueError,
        "`target` must come with the path of a CSV file, but got 'price'",
    ),
    "y with a file": (
        {"X": "homes.csv", "target": "price"},
        ValueError,
        "`y` must not be given with a CSV file",
    ),
}
METRICS: dict[str, Row] = {
    "unknown": (
        {"metric": "acuracy"},
        ValueError,
        r"'acuracy' is not a metric; did you mean .*'accuracy'.*\? Known: accuracy, .*f1",
    ),
    "of numbers for classes": (
        {"metric": "rmse"},
        ValueError,
        r"`metric` must fit the task 'binary' \(accuracy, .*\), but got 'rmse'",
    ),
    "of classes for numbers": (
        {"y": NUMBERS, "metric": "f1"},
        ValueError,
        r"must fit the task 'regression' \(rmse, mae, r2\), but got 'f1'",
    ),
    "neither name nor function": (
        {"metric": 3},
        ValueError,
        "`metric` must be a name, a function",
    ),
    "unknown direction": ({"direction": "up"}, ValueError, "'up' is not a direction"),
    "wrong direction": (
        {"direction": "minimize"},
        ValueError,
        "`direction` must be 'maximize' for 'accuracy', but got 'minimize'",
    ),
}
BUDGET: dict[str, Row] = {
    "n_trials=0": ({"n_trials": 0}, ValueError, "`n_trials` must be at least 1, but got 0"),
    "n_trials=-1": ({"n_trials": -1}, ValueError, "`n_trials` must be at least 1, but got -1"),
    "half a trial": ({"n_trials": 1.5}, ValueError, "`n_trials` must be .*, but got 1.5"),
    "neither": (
        {"n_trials": None},
        ValueError,
        "`n_trials` or `timeout` must be given, but both are None",
    ),
    "negative timeout": (
        {"timeout": -1},
        ValueError,
        "`timeout` must be more than 0 sec.* got -1",
    ),
    "timeout of 0": ({"timeout": 0}, ValueError, "`timeout` must be more than 0 seconds"),
    "timeout of NaN": ({"timeout": float("nan")}, ValueError, "`timeout` must be more than 0"),
    "a text": ({"timeout": "1 h"}, ValueError, "`timeout` must be more than 0 .* got '1 h'"),
    "cohort_size=0": ({"cohort_size": 0}, ValueError, "`cohort_size` must be at least 1, but got"),
}
SPACE: dict[str, Row] = {
    "unknown in fixed": (
        {"fixed": {"lerning_rate": 0.1}},
        ValueError,
        "'lerning_rate' is not a hyperparameter of binary networks; did you mean 'learning_rate'",
    ),
    "unknown in space": (
        {"space": {"depth": IntDistribution(1, 2)}},
        ValueError,
        "'depth' is not a hyperparameter of binary networks.* Known: weight_init, hidden_layers",
    ),
    "of another task": (
        {"fixed": {"huber_delta": 1.0}},
        ValueError,
        "'huber_delta' is not a hyperparameter of binary networks",
    ),
    "outside the domain": (
        {"fixed": {"epochs": 0}},
        ValueError,
        r"`epochs` must be a number between 1 and 1e\+06, but got 0\.",
    ),
    "dropout of 1": ({"fixed": {"dropout": 1.0}}, ValueError, "`dropout` must .*, but got 1.0"),
    "NaN": ({"fixed": {"dropout": float("nan")}}, ValueError, "`dropout` must .* got nan"),
    "a text for a number": ({"fixed": {"width": "wide"}}, ValueError, "`width` must be a number"),
    "half a layer": (
        {"fixed": {"hidden_layers": 1.5}},
        ValueError,
        "`hidden_layers` must be a wh",
    ),
    "an unknown choice": (
        {"fixed": {"optimizer": "adamx"}},
        ValueError,
        "'adamx' is not a choice of `optimizer`; did you mean 'adam'.* Known: sgd,",
    ),
    "range outside the domain": (
        {"space": {"dropout": FloatDistribution(0.0, 1.0)}},
        ValueError,
        "`dropout` must be a number between 0 and 0.95, but got 1.0",
    ),
    "an unknown choice in a space": (
        {"space": {"activation": CategoricalDistribution(("relu", "sinus"))}},
        ValueError,
        "'sinus' is not a choice of `activation`.* Known: .*relu",
    ),
    "halves of layers": (
        {"space": {"hidden_layers": FloatDistribution(1, 2.0)}},
        ValueError,
        "`hidden_layers` must be a whole number, but `space` gives FloatDistribution",
    ),
    "no distribution": (
        {"space": {"dropout": (0.0, 0.5)}},
        ValueError,
        r"`space\['dropout'\]` must be an Optuna distribution .*, but got \(0\.0, 0\.5\)",
    ),
    "both": (
        {"space": {"dropout": FloatDistribution(0.0, 0.5)}, "fixed": {"dropout": 0.1}},
        ValueError,
        "`dropout` must be in `space` or in `fixed`, but is in both",
    ),
    "two budgets": (
        {"fixed": {"epochs": 3, "iterations": 30}},
        ValueError,
        "The budget must be `epochs` or `iterations`, but both are given",
    ),
}
REST: dict[str, Row] = {
    "template": (
        {"template": "dn"},
        ValueError,
        r"'dn' is not a template; did you mean 'dnn'\? K",
    ),
    "method": (
        {"method": "bayess"},
        ValueError,
        "'bayess' is not a method; did you mean 'bayes'.* Known: grid, random",
    ),
    "sampler": (
        {"sampler": "tpe"},
        ValueError,
        "`sampler` must be an Optuna sampler, but got 'tp",
    ),
    "sampler class": (
        {"sampler": optuna.samplers.TPESampler},
        ValueError,
        "`sampler` must be an Optuna sampler, but got <class",
    ),
    "pruner": ({"pruner": "median"}, ValueError, "`pruner` must be an Optuna pruner, but got 'me"),
    "negative seed": (
        {"seed": -1},
        ValueError,
        r"`seed` must be .* from 0 to 2\*\*32 - 1, but .*",
    ),
    "great seed": ({"seed": 2**32}, ValueError, "`seed` must be a whole number from 0 to"),
    "half a seed": ({"seed": 0.5}, ValueError, "`seed` must be a whole number .* got 0.5"),
    "device": ({"device": "gpu"}, ValueError, "`device` must be usable here, but gpu is not"),
    "no such device": (
        {"device": "cuda:77"},
        ValueError,
        "`device` must be usable here, but cuda",
    ),
    "storage": (
        {"storage": "no/such/folder.journal"},
        ValueError,
        r"The storage must be one that can be written, but no/such/folder\.journal cannot",
    ),
}
TABLE = {
    f"{name}: {row}": rows[row]
    for name, rows in {
        "data": DATA,
        "validation": VALIDATION,
        "files": FILES,
        "metrics": METRICS,
        "budget": BUDGET,
        "space": SPACE,
        "rest": REST,
    }.items()
    for row in rows
}


@pytest.fixture
def files(folder: Path) -> Path:
    (folder / "homes.csv").write_text("size,price\n" + "1,2\n3,4\n" * 20)
    (folder / "header.csv").write_text("size,price\n")
    (folder / "empty.csv").write_text("")
    (folder / "image.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    return folder


@pytest.mark.parametrize("row", TABLE)
def test_invalid_input_is_rejected_before_training(
    row: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any) -> None:
        raise AssertionError("Something was trained.")

    arguments, kind, message = TABLE[row]
    monkeypatch.setattr(Cohort, "__init__", forbidden)
    before = sorted(files.iterdir())
    usual: dict[str, Any] = {"template": "dnn", "X": X, "y": LABELS, "n_trials": 2}
    with pytest.raises(kind, match=message) as error:
        optimize(**(usual | arguments))
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert sorted(files.iterdir()) == before  # no journal, no folder of models


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: FloatDistribution(0.5, 0.1), id="float"),
        pytest.param(lambda: IntDistribution(5, 1), id="int"),
        pytest.param(lambda: CategoricalDistribution(()), id="no choices"),
    ],
)
def test_optuna_rejects_reversed_bounds(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"low <= high|must contain one or more") as error:
        make()
    assert "\n" not in str(error.value)


def test_other_study_with_the_same_name_is_not_changed(folder: Path) -> None:
    def run(**arguments: Any) -> list[Any]:
        usual: dict[str, Any] = {"study_name": "s", "n_trials": 2, "fixed": TINY}
        return optimize("dnn", X, **({"y": LABELS} | usual | arguments)).study.trials

    before = run()
    content = (folder / "optuna_nnhp.journal").read_bytes()
    for arguments, message in [
        ({"space": {"dropout": FloatDistribution(0.1, 0.2)}}, "another range of `dropout`"),
        ({"fixed": TINY | {"epochs": 9}}, "another value of `epochs`: 4, but this one has 9"),
        ({"metric": "f1"}, "another metric: 'accuracy', but this one has 'f1'"),
        ({"y": NUMBERS}, "another task: 'binary', but this one has 'regression'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            run(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    assert len(run()) == len(before) == 2
    assert (folder / "optuna_nnhp.journal").read_bytes().startswith(content)
