"""The page on workers says what is so."""

from __future__ import annotations

import ast
from pathlib import Path
import re
import shlex

import pytest

import optuna_nnhp
from optuna_nnhp.__main__ import parse_arguments

TEXT = (Path(optuna_nnhp.__file__).parent / "workers" / "WORKERS.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"python -m optuna_nnhp (worker --study.*)", re.sub(r"\\\n\s*", "", TEXT))
OPTIONS = set(optuna_nnhp.optimize.__kwdefaults__) | {"template", "X", "y"}


@pytest.mark.parametrize("code", PYTHON)
def test_calls_have_options_that_there_are(code: str) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "optimize"
    ]
    given = {keyword.arg for call in calls for keyword in call.keywords}
    assert given <= OPTIONS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_read(command: str) -> None:
    words = shlex.split(command.replace("$SLURM_CPUS_PER_TASK", "4"))
    assert parse_arguments(words).study == "digits"


def test_the_manifest_s_command_can_be_read() -> None:
    match = re.search(r"command: \[(.*?)\]", TEXT, re.DOTALL)
    assert match is not None
    words = [word.strip().strip('"') for word in match.group(1).split(",")]
    assert words[:3] == ["python", "-m", "optuna_nnhp"]
    assert parse_arguments(words[3:]).storage == "postgresql://tuner@db/studies"


def test_there_is_something_to_look_at() -> None:
    assert (len(PYTHON), len(COMMANDS)) == (5, 3)
