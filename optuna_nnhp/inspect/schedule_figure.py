"""Plot how hyperparameters changed during training."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optuna_nnhp.inspect.plot_style import COLORS
from optuna_nnhp.inspect.plot_style import apply_style
from optuna_nnhp.inspect.plot_style import escape_markup
from optuna_nnhp.inspect.plot_style import round_to_five_digits
from optuna_nnhp.inspect.schedules import HyperparameterSchedule
from optuna_nnhp.inspect.schedules import schedule_of
from optuna_nnhp.inspect.summary import epoch_axis_title
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import ranked_trials
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.study.running import SCHEDULE

PANEL_COLUMNS, PANEL_HEIGHT = 3, 190  # panels side by side; height of a panel in pixels
TOP_MARGIN, BOTTOM_MARGIN, ROW_GAP = 110, 60, 62  # in pixels
COMPACT_HEIGHT, COMPACT_ROW_GAP = 450, 26  # in pixels; optuna-dashboard's figures are that high
MIN_RATIO_FOR_DECADE_TICKS = 30.0  # of the largest to the smallest value of a logarithmic axis
RESTART_LABEL = "restarts from its initial weights"


def plot_schedules(study: optuna.Study, n_best: int = 5, *, compact: bool = False) -> go.Figure:
    """Plot the hyperparameter values against the epoch, for the best trials whose values changed.

    There is one panel per hyperparameter that changed, with one step line per trial. A trial is
    left out if its whole schedule is the beginning of a better trial's, as in a population, where
    trials copy each other.

    Args:
        study:
            A study with one objective, tuned with ``method="population"`` or ``"gradient"``.
        n_best:
            Number of trials to show, best first, each in its own color.
        compact:
            Whether the figure has to fit into the space that optuna-dashboard gives a figure.

    Returns:
        The figure. If no values changed it has no data, and its title says so.

    Raises:
        ValueError: If ``n_best`` is below 1.

    Example:
        >>> study = optuna.create_study()
        >>> stored = [[0, {"dropout": 0.1}, False], [2, {"dropout": 0.2}, False]]
        >>> attributes = {"schedule": stored, "epochs": 4}
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
        >>> (line,) = plot_schedules(study).data
        >>> line.x, line.y
        ((0, 2, 4), (0.1, 0.2, 0.2))
    """
    if n_best < 1:
        raise ValueError(f"`n_best` must be at least 1, but got {n_best}.")
    schedules = _best_schedules(study, n_best)
    title = f"Hyperparameter schedules: {escape_markup(metric_name(study))}"
    names = _changed_parameters(schedules)
    if not names:
        return apply_style(go.Figure(), title, "no values changed during training")
    figure = _empty_panels(study, schedules, names, compact)
    # The best trial is drawn last, on top of the others, and comes first in the legend.
    for rank, schedule in reversed(list(enumerate(schedules))):
        _draw_schedule(figure, schedule, names, rank)
    apply_style(figure, title, _subtitle(schedules))
    return _compact_layout(figure) if compact else figure


def _best_schedules(study: optuna.Study, n_best: int) -> list[HyperparameterSchedule]:
    """Return the schedules of the best trials that are not the beginning of a better one's."""
    best: list[HyperparameterSchedule] = []
    for trial in ranked_trials(study):
        if len(best) == n_best:
            break
        if SCHEDULE in trial.user_attrs:
            schedule = schedule_of(study, trial)
            n = len(schedule.segments)
            if all(better.segments[:n] != schedule.segments for better in best):
                best.append(schedule)
    return best


def _changed_parameters(schedules: Sequence[HyperparameterSchedule]) -> list[str]:
    """Return the names of the hyperparameters that changed in any of the schedules."""
    names = dict.fromkeys(name for schedule in schedules for name in schedule.values[0])
    return [
        name
        for name in names
        if any(
            values.get(name) != schedule.values[0].get(name)
            for schedule in schedules
            for values in schedule.values
        )
    ]


def _empty_panels(
    study: optuna.Study,
    schedules: Sequence[HyperparameterSchedule],
    names: Sequence[str],
    compact: bool,
) -> go.Figure:
    """Return a figure with one empty panel per name."""
    columns = min(PANEL_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    gap, margins = COMPACT_ROW_GAP if compact else ROW_GAP, TOP_MARGIN + BOTTOM_MARGIN
    height = COMPACT_HEIGHT - margins if compact else rows * PANEL_HEIGHT + (rows - 1) * gap
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[escape_markup(name) for name in names],
        horizontal_spacing=0.08,
        vertical_spacing=gap / height,
    )
    figure.update_layout(height=height + margins, margin={"t": TOP_MARGIN, "b": BOTTOM_MARGIN})
    figure.update_annotations(font_size=13)
    figure.update_xaxes(matches="x", rangemode="tozero")
    for index, name in enumerate(names):
        row, column = _panel_position(index, columns)
        figure.update_yaxes(_axis_options(study, schedules, name), row=row, col=column)
        if index + columns >= len(names):  # the lowest panel of its column
            figure.update_xaxes(title_text=epoch_axis_title(study), row=row, col=column)
        elif compact:
            figure.update_xaxes(showticklabels=False, row=row, col=column)
    return figure


