"""Every code block of the README and of docs/ runs, and the generated tables are current."""

from __future__ import annotations

import ast
from configparser import ConfigParser
import importlib
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple
import urllib.request

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris

import optuna_nnhp
from optuna_nnhp.workers.command_line import parse_arguments
from tests.docs_tables import DOCS
from tests.docs_tables import TABLES
from tests.docs_tables import with_tables
from tests.tiny import ENVIRONMENT

ROOT = DOCS.parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [
    README,
    CONTRIBUTING,
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
MAX_README_LINES = 200
INSTALL = re.compile(
    r"^python3 -m venv \.venv && \.venv/bin/pip install -q -c constraints\.txt "
    r"-e '\.\[(\w+)\]'(?: && (.*))?$"
)
# Each block of these pages is a script of its own; the blocks of another page are one script.
INDEPENDENT_BLOCKS = {"README.md", "docs/guides/workers.md"}
# What the tests use in place of clusters and databases that they do not have.
REPLACEMENTS = {
    'Client("scheduler:8786")': "Client(n_workers=2, threads_per_worker=1)",
    'AutoExecutor(folder="jobs")': 'AutoExecutor(folder="jobs", cluster="local")',
    "mpi4py.futures import MPIPoolExecutor": (
        "joblib.externals.loky import get_reusable_executor as MPIPoolExecutor"
    ),
    "postgresql://host/studies": "studies.journal",
    "n_trials=1000": "n_trials=4",
}


class Block(NamedTuple):
    """A fenced code block.

    Args:
        page:
            Path of the page from the repository's root.
        line:
            Line of the page on which the code starts.
        language:
            What follows the opening fence.
        code:
            The code.
    """

    page: str
    line: int
    language: str
    code: str


def read_blocks(path: Path) -> list[Block]:
    """Return the code blocks of a page."""
    text = path.read_text(encoding="utf-8")
    page = path.relative_to(ROOT).as_posix()
    return [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
README_LINES = [b.code.strip() for b in BLOCKS if (b.page, b.language) == ("README.md", "sh")]
# Lines of a shell that end with a backslash go on in the next one.
COMMANDS = [
    line.strip()
    for block in BLOCKS
    if block.language == "sh" and block.page != "README.md"
    for line in re.sub(r"\\\n\s*", "", block.code).splitlines()
    if line.strip() and not line.startswith("#")
]


def as_script(blocks: list[Block]) -> str:
    """Return blocks of a page as one script in which each has its page's line numbers."""
    script = ""
    for block in blocks:
        script += "\n" * (block.line - 1 - script.count("\n")) + block.code
    return script


def scripts() -> dict[str, str]:
    """Return the Python scripts of all pages by a name that says where each is."""
    found: dict[str, str] = {}
    for page in dict.fromkeys(block.page for block in BLOCKS):
        blocks = [b for b in BLOCKS if (b.page, b.language) == (page, "python")]
        groups = [[b] for b in blocks] if page in INDEPENDENT_BLOCKS else [blocks]
        found |= {f"{page}:{group[0].line}": as_script(group) for group in groups if group}
    return found


SCRIPTS = scripts()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory with the scripts, two texts and a CSV file in it."""
    for name in ("studies", "dashboards"):
        shutil.copytree(ROOT / name, tmp_path / name)
    rng = np.random.default_rng(0)
    houses = pd.DataFrame({"area": rng.normal(size=80), "town": ["here", "there"] * 40})
    houses["price"] = houses["area"] + (houses["town"] == "here") + rng.normal(size=80)
    houses.to_csv(tmp_path / "houses.csv", index=False)
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_python_blocks_run(name: str, folder: Path) -> None:
    code = SCRIPTS[name]
    for said, here in REPLACEMENTS.items():
        code = code.replace(said, here)
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_every_replacement_replaces_something() -> None:
    code = "".join(SCRIPTS.values())
    assert [said for said in REPLACEMENTS if said not in code] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_the_readmes_first_two_commands_need_nothing_else() -> None:
    first, second = (INSTALL.match(line) for line in README_LINES[:2])
    assert first and first.groups() == ("dashboard", ".venv/bin/python studies/dnn_digits.py")
    # .ci/run runs this very line, in a fresh virtual environment.
    assert second and second.groups() == ("test", ".venv/bin/python -m pytest")


@pytest.mark.parametrize(
    "line", [line for line in README_LINES if "serve.py" not in line][2:] + README_LINES[:1]
)
def test_shell_blocks_of_the_readme_run(line: str, folder: Path) -> None:
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


def test_the_readmes_dashboard_command_runs(folder: Path) -> None:
    (line,) = [line for line in README_LINES if "serve.py" in line]
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


def extras() -> set[str]:
    """Return the names of the extras that setup.cfg has."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options.extras_require"])


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_of_the_docs_are_valid(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command.replace("$SLURM_CPUS_PER_TASK", "4"))
    words = words[words[0] == "exec" :]
    if match := INSTALL.match(command):
        assert match[1] in extras()
    elif words[:3] == ["python", "-m", "optuna_nnhp"]:
        assert parse_arguments(words[3:]).study == "digits"
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "docs", "exec")
    else:
        python, script, *options = words
        assert python in ("python", ".venv/bin/python")
        monkeypatch.syspath_prepend(ROOT)
        module = importlib.import_module(".".join(Path(script).with_suffix("").parts))
        with pytest.raises(SystemExit):
            module.main(["--help"])
        known = capsys.readouterr().out
        assert [word for word in options if word.startswith("-") and word not in known] == []


def test_the_command_of_the_kubernetes_job_is_valid() -> None:
    (manifest,) = [block.code for block in BLOCKS if block.language == "yaml"]
    match = re.search(r"command: \[(.*?)\]", manifest, re.DOTALL)
    assert match is not None
    words = [word.strip().strip('"') for word in match.group(1).split(",")]
    assert words[:3] == ["python", "-m", "optuna_nnhp"]
    assert parse_arguments(words[3:]).storage == "postgresql://tuner@db/studies"


@pytest.mark.parametrize("page", TABLES)
def test_generated_tables_are_current(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert with_tables(page, text) == text, "run `python -m tests.docs_tables`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []


def defined_names(path: Path) -> set[str]:
    """Return the names that a Python file defines: `name` and, within a class, `Class.name`."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_source_files_and_names_in_them_that_a_page_mentions_exist(page: Path) -> None:
    mentioned = re.findall(
        r"`((?:optuna_nnhp|tests|studies|dashboards|hub)/[\w/.]+)(?:::([\w.]+))?`",
        page.read_text(encoding="utf-8"),
    )
    assert [path for path, _ in mentioned if not (ROOT / path).exists()] == []
    unknown = [
        f"{path}::{name}"
        for path, name in mentioned
        if name and name not in defined_names(ROOT / path)
    ]
    assert unknown == []


def test_the_api_page_names_everything_that_is_public() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    missing = [
        name
        for name in optuna_nnhp.__all__
        if f"optuna_nnhp.{name}\n" not in text and f"`{name}`" not in text
    ]
    assert missing == []


def test_the_changelog_has_the_version_or_is_unreleased() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changes or f"## [{optuna_nnhp.__version__}]" in changes
