"""The last words of a study script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
import shlex
import sys

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.inspect.figures import save_html
from optuna_nnhp.inspect.result import Result
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import main_parameters
from optuna_nnhp.inspect.summary import summary
from optuna_nnhp.storages.paths import sibling_path

REPORT_ROWS = (
    *("data", "budget", "trials", "ended by", "best", "other seeds"),
    *("perplexity", "loss", "trained on", "speed"),
)


def closing_report(result: Result, storage: str, extra: Mapping[str, object] | None = None) -> str:
    """Save the figures beside the study, and sum up in a few lines.

    Args:
        result:
            What the study found.
        storage:
            Where it is kept: the path of a journal file, or a URL.
        extra:
            More rows, such as the accuracy on data that the study has not seen.

    Returns:
        Lines for a person, the last one opens the dashboard.
    """
    rows = {name: text for name, text in summary(result.study).items() if name in REPORT_ROWS}
    trial = result.best_trial
    rows["parameters"] = ", ".join(
        f"{name}={format_value(value)}" for name, value in main_parameters(trial.params).items()
    )
    rows |= {name: format_value(value) for name, value in (extra or {}).items()}
    folder = figures_folder(storage)
    save_html(result.study, folder)
    rows["figures"] = str(folder / "index.html")
    where = shlex.quote(hide_passwords(storage, storage))
    rows["dashboard"] = f"{_python_command()} dashboards/serve.py {where}"
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name + ':':{width}s}{text}" for name, text in rows.items())


def figures_folder(storage: str) -> Path:
    """Where the figures of a study go: beside its file, or here for a database.

    Example:
        >>> figures_folder("digits.journal").name, figures_folder("sqlite:///a/b.db").name
        ('digits.figures', 'b.figures')
    """
    return sibling_path(storage, ".figures")


def _python_command() -> str:
    """How to call this Python from here: the virtual environment's, if it lies here."""
    try:
        return str(Path(sys.prefix, "bin", "python").relative_to(Path.cwd()))
    except ValueError:
        return "python"
