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

from optuna_nnhp.inspect.style import COLORS
from optuna_nnhp.inspect.style import escaped
from optuna_nnhp.inspect.style import rounded
from optuna_nnhp.inspect.style import styled
from optuna_nnhp.inspect.summary import is_language
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import ranked
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.inspect.summary import shown
from optuna_nnhp.study.lockstep import COURSE
from optuna_nnhp.training.rounds import epochs

COLUMNS, PANEL = 3, 190  # panels side by side; height of one in pixels
ABOVE, BELOW, GAP = 110, 60, 62  # pixels above, below and between the rows of panels
SMALL, TIGHT = 450, 26  # pixels that optuna-dashboard gives a figure, and between its rows
DECADES = 30.0  # ratio of the largest to the smallest value, from which on only decades have ticks
ANEW = "begins anew"


@dataclass(frozen=True)
class Course:
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
        return [*x, max(end, x[-1])], [_point(value) for value in (*y, y[-1])]


def course_of(study: optuna.Study, trial: FrozenTrial) -> Course:
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
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"course": course}))
        >>> found = course_of(study, study.best_trial)
        >>> found.stages, found.fresh
        ([(0, {'dropout': 0.1}), (2, {'dropout': 0.2})], [2])
    """
    rounds = study.user_attrs.get("rounds_per_epoch", 1)
    noted = trial.user_attrs.get(COURSE) or [[0, {}, False]]
    begins = [epochs(begin, rounds) for begin, _, _ in noted]
    return Course(
        trial,
        begins,
        [{**trial.params, **changed} for _, changed, _ in noted],
        [begin for begin, (_, _, is_fresh) in zip(begins, noted, strict=True) if is_fresh],
    )


def schedule_frame(study: optuna.Study, trial: FrozenTrial) -> pd.DataFrame:
    """A trial's values over its training: one row per stage, with the epoch it begins at.

    Args:
        study:
            The trial's study.
        trial:
            The trial.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=1.0))
        >>> schedule_frame(study, study.best_trial).to_dict("records")
        [{'epoch': 0}]
    """
    stages = course_of(study, trial).stages
    return pd.DataFrame([{"epoch": begin, **values} for begin, values in stages])


def courses(study: optuna.Study, best: int = 5, *, small: bool = False) -> go.Figure:
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
        >>> attributes = {"course": course, "epochs": 4}
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
        >>> (line,) = courses(study).data
        >>> line.x, line.y
        ((0, 2, 4), (0.1, 0.2, 0.2))
    """
    if best < 1:
        raise ValueError(f"`best` must be at least 1, but got {best}.")
    found, title = _leading(study, best), f"Courses: {escaped(metric_name(study))}"
    names = _moved(found)
    if not names:
        return styled(go.Figure(), title, "no values have moved while a trial trained")
    figure = _panels(study, found, names, small)
    # The best is drawn last, on top of the others, and comes first in the legend.
    for place, course in reversed(list(enumerate(found))):
        _draw(figure, course, names, place)
    styled(figure, title, _subtitle(found))
    return _shrunk(figure) if small else figure


def _leading(study: optuna.Study, best: int) -> list[Course]:
    """The best trials with courses of their own."""
    found: list[Course] = []
    for trial in ranked(study):
        if len(found) == best:
            break
        if COURSE in trial.user_attrs:
            course = course_of(study, trial)
            count = len(course.stages)
            if all(better.stages[:count] != course.stages for better in found):
                found.append(course)
    return found


def _moved(found: Sequence[Course]) -> list[str]:
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


