"""A study whose checkpoints are damaged continues to the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import shutil
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import optuna
import pytest

from optuna_nnhp import optimize
from tests.properties.clear import example_share
from tests.study.test_recovery import TRIALS
from tests.study.test_recovery import records_without_kill
from tests.study.test_recovery import run
from tests.study.test_recovery import trial_records
from tests.tiny import SHAPE
from tests.tiny import numbers

KIND = "dnn"
Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was killed, with two checkpoints in it."""
    folder = tmp_path_factory.mktemp("killed")
    run(KIND, str(folder / "s.journal"), at=6)
    assert len(checkpoints_in(folder)) == 4
    return folder


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("s.models/*/checkpoints/*/*[0-9].*"))


def cut(share: float) -> Damage:
    return lambda content: content[: int(share * len(content))]


def flip(share: float, bit: int) -> Damage:
    def damage(content: bytes) -> bytes:
        found = bytearray(content)
        found[int(share * len(content))] ^= 1 << bit
        return bytes(found)

    return damage


def replace(new: bytes) -> Damage:
    return lambda _: new


share = st.floats(0.0, 1.0, exclude_max=True)
damages = st.one_of(
    st.builds(cut, share),
    st.builds(flip, share, st.integers(0, 7)),
    st.builds(replace, st.one_of(st.binary(), st.text().map(str.encode))),
    st.builds(
        replace, st.sampled_from([b"{}", b"[]", b"null", b'{"metadata": {}, "checksum": 1}'])
    ),
)


@example_share(0.5)
@given(harms=st.dictionaries(st.integers(0, 3), damages, min_size=1))
def test_damaged_checkpoint_is_ignored_or_rejected(
    harms: dict[int, Damage], killed: Path, folder: Path
) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(killed, folder, dirs_exist_ok=True)
    paths = checkpoints_in(folder)
    for place, damage in harms.items():
        paths[place].write_bytes(damage(paths[place].read_bytes()))
    finish()
    assert trial_records("s.journal") == records_without_kill(KIND)


def finish() -> Any:
    """Go on with the study that `run` has begun in another process."""
    X, y = numbers(200)
    return optimize(
        X=X,
        y=y,
        storage="s.journal",
        fixed=SHAPE | {"epochs": 12, "patience": 10**6},
        cohort_size=6,
        n_trials=TRIALS[KIND],
        pruner=optuna.pruners.NopPruner(),
        checkpoint_every=None,
        device="cpu",
    )
