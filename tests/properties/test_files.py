"""A damaged model is rejected with the file's name, or is still the same model."""

from __future__ import annotations

from pathlib import Path
import shutil

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

import optuna_nnhp
from optuna_nnhp import optimize
from optuna_nnhp.templates import LanguageModel
from optuna_nnhp.templates import Predictor
from tests.properties.clear import outcome
from tests.tiny import classes
from tests.tiny import tune

FILES = ("model.json", "model.safetensors")
X, Y = classes()
TEXT = "to be or not to be\n" * 99


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a table's model, one with another's, and one with a text's."""
    folder = tmp_path_factory.mktemp("models")
    tune(n_trials=1).save(folder / "table")
    tune(n_trials=1, seed=1).save(folder / "other")
    small = {"iterations": 3, "width": 16, "layers": 1, "context": 32}
    optimize("gpt", TEXT, n_trials=1, storage=None, fixed=small).save(folder / "text")
    return {kind: folder / kind for kind in ("table", "other", "text")}


def answers(model: Predictor | LanguageModel) -> bytes:
    """All that a model says, bit for bit."""
    if isinstance(model, LanguageModel):
        return repr((model.bits_per_byte(TEXT[:60]), model.generate("to", 5))).encode()
    return np.asarray(model.predict_proba(X)).tobytes() + repr(model.predict(X).tolist()).encode()


def check(damaged: Path, whole: Path, name: str) -> None:
    """Load a damaged copy: it is refused and named, or all its answers are those of the whole."""
    try:
        found = outcome(lambda: optuna_nnhp.load(damaged))
    except OSError as error:
        pytest.fail(f"not a clear error: {error!r}")
    if found is not None:
        assert answers(found) == answers(optuna_nnhp.load(whole)), name


def copied(models: dict[str, Path], kind: str, folder: Path) -> Path:
    place = folder / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(models[kind], place))


kinds = st.sampled_from(["table", "text"])
files = st.sampled_from(FILES)
share = st.floats(0.0, 1.0, exclude_max=True)


@given(kind=kinds, name=files, where=share)
def test_truncated_file_is_rejected(
    kind: str, name: str, where: float, models: dict[str, Path], tmp_path: Path
) -> None:
    place = copied(models, kind, tmp_path)
    content = (place / name).read_bytes()
    (place / name).write_bytes(content[: int(where * len(content))])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        optuna_nnhp.load(place)


@given(kind=kinds, name=files, where=share, bit=st.integers(0, 7))
def test_file_with_a_flipped_bit_is_rejected(
    kind: str, name: str, where: float, bit: int, models: dict[str, Path], tmp_path: Path
) -> None:
    place = copied(models, kind, tmp_path)
    content = bytearray((place / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (place / name).write_bytes(bytes(content))
    check(place, models[kind], name)


@given(kind=kinds, name=files, content=st.one_of(st.binary(), st.text().map(str.encode)))
def test_file_with_other_content_is_rejected(
    kind: str, name: str, content: bytes, models: dict[str, Path], tmp_path: Path
) -> None:
    place = copied(models, kind, tmp_path)
    (place / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        optuna_nnhp.load(place)


@pytest.mark.parametrize("kind", ["table", "text"])
@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(
    kind: str, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    place = copied(models, kind, tmp_path)
    (place / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        optuna_nnhp.load(place)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", ["other", "text"])
def test_file_of_another_model_is_rejected(
    name: str, other: str, models: dict[str, Path], tmp_path: Path
) -> None:
    place = copied(models, "table", tmp_path)
    shutil.copy(models[other] / name, place / name)
    with pytest.raises(ValueError, match=r"model\.(json|safetensors)"):
        optuna_nnhp.load(place)
