"""The course of each hyperparameter through a training: as a table, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
import math
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optuna_nnhp.inspect.plot_style import COLORS
from optuna_nnhp.inspect.plot_style import apply_style
from optuna_nnhp.inspect.plot_style import escape_markup
from optuna_nnhp.inspect.plot_style import round_to_five_digits
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import is_language
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import ranked_trials
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.study.running_trial import SCHEDULE
from optuna_nnhp.training.rounds import epochs

PANEL_COLUMNS, PANEL_HEIGHT = 3, 190  # panels side by side; height of one in pixels
TOP_MARGIN, BOTTOM_MARGIN, ROW_GAP = (
    110,
    60,
    62,
)  # pixels above, below and between the rows of panels
COMPACT_HEIGHT, COMPACT_ROW_GAP = (
    450,
    26,
)  # pixels that optuna-dashboard gives a figure, and between its rows
MIN_RATIO_FOR_DECADE_TICKS = (
    30.0  # ratio of the largest to the smallest value, from which on only decades have ticks
)
RESTART_LABEL = "begins anew"


@dataclass(frozen=True)
class HyperparameterSchedule:
    """What values a trial had while it trained.

    Args:
        trial:
            The trial.
        begins:
            From which epoch on it had which; the first is 0.
        values:
            Of all parameters, one for each beginning.
        fresh:
            Beginnings at which it went back to its first weights.
    """

    trial: FrozenTrial
    begins: Sequence[float]
    values: Sequence[dict[str, Any]]
    fresh: Sequence[float]

    @cached_property
    def stages(self) -> list[tuple[float, dict[str, Any]]]:
        """Beginnings and values."""
        return list(zip(self.begins, self.values, strict=True))

    def line(self, name: str) -> tuple[list[float], list[Any]]:
        """Epochs and values of one parameter, where it changes and at the end."""
        x, y = list[float](), list[Any]()
        for begin, values in self.stages:
            if not y or values[name] != y[-1]:
                x.append(begin)
                y.append(values[name])
        end = self.trial.user_attrs.get("epochs", self.begins[-1])
        return [*x, max(end, x[-1])], [_plot_value(value) for value in (*y, y[-1])]


def schedule_of(study: optuna.Study, trial: FrozenTrial) -> HyperparameterSchedule:
    """The course of a trial; where its values did not change it has one stage.

    Args:
        study:
            The trial's study.
        trial:
            The trial.

    Example:
        >>> study = optuna.create_study()
        >>> study.set_user_attr("rounds_per_epoch", 3)
        >>> course = [[0, {"dropout": 0.1}, False], [6, {"dropout": 0.2}, True]]
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"schedule": course}))
        >>> found = schedule_of(study, study.best_trial)
        >>> found.stages, found.fresh
        ([(0, {'dropout': 0.1}), (2, {'dropout': 0.2})], [2])
    """
    rounds = study.user_attrs.get("rounds_per_epoch", 1)
    noted = trial.user_attrs.get(SCHEDULE) or [[0, {}, False]]
    begins = [epochs(begin, rounds) for begin, _, _ in noted]
    return HyperparameterSchedule(
        trial,
        begins,
        [{**trial.params, **changed} for _, changed, _ in noted],
        [begin for begin, (_, _, from_scratch) in zip(begins, noted, strict=True) if from_scratch],
    )


def schedule_dataframe(study: optuna.Study, trial: FrozenTrial) -> pd.DataFrame:
    """A trial's values over its training: one row per stage, with the epoch it begins at.

    Args:
        study:
            The trial's study.
        trial:
            The trial.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=1.0))
        >>> schedule_dataframe(study, study.best_trial).to_dict("records")
        [{'epoch': 0}]
    """
    stages = schedule_of(study, trial).stages
    return pd.DataFrame([{"epoch": begin, **values} for begin, values in stages])


def plot_schedules(study: optuna.Study, best: int = 5, *, small: bool = False) -> go.Figure:
    """Each hyperparameter's value against the epoch, of the best trials whose values moved.

    One panel for each parameter that moved, with one step line per trial. A trial whose whole
    course is the beginning of a better one's, as in a population its parent's may be, is left
    out.

    Args:
        study:
            A study of one objective, tuned by ``method="population"`` or ``"gradient"``.
        best:
            How many trials to show, best first, each in its colour.
        small:
            Whether all has to fit into the space that optuna-dashboard gives a figure.

    Returns:
        The figure; where no values have moved it has no data, and its title says so.

    Raises:
        ValueError: If ``best`` is below 1.

    Example:
        >>> study = optuna.create_study()
        >>> course = [[0, {"dropout": 0.1}, False], [2, {"dropout": 0.2}, False]]
        >>> attributes = {"schedule": course, "epochs": 4}
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
        >>> (line,) = plot_schedules(study).data
        >>> line.x, line.y
        ((0, 2, 4), (0.1, 0.2, 0.2))
    """
    if best < 1:
        raise ValueError(f"`best` must be at least 1, but got {best}.")
    found, title = _best_schedules(study, best), f"Courses: {escape_markup(metric_name(study))}"
    names = _changed_parameters(found)
    if not names:
        return apply_style(go.Figure(), title, "no values have moved while a trial trained")
    figure = _empty_panels(study, found, names, small)
    # The best is drawn last, on top of the others, and comes first in the legend.
    for place, course in reversed(list(enumerate(found))):
        _draw_schedule(figure, course, names, place)
    apply_style(figure, title, _subtitle(found))
    return _compact_layout(figure) if small else figure


def _best_schedules(study: optuna.Study, best: int) -> list[HyperparameterSchedule]:
    """The best trials with courses of their own."""
    found: list[HyperparameterSchedule] = []
    for trial in ranked_trials(study):
        if len(found) == best:
            break
        if SCHEDULE in trial.user_attrs:
            course = schedule_of(study, trial)
            count = len(course.stages)
            if all(better.stages[:count] != course.stages for better in found):
                found.append(course)
    return found


def _changed_parameters(found: Sequence[HyperparameterSchedule]) -> list[str]:
    """The parameters that changed in one of the courses."""
    names = dict.fromkeys(name for course in found for name in course.values[0])
    return [
        name
        for name in names
        if any(
            values.get(name) != course.values[0].get(name)
            for course in found
            for values in course.values
        )
    ]


def _empty_panels(
    study: optuna.Study, found: Sequence[HyperparameterSchedule], names: Sequence[str], small: bool
) -> go.Figure:
    """The empty figure, with a panel for each name."""
    columns = min(PANEL_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    gap = COMPACT_ROW_GAP if small else ROW_GAP
    inner = (
        COMPACT_HEIGHT - TOP_MARGIN - BOTTOM_MARGIN
        if small
        else rows * PANEL_HEIGHT + (rows - 1) * gap
    )
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[escape_markup(name) for name in names],
        horizontal_spacing=0.08,
        vertical_spacing=gap / inner,
    )
    figure.update_layout(
        height=inner + TOP_MARGIN + BOTTOM_MARGIN, margin={"t": TOP_MARGIN, "b": BOTTOM_MARGIN}
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(matches="x", rangemode="tozero")
    for place, name in enumerate(names):
        row, column = _panel_position(place, columns)
        figure.update_yaxes(_axis_options(study, found, name), row=row, col=column)
        if place + columns >= len(names):  # nothing is below it
            title = "share of the budget" if is_language(study) else "epoch"
            figure.update_xaxes(title_text=title, row=row, col=column)
        elif small:
            figure.update_xaxes(showticklabels=False, row=row, col=column)
    return figure


def _compact_layout(figure: go.Figure) -> go.Figure:
    """The figure with small texts, and the legend where there is room."""
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "yref": "container", "y": 0.01}
    figure.update_annotations(font_size=11)
    figure.update_xaxes(title={"font_size": 11, "standoff": 2})
    return figure.update_layout(font_size=10, margin={"l": 50, "r": 15}, legend=legend)


def _axis_options(
    study: optuna.Study, found: Sequence[HyperparameterSchedule], name: str
) -> dict[str, Any]:
    """A parameter's axis, logarithmic where its range is."""
    distribution = search_space(study).get(name)
    if not isinstance(distribution, FloatDistribution | IntDistribution) or not distribution.log:
        return {}
    values = [v[name] for course in found for v in course.values if name in v]
    ticks = (
        {"dtick": 1} if max(values) > MIN_RATIO_FOR_DECADE_TICKS * min(values) else {"nticks": 4}
    )
    return {"type": "log", "exponentformat": "power", **ticks}


