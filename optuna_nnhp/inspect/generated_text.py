"""Store a text that the best language model of a study generates, for notes and dashboards."""

from __future__ import annotations

from optuna_nnhp.inspect.result import Result
from optuna_nnhp.inspect.summary import GENERATED_TEXT
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.inspect.summary import is_language

GENERATED_TOKENS = 300


def store_generated_text(result: Result) -> None:
    """Store a text of the best language model in the study, unless it is stored already.

    Args:
        result:
            The study's result; nothing happens unless it tuned language models.
    """
    study = result.study
    best = find_best_trial(study) if is_language(study) else None
    if best is None or study.user_attrs.get(GENERATED_TEXT, {}).get("trial") == best.number:
        return
    text = result.generate(tokens=GENERATED_TOKENS)
    study.set_user_attr(GENERATED_TEXT, {"trial": best.number, "text": text})
