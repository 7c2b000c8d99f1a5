"""Write the README's tables of hyperparameters and activations: `python -m tests.readme_table`."""

from __future__ import annotations

from pathlib import Path
import re

import optuna_nnhp
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS

README = Path(__file__).parent.parent / "README.md"
MARKED = r"(<!-- {0}:[^\n]*-->\n)(.*?)(<!-- end of {0} -->)"


def catalogue_table() -> str:
    frame = optuna_nnhp.catalogue()
    lines = ["| " + " | ".join(frame.columns) + " |", "|---" * len(frame.columns) + "|"]
    for row in frame.itertuples(index=False):
        cells = [{True: "yes", False: "no"}.get(cell, str(cell)) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def activation_table() -> str:
    rows = [f"| {name} | {a.pros} | {a.cons} |\n" for name, a in ACTIVATIONS.items()]
    return "| activation | for it | against it |\n|---|---|---|\n" + "".join(rows)


def with_tables(text: str) -> str:
    for name, table in (("catalogue", catalogue_table()), ("activations", activation_table())):
        marked = re.compile(MARKED.format(name), re.DOTALL)
        text = marked.sub(lambda m, table=table: m[1] + table + m[3], text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
