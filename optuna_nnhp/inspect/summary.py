"""Summarize a study as plain text rows.

The figures, the HTML page and the notes for optuna-dashboard show these rows; each escapes them
for its own format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.distributions import json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.inspect.replicates import best_replicated_trial
from optuna_nnhp.study.running import SCHEDULE
from optuna_nnhp.templates.base import template_of_study

# These parameters come first in a short description of a trial.
MAIN_PARAMETERS = (
    "learning_rate",
    "optimizer",
    "hidden_layers",
    "width",
    "activation",
    "batch_size",
    "layers",
    "heads",
    "context",
    "batch_tokens",
    "muon_learning_rate",
    "dropout",
    "weight_decay",
)
# Attribute of a study of language models: a text that its best model generated, and its trial.
GENERATED_TEXT = "generated_text"


def format_value(value: object) -> str:
    """Format a value as one line of text, floats with four digits.

    Example:
        >>> format_value(0.0123456), format_value(1e-05), format_value(64), format_value("adam")
        ('0.01235', '1e-05', '64', 'adam')
    """
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def is_maximized(study: optuna.Study) -> bool:
    """Return whether larger values are better.

    Raises:
        RuntimeError: If the study has several objectives (raised by Optuna).

    Example:
        >>> is_maximized(optuna.create_study(direction="maximize"))
        True
    """
    return study.direction == StudyDirection.MAXIMIZE


def epoch_axis_title(study: optuna.Study) -> str:
    """Return the title of an axis that shows epochs; it depends on the template.

    Example:
        >>> epoch_axis_title(optuna.create_study())
        'epoch'
    """
    return template_of_study(study).step_title


def metric_name(study: optuna.Study) -> str:
    """Return the name of the metric, or ``"value"`` if the study has none.

    Example:
        >>> study = optuna.create_study()
        >>> study.set_user_attr("metric", "accuracy")
        >>> metric_name(study)
        'accuracy'
    """
    names = study.metric_names
    return str(study.user_attrs.get("metric") or (names[0] if names else "value"))


def finite_reports(trial: FrozenTrial) -> dict[int, float]:
    """Return the finite values that a trial reported, by step, in the order of the steps.

    Example:
        >>> trial = optuna.trial.create_trial(
        ...     value=0.5, intermediate_values={2: 0.5, 1: 0.25, 3: float("nan")}
        ... )
        >>> finite_reports(trial)
        {1: 0.25, 2: 0.5}
    """
    values = trial.intermediate_values
    return {step: values[step] for step in sorted(values) if math.isfinite(values[step])}


def best_value(trial: FrozenTrial, maximized: bool) -> float | None:
    """Return the best value of a trial; Optuna's ``value`` of a pruned trial is only its last.

    Args:
        trial:
            The trial.
        maximized:
            Whether larger values are better.

    Returns:
        The value of a complete trial; for others the attribute ``best_value``, or else the best
        reported value. None if there is no finite value.

    Example:
        >>> pruned = optuna.trial.create_trial(
        ...     state=TrialState.PRUNED, intermediate_values={1: 0.8, 2: 0.6}
        ... )
        >>> best_value(pruned, maximized=True), best_value(pruned, maximized=False)
        (0.8, 0.6)
    """
    if trial.state == TrialState.COMPLETE:
        value = trial.value
    else:
        values = finite_reports(trial).values()
        best_report = (max if maximized else min)(values) if values else None
        value = trial.user_attrs.get("best_value", best_report)
    return float(value) if value is not None and math.isfinite(value) else None


def ranked_trials(
    study: optuna.Study, state: TrialState = TrialState.COMPLETE
) -> list[FrozenTrial]:
    """Return the trials of one state that have a value, best first.

    Trials that violate a constraint are left out, as in ``study.best_trial``.

    Example:
        >>> study = optuna.create_study(direction="maximize")
        >>> study.add_trials([optuna.trial.create_trial(value=v) for v in (0.5, 0.9, 0.7)])
        >>> [trial.value for trial in ranked_trials(study)]
        [0.9, 0.7, 0.5]
    """
    maximized = is_maximized(study)
    with_value = [
        (value, trial)
        for trial in study.get_trials(deepcopy=False, states=(state,))
        if (value := best_value(trial, maximized)) is not None
        and all(constraint <= 0.0 for constraint in trial.constraints.values())
    ]
    sign = -1.0 if maximized else 1.0
    return [trial for _, trial in sorted(with_value, key=lambda it: (sign * it[0], it[1].number))]


def find_best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the best trial; in a study with replicates that with the best mean over the seeds.

    Returns:
        The trial; None if no trial is complete.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trials([optuna.trial.create_trial(value=v) for v in (0.5, 0.4)])
        >>> find_best_trial(study).number
        1
    """
    if (replicated := best_replicated_trial(study)) is not None:
        return study.get_trials(deepcopy=False)[replicated.number]
    return next(iter(ranked_trials(study)), None)


