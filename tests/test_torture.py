"""A study that is killed at random moments loses nothing: see `tests.torture`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import torture


@pytest.mark.parametrize("storage", ["study.journal", "sqlite:///study.db"])
def test_kills_lose_no_trial(storage: str, folder: Path) -> None:
    found = torture(storage, n_trials=150, kills=3, longest=1.0)
    assert found.faults == []
    assert found.kills == 3
    assert found.trained >= found.recorded > 0
    assert not list(folder.glob("*.models/*/checkpoints/*"))
