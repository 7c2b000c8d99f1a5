"""The packages for OptunaHub: loaded as its users do, with what the package itself proposes."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import inspect
import os
from pathlib import Path
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import optuna
from optuna.samplers import BaseSampler
import pytest
import yaml

from hub import build
from optuna_nnhp import samplers

REGISTRY = build.PACKAGES
NAMES = sorted(build.SAMPLERS)
BY_HAND = {"README.md", "example.py", "requirements.txt"}
KEYS = {"author", "title", "description", "tags", "optuna_versions", "license"}
# Run a program, and fail if it has imported what a sampler must not need.
ALONE = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
assert not {"torch", "optuna_nnhp"} & set(sys.modules)
"""
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load a package from here, instead of from the network."""
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")  # no git is needed for local packages
    import optunahub

    def local(name: str) -> ModuleType:
        module: ModuleType = optunahub.load_local_module(name, registry_root=str(REGISTRY))
        return module

    monkeypatch.setattr(optunahub, "load_module", local)
    yield local
    for name in [name for name in sys.modules if name.startswith("optunahub_registry.")]:
        del sys.modules[name]


def sampler_of(module: Any, name: str) -> BaseSampler:
    sampler: BaseSampler = getattr(module, build.SAMPLERS[name][0])(seed=1)
    return sampler


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -2.0, 2.0)
    y = trial.suggest_float("y", 1e-4, 1.0, log=True)
    shape = trial.suggest_categorical("shape", ["round", "square"])
    trial.set_user_attr("hypergradient", {"x": 2 * (x - 0.5), "y": 1.0})
    return (x - 0.5) ** 2 + y + 0.01 * (shape == "square")


def optimized(sampler: BaseSampler, n_trials: int = 96) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=n_trials)
    return study


def test_generated_packages_are_up_to_date() -> None:
    generated_files = build.generated_files()
    stale = [
        path.name
        for path, text in generated_files.items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `python hub/build.py`"
    present = {path for path in REGISTRY.rglob("*.*") if path.suffix != ".pyc"}
    assert {path.name for path in present - set(generated_files)} <= BY_HAND


def test_outdated_files_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, old = tmp_path / "good.py", tmp_path / "old.py"
    good.write_text("1\n", encoding="utf-8")
    old.write_text("1\n", encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(
        build, "generated_files", lambda: {good: "1\n", old: "2\n", tmp_path / "new": "3\n"}
    )
    assert build.main() == 0
    assert capsys.readouterr().out == "old.py\nnew\n"
    assert old.read_text(encoding="utf-8") == "2\n"


@pytest.mark.parametrize("name", NAMES)
def test_packaged_sampler_proposes_the_same_values_and_improves(name: str, load: Load) -> None:
    module = load(name)
    theirs, ours = sampler_of(module, name), sampler_of(samplers, name)
    assert module.__all__ == [type(ours).__name__]
    assert type(theirs).__module__.startswith(f"optunahub_registry.package.{name[:8]}")
    study, twin = optimized(theirs), optimized(ours)
    assert [t.params for t in study.trials] == [t.params for t in twin.trials]
    first = [trial.value or 0.0 for trial in study.trials[:4]]
    assert study.best_value < 0.2 * min(first)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_without_torch(name: str) -> None:
    command = [sys.executable, "-W", "error", "-c", ALONE, str(REGISTRY / name / "example.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"GIT_PYTHON_REFRESH": "quiet"}
    )
    assert done.returncode == 0, done.stderr
    assert f"{build.SAMPLERS[name][0]}: " in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_readme_has_the_form_that_optunahub_requires(name: str) -> None:
    text = (REGISTRY / name / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert set(about) == KEYS and all(about.values())
    assert "sampler" in about["tags"] and about["license"] == "MIT License"
    assert about["optuna_versions"] == [optuna.__version__]
    sections = re.findall(r"^## (.*)$", body, re.MULTILINE)
    assert sections == ["Abstract", "APIs", "Installation", "Example", "Others"]
    assert "\n### References\n" in body


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_names_every_argument_with_its_default(name: str, load: Load) -> None:
    sampler = build.SAMPLERS[name][0]
    parameters = inspect.signature(getattr(load(name), sampler)).parameters.values()
    said = ", ".join(f"{p.name}={p.default!r}" for p in parameters).replace("'", '"')
    text = (REGISTRY / name / "README.md").read_text(encoding="utf-8")
    assert f"`{sampler}(*, {said})`" in text
    assert re.findall(r"^  - `(\w+)`: ", text, re.MULTILINE) == [p.name for p in parameters]


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_example_runs(
    name: str, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (REGISTRY / name / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()
