"""Write a study's summary and figures as an HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from html import escape
from pathlib import Path

import optuna
import plotly.graph_objects as go

from optuna_nnhp.inspect.figures import figures
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import range_text
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.inspect.summary import summary

_STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: #2b2f36; margin: 0 auto;
       max-width: 1160px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 16px; }
h2 { font-size: 17px; margin: 0 0 8px; }
section { max-width: 640px; margin-bottom: 24px; }
table { border-collapse: collapse; }
th, td { padding: 4px 24px 4px 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid #eceef1; font-weight: 400; overflow-wrap: anywhere; }
th { color: #6b7280; white-space: nowrap; }
thead th { font-size: 13px; }
.tables { display: flex; flex-wrap: wrap; gap: 0 64px; }
figure { margin: 20px 0; border: 1px solid #eceef1; border-radius: 6px; padding: 0 8px 8px; }
figcaption { font-size: 13px; text-align: right; }
a { color: #0072b2; }
"""
# The page loads plotly.js once, from the file that `Figure.write_html` writes beside it.
_FIGURE_OPTIONS = {
    "full_html": False,
    "include_plotlyjs": False,
    "default_height": "500px",
    "config": {"displaylogo": False, "responsive": True},
}


def save_html(study: optuna.Study, folder: str | Path) -> list[Path]:
    """Write each figure as an HTML file, and ``index.html`` with all figures and a summary.

    The files work offline: plotly.js (5 MB) is written beside them, once.

    Args:
        study:
            A study with one objective.
        folder:
            Folder to write to; created if it does not exist. Files of an earlier call are
            replaced.

    Returns:
        The written files, ``index.html`` first, without plotly.js.

    Raises:
        NotADirectoryError: If ``folder`` is a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save_html(optuna.create_study(), folder)]
        ['index.html', 'learning_curves.html', 'learning_rate.html']
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`folder` must be a folder, but {str(folder)!r} is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    all_figures = figures(study)
    paths = {name: folder / f"{name}.html" for name in all_figures}
    for name, figure in all_figures.items():
        figure.write_html(paths[name], include_plotlyjs="directory", config={"displaylogo": False})
    index = folder / "index.html"
    index.write_text(index_html(study, all_figures), encoding="utf-8")
    return [index, *paths.values()]


def index_html(study: optuna.Study, all_figures: Mapping[str, go.Figure]) -> str:
    """Return a page with the summary, the best parameters, the search space and the figures.

    Args:
        study:
            A study with one objective.
        all_figures:
            Figures by name; ``name.html`` and ``plotly.min.js`` are in the page's folder.

    Returns:
        The HTML page, with all names and values escaped.

    Example:
        >>> study = optuna.create_study(study_name="<b>")
        >>> "<h1>&lt;b&gt;</h1>" in index_html(study, {})
        True
    """
    top, bottom = [_html_table(summary(study))], []
    if best := find_best_trial(study):
        params = _html_table(best.params, ("parameter", "value"))
        top.append(f"<h2>Best trial: {best.number}</h2>{params}")
    if space := {name: range_text(found) for name, found in search_space(study).items()}:
        bottom.append("<h2>Tuned parameters</h2>" + _html_table(space, ("parameter", "range")))
    if fixed := study.user_attrs.get("fixed"):
        bottom.append("<h2>Fixed parameters</h2>" + _html_table(fixed, ("parameter", "value")))
    figure_html = "".join(
        f'<figure id="{name}">{figure.to_html(**_FIGURE_OPTIONS, div_id=f"{name}-plot")}'
        f'<figcaption><a href="{name}.html">{name}.html</a></figcaption></figure>'
        for name, figure in ((escape(name), figure) for name, figure in all_figures.items())
    )
    name = escape(study.study_name)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<title>{name}</title><style>{_STYLE}</style><script src="plotly.min.js"></script></head>'
        f"<body><h1>{name}</h1>{_side_by_side(top)}{figure_html}{_side_by_side(bottom)}</body>"
        "</html>\n"
    )


def _html_table(rows: Mapping[str, object], heads: tuple[str, str] | None = None) -> str:
    """Return a table with two columns, escaped."""
    head = f"<thead><tr><th>{heads[0]}</th><th>{heads[1]}</th></tr></thead>" if heads else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(format_value(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _side_by_side(sections: Iterable[str]) -> str:
    """Return sections that are shown side by side."""
    content = "".join(f"<section>{section}</section>" for section in sections)
    return f'<div class="tables">{content}</div>'
