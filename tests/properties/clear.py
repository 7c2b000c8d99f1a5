"""Check that a call returns a result or raises a clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import re
from typing import TypeVar

from hypothesis import event
from hypothesis import settings

import optuna_nnhp

EXAMPLES, THOROUGH = 50, 2000
PACKAGE = str(Path(optuna_nnhp.__file__).parent)
CLEAR_ERRORS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError)
# The rule, then the value.
RULE = re.compile(r"\b(must|needs?|is not|are not|does not exist|cannot|is empty|has|was made)\b")
LONGEST = 2000

T = TypeVar("T")


def example_share(share: float) -> settings:
    """Return settings with a fraction of the profile's examples, for slow tests."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))


def outcome(call: Callable[[], T]) -> T | None:
    """Return a call's result, or None after a clear error; raise any other error."""
    try:
        result = call()
    except CLEAR_ERRORS as error:
        check_clear(error)
        event(f"refused: {str(error)[:40]}")
        return None
    event("taken")
    return result


def check_clear(error: Exception) -> None:
    """Raise unless an error comes from the package and states the rule on one line."""
    where, trace = "", error.__traceback__
    while trace is not None:
        where, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    text = str(error)
    if not where.startswith(PACKAGE) or not RULE.search(text) or "\n" in text:
        raise AssertionError(f"Not a clear error, from {where}: {text!r}") from error
    assert len(text) < LONGEST, text
