from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import pytest

from optuna_nnhp.hyperparameters.spec import Hyperparameter

NUMBER: dict[str, Any] = {
    "name": "number",
    "distribution": FloatDistribution(0.1, 10.0, log=True),
    "default": 1.0,
    "grid_values": (0.1, 1.0),
    "help": "A number.",
    "domain": (0.0, 100.0),
}
WHOLE: dict[str, Any] = NUMBER | {
    "name": "whole",
    "distribution": IntDistribution(1, 10),
    "default": 1,
    "grid_values": (1, 10),
    "domain": (1, 100),
}
CHOICE: dict[str, Any] = NUMBER | {
    "name": "choice",
    "distribution": CategoricalDistribution(("a", "b", None)),
    "default": "a",
    "grid_values": ("a", None),
    "domain": None,
}
NUMBERED: dict[str, Any] = WHOLE | {"distribution": CategoricalDistribution((1, 10))}


@pytest.mark.parametrize(
    "spec, changes, message",
    [
        (NUMBER, {"default": 101.0}, "`number` must be a number between 0 and 100, but got 101"),
        (NUMBER, {"grid_values": (0.1, -1.0)}, "`number` must be a number between 0 and 100"),
        (NUMBER, {"grid_values": (0.1, 50.0)}, "50.0 must lie in the range of `number`"),
        (NUMBER, {"grid_values": (0.0, 1.0)}, "0.0 must lie in the range of `number`"),
        (WHOLE, {"grid_values": (1, 1.5)}, r"`whole` must be a whole number, but got 1\.5"),
        (CHOICE, {"default": "c"}, "'c' is not a choice of `choice`.*Known: a, b, None"),
        (CHOICE, {"grid_values": ("a", "c")}, "'c' is not a choice of `choice`"),
    ],
)
def test_a_declaration_must_agree_with_itself(
    spec: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Hyperparameter(**spec | changes)


@pytest.mark.parametrize(
    "spec, value, fits",
    [
        (NUMBER, 0, True),
        (NUMBER, 100.0, True),
        (NUMBER, 100.1, False),
        (NUMBER, -1e-9, False),
        (NUMBER, True, False),
        (NUMBER, None, False),
        (NUMBER, "1", False),
        (NUMBER, float("nan"), False),
        (WHOLE, 1, True),
        (WHOLE, 2.0, True),
        (WHOLE, 2.5, False),
        (WHOLE, 0, False),
        (WHOLE, False, False),
        (CHOICE, None, True),
        (CHOICE, "b", True),
        (CHOICE, "B", False),
        (CHOICE, 0, False),
        (NUMBERED, 7, True),  # a list of numbers may be left for others in the domain
        (NUMBERED, 101, False),
        (NUMBERED, 7.5, False),
    ],
)
def test_check(spec: dict[str, Any], value: Any, fits: bool) -> None:
    h = Hyperparameter(**spec)
    if fits:
        h.check(value)
    else:
        with pytest.raises(ValueError):
            h.check(value)


@pytest.mark.parametrize(
    "spec, distribution, fits",
    [
        (NUMBER, FloatDistribution(0.0, 100.0), True),
        (NUMBER, IntDistribution(0, 100), True),
        (NUMBER, CategoricalDistribution((0.0, 1, 2.5)), True),
        (NUMBER, FloatDistribution(0.0, 100.1), False),
        (NUMBER, FloatDistribution(-0.1, 1.0), False),
        (NUMBER, CategoricalDistribution((1.0, None)), False),
        (WHOLE, IntDistribution(1, 100), True),
        (WHOLE, FloatDistribution(1, 100), False),
        (WHOLE, CategoricalDistribution((1, 2)), True),
        (WHOLE, CategoricalDistribution((1, 2.5)), False),
        (CHOICE, CategoricalDistribution(("b",)), True),
        (CHOICE, CategoricalDistribution(("b", "c")), False),
        (CHOICE, IntDistribution(0, 1), False),
        (NUMBERED, IntDistribution(1, 100), True),
        (NUMBERED, IntDistribution(1, 101), False),
    ],
)
def test_check_distribution(
    spec: dict[str, Any], distribution: BaseDistribution, fits: bool
) -> None:
    h = Hyperparameter(**spec)
    if fits:
        h.check_distribution(distribution)
    else:
        with pytest.raises(ValueError):
            h.check_distribution(distribution)


@pytest.mark.parametrize("thing", [None, (1, 2), [1, 2], 3, "1-2", IntDistribution])
def test_only_a_distribution_is_a_distribution(thing: object) -> None:
    with pytest.raises(ValueError, match=r"`space\['number'\]` must be an Optuna distribution"):
        Hyperparameter(**NUMBER).check_distribution(thing)


@pytest.mark.parametrize(
    "zero_below, infinite_above, value, expected",
    [
        (None, None, 0.05, 0.05),
        (0.1, None, 0.05, 0.0),
        (0.1, None, 0.1, 0.1),
        (0.1, None, 0, 0.0),
        (None, 5.0, 5.0, 5.0),
        (None, 5.0, 5.1, float("inf")),
        (0.1, 5.0, 1, 1),
    ],
)
def test_effective(
    zero_below: float | None, infinite_above: float | None, value: float, expected: float
) -> None:
    h = Hyperparameter(**NUMBER, zero_below=zero_below, infinite_above=infinite_above)
    assert h.effective_value(value) == expected


@pytest.mark.parametrize(
    "spec, is_integer, description",
    [
        (NUMBER, False, "0.1 to 10, log"),
        (
            NUMBER | {"zero_below": 0.2, "infinite_above": 5.0},
            False,
            "0.1 to 10, log; off below 0.2; off above 5",
        ),
        (WHOLE, True, "1 to 10"),
        (CHOICE, False, "a, b, None"),
        (NUMBERED, True, "1, 10"),
    ],
)
def test_description(spec: dict[str, Any], is_integer: bool, description: str) -> None:
    h = Hyperparameter(**spec)
    assert h.is_integer is is_integer
    assert h.describe_range() == description


@pytest.mark.parametrize(
    "value, text",
    [(0.05, "off"), (0.0, "off"), (0.1, "0.1"), (2.0, "2"), (3, "3"), (1e-3 + 0.2, "0.201")],
)
def test_describe_value(value: float, text: str) -> None:
    assert Hyperparameter(**NUMBER, zero_below=0.1).describe_value(value) == text
