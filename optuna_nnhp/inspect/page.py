"""The HTML page that shows a study's summary and figures."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from html import escape

import optuna

from optuna_nnhp.inspect.summary import range_text
from optuna_nnhp.inspect.summary import ranked
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.inspect.summary import shown
from optuna_nnhp.inspect.summary import summary

_STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: #2b2f36; margin: 0 auto;
       max-width: 1160px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 16px; }
h2 { font-size: 17px; margin: 28px 0 8px; }
table { border-collapse: collapse; }
th, td { padding: 4px 24px 4px 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid #eceef1; font-weight: 400; overflow-wrap: anywhere; }
th { color: #6b7280; white-space: nowrap; }
thead th { font-size: 13px; }
.tables { display: flex; flex-wrap: wrap; gap: 0 64px; }
iframe { width: 100%; height: 520px; border: 1px solid #eceef1; border-radius: 6px; }
figure { margin: 20px 0; }
figcaption { font-size: 13px; text-align: right; }
a { color: #0072b2; }
"""


def _table(rows: Mapping[str, object], heads: tuple[str, str] | None = None) -> str:
    head = f"<thead><tr><th>{heads[0]}</th><th>{heads[1]}</th></tr></thead>" if heads else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(shown(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def index_html(study: optuna.Study, files: Iterable[str]) -> str:
    """The page with the summary, the best parameters, the search space and the figures.

    Args:
        study:
            A study of one objective.
        files:
            Names of the figures' HTML files in the page's folder.

    Returns:
        The whole page; every name and value in it is escaped.

    Example:
        >>> study = optuna.create_study(study_name="<b>")
        >>> "<h1>&lt;b&gt;</h1>" in index_html(study, [])
        True
    """
    tables = []
    if complete := ranked(study):
        heads = ("parameter", "value")
        title = f"<h2>Best trial: {complete[0].number}</h2>"
        tables.append(title + _table(complete[0].params, heads))
    if space := {name: range_text(found) for name, found in search_space(study).items()}:
        tables.append("<h2>What is tuned</h2>" + _table(space, ("parameter", "range")))
    if fixed := study.user_attrs.get("fixed"):
        tables.append("<h2>What is fixed</h2>" + _table(fixed, ("parameter", "value")))
    frames = "".join(
        f'<figure><iframe src="{escape(file)}" title="{escape(file)}" loading="lazy"></iframe>'
        f'<figcaption><a href="{escape(file)}">{escape(file)}</a></figcaption></figure>'
        for file in files
    )
    name = escape(study.study_name)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{name}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{name}</h1>{_table(summary(study))}{frames}"
        f'<div class="tables">{"".join(f"<section>{t}</section>" for t in tables)}</div>'
        "</body></html>\n"
    )
