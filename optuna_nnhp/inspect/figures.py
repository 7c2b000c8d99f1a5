"""Plot learning curves and the learning rate of a study with plotly.

All functions only read the study. Names and categories come from users, so they are escaped
wherever plotly or a browser would interpret them as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import plotly.graph_objects as go

from optuna_nnhp.inspect.optuna_figures import optuna_figures
from optuna_nnhp.inspect.plot_style import COLORS
from optuna_nnhp.inspect.plot_style import GREY
from optuna_nnhp.inspect.plot_style import apply_style
from optuna_nnhp.inspect.plot_style import escape_markup
from optuna_nnhp.inspect.plot_style import robust_range
from optuna_nnhp.inspect.plot_style import round_to_five_digits
from optuna_nnhp.inspect.schedule_figure import plot_schedules
from optuna_nnhp.inspect.summary import best_value
from optuna_nnhp.inspect.summary import epoch_axis_title
from optuna_nnhp.inspect.summary import finite_reports
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import is_maximized
from optuna_nnhp.inspect.summary import main_parameters
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import ranked_trials

MIN_RATIO_FOR_DECADE_TICKS = 100.0  # of the largest to the smallest learning rate


def figures(study: optuna.Study) -> dict[str, go.Figure]:
    """Return all figures that a study has data for, by name.

    Learning curves and learning rate are always included, the hyperparameter schedules if any
    hyperparameter changed during training; for the others see :func:`optuna_figures`.

    Args:
        study:
            A study with one objective.

    Example:
        >>> sorted(figures(optuna.create_study()))
        ['learning_curves', 'learning_rate']
    """
    own = {
        "learning_curves": plot_learning_curves(study),
        "learning_rate": plot_learning_rate(study),
    }
    if (schedules := plot_schedules(study)).data:
        own["schedules"] = schedules
    return own | optuna_figures(study)


def plot_learning_curves(
    study: optuna.Study, n_best: int = 5, n_pruned: int = 20, *, max_points: int = 200
) -> go.Figure:
    """Plot the metric on the validation part against the epoch.

    Args:
        study:
            A study with one objective whose trials report one value per epoch.
        n_best:
            Number of complete trials to show, best first, each in its own color.
        n_pruned:
            Number of pruned trials to show as thin grey lines, best first: they tell whether a
            good trial was pruned.
        max_points:
            Approximate limit on the points per curve; longer curves are thinned evenly.

    Returns:
        The figure. If there is nothing to show, its title says so.

    Raises:
        ValueError: If ``n_best`` or ``n_pruned`` is negative, or ``max_points`` is below 2.

    Example:
        >>> study = optuna.create_study(direction="maximize")
        >>> study.add_trial(
        ...     optuna.trial.create_trial(value=0.9, intermediate_values={1: 0.5, 2: 0.9})
        ... )
        >>> [trace.name for trace in plot_learning_curves(study).data]
        ['trial 0: 0.9', 'best epoch']
    """
    limits = (("n_best", n_best, 0), ("n_pruned", n_pruned, 0), ("max_points", max_points, 2))
    for name, number, minimum in limits:
        if number < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, but got {number}.")
    maximized, rounds = is_maximized(study), study.user_attrs.get("rounds_per_epoch", 1)
    pruned = [t for t in ranked_trials(study, TrialState.PRUNED) if finite_reports(t)][:n_pruned]
    best = [t for t in ranked_trials(study) if finite_reports(t)][:n_best]
    figure = go.Figure()
    for trial in reversed(pruned):
        line = {"color": GREY, "width": 1}
        trace = _curve_trace(trial, maximized, rounds, max_points, ", pruned", line)
        trace.update(name="pruned", legendgroup="pruned", legendrank=1002)
        figure.add_trace(trace.update(showlegend=trial is pruned[0]))
    # The best trial is drawn last, on top of the others, and comes first in the legend.
    for rank, trial in reversed(list(enumerate(best))):
        line = {"color": COLORS[rank % len(COLORS)], "width": 3 if rank == 0 else 1.8}
        trace = _curve_trace(trial, maximized, rounds, max_points, "", line)
        name = f"trial {trial.number}: {format_value(trial.value)}"
        figure.add_trace(trace.update(name=name, legendrank=rank + 1))
    _mark_best_epochs(figure, best, maximized, rounds)
    for trace in figure.data if rounds > 1 else ():
        trace.x = [round(step / rounds, 3) for step in trace.x]
    metric = escape_markup(metric_name(study))
    apply_style(
        figure,
        f"Learning curves: {metric}",
        _curves_subtitle(study, len(best), len(pruned)),
        xaxis_title=epoch_axis_title(study),
        yaxis_title=f"{metric} (validation)",
    )
    values = [value for trial in [*pruned, *best] for value in finite_reports(trial).values()]
    if values:
        figure.update_yaxes(range=list(robust_range(values, maximized)))
    return figure


def _curve_trace(
    trial: FrozenTrial,
    maximized: bool,
    rounds: int,
    max_points: int,
    state: str,
    line: dict[str, Any],
) -> go.Scatter:
    """Return the learning curve of a trial."""
    x, y = _thinned_curve(trial, max_points, _best_step(trial, maximized, rounds))
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers" if len(x) == 1 else "lines",
        line=line,
        marker={"size": 4},
        text=_hover_text(trial, state),
        hovertemplate="%{text}<br>epoch %{x}: <b>%{y}</b><extra></extra>",
    )


def _thinned_curve(
    trial: FrozenTrial, max_points: int, keep_step: int
) -> tuple[list[int], list[float]]:
    """Return about ``max_points`` evenly spaced steps and their values, including one step."""
    values = finite_reports(trial)
    steps = np.asarray(list(values))
    indices = np.unique(np.linspace(0, len(steps) - 1, min(max_points, len(steps))).round())
    kept = sorted({int(steps[int(i)]) for i in indices} | {keep_step})
    return kept, [round_to_five_digits(values[step]) for step in kept]


def _best_step(trial: FrozenTrial, maximized: bool, rounds: int) -> int:
    """Return the step of a trial's best value."""
    values = finite_reports(trial)
    step = round(trial.user_attrs.get("best_epoch", 0) * rounds)
    return step if step in values else (max if maximized else min)(values, key=values.__getitem__)


