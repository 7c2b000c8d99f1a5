"""Texts that errors of every room share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """An error for a name that does not exist, with the near ones and the list.

    Args:
        kind:
            What is named, with its article: ``"a metric"``.
        name:
            The name that was given.
        known:
            The names that exist.

    Example:
        >>> unknown("a metric", "acuracy", ["accuracy", "f1"])
        ValueError("'acuracy' is not a metric; did you mean 'accuracy'? Known: accuracy, f1.")
    """
    names = list(known)
    near = get_close_matches(str(name), names, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return ValueError(f"{str(name)!r} is not {kind}{hint} Known: {', '.join(names)}.")
