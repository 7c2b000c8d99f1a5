"""Figures of a study: learning curves, the learning rate, all others, as plotly figures.

Every function only reads the study. Names and categories come from users, so they are escaped
wherever plotly or a browser would read them as markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import plotly.graph_objects as go

from optuna_nnhp.inspect.html_page import index_html
from optuna_nnhp.inspect.optuna_figures import optuna_figures
from optuna_nnhp.inspect.plot_style import COLORS
from optuna_nnhp.inspect.plot_style import GREY
from optuna_nnhp.inspect.plot_style import apply_style
from optuna_nnhp.inspect.plot_style import escape_markup
from optuna_nnhp.inspect.plot_style import robust_range
from optuna_nnhp.inspect.plot_style import round_to_five_digits
from optuna_nnhp.inspect.schedules import plot_schedules
from optuna_nnhp.inspect.summary import best_value
from optuna_nnhp.inspect.summary import finite_reports
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import is_language
from optuna_nnhp.inspect.summary import is_maximized
from optuna_nnhp.inspect.summary import main_parameters
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import ranked_trials


def _hover_text(trial: FrozenTrial, state: str = "") -> str:
    lines = [f"<b>trial {trial.number}</b>{state}"]
    lines += [
        f"{escape_markup(k)}: {escape_markup(v)}" for k, v in main_parameters(trial.params).items()
    ]
    return "<br>".join(lines)


def _best_step(trial: FrozenTrial, maximized: bool, rounds: int) -> int:
    values = finite_reports(trial)
    step = round(trial.user_attrs.get("best_epoch", 0) * rounds)
    return step if step in values else (max if maximized else min)(values, key=values.__getitem__)


def _thinned_curve(trial: FrozenTrial, points: int, keep: int) -> tuple[list[int], list[float]]:
    """Steps and values of one trial, thinned evenly to about ``points``; ``keep`` stays."""
    values = finite_reports(trial)
    epochs = np.asarray(list(values))
    chosen = np.unique(np.linspace(0, len(epochs) - 1, min(points, len(epochs))).round())
    kept = sorted({int(epochs[int(i)]) for i in chosen} | {keep})
    return kept, [round_to_five_digits(values[epoch]) for epoch in kept]


def _curves_subtitle(study: optuna.Study, shown_best: int, shown_pruned: int) -> str:
    complete, pruned = len(ranked_trials(study)), len(ranked_trials(study, TrialState.PRUNED))
    if not complete and not pruned:
        return "no trial has completed yet"
    best = f"the best {shown_best} of {complete} complete trials, star: best epoch"
    grey = f"grey: the best {shown_pruned} of {pruned} pruned trials"
    return "; ".join(
        [best if complete else "no trial has completed yet"] + ([grey] if pruned else [])
    )


def plot_learning_curves(
    study: optuna.Study, best: int = 5, pruned: int = 20, *, points: int = 200
) -> go.Figure:
    """The metric on the validation part against the epoch, of the best trials and pruned ones.

    Args:
        study:
            A study of one objective whose trials report one value an epoch.
        best:
            How many complete trials to show, best first, each in its colour.
        pruned:
            How many pruned trials to show thin and grey: those that came closest, so that one
            sees whether something good was pruned.
        points:
            At most about so many points a curve; longer curves are thinned evenly.

    Returns:
        The figure; where there is nothing to show, its title says so.

    Raises:
        ValueError: If ``best`` or ``pruned`` is negative, or ``points`` below 2.

    Example:
        >>> study = optuna.create_study(direction="maximize")
        >>> study.add_trial(
        ...     optuna.trial.create_trial(value=0.9, intermediate_values={1: 0.5, 2: 0.9})
        ... )
        >>> [trace.name for trace in plot_learning_curves(study).data]
        ['trial 0: 0.9', 'best epoch']
    """
    for name, number, least in (("best", best, 0), ("pruned", pruned, 0), ("points", points, 2)):
        if number < least:
            raise ValueError(f"`{name}` must be at least {least}, but got {number}.")
    maximized, rounds = is_maximized(study), study.user_attrs.get("rounds_per_epoch", 1)
    grey = [t for t in ranked_trials(study, TrialState.PRUNED) if finite_reports(t)][:pruned]
    top = [t for t in ranked_trials(study) if finite_reports(t)][:best]
    figure = go.Figure()
    for trial in reversed(grey):
        line = {"color": GREY, "width": 1}
        trace = _curve_trace(trial, maximized, rounds, points, ", pruned", line)
        trace.update(name="pruned", legendgroup="pruned", legendrank=1002)
        figure.add_trace(trace.update(showlegend=trial is grey[0]))
    # The best is drawn last, on top of the others, and comes first in the legend.
    for place, trial in reversed(list(enumerate(top))):
        line = {"color": COLORS[place % len(COLORS)], "width": 3 if place == 0 else 1.8}
        trace = _curve_trace(trial, maximized, rounds, points, "", line)
        trace.update(
            name=f"trial {trial.number}: {format_value(trial.value)}", legendrank=place + 1
        )
        figure.add_trace(trace)
    _mark_best_epochs(figure, top, maximized, rounds)
    for trace in figure.data if rounds > 1 else ():
        trace.x = [round(step / rounds, 3) for step in trace.x]
    metric = escape_markup(metric_name(study))
    apply_style(
        figure,
        f"Learning curves: {metric}",
        _curves_subtitle(study, len(top), len(grey)),
        xaxis_title="share of the budget" if is_language(study) else "epoch",
        yaxis_title=f"{metric} (validation)",
    )
    values = [value for trial in [*grey, *top] for value in finite_reports(trial).values()]
    if values:
        figure.update_yaxes(range=list(robust_range(values, maximized)))
    return figure


def _curve_trace(
    trial: FrozenTrial,
    maximized: bool,
    rounds: int,
    points: int,
    state: str,
    line: dict[str, Any],
) -> go.Scatter:
    x, y = _thinned_curve(trial, points, _best_step(trial, maximized, rounds))
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers" if len(x) == 1 else "lines",
        line=line,
        marker={"size": 4},
        text=_hover_text(trial, state),
        hovertemplate="%{text}<br>epoch %{x}: <b>%{y}</b><extra></extra>",
    )


def _mark_best_epochs(
    figure: go.Figure, trials: list[FrozenTrial], maximized: bool, rounds: int
) -> None:
    if not trials:
        return
    epochs = [_best_step(trial, maximized, rounds) for trial in trials]
    values = [finite_reports(t)[epoch] for t, epoch in zip(trials, epochs, strict=True)]
    colors = [COLORS[place % len(COLORS)] for place in range(len(trials))]
    figure.add_scatter(
        x=epochs,
        y=[round_to_five_digits(value) for value in values],
        mode="markers",
        marker={
            "symbol": "star",
            "size": 13,
            "color": colors,
            "line": {"width": 1, "color": "white"},
        },
        name="best epoch",
        legendrank=1001,
        showlegend=False,
        hoverinfo="skip",
    )


def _thin_by_rank(trials: list[FrozenTrial], most: int) -> list[FrozenTrial]:
    """At most ``most`` of ranked trials, evenly over the ranks; the best one always stays."""
    if len(trials) <= most:
        return trials
    return [trials[int(i)] for i in np.linspace(0, len(trials) - 1, most).round()]


def _optimizer_name(study: optuna.Study, trial: FrozenTrial) -> str:
    fixed = study.user_attrs.get("fixed", {}).get("optimizer", "all trials")
    return format_value(trial.params.get("optimizer", fixed))


def learning_rate(study: optuna.Study, *, most: int = 1000, details: bool = True) -> go.Figure:
    """What each trial reached against its learning rate, coloured by the optimizer.

    Pruned trials are small open markers at their best value; diverged ones without a value are
    crosses on the bad edge. The y-range leaves far outliers out: they are triangles on its edge.

    Args:
        study:
            A study of one objective.
        most:
            At most so many complete and so many pruned trials; more are thinned evenly by rank.
        details:
            Whether the texts under the pointer give the main parameters, or the number only.

    Returns:
        The figure; where there is nothing to show, its title says so.

    Raises:
        ValueError: If ``most`` is below 1.

    Example:
        >>> study = optuna.create_study()
        >>> space = {"learning_rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)}
        >>> trial = optuna.trial.create_trial(
        ...     params={"learning_rate": 0.1}, distributions=space, value=0.5
        ... )
        >>> study.add_trial(trial)
        >>> [(list(trace.x), list(trace.y)) for trace in learning_rate(study).data][0]
        ([0.1], [0.5])
    """
    if most < 1:
        raise ValueError(f"`most` must be at least 1, but got {most}.")
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    with_rate = {
        s: [t for t in ranked_trials(study, s) if "learning_rate" in t.params] for s in states
    }
    trials = {state: _thin_by_rank(with_rate[state], most) for state in states}
    both = [trial for state in states for trial in trials[state]]
    figure = go.Figure()
    metric = escape_markup(metric_name(study))
    layout = {"xaxis_title": "learning rate", "yaxis_title": f"{metric} (validation)"}
    if not both:
        fixed = study.user_attrs.get("fixed", {}).get("learning_rate")
        why = "no trial has completed yet" if fixed is None else f"fixed at {escape_markup(fixed)}"
        return apply_style(figure, f"Learning rate: {metric}", why, **layout, xaxis_type="log")
    maximized = is_maximized(study)
    values = [value for t in both if (value := best_value(t, maximized)) is not None]
    bounds = robust_range(values, maximized)
    optimizers = sorted({_optimizer_name(study, trial) for trial in both})
    for optimizer, color in zip(optimizers, COLORS * len(optimizers), strict=False):
        groups = [[t for t in trials[s] if _optimizer_name(study, t) == optimizer] for s in states]
        for place, group in enumerate(filter(None, groups)):
            trace = _rate_trace(group, optimizer, color, maximized, bounds, details)
            figure.add_trace(trace.update(showlegend=place == 0))
    _add_diverged(figure, study, bounds[0] if maximized else bounds[1], most)
    notes = [f"{len(with_rate[TrialState.COMPLETE])} complete trials"]
    if not trials[TrialState.COMPLETE]:
        notes = ["no trial has completed yet"]
    if trials[TrialState.PRUNED]:
        count = len(with_rate[TrialState.PRUNED])
        notes.append(f"open: {count} pruned, at the best value they reached")
    if outside := sum(not bounds[0] <= value <= bounds[1] for value in values):
        notes.append(f"triangles: {outside} beyond the axis")
    figure.update_yaxes(range=list(bounds))
    rates = [trial.params["learning_rate"] for trial in both]
    decades = {"dtick": 1} if max(rates) > 100 * min(rates) else {}
    figure.update_xaxes(type="log", exponentformat="power", **decades)
    return apply_style(figure, f"Learning rate: {metric}", "; ".join(notes), **layout)


def _rate_trace(
    trials: list[FrozenTrial],
    optimizer: str,
    color: str,
    maximized: bool,
    bounds: tuple[float, float],
    details: bool,
) -> go.Scatter:
    """The markers of one optimizer's complete trials, or of its pruned ones."""
    values = [value for t in trials if (value := best_value(t, maximized)) is not None]
    inside = [bounds[0] <= value <= bounds[1] for value in values]
    pruned = trials[0].state == TrialState.PRUNED
    beyond = "triangle-down" if maximized else "triangle-up"
    symbols = [("circle" if ok else beyond) + ("-open" if pruned else "") for ok in inside]
    texts = [
        (_hover_text(t, ", pruned" if pruned else "") if details else f"trial {t.number}")
        + f"<br>value: <b>{format_value(value)}</b>"
        for t, value in zip(trials, values, strict=True)
    ]
    return go.Scatter(
        x=[round_to_five_digits(t.params["learning_rate"]) for t in trials],
        y=[round_to_five_digits(float(np.clip(value, *bounds))) for value in values],
        mode="markers",
        # One symbol for all where there is no outlier keeps the saved figure small.
        marker={
            "symbol": symbols if len(set(symbols)) > 1 else symbols[0],
            "color": color,
            "size": 6 if pruned else 9,
            "opacity": 0.6 if pruned else 0.9,
        },
        name=escape_markup(optimizer),
        legendgroup=escape_markup(optimizer),
        cliponaxis=False,
        text=texts,
        hovertemplate="%{text}<br>learning rate: <b>%{x}</b><extra></extra>",
    )


def _add_diverged(figure: go.Figure, study: optuna.Study, edge: float, most: int) -> None:
    maximized = is_maximized(study)
    rates = [
        round_to_five_digits(trial.params["learning_rate"])
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("cause") == "diverged"
        and "learning_rate" in trial.params
        and best_value(trial, maximized) is None
    ][:most]
    if rates:
        figure.add_scatter(
            x=rates,
            y=[round_to_five_digits(edge)] * len(rates),
            mode="markers",
            marker={"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": "#8a9099"}},
            name="diverged",
            cliponaxis=False,
            hovertemplate="diverged at learning rate %{x}<extra></extra>",
        )