def _panels(
    study: optuna.Study, found: Sequence[Course], names: Sequence[str], small: bool
) -> go.Figure:
    """The empty figure, with a panel for each name."""
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    gap = TIGHT if small else GAP
    inner = SMALL - ABOVE - BELOW if small else rows * PANEL + (rows - 1) * gap
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[escaped(name) for name in names],
        horizontal_spacing=0.08,
        vertical_spacing=gap / inner,
    )
    figure.update_layout(height=inner + ABOVE + BELOW, margin={"t": ABOVE, "b": BELOW})
    figure.update_annotations(font_size=13)
    figure.update_xaxes(matches="x", rangemode="tozero")
    for place, name in enumerate(names):
        row, column = _place(place, columns)
        figure.update_yaxes(_scale(study, found, name), row=row, col=column)
        if place + columns >= len(names):  # nothing is below it
            title = "share of the budget" if is_language(study) else "epoch"
            figure.update_xaxes(title_text=title, row=row, col=column)
        elif small:
            figure.update_xaxes(showticklabels=False, row=row, col=column)
    return figure


def _shrunk(figure: go.Figure) -> go.Figure:
    """The figure with small texts, and the legend where there is room."""
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "yref": "container", "y": 0.01}
    figure.update_annotations(font_size=11)
    figure.update_xaxes(title={"font_size": 11, "standoff": 2})
    return figure.update_layout(font_size=10, margin={"l": 50, "r": 15}, legend=legend)


def _scale(study: optuna.Study, found: Sequence[Course], name: str) -> dict[str, Any]:
    """A parameter's axis, logarithmic where its range is."""
    distribution = search_space(study).get(name)
    if not isinstance(distribution, FloatDistribution | IntDistribution) or not distribution.log:
        return {}
    values = [v[name] for course in found for v in course.values if name in v]
    ticks = {"dtick": 1} if max(values) > DECADES * min(values) else {"nticks": 4}
    return {"type": "log", "exponentformat": "power", **ticks}


def _place(place: int, columns: int) -> tuple[int, int]:
    return place // columns + 1, place % columns + 1


def _draw(figure: go.Figure, course: Course, names: Sequence[str], rank: int) -> None:
    """A trial's lines in all panels, and marks where it began anew."""
    number, columns = course.trial.number, min(COLUMNS, len(names))
    color, drawn = COLORS[rank % len(COLORS)], False
    for place, name in enumerate(names):
        if name not in course.values[0]:
            continue
        row, column = _place(place, columns)
        x, y = course.line(name)
        line = {"color": color, "shape": "hv", "width": 3 if rank == 0 else 1.5}
        trace = go.Scatter(
            x=x,
            y=y,
            mode="lines",
            line=line,
            name=f"trial {number}: {shown(course.trial.value)}",
            legendgroup=str(number),
            legendrank=rank + 1,
            showlegend=not drawn,
            hovertemplate=f"<b>trial {number}</b><br>epoch %{{x}}: <b>%{{y}}</b><extra></extra>",
        )
        figure.add_trace(trace, row=row, col=column)
        if course.fresh:
            figure.add_trace(_marks(course, name, color), row=row, col=column)
        drawn = True


def _marks(course: Course, name: str, color: str) -> go.Scatter:
    """Where a trial went back to its first weights."""
    values = dict(course.stages)
    number = course.trial.number
    return go.Scatter(
        x=list(course.fresh),
        y=[_point(values[begin][name]) for begin in course.fresh],
        mode="markers",
        marker={"symbol": "diamond-open", "size": 8, "color": color},
        name=ANEW,
        legendgroup=str(number),
        showlegend=False,
        hovertemplate=f"<b>trial {number}</b> {ANEW}<br>epoch %{{x}}<extra></extra>",
    )


def _subtitle(found: Sequence[Course]) -> str:
    """Which trials are shown, and what the marks are."""
    if len(found) == 1:
        said = "the best trial"
    else:
        said = f"the best {len(found)} trials with courses of their own, thick: the best"
    return said + ("; diamonds: back to the first weights" if any(c.fresh for c in found) else "")


def _point(value: Any) -> Any:
    """A value as a point of a figure."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return rounded(value) if is_number else escaped(value)
