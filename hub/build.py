"""Make the code of our OptunaHub packages from the modules of optuna_nnhp.

OptunaHub loads one folder at a time, and its users should not have to install PyTorch for a
sampler: so each package gets copies of the few modules that it needs, with relative imports. What
is written by hand in `hub/package/` are the READMEs, the examples and the requirements.

    python hub/build.py
"""

from __future__ import annotations

from pathlib import Path
import re
import sys

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "hub" / "package"
SEARCH = "optuna_nnhp/search"

# By package: its sampler and the modules of `SEARCH` it needs, the sampler's own first.
SAMPLERS = {
    "samplers/zoom": ("ZoomSampler", ("zoom", "boxes", "ordering")),
    "samplers/hypergradient": ("HypergradientSampler", ("hypergradient", "unit_scale")),
    "samplers/population_based_training": ("PopulationSampler", ("population", "unit_scale")),
}
SEARCH_IMPORT = re.compile(r"^from optuna_nnhp\.search\.(\w+) import ", re.MULTILINE)


def copy_of_module(name: str) -> str:
    """A module of `SEARCH` as it stands in a package.

    Args:
        name:
            The module's name.
    """
    source = (ROOT / SEARCH / f"{name}.py").read_text(encoding="utf-8")
    source = SEARCH_IMPORT.sub(r"from .\1 import ", source)
    return f"# Made by hub/build.py from {SEARCH}/{name}.py of optuna_nnhp: edit that.\n{source}"


def package_init(sampler: str, module: str) -> str:
    """The `__init__.py` of a package.

    Args:
        sampler:
            Name of its class.
        module:
            Where the class is.
    """
    return (
        f'"""{sampler} of optuna_nnhp, as a package of OptunaHub."""\n\n'
        f'from .{module} import {sampler}\n\n__all__ = ["{sampler}"]\n'
    )


def generated_files() -> dict[Path, str]:
    """The text of every file that is made, by its path."""
    files = {}
    for package, (sampler, modules) in SAMPLERS.items():
        folder = PACKAGES / package
        files[folder / "__init__.py"] = package_init(sampler, modules[0])
        files[folder / "LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
        files |= {folder / f"{name}.py": copy_of_module(name) for name in modules}
    return files


def main() -> int:
    """Write the files that are not up to date, and say which."""
    for path, text in generated_files().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
