"""Write the closing report of a study script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
import shlex
import sys

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.inspect.html_page import save_html
from optuna_nnhp.inspect.result import Result
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import main_parameters
from optuna_nnhp.inspect.summary import summary
from optuna_nnhp.storages.open_storage import sibling_path

# Rows of `summary` that the report shows.
REPORT_ROWS = (
    *("data", "budget", "trials", "ended by", "best", "other seeds"),
    *("perplexity", "loss", "trained on", "speed"),
)


def closing_report(result: Result, storage: str, extra: Mapping[str, object] | None = None) -> str:
    """Save the figures beside the study, and summarize the study in a few lines.

    Args:
        result:
            The study's result.
        storage:
            Storage of the study: the path of a journal file, or a URL.
        extra:
            More rows by label, such as the accuracy on test data.

    Returns:
        The report; its last line is the command that opens the dashboard.
    """
    rows = {label: text for label, text in summary(result.study).items() if label in REPORT_ROWS}
    rows["parameters"] = ", ".join(
        f"{name}={format_value(value)}"
        for name, value in main_parameters(result.best_trial.params).items()
    )
    rows |= {label: format_value(value) for label, value in (extra or {}).items()}
    folder = figures_folder(storage)
    save_html(result.study, folder)
    rows["figures"] = str(folder / "index.html")
    location = shlex.quote(hide_passwords(storage, storage))
    rows["dashboard"] = f"{_python_command()} dashboards/serve.py {location}"
    width = max(map(len, rows)) + 2
    return "\n".join(f"{label + ':':{width}s}{text}" for label, text in rows.items())


def figures_folder(storage: str) -> Path:
    """Return the folder for a study's figures: beside its file, or here for a database.

    Example:
        >>> figures_folder("digits.journal").name, figures_folder("sqlite:///a/b.db").name
        ('digits.figures', 'b.figures')
    """
    return sibling_path(storage, ".figures")


def _python_command() -> str:
    """Return the command that runs this Python: that of the virtual environment, if it is here."""
    try:
        return str(Path(sys.prefix, "bin", "python").relative_to(Path.cwd()))
    except ValueError:
        return "python"
