"""Notes and figures for optuna-dashboard, kept in the study itself.

optuna-dashboard has no pages of one's own: what it shows beyond its plots are Markdown notes and
plotly figures that are stored as attributes of the study.
https://optuna-dashboard.readthedocs.io/en/stable/api.html
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
import json
import re
from types import ModuleType
from types import SimpleNamespace
from typing import Any
from typing import cast

import optuna
from optuna.trial import FrozenTrial

from optuna_nnhp.inspect.figures import learning_rate
from optuna_nnhp.inspect.figures import plot_learning_curves
from optuna_nnhp.inspect.replicates import replicated_trials
from optuna_nnhp.inspect.schedules import plot_schedules
from optuna_nnhp.inspect.summary import SAMPLE
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import is_language
from optuna_nnhp.inspect.summary import language_model_rows
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import range_text
from optuna_nnhp.inspect.summary import replicates_text
from optuna_nnhp.inspect.summary import schedule_changes_text
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.inspect.summary import summary
from optuna_nnhp.version import __version__

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# Where the study remembers what was last written: a digest by part, and the best trial.
_ATTRIBUTE = "optuna_nnhp:annotated"
_OWN_NOTES = "*Your own notes: text below this line is kept.*"


def _optuna_dashboard() -> ModuleType:
    try:
        import optuna_dashboard
    except ModuleNotFoundError as error:
        if error.name != "optuna_dashboard":
            raise
        raise ModuleNotFoundError(
            "Notes and figures need optuna-dashboard, which is not installed: "
            "pip install 'optuna-nnhp[dashboard]'",
            name=error.name,
        ) from error
    return cast(ModuleType, optuna_dashboard)


def _escape_markdown(value: object) -> str:
    """Text that Markdown shows as it is: no emphasis, links, tables, HTML or formulas.

    Example:
        >>> print(_escape_markdown("a_b|<script>$x$"))
        a\\_b\\|\\<script\\>\\$x\\$
    """
    return re.sub(r"([\\`*_\[\]<>|$~&#!])", r"\\\1", format_value(value))


def _markdown_name(name: str) -> str:
    # A code span shows its content as it is, but knows no escapes: plain names only.
    return f"`{name}`" if re.fullmatch(r"[\w.:-]+", name) else _escape_markdown(name)


def _markdown_table(rows: Mapping[str, object], heads: tuple[str, str]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "| --- | --- |"]
    # The dashboard's tables have no padding: the space keeps the columns apart.
    lines += [
        f"| {_markdown_name(name)}&emsp; | {_escape_markdown(value)} |"
        for name, value in rows.items()
    ]
    return "\n".join(lines)


def study_note(study: optuna.Study) -> str:
    """The study in Markdown: what is tuned in which ranges, on what data, and the best so far.

    Args:
        study:
            A study of one objective.

    Example:
        >>> study = optuna.create_study(study_name="digits")
        >>> study.set_user_attr("metric", "loss")
        >>> study.add_trial(optuna.trial.create_trial(value=0.25))
        >>> "**loss 0.25** in trial 0" in study_note(study)
        True
    """
    rows = summary(study)
    parts = [f"## {_escape_markdown(rows.pop('study'))}"]
    rows.pop("best")
    rows.pop("other seeds", None)
    parts.append(
        "\n".join(
            f"- **{_escape_markdown(k)}**: {_escape_markdown(text)}" for k, text in rows.items()
        )
    )
    parts.append("### Best so far")
    if best := find_best_trial(study):
        value = f"{_escape_markdown(metric_name(study))} {format_value(best.value)}"
        seeds = f"; {_escape_markdown(words)}" if (words := replicates_text(study)) else ""
        parts.append(f"**{value}** in trial {best.number}{seeds}")
        parts.append(_markdown_table(best.params, ("parameter", "value")))
        parts += _generated_text(study, best)
    else:
        parts.append("No trial has completed yet.")
    if space := {name: range_text(found) for name, found in search_space(study).items()}:
        parts += ["### What is tuned", _markdown_table(space, ("parameter", "range"))]
    if fixed := study.user_attrs.get("fixed"):
        parts += ["### What is fixed", _markdown_table(fixed, ("parameter", "value"))]
    return "\n\n".join(parts)


def _generated_text(study: optuna.Study, trial: FrozenTrial) -> list[str]:
    """What a language model writes, if it is the study's best."""
    sample = study.user_attrs.get(SAMPLE, {})
    if sample.get("trial") != trial.number:
        return []
    return ["### What it writes", _code_block(sample["text"])]


def _code_block(text: str) -> str:
    """A text as it stands: every line indented, which is Markdown's code."""
    return "\n".join("    " + line for line in text.splitlines())


