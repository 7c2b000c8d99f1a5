"""A model's files are read as they were written, or rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from optuna_nnhp import load
from optuna_nnhp.templates.language_model import LanguageModel
from optuna_nnhp.templates.model_files import METADATA_FILE
from optuna_nnhp.templates.model_files import WEIGHTS_FILE
from optuna_nnhp.templates.model_files import read_metadata
from optuna_nnhp.templates.model_files import write_model_files
from tests.templates.test_gpt import tune as tune_text
from tests.tiny import classes
from tests.tiny import tune


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_files(
        tmp_path / "a" / "model", nn.Linear(2, 1), {"template": "x", "word": "up"}
    )


def flip_bit(path: Path, place: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_metadata_is_read_as_written(folder: Path) -> None:
    record = read_metadata(folder)
    assert record["word"] == "up"
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_FILE, METADATA_FILE}


def test_edited_metadata_is_rejected(folder: Path) -> None:
    text = (folder / METADATA_FILE).read_text()
    (folder / METADATA_FILE).write_text(text.replace('"up"', '"uq"'))
    with pytest.raises(ValueError, match=r"model\.json .* cannot be read: it is damaged") as error:
        read_metadata(folder)
    assert "\n" not in str(error.value)


def test_metadata_layout_does_not_matter(folder: Path) -> None:
    record = json.loads((folder / METADATA_FILE).read_text())
    (folder / METADATA_FILE).write_text(json.dumps(dict(reversed(record.items()))))
    assert read_metadata(folder)["word"] == "up"


def test_changed_weights_are_rejected(folder: Path) -> None:
    flip_bit(folder / WEIGHTS_FILE, -3)
    with pytest.raises(ValueError, match=r"model\.safetensors must hold .* damaged") as error:
        read_metadata(folder)
    assert "\n" not in str(error.value)


def test_incomplete_models_are_reported(folder: Path) -> None:
    record = (folder / METADATA_FILE).read_bytes()
    with torch.no_grad():
        other = nn.Linear(2, 1)
        other.weight.zero_()
    write_model_files(folder, other, {"template": "x"})
    (folder / METADATA_FILE).write_bytes(record)  # killed between the two files
    with pytest.raises(ValueError, match="or another model's"):
        read_metadata(folder)


def test_models_of_versions_without_checksums_are_read(tmp_path: Path) -> None:
    result = tune(n_trials=1)
    folder = result.save(tmp_path)
    record = json.loads((folder / METADATA_FILE).read_text())
    del record["checksum"], record["weights"]
    (folder / METADATA_FILE).write_text(json.dumps(record))
    X, _ = classes()
    assert load(folder).predict(X).tolist() == result.predict(X).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [WEIGHTS_FILE, METADATA_FILE])
@pytest.mark.parametrize("place", [0, 9, -200, -1])
def test_damaged_language_models_are_rejected(name: str, place: int, tmp_path: Path) -> None:
    folder = tune_text(n_trials=1).save(tmp_path)
    assert isinstance(load(folder), LanguageModel)
    flip_bit(folder / name, place)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        load(folder)
    assert "\n" not in str(error.value)
