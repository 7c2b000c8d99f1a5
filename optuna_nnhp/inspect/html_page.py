"""The HTML page that shows a study's summary and figures."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from html import escape

import optuna
import plotly.graph_objects as go

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
# The page loads plotly.js once, from the file that `Figure.write_html` puts beside it.
_FIGURE = {
    "full_html": False,
    "include_plotlyjs": False,
    "default_height": "500px",
    "config": {"displaylogo": False, "responsive": True},
}


def _html_table(rows: Mapping[str, object], heads: tuple[str, str] | None = None) -> str:
    head = f"<thead><tr><th>{heads[0]}</th><th>{heads[1]}</th></tr></thead>" if heads else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(format_value(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _side_by_side(sections: Iterable[str]) -> str:
    return (
        f'<div class="tables">{"".join(f"<section>{text}</section>" for text in sections)}</div>'
    )


def index_html(study: optuna.Study, figures: Mapping[str, go.Figure]) -> str:
    """The page with the summary, the best parameters, the search space and the figures.

    Args:
        study:
            A study of one objective.
        figures:
            The figures by name; ``name.html`` and ``plotly.min.js`` are in the page's folder.

    Returns:
        The whole page; every name and value in it is escaped.

    Example:
        >>> study = optuna.create_study(study_name="<b>")
        >>> "<h1>&lt;b&gt;</h1>" in index_html(study, {})
        True
    """
    top, bottom = [_html_table(summary(study))], []
    if leader := find_best_trial(study):
        best = _html_table(leader.params, ("parameter", "value"))
        top.append(f"<h2>Best trial: {leader.number}</h2>{best}")
    if space := {name: range_text(found) for name, found in search_space(study).items()}:
        bottom.append("<h2>What is tuned</h2>" + _html_table(space, ("parameter", "range")))
    if fixed := study.user_attrs.get("fixed"):
        bottom.append("<h2>What is fixed</h2>" + _html_table(fixed, ("parameter", "value")))
    drawn = "".join(
        f'<figure id="{name}">{figure.to_html(**_FIGURE, div_id=f"{name}-plot")}'
        f'<figcaption><a href="{name}.html">{name}.html</a></figcaption></figure>'
        for name, figure in ((escape(name), figure) for name, figure in figures.items())
    )
    name = escape(study.study_name)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<title>{name}</title><style>{_STYLE}</style><script src="plotly.min.js"></script></head>'
        f"<body><h1>{name}</h1>{_side_by_side(top)}{drawn}{_side_by_side(bottom)}</body></html>\n"
    )
