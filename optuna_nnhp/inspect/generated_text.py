"""Store a text that the best model of a study writes, for notes and dashboards."""

from __future__ import annotations

from optuna_nnhp.inspect.result import Result
from optuna_nnhp.inspect.summary import GENERATED_TEXT
from optuna_nnhp.inspect.summary import find_best_trial


def store_generated_text(result: Result) -> None:
    """Store a text of the best model in the study, unless it is stored already.

    Args:
        result:
            The study's result; nothing happens unless its template's models write text.
    """
    study = result.study
    best = find_best_trial(study) if result.samples_text else None
    if best is None or study.user_attrs.get(GENERATED_TEXT, {}).get("trial") == best.number:
        return
    text = result.sample_text()
    study.set_user_attr(GENERATED_TEXT, {"trial": best.number, "text": text})
