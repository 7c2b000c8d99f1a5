"""Optuna's own figures of a study, in our look and safe with any name."""

from __future__ import annotations

import html
from typing import Any
import warnings

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial
import plotly.graph_objects as go

from optuna_nnhp.inspect.plot_style import apply_style
from optuna_nnhp.inspect.plot_style import escape_markup
from optuna_nnhp.inspect.plot_style import robust_range
from optuna_nnhp.inspect.summary import is_maximized
from optuna_nnhp.inspect.summary import main_parameters
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import ranked_trials

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# PED-ANOVA compares the best tenth with all; a tenth of fewer trials is a single one.
MIN_TRIALS_FOR_IMPORTANCES = 20


def _with_escaped_names(study: optuna.Study) -> optuna.Study:
    """The study itself or, where a name or category holds markup, a copy with these escaped.

    Optuna's figures put names and categories into plotly texts as they are.
    """
    trials = study.get_trials(deepcopy=False)
    words = {study.study_name, *(study.metric_names or ())}
    for distributions in {id(t.distributions): t.distributions for t in trials}.values():
        words |= set(distributions)
        for found in distributions.values():
            if isinstance(found, CategoricalDistribution):
                words |= {choice for choice in found.choices if isinstance(choice, str)}
    if all(word == html.escape(word, quote=False) for word in words):
        return study
    copy = optuna.create_study(direction=study.direction)
    if study.metric_names:
        copy.set_metric_names([html.escape(name, quote=False) for name in study.metric_names])
    copy.add_trials([_escaped_trial(trial) for trial in trials])
    return copy


def _escaped_trial(trial: FrozenTrial) -> FrozenTrial:
    def text(value: Any) -> Any:
        return html.escape(value, quote=False) if isinstance(value, str) else value

    def distribution(found: BaseDistribution) -> BaseDistribution:
        if isinstance(found, CategoricalDistribution):
            return CategoricalDistribution([text(choice) for choice in found.choices])
        return found

    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        params={text(name): text(value) for name, value in trial.params.items()},
        distributions={text(k): distribution(v) for k, v in trial.distributions.items()},
        intermediate_values=trial.intermediate_values,
        constraints=trial.constraints,
    )


def _importances(study: optuna.Study) -> dict[str, float]:
    """Importance by parameter, largest first; empty where there are too few trials to tell."""
    with warnings.catch_warnings():
        # Optuna warns where it cannot tell importances apart, and returns equal ones.
        warnings.simplefilter("error", UserWarning)
        try:
            found = optuna.importance.get_param_importances(study)
        except (UserWarning, ValueError, RuntimeError) as reason:
            _logger.info(f"No parameter importances: {reason}")
            return {}
    return found if sum(found.values()) > 0.0 else {}


def optuna_figures(study: optuna.Study) -> dict[str, go.Figure]:
    """Optuna's figures that the study has data for, by name.

    ``optimization_history`` needs a complete trial, ``slice`` and ``parallel_coordinate`` two
    (they show the six and eight most important parameters), and ``param_importances`` 20, of
    which the best tenth tells which parameters matter.

    Args:
        study:
            A study of one objective.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=0.5))
        >>> list(optuna_figures(study))
        ['optimization_history']
    """
    found: dict[str, go.Figure] = {}
    complete = ranked_trials(study)
    if not complete:
        return found
    plots, metric = optuna.visualization, escape_markup(metric_name(study))
    study = _with_escaped_names(study)
    maximized = is_maximized(study)
    values = [value for trial in complete if (value := trial.value) is not None]
    bounds = list(robust_range(values, maximized))
    found["optimization_history"] = apply_style(
        plots.plot_optimization_history(study, target_name=metric),
        f"Optimization history: {metric}",
        yaxis_range=bounds,
    )
    params = sorted({name for trial in ranked_trials(study) for name in trial.params})
    importances = _importances(study) if len(complete) >= MIN_TRIALS_FOR_IMPORTANCES else {}
    if importances:
        found["param_importances"] = apply_style(
            plots.plot_param_importances(study, target_name=metric),
            f"Importance of the parameters for {metric}",
            "PED-ANOVA: what sets the best trials apart from the rest",
        )
    names = list(importances or main_parameters(dict.fromkeys(params), len(params)))
    if len(complete) > 1 and names:
        found["slice"] = apply_style(
            plots.plot_slice(study, params=names[:6], target_name=metric),
            f"{metric} by parameter",
        )
        found["slice"].update_layout(width=None).update_yaxes(range=bounds)
        found["parallel_coordinate"] = apply_style(
            plots.plot_parallel_coordinate(study, params=names[:8], target_name=metric),
            f"Parameters of the trials and {metric}",
        )
    return found
