"""What a study says about itself, as plain text rows.

The figures, the HTML page and the notes for optuna-dashboard all show these rows; each
escapes them for its own medium. Only the study is read: no torch, no training.
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
from optuna_nnhp.study.running_trial import SCHEDULE

# What a short label of a trial shows first; what else the study tunes fills the rest.
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


SAMPLE = "sample"  # attribute of a study of language models: what its best one writes


def format_value(value: object) -> str:
    """A value as a reader wants it: floats with four digits, everything else as ``str``.

    Example:
        >>> (
        ...     format_value(0.0123456),
        ...     format_value(1e-05),
        ...     format_value(64),
        ...     format_value("adam"),
        ...     format_value(None),
        ... )
        ('0.01235', '1e-05', '64', 'adam', 'None')
    """
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def is_maximized(study: optuna.Study) -> bool:
    """Whether larger values are better.

    Raises:
        RuntimeError: If the study has several objectives (from Optuna).

    Example:
        >>> is_maximized(optuna.create_study(direction="maximize"))
        True
    """
    return study.direction == StudyDirection.MAXIMIZE


def is_language(study: optuna.Study) -> bool:
    """Whether language models are tuned.

    Example:
        >>> is_language(optuna.create_study())
        False
    """
    return study.user_attrs.get("task") == "language"


def language_model_rows(trial: FrozenTrial) -> dict[str, str]:
    """What one wants to know of a language model besides bits per byte; nothing of others.

    Example:
        >>> attrs = {"tokens_per_step": 768, "iterations": 100, "validation_loss": [2.0, 1.0]}
        >>> trial = optuna.trial.create_trial(value=1.4, user_attrs=attrs | {"seconds": 2.0})
        >>> language_model_rows(trial)["perplexity"], language_model_rows(trial)["speed"]
        ('2.718 a token', '38,400 tokens a second')
    """
    attrs = trial.user_attrs
    if "tokens_per_step" not in attrs or not attrs.get("validation_loss"):
        return {}
    tokens = attrs["tokens_per_step"] * attrs["iterations"]
    nats = attrs["validation_loss"][-1]
    return {
        "perplexity": f"{format_value(math.exp(min(nats, 700.0)))} a token",
        "loss": f"{format_value(nats)} nats a token",
        "trained on": f"{tokens:,} tokens in {attrs['iterations']:,} steps",
        "speed": f"{tokens / max(attrs['seconds'], 1e-3):,.0f} tokens a second",
    }


def metric_name(study: optuna.Study) -> str:
    """The name of what is optimized, or ``"value"`` where the study does not say.

    Example:
        >>> study = optuna.create_study()
        >>> study.set_user_attr("metric", "accuracy")
        >>> metric_name(study)
        'accuracy'
    """
    names = study.metric_names
    return str(study.user_attrs.get("metric") or (names[0] if names else "value"))


def finite_reports(trial: FrozenTrial) -> dict[int, float]:
    """The finite values that a trial reported, by epoch, in order of the epochs.

    A diverged trial reports NaN or infinity; those are left out.

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
    """The best value a trial reached: also of a pruned one, whose ``value`` is only its last.

    Returns:
        For complete trials their value; for others the attribute ``best_value``, else the
        best reported value. None where there is no finite one.

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
        found = (max if maximized else min)(values) if values else None
        value = trial.user_attrs.get("best_value", found)
    return float(value) if value is not None and math.isfinite(value) else None


def ranked_trials(
    study: optuna.Study, state: TrialState = TrialState.COMPLETE
) -> list[FrozenTrial]:
    """The trials of one state that reached a value, best first.

    Trials that break a constraint are left out, as in ``study.best_trial``.

    Example:
        >>> study = optuna.create_study(direction="maximize")
        >>> study.add_trials([optuna.trial.create_trial(value=v) for v in (0.5, 0.9, 0.7)])
        >>> [trial.value for trial in ranked_trials(study)]
        [0.9, 0.7, 0.5]
    """
    maximized = is_maximized(study)
    found = [
        (value, trial)
        for trial in study.get_trials(deepcopy=False, states=(state,))
        if (value := best_value(trial, maximized)) is not None
        and all(constraint <= 0.0 for constraint in trial.constraints.values())
    ]
    sign = -1.0 if maximized else 1.0
    return [trial for _, trial in sorted(found, key=lambda it: (sign * it[0], it[1].number))]


def find_best_trial(study: optuna.Study) -> FrozenTrial | None:
    """What the study's result is: its best trial, with replicates that with the best mean.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trials([optuna.trial.create_trial(value=v) for v in (0.5, 0.4)])
        >>> find_best_trial(study).number
        1
    """
    if (chosen := best_replicated_trial(study)) is not None:
        return study.get_trials(deepcopy=False)[chosen.number]
    return next(iter(ranked_trials(study)), None)


def replicates_text(study: optuna.Study) -> str:
    """What the best trial came to with other seeds, in words; empty without replicates.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=0.25))
        >>> record = {"0": {"seeds": [1, 2, 3], "values": [0.25, 0.27, 0.29]}}
        >>> study.set_user_attr("replicates", record)
        >>> replicates_text(study)
        '0.27 ± 0.02 over 3 seeds'
    """
    chosen = best_replicated_trial(study)
    return "" if chosen is None else chosen.words


def schedule_changes_text(trial: FrozenTrial) -> str | None:
    """How often a trial's values changed while it trained, in words; None if they did not.

    Example:
        >>> course = [[0, {"dropout": 0.1}, False], [2, {"dropout": 0.2}, False]]
        >>> schedule_changes_text(
        ...     optuna.trial.create_trial(value=1.0, user_attrs={"schedule": course})
        ... )
        'changed once while it trained, as the figure of courses shows'
    """
    count = len(trial.user_attrs.get(SCHEDULE, ())) - 1
    if count < 1:
        return None
    often = "once" if count == 1 else f"{count} times"
    return f"changed {often} while it trained, as the figure of courses shows"


def main_parameters(params: Mapping[str, Any], count: int = 8) -> dict[str, Any]:
    """The first ``count`` parameters, those of :data:`MAIN_PARAMETERS` before all others.

    Example:
        >>> main_parameters({"l1": 0.0, "width": 64, "learning_rate": 0.1}, count=2)
        {'learning_rate': 0.1, 'width': 64}
    """
    names = [name for name in MAIN_PARAMETERS if name in params]
    names += [name for name in params if name not in MAIN_PARAMETERS]
    return {name: params[name] for name in names[:count]}


def range_text(distribution: BaseDistribution) -> str:
    """What a parameter may be, in words.

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
    """The distributions of the study: those it was started with, else those of its trials.

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
    found: dict[str, BaseDistribution] = {}
    for trial in study.get_trials(deepcopy=False):
        found |= trial.distributions
    return found


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def _timing(timing: Mapping[str, float] | None) -> str | None:
    """Where the time of the last call went, as the scheduler noted it."""
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
    """What is tuned, on what, for how long, and how far it got; plain text, not escaped.

    Returns:
        Label -> text, in the order to show; what the study does not say is left out.

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
    leader, metric = find_best_trial(study), metric_name(study)
    best = f"{metric} {format_value(leader.value)} in trial {leader.number}" if leader else ""
    rows = {
        "study": study.study_name,
        "template": attrs.get("template"),
        "task": attrs.get("task"),
        "metric": f"{metric}, {'maximized' if is_maximized(study) else 'minimized'}",
        "data": attrs.get("data"),
        "budget": attrs.get("budget"),
        "seed": attrs.get("seed"),
        "optuna_nnhp": attrs.get("version"),
        "best": best or "no trial has completed yet",
        "other seeds": replicates_text(study) or None,
        "best trial's values": schedule_changes_text(leader) if leader else None,
        **(language_model_rows(leader) if leader else {}),
        "trials": f"{len(trials)} in all" + (f": {_counts(states)}" if trials else ""),
        "ended by": _counts(causes) or None,
        "last call": _timing(attrs.get("timing")),
    }
    return {label: format_value(text) for label, text in rows.items() if text is not None}