def replicates_text(study: optuna.Study) -> str:
    """Describe the best trial's values with other seeds; empty without replicates.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=0.25))
        >>> record = {"0": {"seeds": [1, 2, 3], "values": [0.25, 0.27, 0.29]}}
        >>> study.set_user_attr("replicates", record)
        >>> replicates_text(study)
        '0.27 ± 0.02 over 3 seeds'
    """
    replicated = best_replicated_trial(study)
    return "" if replicated is None else replicated.text


def schedule_changes_text(trial: FrozenTrial) -> str | None:
    """Describe how often a trial's hyperparameters changed; None if they did not.

    Example:
        >>> stored = [[0, {"dropout": 0.1}, False], [2, {"dropout": 0.2}, False]]
        >>> trial = optuna.trial.create_trial(value=1.0, user_attrs={"schedule": stored})
        >>> schedule_changes_text(trial)
        'changed once during training, see the figure of schedules'
    """
    count = len(trial.user_attrs.get(SCHEDULE, ())) - 1
    if count < 1:
        return None
    times = "once" if count == 1 else f"{count} times"
    return f"changed {times} during training, see the figure of schedules"


def main_parameters(params: Mapping[str, Any], count: int = 8) -> dict[str, Any]:
    """Return the first ``count`` parameters, those of :data:`MAIN_PARAMETERS` first.

    Example:
        >>> main_parameters({"l1": 0.0, "width": 64, "learning_rate": 0.1}, count=2)
        {'learning_rate': 0.1, 'width': 64}
    """
    names = [name for name in MAIN_PARAMETERS if name in params]
    names += [name for name in params if name not in MAIN_PARAMETERS]
    return {name: params[name] for name in names[:count]}


def range_text(distribution: BaseDistribution) -> str:
    """Describe the values that a distribution allows.

    Example:
        >>> range_text(FloatDistribution(1e-5, 0.1, log=True)), range_text(IntDistribution(1, 4))
        ('1e-05 to 0.1, logarithmic', '1 to 4')
        >>> range_text(CategoricalDistribution(["adam", "sgd"]))
        'adam, sgd'
    """
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(format_value, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = distribution.step
    return (
        f"{format_value(distribution.low)} to {format_value(distribution.high)}"
        + (", logarithmic" if distribution.log else "")
        + (f", in steps of {format_value(step)}" if step is not None and step != 1 else "")
    )


def search_space(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Return the distributions of a study: as it was created, or else those of its trials.

    Example:
        >>> study = optuna.create_study()
        >>> text = optuna.distributions.distribution_to_json(IntDistribution(1, 4))
        >>> study.set_user_attr("space", {"hidden_layers": text})
        >>> search_space(study)
        {'hidden_layers': IntDistribution(high=4, log=False, low=1, step=1)}
    """
    if "space" in study.user_attrs:
        space = study.user_attrs["space"]
        return {name: json_to_distribution(text) for name, text in space.items()}
    distributions: dict[str, BaseDistribution] = {}
    for trial in study.get_trials(deepcopy=False):
        distributions |= trial.distributions
    return distributions


def _counts_text(counter: Counter[str]) -> str:
    """Format counts, largest first."""
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def _timing_text(timing: Mapping[str, float] | None) -> str | None:
    """Describe how the last call spent its time."""
    if timing is None:
        return None
    shares = [
        f"{format_value(100 * timing[name])} % {name}"
        for name in ("training", "asking", "bookkeeping")
    ]
    return (
        f"{format_value(timing['seconds'])} s, of it {', '.join(shares)}; cohorts "
        f"{format_value(100 * timing['occupancy'])} % full"
    )


def summary(study: optuna.Study) -> dict[str, str]:
    """Summarize what is tuned, on what data, for how long, and the best value; not escaped.

    Returns:
        Text by label, in the order to show. Labels without information are left out.

    Example:
        >>> study = optuna.create_study(direction="maximize", study_name="digits")
        >>> study.set_user_attr("metric", "accuracy")
        >>> study.add_trial(optuna.trial.create_trial(value=0.97))
        >>> summary(study)["best"], summary(study)["trials"]
        ('accuracy 0.97 in trial 0', '1 in all: 1 complete')
    """
    attrs = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state.name.lower().replace("fail", "failed") for trial in trials)
    causes = Counter(str(t.user_attrs["cause"]) for t in trials if "cause" in t.user_attrs)
    best, metric = find_best_trial(study), metric_name(study)
    best_text = f"{metric} {format_value(best.value)} in trial {best.number}" if best else ""
    rows = {
        "study": study.study_name,
        "template": attrs.get("template"),
        "task": attrs.get("task"),
        "metric": f"{metric}, {'maximized' if is_maximized(study) else 'minimized'}",
        "data": attrs.get("data"),
        "budget": attrs.get("budget"),
        "seed": attrs.get("seed"),
        "optuna_nnhp": attrs.get("version"),
        "best": best_text or "no trial has completed yet",
        "other seeds": replicates_text(study) or None,
        "best trial's values": schedule_changes_text(best) if best else None,
        **(template_of_study(study).trial_rows(best) if best else {}),
        "trials": f"{len(trials)} in all" + (f": {_counts_text(states)}" if trials else ""),
        "ended by": _counts_text(causes) or None,
        "last call": _timing_text(attrs.get("timing")),
    }
    return {label: format_value(text) for label, text in rows.items() if text is not None}
