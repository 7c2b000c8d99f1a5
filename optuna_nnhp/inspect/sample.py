"""What a study's best language model writes, kept with the study for its readers."""

from __future__ import annotations

from optuna_nnhp.inspect.result import Result
from optuna_nnhp.inspect.summary import SAMPLE
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.inspect.summary import is_language

TOKENS = 300


def store_generated_text(result: Result) -> None:
    """Note on the study what its best model writes, if it is new and a language model.

    Args:
        result:
            What the study found.
    """
    study = result.study
    best = find_best_trial(study) if is_language(study) else None
    if best is None or study.user_attrs.get(SAMPLE, {}).get("trial") == best.number:
        return
    text = result.generate(tokens=TOKENS)
    study.set_user_attr(SAMPLE, {"trial": best.number, "text": text})
