"""How many files of the package a study of one trial enters."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import pytest

from optuna_nnhp.errors import short_repr
from optuna_nnhp.version import __version__
from tests.files_entered import MAX_IN_ALL
from tests.files_entered import MAX_IN_LOOP
from tests.files_entered import trace_files


@pytest.fixture(scope="module")
def entered() -> dict[str, bool]:
    """Whether each file that is entered is entered inside the loop; of a new process."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.files_entered"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return {line[2:]: line[0] == "*" for line in result.stdout.splitlines()[:-1]}


def test_a_study_of_one_trial_enters_few_files(entered: dict[str, bool]) -> None:
    assert sum(entered.values()) <= MAX_IN_LOOP
    assert len(entered) <= MAX_IN_ALL


def test_training_is_inside_the_loop_and_reading_data_is_not(entered: dict[str, bool]) -> None:
    assert entered["training/cohort.py"] and entered["study/tuner.py"]
    assert not entered["data/frames.py"] and not entered["optimize.py"]


def test_only_calls_count() -> None:
    assert trace_files(lambda: __version__) == (set(), set())
    assert trace_files(lambda: short_repr("a")) == (set(), {"errors.py"})
