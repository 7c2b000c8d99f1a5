"""What `import optuna_nnhp` offers, and what it does not import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
import subprocess
import sys

import pytest

import optuna_nnhp

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path for folder in ("studies", "dashboards") for path in (ROOT / folder).rglob("*.py")
)
SLOW_PACKAGES = ("cmaes", "matplotlib", "plotly", "scipy", "sklearn")


def in_new_process(code: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return result.stdout.split()


def private_imports(source: str) -> Iterator[str]:
    """Imports from `optuna_nnhp` that are not of its public names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name for name in names if name.startswith("optuna_nnhp."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("optuna_nnhp."):
                yield node.module
            elif node.module == "optuna_nnhp":
                names = [alias.name for alias in node.names]
                yield from (name for name in names if name not in optuna_nnhp.__all__)


@pytest.mark.parametrize("name", SLOW_PACKAGES)
def test_import_leaves_slow_packages_out(name: str) -> None:
    loaded = in_new_process("import sys, optuna_nnhp; print(*sys.modules)")
    assert "optuna_nnhp.optimize" in loaded
    assert name not in {module.partition(".")[0] for module in loaded}


@pytest.mark.parametrize("name", optuna_nnhp.__all__)
def test_every_public_name_exists_after_import(name: str) -> None:
    assert in_new_process(f"import optuna_nnhp; print(optuna_nnhp.{name} is not None)") == ["True"]


def test_samplers_need_no_import_of_their_own() -> None:
    code = "import optuna_nnhp; print(type(optuna_nnhp.samplers.ZoomSampler()).__name__)"
    assert in_new_process(code) == ["ZoomSampler"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = optuna_nnhp.optimise


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_public_names_only(path: Path) -> None:
    assert list(private_imports(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from optuna_nnhp import optimize, cli", []),
        ("import optuna_nnhp", []),
        ("from optuna_nnhp import rng", ["rng"]),
        ("from optuna_nnhp.study.tuner import Tuner", ["optuna_nnhp.study.tuner"]),
        ("import optuna_nnhp.study", ["optuna_nnhp.study"]),
    ],
)
def test_private_imports_are_found(source: str, found: list[str]) -> None:
    assert list(private_imports(source)) == found