def _mark_best_epochs(
    figure: go.Figure, trials: Sequence[FrozenTrial], maximized: bool, rounds: int
) -> None:
    """Add a star at the best epoch of each trial."""
    if not trials:
        return
    steps = [_best_step(trial, maximized, rounds) for trial in trials]
    values = [finite_reports(trial)[step] for trial, step in zip(trials, steps, strict=True)]
    colors = [COLORS[rank % len(COLORS)] for rank in range(len(trials))]
    figure.add_scatter(
        x=steps,
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


def _curves_subtitle(study: optuna.Study, n_best: int, n_pruned: int) -> str:
    """Describe which trials the learning curves show."""
    complete, pruned = len(ranked_trials(study)), len(ranked_trials(study, TrialState.PRUNED))
    text = "no trial has completed yet"
    if complete:
        text = f"the best {n_best} of {complete} complete trials, star: best epoch"
    if pruned:
        text += f"; grey: the best {n_pruned} of {pruned} pruned trials"
    return text


def plot_learning_rate(
    study: optuna.Study, *, max_trials: int = 1000, details: bool = True
) -> go.Figure:
    """Plot the best value of each trial against its learning rate, colored by optimizer.

    Pruned trials are small open markers at their best value. Diverged trials without a value are
    crosses on the bad edge. The range of the y axis excludes outliers, which are triangles on its
    edge.

    Args:
        study:
            A study with one objective.
        max_trials:
            Limit on the complete and on the pruned trials; more are thinned evenly by rank.
        details:
            Whether the hover texts contain the main parameters, or only the trial number.

    Returns:
        The figure. If there is nothing to show, its title says so.

    Raises:
        ValueError: If ``max_trials`` is below 1.

    Example:
        >>> study = optuna.create_study()
        >>> space = {"learning_rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)}
        >>> trial = optuna.trial.create_trial(
        ...     params={"learning_rate": 0.1}, distributions=space, value=0.5
        ... )
        >>> study.add_trial(trial)
        >>> [(list(trace.x), list(trace.y)) for trace in plot_learning_rate(study).data][0]
        ([0.1], [0.5])
    """
    if max_trials < 1:
        raise ValueError(f"`max_trials` must be at least 1, but got {max_trials}.")
    metric = escape_markup(metric_name(study))
    title = f"Learning rate: {metric}"
    layout = {"xaxis_title": "learning rate", "yaxis_title": f"{metric} (validation)"}
    complete, pruned = (
        [t for t in ranked_trials(study, state) if "learning_rate" in t.params]
        for state in (TrialState.COMPLETE, TrialState.PRUNED)
    )
    shown = [_thin_by_rank(complete, max_trials), _thin_by_rank(pruned, max_trials)]
    both = [trial for trials in shown for trial in trials]
    figure = go.Figure()
    if not both:
        fixed = study.user_attrs.get("fixed", {}).get("learning_rate")
        reason = (
            "no trial has completed yet" if fixed is None else f"fixed at {escape_markup(fixed)}"
        )
        return apply_style(figure, title, reason, **layout, xaxis_type="log")
    maximized = is_maximized(study)
    values = [value for t in both if (value := best_value(t, maximized)) is not None]
    bounds = robust_range(values, maximized)
    optimizers = sorted({_optimizer_name(study, trial) for trial in both})
    for optimizer, color in zip(optimizers, COLORS * len(optimizers), strict=False):
        groups = [
            [t for t in trials if _optimizer_name(study, t) == optimizer] for trials in shown
        ]
        for index, group in enumerate(filter(None, groups)):
            trace = _learning_rate_trace(group, optimizer, color, maximized, bounds, details)
            figure.add_trace(trace.update(showlegend=index == 0))
    _add_diverged(figure, study, bounds[0] if maximized else bounds[1], max_trials)
    _scale_axes(figure, [trial.params["learning_rate"] for trial in both], bounds)
    n_outside = sum(not bounds[0] <= value <= bounds[1] for value in values)
    subtitle = _learning_rate_subtitle(len(complete), len(pruned), n_outside)
    return apply_style(figure, title, subtitle, **layout)


def _learning_rate_trace(
    trials: Sequence[FrozenTrial],
    optimizer: str,
    color: str,
    maximized: bool,
    bounds: tuple[float, float],
    details: bool,
) -> go.Scatter:
    """Return the markers of one optimizer's complete trials, or of its pruned ones."""
    values = [value for t in trials if (value := best_value(t, maximized)) is not None]
    is_inside = [bounds[0] <= value <= bounds[1] for value in values]
    pruned = trials[0].state == TrialState.PRUNED
    outlier = "triangle-down" if maximized else "triangle-up"
    symbols = [("circle" if ok else outlier) + ("-open" if pruned else "") for ok in is_inside]
    texts = [
        (_hover_text(t, ", pruned" if pruned else "") if details else f"trial {t.number}")
        + f"<br>value: <b>{format_value(value)}</b>"
        for t, value in zip(trials, values, strict=True)
    ]
    return go.Scatter(
        x=[round_to_five_digits(t.params["learning_rate"]) for t in trials],
        y=[round_to_five_digits(float(np.clip(value, *bounds))) for value in values],
        mode="markers",
        marker={
            # A single symbol, where there are no outliers, keeps the saved figure small.
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


def _add_diverged(figure: go.Figure, study: optuna.Study, edge: float, max_trials: int) -> None:
    """Add crosses for diverged trials without a value, at the bad edge of the y axis."""
    maximized = is_maximized(study)
    rates = [
        round_to_five_digits(trial.params["learning_rate"])
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("cause") == "diverged"
        and "learning_rate" in trial.params
        and best_value(trial, maximized) is None
    ][:max_trials]
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


def _scale_axes(figure: go.Figure, rates: Sequence[float], bounds: tuple[float, float]) -> None:
    """Set the range of the y axis and a logarithmic x axis."""
    has_decades = max(rates) > MIN_RATIO_FOR_DECADE_TICKS * min(rates)
    ticks = {"dtick": 1} if has_decades else {}
    figure.update_xaxes(type="log", exponentformat="power", **ticks)
    figure.update_yaxes(range=list(bounds))


def _learning_rate_subtitle(n_complete: int, n_pruned: int, n_outside: int) -> str:
    """Describe which trials the figure of the learning rate shows."""
    parts = [f"{n_complete} complete trials" if n_complete else "no trial has completed yet"]
    if n_pruned:
        parts.append(f"open: {n_pruned} pruned, at their best value")
    if n_outside:
        parts.append(f"triangles: {n_outside} outside the axis")
    return "; ".join(parts)


def _thin_by_rank(trials: list[FrozenTrial], max_trials: int) -> list[FrozenTrial]:
    """Return at most ``max_trials`` ranked trials, evenly over the ranks, including the best."""
    if len(trials) <= max_trials:
        return trials
    return [trials[int(i)] for i in np.linspace(0, len(trials) - 1, max_trials).round()]


def _optimizer_name(study: optuna.Study, trial: FrozenTrial) -> str:
    """Return the optimizer of a trial, tuned or fixed."""
    fixed = study.user_attrs.get("fixed", {}).get("optimizer", "all trials")
    return format_value(trial.params.get("optimizer", fixed))


def _hover_text(trial: FrozenTrial, state: str = "") -> str:
    """Return the hover text of a trial: number, state and main parameters."""
    lines = [f"<b>trial {trial.number}</b>{state}"]
    params = main_parameters(trial.params)
    lines += [f"{escape_markup(name)}: {escape_markup(value)}" for name, value in params.items()]
    return "<br>".join(lines)
