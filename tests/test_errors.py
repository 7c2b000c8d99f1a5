"""Texts of errors; how passwords are hidden is in test_security.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optuna_nnhp.errors import MAX_REPR_LENGTH
from optuna_nnhp.errors import short_repr
from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.catalogue import resolve_space


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


ODD: list[Any] = [np.zeros((9, 9)), "a\nb", "x" * 999, 10**5000, Broken(), [1] * 99]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_any_value_is_shown_on_one_short_line(value: Any) -> None:
    assert "\n" not in short_repr(value) and 0 < len(short_repr(value)) <= MAX_REPR_LENGTH
    assert "\n" not in str(unknown_name("a metric", value, ["f1", 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fixed": [1]}, r"`fixed` must map names to values, but got \[1\]\."),
        ({"space": np.zeros(2)}, r"`space` must map names to distributions, but got array"),
        ({"fixed": {3: 1}}, "The names in `fixed` must be texts, but one is 3"),
        ({"fixed": {"epochs": 10**400}}, "`epochs` must be a number between 1 and 1e"),
        ({"fixed": {"epochs": 10**5000}}, "`epochs` must be a number between .* got an int"),
        ({"fixed": {"activation": np.zeros(2)}}, "is not a choice of `activation`"),
    ],
)
def test_space_and_fixed_must_be_mappings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_space("binary", **arguments)
