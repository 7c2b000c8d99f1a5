"""Write notes and figures for optuna-dashboard, which are stored in the study.

optuna-dashboard has no custom pages: besides its own plots it shows Markdown notes and plotly
figures that are stored as attributes of the study.
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

from optuna_nnhp.inspect.figures import plot_learning_curves
from optuna_nnhp.inspect.figures import plot_learning_rate
from optuna_nnhp.inspect.replicates import replicated_trials
from optuna_nnhp.inspect.schedule_figure import plot_schedules
from optuna_nnhp.inspect.summary import GENERATED_TEXT
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.inspect.summary import format_value
from optuna_nnhp.inspect.summary import metric_name
from optuna_nnhp.inspect.summary import range_text
from optuna_nnhp.inspect.summary import replicates_text
from optuna_nnhp.inspect.summary import schedule_changes_text
from optuna_nnhp.inspect.summary import search_space
from optuna_nnhp.inspect.summary import summary
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.templates.base import template_of_study
from optuna_nnhp.version import __version__

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# System attribute of a study: digests of what was last written, and the number of the best trial.
_ANNOTATED_KEY = "optuna_nnhp:annotated"
_USER_NOTES_MARK = "*Your own notes: text below this line is kept.*"


def annotate(study: optuna.Study) -> bool:
    """Write notes on the study and its best trial, and figures, for optuna-dashboard.

    The figures are small, about 20 kB each, since the dashboard stores them in pieces of 2045
    characters and sends them again at every poll. Text that a person added to a note below our
    line is kept. Nothing is written if no trial has started or ended since the last call.

    Args:
        study:
            A study with one objective, in any storage.

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
    storage, number = storage_of(study), study_id(study)
    last: dict[str, Any] = storage.get_study_system_attrs(number).get(_ANNOTATED_KEY, {})
    fingerprint = _fingerprint(study)
    if last.get("study") == fingerprint:
        return False
    _write_note(study, _append_written_text(study_note(study), dashboard.get_note(study)))
    best = _write_best_trial_note(study, last.get("best"))
    now: dict[str, Any] = {"study": fingerprint, "best": best}
    figures = {
        "learning_curves": plot_learning_curves(study, max_points=50),
        "learning_rate": plot_learning_rate(study, max_trials=100, details=False),
    }
    if (schedules := plot_schedules(study, n_best=3, compact=True)).data:
        figures["schedules"] = schedules
    for name, figure in figures.items():
        now[name] = _digest(figure.to_json())
        if last.get(name) != now[name]:
            dashboard.save_plotly_graph_object(study, figure, graph_object_id=name)
    storage.set_study_system_attr(number, _ANNOTATED_KEY, now)
    _logger.debug(f"Annotated study {study.study_name!r} for optuna-dashboard.")
    return True