def trial_note(study: optuna.Study, trial: FrozenTrial) -> str:
    """The best trial in Markdown: how good, how long, which parameters, how to get it back.

    Args:
        study:
            The trial's study, of one objective.
        trial:
            A trial with a value.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=0.25))
        >>> "`optuna_nnhp.load`" in trial_note(study, study.best_trial)
        True
    """
    attrs = trial.user_attrs
    facts = {
        "other seeds": _replicates_text(study, trial),
        "best epoch": attrs.get("best_epoch"),
        "epochs": attrs.get("epochs"),
        "iterations": attrs.get("iterations"),
        "weights": attrs.get("weights"),
        "seconds": attrs.get("seconds"),
        **language_model_rows(trial),
        "ended by": attrs.get("cause"),
        "its values": schedule_changes_text(trial),
    }
    known = [
        f"- **{label}**: {_escape_markdown(fact)}"
        for label, fact in facts.items()
        if fact is not None
    ]
    use = "generate" if is_language(study) else "predict"
    parts = [
        f"## Best trial: {_escape_markdown(metric_name(study))} {format_value(trial.value)}",
        "\n".join(known),
        *_generated_text(study, trial),
        _markdown_table(trial.params, ("parameter", "value")) if trial.params else "",
        "### The network",
        "In the program that ran the study, `result.model` is this trial's network at its best "
        f"epoch, and `result.{use}` uses it; elsewhere `optuna_nnhp.load` reads what "
        "`result.save` wrote.",
    ]
    return "\n\n".join(filter(None, parts))


def _replicates_text(study: optuna.Study, trial: FrozenTrial) -> str | None:
    """What a trial came to with other seeds."""
    return next((r.words for r in replicated_trials(study) if r.number == trial.number), None)


def _fingerprint(study: optuna.Study) -> str:
    """A digest of all that the notes and figures are made of; running trials count by state."""
    trials = [
        (trial.number, trial.state.name, trial.values, len(trial.user_attrs))
        for trial in study.get_trials(deepcopy=False)
    ]
    return _digest(
        json.dumps([__version__, study.study_name, study.user_attrs, trials], default=str)
    )


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def _merge_notes(own: str, old: str) -> str:
    """Our text, then what a person wrote: below our line or, without one, all there was."""
    _, line, kept = old.partition(_OWN_NOTES)
    kept = kept if line else f"\n\n{old}" if old.strip() else ""
    return f"{own}\n\n---\n\n{_OWN_NOTES}{kept}"


def _write_note(target: optuna.Study | optuna.Trial, body: str) -> None:
    dashboard = _optuna_dashboard()
    if dashboard.get_note(target) != body:
        dashboard.save_note(target, body)


def _note_target(study: optuna.Study, number: int) -> optuna.Trial:
    # `optuna.Trial(...)` would call the sampler's `before_trial`, which may write; the notes need
    # these three attributes only.
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    target = SimpleNamespace(study=study, storage=study._storage, _trial_id=trial_id)
    return cast(optuna.Trial, target)


def _write_best_trial_note(study: optuna.Study, before: int | None) -> int | None:
    """Write the note of the best trial, take ours off the trial that was best before."""
    dashboard = _optuna_dashboard()
    leader = find_best_trial(study)
    best = leader.number if leader else None
    if before is not None and before != best:
        target = _note_target(study, before)
        _write_note(target, dashboard.get_note(target).partition(_OWN_NOTES)[2].strip())
    if leader is not None:
        target = _note_target(study, leader.number)
        own = trial_note(study, leader)
        _write_note(target, _merge_notes(own, dashboard.get_note(target)))
    return best


def annotate(study: optuna.Study) -> bool:
    """Write notes on the study and its best trial, and figures, for optuna-dashboard.

    The figures are kept small, about 20 kB each, since the dashboard stores them in pieces of
    2045 characters and sends them again at every poll. Text that a person added to a note below
    our line is kept. Nothing is written where no trial started or ended since the last call.

    Args:
        study:
            A study of one objective, in any storage.

    Returns:
        Whether anything was written.

    Raises:
        ModuleNotFoundError: If optuna-dashboard is not installed.

    Example:
        >>> study = optuna.create_study()
        >>> annotate(study), annotate(study)
        (True, False)
    """
    dashboard = _optuna_dashboard()
    storage, study_id = study._storage, study._study_id
    last: dict[str, Any] = storage.get_study_system_attrs(study_id).get(_ATTRIBUTE, {})
    fingerprint = _fingerprint(study)
    if last.get("study") == fingerprint:
        return False
    _write_note(study, _merge_notes(study_note(study), dashboard.get_note(study)))
    now: dict[str, Any] = {
        "study": fingerprint,
        "best": _write_best_trial_note(study, last.get("best")),
    }
    figures = {
        "learning_curves": plot_learning_curves(study, points=50),
        "learning_rate": learning_rate(study, most=100, details=False),
    }
    if (moved := plot_schedules(study, best=3, small=True)).data:
        figures["courses"] = moved
    for name, figure in figures.items():
        now[name] = _digest(figure.to_json())
        if last.get(name) != now[name]:
            dashboard.save_plotly_graph_object(study, figure, graph_object_id=name)
    storage.set_study_system_attr(study_id, _ATTRIBUTE, now)
    _logger.debug(f"Annotated study {study.study_name!r} for optuna-dashboard.")
    return True