def _panel_position(place: int, columns: int) -> tuple[int, int]:
    return place // columns + 1, place % columns + 1


def _draw_schedule(
    figure: go.Figure, course: HyperparameterSchedule, names: Sequence[str], rank: int
) -> None:
    """A trial's lines in all panels, and marks where it began anew."""
    number, columns = course.trial.number, min(PANEL_COLUMNS, len(names))
    color, drawn = COLORS[rank % len(COLORS)], False
    for place, name in enumerate(names):
        if name not in course.values[0]:
            continue
        row, column = _panel_position(place, columns)
        x, y = course.line(name)
        line = {"color": color, "shape": "hv", "width": 3 if rank == 0 else 1.5}
        trace = go.Scatter(
            x=x,
            y=y,
            mode="lines",
            line=line,
            name=f"trial {number}: {format_value(course.trial.value)}",
            legendgroup=str(number),
            legendrank=rank + 1,
            showlegend=not drawn,
            hovertemplate=f"<b>trial {number}</b><br>epoch %{{x}}: <b>%{{y}}</b><extra></extra>",
        )
        figure.add_trace(trace, row=row, col=column)
        if course.fresh:
            figure.add_trace(_restart_markers(course, name, color), row=row, col=column)
        drawn = True


def _restart_markers(course: HyperparameterSchedule, name: str, color: str) -> go.Scatter:
    """Where a trial went back to its first weights."""
    values = dict(course.stages)
    number = course.trial.number
    return go.Scatter(
        x=list(course.fresh),
        y=[_plot_value(values[begin][name]) for begin in course.fresh],
        mode="markers",
        marker={"symbol": "diamond-open", "size": 8, "color": color},
        name=RESTART_LABEL,
        legendgroup=str(number),
        showlegend=False,
        hovertemplate=f"<b>trial {number}</b> {RESTART_LABEL}<br>epoch %{{x}}<extra></extra>",
    )


def _subtitle(found: Sequence[HyperparameterSchedule]) -> str:
    """Which trials are shown, and what the marks are."""
    if len(found) == 1:
        said = "the best trial"
    else:
        said = f"the best {len(found)} trials with courses of their own, thick: the best"
    return said + ("; diamonds: back to the first weights" if any(c.fresh for c in found) else "")


def _plot_value(value: Any) -> Any:
    """A value as a point of a figure."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return round_to_five_digits(value) if is_number else escape_markup(value)
