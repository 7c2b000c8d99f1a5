"""Write the README's tables of hyperparameters and activations: `python -m tests.readme_table`."""

from __future__ import annotations

from pathlib import Path
import re

import optuna_nnhp
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS

README = Path(__file__).parent.parent / "README.md"
CATALOGUE = re.compile(r"(<!-- catalogue:[^\n]*-->\n)(.*?)(<!-- end of catalogue -->)", re.DOTALL)
ACTIVATION = re.compile(r"(\|---\|---\|---\|\n)(.*?)(<!-- activations -->)", re.DOTALL)


def catalogue_table() -> str:
    frame = optuna_nnhp.catalogue()
    lines = ["| " + " | ".join(frame.columns) + " |", "|---" * len(frame.columns) + "|"]
    for row in frame.itertuples(index=False):
        cells = [{True: "yes", False: "no"}.get(cell, str(cell)) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def activation_table() -> str:
    return "".join(f"| {name} | {a.pros} | {a.cons} |\n" for name, a in ACTIVATIONS.items())


def with_tables(text: str) -> str:
    text = CATALOGUE.sub(lambda m: m[1] + catalogue_table() + m[3], text)
    return ACTIVATION.sub(lambda m: m[1] + activation_table() + m[3], text)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
