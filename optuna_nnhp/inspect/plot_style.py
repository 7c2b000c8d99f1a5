"""Style all figures alike, and format the numbers and texts in them."""

from __future__ import annotations

from collections.abc import Sequence
import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from optuna_nnhp.inspect.summary import format_value

# Okabe and Ito's colors for color-blind readers, without yellow and black.
# https://jfly.uni-koeln.de/color/
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d46")
GREY = "#b8bec6"
TEXT_COLOR = "#2b2f36"


def escape_markup(value: object) -> str:
    """Format a value as text for a plotly figure that shows markup as written.

    Example:
        >>> escape_markup("<b>")
        '&lt;b&gt;'
    """
    # plotly interprets <b>, <a> and the like in every text; it decodes &lt; but not &quot;.
    return html.escape(format_value(value), quote=False)


def plot_template() -> go.layout.Template:
    """Return the plotly template of all figures: white, with thin grid lines.

    It is short on purpose: plotly's own template adds 7 kB to every saved figure.

    Example:
        >>> plot_template().layout.plot_bgcolor
        'white'
    """
    axis = {
        "gridcolor": "#eceef1",
        "linecolor": "#c9ced6",
        "ticks": "outside",
        "tickcolor": "#c9ced6",
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 10},
    }
    return go.layout.Template(
        layout={
            "font": {"family": "system-ui, Segoe UI, sans-serif", "size": 13, "color": TEXT_COLOR},
            "title": {"x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 24}},
            "margin": {"l": 70, "r": 30, "t": 84, "b": 60},
            "colorway": list(COLORS),
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hoverlabel": {"align": "left"},
            "legend": {"groupclick": "togglegroup"},
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def apply_style(figure: go.Figure, title: str, subtitle: str = "", **layout: Any) -> go.Figure:
    """Apply the common style to a figure, with a title and a line under it.

    Args:
        figure:
            The figure, which is changed in place.
        title:
            Title, with escaped markup.
        subtitle:
            Line under the title, with escaped markup.
        layout:
            More options of plotly's layout.

    Returns:
        The figure.

    Example:
        >>> apply_style(go.Figure(), "Learning curves").layout.title.text
        '<b>Learning curves</b>'
    """
    # The subtitle is part of the title because older versions of plotly.js lack title.subtitle.
    small = f'<br><span style="font-size:12px;color:#6b7280">{subtitle}</span>'
    text = f"<b>{title}</b>" + (small if subtitle else "")
    position = {"text": text, "x": 0, "xref": "container", "y": None, "yref": "container"}
    figure.update_layout(template=plot_template(), title=position, **layout)
    figure.update_layout(title={"yanchor": "auto"})
    return figure


def round_to_five_digits(value: float) -> float:
    """Round a number to five digits, which saves two thirds of its size in JSON.

    Example:
        >>> round_to_five_digits(0.123456789)
        0.12346
    """
    return float(f"{value:.5g}")


def robust_range(values: Sequence[float], maximized: bool) -> tuple[float, float]:
    """Return a range for the y axis that outliers do not stretch.

    It ends on the good side at the best value, and on the bad side at four times the distance
    from the best to the median. It covers all values if the worst is not far beyond that.

    Args:
        values:
            The values to show.
        maximized:
            Whether larger values are better.

    Example:
        >>> robust_range([1.0, 1.1, 1.2, 900.0], maximized=False)
        (0.97, 1.63)
    """
    sign = -1.0 if maximized else 1.0
    costs = sign * np.asarray(values, dtype=float)
    best, median, worst = float(costs.min()), float(np.median(costs)), float(costs.max())
    far = best + 4.0 * (median - best)
    limit = worst if median == best or worst - best <= 2.0 * (far - best) else far
    margin = 0.05 * (limit - best) or 0.05 * abs(best) or 0.05
    low, high = sorted((sign * (best - margin), sign * (limit + margin)))
    return round_to_five_digits(low), round_to_five_digits(high)
