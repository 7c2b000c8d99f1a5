"""Imports run one way, files and functions are short, public names are documented."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optuna_nnhp

PACKAGE = "optuna_nnhp"
ROOT = Path(optuna_nnhp.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 500, 55

# Lowest first; packages of one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("version", "errors", "rng"),
    ("hyperparameters", "data"),
    ("networks",),
    ("engine",),
    ("training",),
    ("search", "storages"),
    ("study",),
    ("templates",),
    ("inspect",),
    ("workers",),
    ("objective", "optimize"),
    ("samplers", "cli", "__main__"),
    ("__init__",),
)
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def breaches(source: str, module: str) -> list[str]:
    """Imports that run the wrong way."""
    own, found = module.split(".")[1], []
    for line, name in imported(source, module):
        parts = name.split(".")
        if own == "training" and parts[0] == "optuna":
            found.append(f"{module}:{line}: training imports optuna")
        if parts[0] != PACKAGE:
            continue
        # `from optuna_nnhp import X` is a room, or else something that `__init__` re-exports.
        room = parts[1] if len(parts) > 1 and parts[1] in HEIGHT else "__init__"
        if room != own and HEIGHT[room] >= HEIGHT[own]:
            found.append(f"{module}:{line}: {own} imports {room}")
    return found


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("networks.mlp", "from optuna_nnhp.hyperparameters.width import WIDTH", 0),
        ("networks.mlp", "from optuna_nnhp.networks.layers import Noise", 0),
        ("networks.mlp", "from .layers import Noise", 0),
        ("networks.mlp", "from optuna_nnhp import rng", 0),
        ("networks.mlp", "import optuna, torch", 0),
        ("networks.mlp", "from optuna_nnhp.training.cohort import Cohort", 1),
        ("networks.mlp", "import optuna_nnhp.training.cohort", 1),
        ("networks.mlp", "from ..training import cohort", 1),
        ("networks.mlp", "from .. import training", 1),
        ("networks.mlp", "from optuna_nnhp import training", 1),
        ("networks.mlp", "from optuna_nnhp import optimize", 1),
        ("networks.mlp", "from optuna_nnhp import Result", 1),
        ("networks.mlp", "import optuna_nnhp", 1),
        ("networks.mlp", "def f():\n    from optuna_nnhp.study.budget import Budget", 1),
        (
            "networks.mlp",
            "if TYPE_CHECKING:\n    from optuna_nnhp.study.budget import Budget\nimport os",
            1,
        ),
        ("hyperparameters.depth", "from optuna_nnhp.data.supervised import prepare", 1),
        ("data.tabular", "from optuna_nnhp.hyperparameters.width import WIDTH", 1),
        ("objective", "from optuna_nnhp.optimize import optimize", 1),
        ("rng", "from optuna_nnhp.errors import unknown_name", 1),
        ("training.cohort", "import optuna", 1),
        ("training.cohort", "from optuna.distributions import IntDistribution", 1),
        ("training.cohort", "from optuna_nnhp.networks.mlp import StackedMLP", 0),
        ("__init__", "from optuna_nnhp.optimize import optimize", 0),
    ],
)
def test_imports_of_higher_layers_are_found(module: str, source: str, wrong: int) -> None:
    assert len(breaches(source, f"{PACKAGE}.{module}")) == wrong


def test_every_folder_has_a_layer() -> None:
    assert {room_of(path) for path in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    assert breaches(path.read_text(encoding="utf-8"), module_of(path)) == []


def statements(function: Function) -> list[ast.stmt]:
    """The body without its docstring."""
    body = function.body
    return body[1:] if ast.get_docstring(function) is not None else body


def test_length_of_a_function_excludes_its_docstring() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    a = 1\n\n    return a\n'
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 3


def length(function: Function) -> int:
    body = statements(function)
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_no_file_and_no_function_is_long(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    assert [(f.name, length(f)) for f in functions if length(f) > LONGEST_FUNCTION] == []


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public functions and classes, and public methods of those, that lack a docstring."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If):
            yield from undocumented([*node.body, *node.orelse], prefix)


def test_missing_docstrings_are_found() -> None:
    source = (
        'def a():\n    """A."""\ndef b(): ...\ndef _c(): ...\n'
        'class D:\n    """D."""\n    def e(self): ...\n    def _f(self): ...\nclass G: ...\n'
    )
    assert list(undocumented(ast.parse(source).body, "")) == ["b", "D.e", "G"]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body, f"{module_of(path)}.")) == []