def study_note(study: optuna.Study) -> str:
    """Describe a study in Markdown: data, best trial, tuned and fixed parameters.

    Args:
        study:
            A study with one objective.

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
    parts.append(_markdown_list(rows))
    parts.append("### Best so far")
    if best := find_best_trial(study):
        value = f"{_escape_markdown(metric_name(study))} {format_value(best.value)}"
        seeds = f"; {_escape_markdown(text)}" if (text := replicates_text(study)) else ""
        parts.append(f"**{value}** in trial {best.number}{seeds}")
        parts.append(_markdown_table(best.params, ("parameter", "value")))
        parts += _generated_text(study, best)
    else:
        parts.append("No trial has completed yet.")
    if space := {name: range_text(found) for name, found in search_space(study).items()}:
        parts += ["### Tuned parameters", _markdown_table(space, ("parameter", "range"))]
    if fixed := study.user_attrs.get("fixed"):
        parts += ["### Fixed parameters", _markdown_table(fixed, ("parameter", "value"))]
    return "\n\n".join(parts)


def trial_note(study: optuna.Study, trial: FrozenTrial) -> str:
    """Describe the best trial in Markdown: value, duration, parameters, how to load its network.

    Args:
        study:
            The trial's study, with one objective.
        trial:
            A trial with a value.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=0.25))
        >>> "`optuna_nnhp.load`" in trial_note(study, study.best_trial)
        True
    """
    attrs = trial.user_attrs
    rows = {
        "other seeds": _replicates_text(study, trial),
        "best epoch": attrs.get("best_epoch"),
        "epochs": attrs.get("epochs"),
        "iterations": attrs.get("iterations"),
        "weights": attrs.get("weights"),
        "seconds": attrs.get("seconds"),
        **template_of_study(study).trial_rows(trial),
        "ended by": attrs.get("cause"),
        "its values": schedule_changes_text(trial),
    }
    use = template_of_study(study).model_method
    parts = [
        f"## Best trial: {_escape_markdown(metric_name(study))} {format_value(trial.value)}",
        _markdown_list({label: value for label, value in rows.items() if value is not None}),
        *_generated_text(study, trial),
        _markdown_table(trial.params, ("parameter", "value")) if trial.params else "",
        "### The network",
        "In the program that ran the study, `result.model` is this trial's network at its best "
        f"epoch, and `result.{use}` uses it. Elsewhere `optuna_nnhp.load` loads what "
        "`result.save` has written.",
    ]
    return "\n\n".join(filter(None, parts))


def _optuna_dashboard() -> ModuleType:
    """Import optuna-dashboard, which is an optional dependency."""
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
    """Escape a value so that Markdown shows no emphasis, links, tables, HTML or formulas.

    Example:
        >>> print(_escape_markdown("a_b|<script>$x$"))
        a\\_b\\|\\<script\\>\\$x\\$
    """
    return re.sub(r"([\\`*_\[\]<>|$~&#!])", r"\\\1", format_value(value))


def _markdown_name(name: str) -> str:
    """Format a parameter name: as a code span, which has no escapes, if it is a plain name."""
    return f"`{name}`" if re.fullmatch(r"[\w.:-]+", name) else _escape_markdown(name)


def _markdown_list(rows: Mapping[str, object]) -> str:
    """Return a list of labels and values."""
    return "\n".join(
        f"- **{_escape_markdown(label)}**: {_escape_markdown(value)}"
        for label, value in rows.items()
    )


def _markdown_table(rows: Mapping[str, object], heads: tuple[str, str]) -> str:
    """Return a table with two columns."""
    lines = [f"| {heads[0]} | {heads[1]} |", "| --- | --- |"]
    # The dashboard's tables have no padding; the space separates the columns.
    lines += [
        f"| {_markdown_name(name)}&emsp; | {_escape_markdown(value)} |"
        for name, value in rows.items()
    ]
    return "\n".join(lines)


def _generated_text(study: optuna.Study, trial: FrozenTrial) -> list[str]:
    """Return a section with the text that the best language model generated, if there is one."""
    stored = study.user_attrs.get(GENERATED_TEXT, {})
    if stored.get("trial") != trial.number:
        return []
    return ["### Generated text", _code_block(stored["text"])]


def _code_block(text: str) -> str:
    """Indent a text, so that Markdown shows it as code, without any markup."""
    return "\n".join("    " + line for line in text.splitlines())


def _replicates_text(study: optuna.Study, trial: FrozenTrial) -> str | None:
    """Describe a trial's values with other seeds; None if it has no replicates."""
    return next((r.text for r in replicated_trials(study) if r.number == trial.number), None)


def _fingerprint(study: optuna.Study) -> str:
    """Return a digest of what notes and figures show; of running trials only the state."""
    trials = [
        (trial.number, trial.state.name, trial.values, len(trial.user_attrs))
        for trial in study.get_trials(deepcopy=False)
    ]
    return _digest(
        json.dumps([__version__, study.study_name, study.user_attrs, trials], default=str)
    )


def _digest(text: str) -> str:
    """Return a digest of a text."""
    return sha256(text.encode()).hexdigest()[:32]


def _append_written_text(generated: str, old: str) -> str:
    """Append what a person wrote to the generated note.

    That is the text below our line, or the whole note if it has no such line.
    """
    _, mark, kept = old.partition(_USER_NOTES_MARK)
    kept = kept if mark else f"\n\n{old}" if old.strip() else ""
    return f"{generated}\n\n---\n\n{_USER_NOTES_MARK}{kept}"


def _write_note(target: optuna.Study | optuna.Trial, body: str) -> None:
    """Write the note of a study or trial if it has changed."""
    dashboard = _optuna_dashboard()
    if dashboard.get_note(target) != body:
        dashboard.save_note(target, body)


def _note_target(study: optuna.Study, number: int) -> optuna.Trial:
    """Return an object by which optuna-dashboard finds a trial.

    `optuna.Trial(...)` would call the sampler's `before_trial`, which may write to the storage;
    notes need only these three attributes.
    """
    trial_id = id_of(study.get_trials(deepcopy=False)[number])
    target = SimpleNamespace(study=study, storage=storage_of(study), _trial_id=trial_id)
    return cast(optuna.Trial, target)


def _write_best_trial_note(study: optuna.Study, old_best: int | None) -> int | None:
    """Write the note of the best trial, and remove ours from the trial that was best before.

    Returns:
        Number of the best trial; None if there is none.
    """
    dashboard = _optuna_dashboard()
    best = find_best_trial(study)
    number = best.number if best else None
    if old_best is not None and old_best != number:
        target = _note_target(study, old_best)
        _write_note(target, dashboard.get_note(target).partition(_USER_NOTES_MARK)[2].strip())
    if best is not None:
        target = _note_target(study, best.number)
        note = trial_note(study, best)
        _write_note(target, _append_written_text(note, dashboard.get_note(target)))
    return number