def _compact_layout(figure: go.Figure) -> go.Figure:
    """Shrink the texts, and move the legend to the free space at the bottom."""
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "yref": "container", "y": 0.01}
    figure.update_annotations(font_size=11)
    figure.update_xaxes(title={"font_size": 11, "standoff": 2})
    return figure.update_layout(font_size=10, margin={"l": 50, "r": 15}, legend=legend)


def _axis_options(
    study: optuna.Study, schedules: Sequence[HyperparameterSchedule], name: str
) -> dict[str, Any]:
    """Return the options of a hyperparameter's axis: logarithmic if its distribution is."""
    distribution = search_space(study).get(name)
    if not isinstance(distribution, FloatDistribution | IntDistribution) or not distribution.log:
        return {}
    values = [v[name] for schedule in schedules for v in schedule.values if name in v]
    has_decades = max(values) > MIN_RATIO_FOR_DECADE_TICKS * min(values)
    ticks = {"dtick": 1} if has_decades else {"nticks": 4}
    return {"type": "log", "exponentformat": "power", **ticks}


def _panel_position(index: int, columns: int) -> tuple[int, int]:
    """Return row and column of a panel, both counted from 1."""
    return index // columns + 1, index % columns + 1


def _draw_schedule(
    figure: go.Figure, schedule: HyperparameterSchedule, names: Sequence[str], rank: int
) -> None:
    """Add the lines of a trial to all panels, with markers where it restarted."""
    number, columns = schedule.trial.number, min(PANEL_COLUMNS, len(names))
    color, has_legend_entry = COLORS[rank % len(COLORS)], False
    for index, name in enumerate(names):
        if name not in schedule.values[0]:
            continue
        row, column = _panel_position(index, columns)
        x, y = _step_line(schedule, name)
        line = {"color": color, "shape": "hv", "width": 3 if rank == 0 else 1.5}
        trace = go.Scatter(
            x=x,
            y=y,
            mode="lines",
            line=line,
            name=f"trial {number}: {format_value(schedule.trial.value)}",
            legendgroup=str(number),
            legendrank=rank + 1,
            showlegend=not has_legend_entry,
            hovertemplate=f"<b>trial {number}</b><br>epoch %{{x}}: <b>%{{y}}</b><extra></extra>",
        )
        figure.add_trace(trace, row=row, col=column)
        if schedule.restarts:
            figure.add_trace(_restart_markers(schedule, name, color), row=row, col=column)
        has_legend_entry = True


def _step_line(schedule: HyperparameterSchedule, name: str) -> tuple[list[float], list[Any]]:
    """Return the points of a hyperparameter's step line: epochs and values."""
    x, y = list[float](), list[Any]()
    for begin, values in schedule.segments:
        if not y or values[name] != y[-1]:
            x.append(begin)
            y.append(values[name])
    end = schedule.trial.user_attrs.get("epochs", schedule.begins[-1])
    return [*x, max(end, x[-1])], [_plot_value(value) for value in (*y, y[-1])]


def _restart_markers(schedule: HyperparameterSchedule, name: str, color: str) -> go.Scatter:
    """Return markers where a trial restarted from its initial weights."""
    values = dict(schedule.segments)
    number = schedule.trial.number
    return go.Scatter(
        x=list(schedule.restarts),
        y=[_plot_value(values[begin][name]) for begin in schedule.restarts],
        mode="markers",
        marker={"symbol": "diamond-open", "size": 8, "color": color},
        name=RESTART_LABEL,
        legendgroup=str(number),
        showlegend=False,
        hovertemplate=f"<b>trial {number}</b> {RESTART_LABEL}<br>epoch %{{x}}<extra></extra>",
    )


def _subtitle(schedules: Sequence[HyperparameterSchedule]) -> str:
    """Describe which trials are shown, and what the markers mean."""
    if len(schedules) == 1:
        text = "the best trial"
    else:
        text = f"the best {len(schedules)} trials with different schedules, thick: the best"
    has_restarts = any(schedule.restarts for schedule in schedules)
    return text + (f"; diamonds: {RESTART_LABEL}" if has_restarts else "")


def _plot_value(value: Any) -> Any:
    """Convert a hyperparameter's value to a value that plotly can draw."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return round_to_five_digits(value) if is_number else escape_markup(value)
