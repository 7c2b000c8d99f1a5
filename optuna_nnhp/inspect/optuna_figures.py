"""Draw Optuna's own figures of a study in the common style, with escaped names."""

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

# PED-ANOVA compares the best tenth with all trials; a tenth of fewer trials is a single one.
MIN_TRIALS_FOR_IMPORTANCES = 20
MAX_SLICES, MAX_COORDINATES = 6, 8  # parameters in the figures `slice` and `parallel_coordinate`


def optuna_figures(study: optuna.Study) -> dict[str, go.Figure]:
    """Return Optuna's figures that the study has data for, by name.

    ``optimization_history`` needs a complete trial, ``slice`` and ``parallel_coordinate`` two
    (they show the six and eight most important parameters), and ``param_importances`` needs 20,
    since it compares the best tenth with the rest.

    Args:
        study:
            A study with one objective.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=0.5))
        >>> list(optuna_figures(study))
        ['optimization_history']
    """
    figures: dict[str, go.Figure] = {}
    complete = ranked_trials(study)
    if not complete:
        return figures
    plots, metric = optuna.visualization, escape_markup(metric_name(study))
    study = _with_escaped_names(study)
    values = [value for trial in complete if (value := trial.value) is not None]
    bounds = list(robust_range(values, is_maximized(study)))
    figures["optimization_history"] = apply_style(
        plots.plot_optimization_history(study, target_name=metric),
        f"Optimization history: {metric}",
        yaxis_range=bounds,
    )
    importances = _importances(study) if len(complete) >= MIN_TRIALS_FOR_IMPORTANCES else {}
    if importances:
        figures["param_importances"] = apply_style(
            plots.plot_param_importances(study, target_name=metric),
            f"Importance of the parameters for {metric}",
            "PED-ANOVA: which parameters distinguish the best trials from the rest",
        )
    params = sorted({name for trial in ranked_trials(study) for name in trial.params})
    names = list(importances or main_parameters(dict.fromkeys(params), len(params)))
    if len(complete) > 1 and names:
        figures["slice"] = apply_style(
            plots.plot_slice(study, params=names[:MAX_SLICES], target_name=metric),
            f"{metric} by parameter",
        )
        figures["slice"].update_layout(width=None).update_yaxes(range=bounds)
        figures["parallel_coordinate"] = apply_style(
            plots.plot_parallel_coordinate(
                study, params=names[:MAX_COORDINATES], target_name=metric
            ),
            f"Parameters of the trials and {metric}",
        )
    return figures


def _importances(study: optuna.Study) -> dict[str, float]:
    """Return the importance by parameter, largest first; empty if it cannot be computed."""
    with warnings.catch_warnings():
        # Optuna warns and returns equal importances where it cannot distinguish parameters.
        warnings.simplefilter("error", UserWarning)
        try:
            importances = optuna.importance.get_param_importances(study)
        except (UserWarning, ValueError, RuntimeError) as reason:
            _logger.info(f"No parameter importances: {reason}")
            return {}
    return importances if sum(importances.values()) > 0.0 else {}


def _with_escaped_names(study: optuna.Study) -> optuna.Study:
    """Return the study, or a copy with escaped names and categories if any contains markup.

    Optuna's figures use names and categories in plotly texts without escaping them.
    """
    trials = study.get_trials(deepcopy=False)
    texts = {study.study_name, *(study.metric_names or ())}
    for distributions in {id(t.distributions): t.distributions for t in trials}.values():
        texts |= set(distributions)
        for distribution in distributions.values():
            if isinstance(distribution, CategoricalDistribution):
                texts |= {choice for choice in distribution.choices if isinstance(choice, str)}
    if all(text == html.escape(text, quote=False) for text in texts):
        return study
    copy = optuna.create_study(direction=study.direction)
    if study.metric_names:
        copy.set_metric_names([html.escape(name, quote=False) for name in study.metric_names])
    copy.add_trials([_escaped_trial(trial) for trial in trials])
    return copy


def _escaped_trial(trial: FrozenTrial) -> FrozenTrial:
    """Return a copy of a trial with escaped parameter names and categories."""

    def escaped(value: Any) -> Any:
        return html.escape(value, quote=False) if isinstance(value, str) else value

    def escaped_distribution(distribution: BaseDistribution) -> BaseDistribution:
        if isinstance(distribution, CategoricalDistribution):
            return CategoricalDistribution([escaped(choice) for choice in distribution.choices])
        return distribution

    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        params={escaped(name): escaped(value) for name, value in trial.params.items()},
        distributions={
            escaped(name): escaped_distribution(d) for name, d in trial.distributions.items()
        },
        intermediate_values=trial.intermediate_values,
        constraints=trial.constraints,
    )
