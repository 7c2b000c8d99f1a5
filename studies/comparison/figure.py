"""Plot the best value so far, over seconds and over model-epochs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optuna_nnhp import METHODS
from studies.comparison.effort import value_at
from studies.comparison.methods import BASELINE
from studies.comparison.methods import Run
from studies.comparison.methods import Runs
from studies.comparison.methods import group_runs

AXES = {"seconds": "seconds", "epochs": "model-epochs of the trials that have ended"}
OPACITY = 0.12  # of the bands
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d46")
BASELINE_COLOR = "#2b2f36"
REACH = 4.0  # the axis shows this many times the distance from the best value to the median
Band = list[tuple[float, float, float, float]]  # spent, smallest, median and largest value


def band(runs: Sequence[Run], axis: str) -> Band:
    """Return the range over the seeds of a method's best value, from when all seeds have one.

    Args:
        runs:
            One run per seed.
        axis:
            ``"seconds"`` or ``"epochs"``; the band ends where the shortest run ends.
    """
    if not all(run.best_values for run in runs):
        return []
    end = min(getattr(run, axis) for run in runs)
    spent = {getattr(point, axis) for run in runs for point in run.best_values}
    found: Band = []
    for at in sorted({end, *(s for s in spent if s < end)}):
        values = [v for run in runs if (v := value_at(run.best_values, axis, at)) is not None]
        if len(values) == len(runs):
            found.append((at, min(values), median(values), max(values)))
    return found


def plot_best_values(runs: Runs, timeout: float) -> go.Figure:
    """Return a figure with a row for each data set and a column for each axis."""
    sets = group_runs(runs, lambda one: one.data)
    figure = make_subplots(len(sets), len(AXES), shared_yaxes=True, horizontal_spacing=0.04)
    methods = sorted({one.method for one in runs}, key=[BASELINE, *METHODS].index)
    looks = dict(zip(methods, (BASELINE_COLOR, *COLORS), strict=False))
    for row, (data, of_data) in enumerate(sets.items(), 1):
        by_method = group_runs(of_data, lambda one: one.method)
        for column, (axis, title) in enumerate(AXES.items(), 1):
            for method in methods:
                is_first = row == column == 1
                for trace in _traces(by_method[method], method, axis, looks[method], is_first):
                    figure.add_trace(trace, row, column)
            figure.update_xaxes(type="log", title_text=title, row=row, col=column)
        values = [point.value for one in of_data for point in one.best_values]
        if values:
            figure.update_yaxes(range=value_range(values, of_data[0].maximize), row=row)
        figure.update_yaxes(title_text=f"{of_data[0].metric}, {data}", row=row, col=1)
    seeds = len({one.seed for one in runs})
    subtitle = (
        f"{timeout:g} s a study; seeds: {seeds}; lines: their median, bands: all of them. "
        "A click on a name hides it, two clicks show it alone."
    )
    heading = {"text": "Best value so far (validation)", "subtitle": {"text": subtitle}}
    height = 120 + 400 * len(sets)
    return figure.update_layout(title=heading, template="plotly_white", height=height)


def value_range(values: Sequence[float], maximize: bool) -> tuple[float, float]:
    """Return the range of an axis, from the best value to far beyond the median.

    Example:
        >>> value_range([1.0, 1.25, 1.5, 900.0], maximize=False)
        (1.0, 2.5)
    """
    best, worst = (max(values), min(values)) if maximize else (min(values), max(values))
    far = best + REACH * (median(values) - best)
    limit = max(worst, far) if maximize else min(worst, far)
    return (limit, best) if maximize else (best, limit)


def _traces(
    runs: Sequence[Run], method: str, axis: str, color: str, is_first: bool
) -> list[go.Scatter]:
    """Return a method's band and line in one panel; the legend shows the method once."""
    found = band(runs, axis)
    x = [at for at, *_ in found]
    edges = {"mode": "lines", "legendgroup": method, "hoverinfo": "skip", "showlegend": False}
    line = {"shape": "hv", "width": 0, "color": color}
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    fill = f"rgba({red},{green},{blue},{OPACITY})"
    return [
        go.Scatter(x=x, y=[low for _, low, _, _ in found], line=line, **edges),
        go.Scatter(
            x=x, y=[high for *_, high in found], line=line, fill="tonexty", fillcolor=fill, **edges
        ),
        go.Scatter(
            x=x,
            y=[middle for _, _, middle, _ in found],
            mode="lines",
            name=method,
            legendgroup=method,
            showlegend=is_first,
            line={"shape": "hv", "color": color, "dash": "dot" if method == BASELINE else None},
            hovertemplate=f"{method}: <b>%{{y:.5g}}</b><extra></extra>",
        ),
    ]
