"""A study in a real PostgreSQL, started for these tests alone."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import shutil
import subprocess
import tempfile

import numpy as np
import pytest

from tests.tiny import courses
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian does not put it on the PATH."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URL of an empty database on a Unix socket, with no port and no password."""
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    # Not tmp_path: a socket's path may have 107 characters, and its owner is another user.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = ["runuser", "-u", "postgres", "--"]

    def run(program: str, *options: str) -> None:
        command = [*user, str(programs / program), "-D", str(folder / "data"), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=60)

    try:
        run("initdb", "-U", "tester", "-A", "trust", "--no-sync")
        settings = f"-c listen_addresses='' -c fsync=off -k {folder}"
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", settings)
        try:
            yield f"postgresql+psycopg2://tester@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")
    finally:
        shutil.rmtree(folder)


def test_a_study_runs_and_goes_on(postgresql: str, folder: Path) -> None:
    X, y = numbers()
    first = tune(X, y, storage=postgresql, n_trials=4, cohort_size=2)
    course = courses(first)
    assert course == courses(tune(X, y, storage=None, n_trials=4, cohort_size=2))
    assert [path.name for path in folder.iterdir()] == ["optuna_nnhp.models"]
    again = tune(X, y, storage=postgresql, n_trials=4)
    assert again.best_value == first.best_value
    assert np.array_equal(again.predict(X), first.predict(X))
    more = tune(X, y, storage=postgresql, n_trials=6)
    assert courses(more)[:4] == course
    assert len(trials(more)) == 6
