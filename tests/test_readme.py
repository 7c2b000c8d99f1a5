"""Every block of the README runs, and says what is so."""

from __future__ import annotations

from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris

import optuna_nnhp
from tests.readme_table import with_tables

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code.strip() for language, code in BLOCKS if language == "sh"]
INSTALL = re.compile(
    r"^python3 -m venv \.venv && \.venv/bin/pip install -q -c constraints\.txt "
    r"-e '\.\[(\w+)\]' && (.*)$"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the scripts in it."""
    for name in ("studies", "dashboards"):
        shutil.copytree(ROOT / name, tmp_path / name)
    source = np.random.default_rng(0)
    houses = pd.DataFrame({"area": source.normal(size=80), "town": ["here", "there"] * 40})
    houses["price"] = houses["area"] + (houses["town"] == "here") + source.normal(size=80)
    houses.to_csv(tmp_path / "houses.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code: str, folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_alone() -> None:
    first, second = (INSTALL.match(line) for line in SHELL[:2])
    assert first and first.groups() == ("dashboard", ".venv/bin/python studies/dnn_digits.py")
    # .ci/run runs this very line, in a fresh virtual environment.
    assert second and second.groups() == ("test", ".venv/bin/python -m pytest")
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "\ndashboard =" in setup and "\ntest =" in setup


@pytest.mark.parametrize(
    "line", [line for line in SHELL if "serve.py" not in line][2:] + SHELL[:1]
)
def test_shell_blocks_run(line: str, folder: Path) -> None:
    match = INSTALL.match(line)
    command = (match.group(2) if match else line).split()
    assert command.pop(0) == ".venv/bin/python"
    if "--timeout" in command:  # a short while instead of a minute
        place = command.index("--timeout")
        del command[place : place + 2]
    done = subprocess.run(
        [sys.executable, *command, "--timeout", "4"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "best" in done.stdout


def test_the_dashboard_block_runs(folder: Path) -> None:
    (line,) = [line for line in SHELL if "serve.py" in line]
    X, y = load_iris(return_X_y=True)
    fixed = {"epochs": 1, "width": 16}
    optuna_nnhp.optimize("dnn", X, y, n_trials=1, fixed=fixed, storage="dnn_digits.journal")
    command = [sys.executable, *line.split()[1:], "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with urllib.request.urlopen(address, timeout=30) as page:
            assert "dashboard" in page.read().decode().lower()
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def test_the_tables_are_those_of_the_catalogue() -> None:
    assert with_tables(TEXT) == TEXT, "run `python -m tests.readme_table`"


def test_the_tree_names_every_file() -> None:
    (tree,) = [code for language, code in BLOCKS if language == "text"]
    for path in (ROOT / "optuna_nnhp").rglob("*.*"):
        if path.suffix in (".py", ".c", ".h") and path.name != "__init__.py":
            assert re.search(rf"(^|\s){re.escape(path.name)}", tree), path.name
    named = set(re.findall(r"(\w+\.py)", tree)) - {"test_equivalence.py", "test_layout.py"}
    present = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert named <= present


def test_the_changelog_has_the_version_or_is_unreleased() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changes or f"## [{optuna_nnhp.__version__}]" in changes
