"""Write the tables of docs/ that follow from the code: `python -m tests.docs_tables`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
import re

import optuna_nnhp
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.study.outcomes import outcome_table

DOCS = Path(__file__).parent.parent / "docs"
TASKS = {
    "table": "Networks on tables",
    "classification": "Classification",
    "regression": "Regression",
    "language": "Language models",
    "any": "All studies",
}
MARKED = r"(<!-- {0}: [^\n]*-->\n)(.*?)(<!-- end of {0} -->)"


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; True and False become yes and no."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = ({True: "yes", False: "no"}.get(cell, str(cell)) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def catalogue_tables() -> str:
    """Return the catalogue of hyperparameters: one table for each kind of study."""
    frame = optuna_nnhp.catalogue()
    tables = []
    for task, title in TASKS.items():
        rows = (
            (
                f"**{h.name}**" + (" (static)" if h.static else ""),
                h.range,
                h.default,
                h.grid_values,
                h.tuned,
                h.help,
            )
            for h in frame[frame["task"] == task].itertuples()
        )
        head = ("name", "range", "default", "grid", "tuned", "effect")
        tables.append(f"### {title}\n\n" + markdown_table(head, rows))
    return "\n".join(tables)


def activation_table() -> str:
    """Return what speaks for and against each activation function."""
    rows = ((name, a.pros, a.cons) for name, a in ACTIVATIONS.items())
    return markdown_table(("activation", "for it", "against it"), rows)


def outcomes_table() -> str:
    """Return how a trial can end."""
    return "\n".join(outcome_table()) + "\n"


TABLES = {
    "trials.md": {"outcomes": outcomes_table},
    "catalogue.md": {"catalogue": catalogue_tables, "activations": activation_table},
}


def with_tables(page: str, text: str) -> str:
    """Return a page's text with its generated tables as they must be now."""
    for name, table in TABLES[page].items():
        marked = re.compile(MARKED.format(name), re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(f"{page} must have the marks of the table {name!r} once.")
        before, after = marked.sub(r"\1\0\3", text).split("\0")
        text = before + table() + after
    return text


def main() -> None:
    """Write all tables."""
    for page in TABLES:
        path = DOCS / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
