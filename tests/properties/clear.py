"""What all property tests say: a right result, or an error that a person understands."""

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
CLEAR = (ValueError, TypeError, FileNotFoundError, NotADirectoryError)
# The rule, then the value.
RULE = re.compile(r"\b(must|needs?|is not|are not|does not exist|cannot|is empty|has|was made)\b")
LONGEST = 2000

T = TypeVar("T")


def some(share: float) -> settings:
    """A share of the profile's examples, for tests that take long."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))


def outcome(call: Callable[[], T]) -> T | None:
    """What a call returns, or None where it refuses; anything but a clear error is raised."""
    try:
        result = call()
    except CLEAR as error:
        check_clear(error)
        event(f"refused: {str(error)[:40]}")
        return None
    event("taken")
    return result


def check_clear(error: Exception) -> None:
    """Raise unless an error is ours, and says on one line what the rule is."""
    where, trace = "", error.__traceback__
    while trace is not None:
        where, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    text = str(error)
    if not where.startswith(PACKAGE) or not RULE.search(text) or "\n" in text:
        raise AssertionError(f"Not a clear error, from {where}: {text!r}") from error
    assert len(text) < LONGEST, text