def figures(study: optuna.Study) -> dict[str, go.Figure]:
    """Learning curves and rates, which are always there, and what else there is, by name.

    That are the courses of hyperparameters that moved, and those of :func:`optuna_figures`.

    Args:
        study:
            A study of one objective.

    Example:
        >>> sorted(figures(optuna.create_study()))
        ['learning_curves', 'learning_rate']
    """
    own = {"learning_curves": plot_learning_curves(study), "learning_rate": learning_rate(study)}
    if (moved := plot_schedules(study)).data:
        own["courses"] = moved
    return own | optuna_figures(study)


def save_html(study: optuna.Study, folder: str | Path) -> list[Path]:
    """Write every figure as an HTML file, and ``index.html`` that shows them all with a summary.

    The files work offline: plotly.js (5 MB) is written beside them, once.

    Args:
        study:
            A study of one objective.
        folder:
            Where to write; made if it is missing. Files of an earlier call are replaced.

    Returns:
        The files written, ``index.html`` first, without plotly.js.

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
    drawn = figures(study)
    paths = {name: folder / f"{name}.html" for name in drawn}
    for name, figure in drawn.items():
        figure.write_html(paths[name], include_plotlyjs="directory", config={"displaylogo": False})
    index = folder / "index.html"
    index.write_text(index_html(study, drawn), encoding="utf-8")
    return [index, *paths.values()]
