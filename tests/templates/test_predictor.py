"""A saved model predicts the same, and a damaged one is rejected."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_nnhp import load
from optuna_nnhp.templates import Predictor
from tests.tiny import Array
from tests.tiny import classes
from tests.tiny import numbers
from tests.tiny import tune


def mixed_table() -> tuple[pd.DataFrame, Array]:
    X, y = classes()
    source = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "number": np.where(source.random(80) < 0.2, np.nan, X[:, 0].astype(np.float64)),
            "town": source.choice(np.array(["Ulm", "Rome", None]), 80),
            "member": source.choice([True, False], 80),
            "since": pd.Timestamp("2020-02-01") + pd.to_timedelta(source.integers(0, 99, 80), "D"),
            "constant": 7,
        }
    )
    return frame, y


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(n_trials=1).save(tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("make", [classes, numbers, mixed_table])
@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_loaded_models_predict_the_same(
    make: Callable[[], Any], normalization: str, tmp_path: Path
) -> None:
    X, y = make()
    fixed = {"epochs": 2, "normalization": normalization, "hidden_layers": 2}
    result = tune(X, y, n_trials=2, fixed=fixed)
    folder = result.save(tmp_path / "a" / "model")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.json"}
    loaded = load(folder)
    assert np.array_equal(loaded.predict(X), result.predict(X))
    assert loaded.predict(X).dtype == result.predict(X).dtype
    if make is not numbers:
        assert np.array_equal(loaded.predict_proba(X), result.predict_proba(X))
        assert loaded.classes == ["down", "up"]
    assert loaded.score(X, y) == result.score(X, y)
    assert loaded.best_params == result.best_params
    assert loaded.best_value == result.best_value
    again = load(str(loaded.save(tmp_path / "b")))
    assert np.array_equal(again.predict(X), result.predict(X))


def test_files_hold_no_code(saved: Path) -> None:
    for path in saved.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # pickle, torch.save
    header = (saved / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert {"dtype", "shape", "data_offsets"} == json.loads(header[8 : 8 + size])["0.bias"].keys()


def test_a_function_as_metric_is_not_saved(tmp_path: Path) -> None:
    def own(y_true: Array, y_pred: Array) -> float:
        return float(np.mean(y_true == y_pred))

    X, y = classes()
    result = tune(X, y, metric=own, n_trials=1)
    assert result.score(X, y) == np.mean(result.predict(X) == y)
    loaded = load(result.save(tmp_path))
    assert np.array_equal(loaded.predict(X), result.predict(X))
    with pytest.raises(
        ValueError, match="`score` must have a metric, but the metric was a function"
    ):
        loaded.score(X, y)


def copy_model(saved: Path, to: Path) -> Path:
    to.mkdir()
    for path in saved.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_files_are_reported(name: str, saved: Path, tmp_path: Path) -> None:
    folder = copy_model(saved, tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"m must hold a saved model, but has no {name}"):
        load(folder)


def test_missing_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing must hold .* but has no model\.json"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:5], id="stump"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content[:-1], id="one byte short"),
        pytest.param(
            lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], id="bit"
        ),
        pytest.param(lambda content: b"\xff" * len(content), id="ones"),
        pytest.param(lambda content: b"[1, 2]", id="another json"),
        pytest.param(lambda content: b'{"format": 1}', id="a foreign json"),
    ],
)
def test_damaged_files_are_rejected(
    name: str, damage: Callable[[bytes], bytes], saved: Path, tmp_path: Path
) -> None:
    folder = copy_model(saved, tmp_path / "m")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 99),
        (("params",), None),
        (("params",), {}),
        (("params", "width"), "wide"),
        (("params", "width"), -3),
        (("params", "activation"), "sinus"),
        (("params", "normalization"), "odd"),
        (("preprocessor",), []),
        (("preprocessor",), "odd"),
        (("preprocessor",), {"columns": 3}),
        (("target",), None),
        (("target",), {"task": "binary"}),
        (("metric",), ["a"]),
        (("best_value",), ...),
    ],
)
def test_edited_metadata_is_rejected(
    path: tuple[str, ...], value: Any, saved: Path, tmp_path: Path
) -> None:
    folder = copy_model(saved, tmp_path / "m")
    record = json.loads((folder / "model.json").read_text())
    del record["checksum"]  # as versions before it wrote them
    place = record
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / "model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"model\.json must be one that `save` wrote") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_rejected(saved: Path, tmp_path: Path) -> None:
    folder = copy_model(saved, tmp_path / "m")
    other = tune(n_trials=1, fixed={"width": 20, "epochs": 1}).save(tmp_path / "other")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors must hold this network's weights"):
        load(folder)


@pytest.fixture(scope="module")
def predictor(saved: Path) -> Predictor:
    return load(saved)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((3, 2)), "X must have 3 columns, but has 2"),
        (np.zeros((0, 3)), "at least one row"),
        (np.zeros(3), "X must be 2-D"),
        (np.full((2, 3), np.inf), "must be finite"),
        (pd.DataFrame({"x0": [1.0]}), "must have the columns of the training data, but lacks"),
    ],
)
def test_invalid_tables_are_rejected_by_predict(
    X: Any, message: str, predictor: Predictor
) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.predict(X)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["up"], "must have the same number of rows, but have 2 and 1"),
        (["up", "sideways"], "must be among 'down', 'up'"),
        (["up", None], "must have no missing values"),
    ],
)
def test_invalid_labels_are_rejected_by_score(y: Any, message: str, predictor: Predictor) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.score(np.zeros((2, 3)), y)


def test_predict_proba_is_rejected_for_regressions() -> None:
    result = tune(*numbers(), n_trials=1)
    with pytest.raises(ValueError, match="`predict_proba` must be called for classes"):
        result.predict_proba(numbers()[0])
    assert result.predictor.classes == []
