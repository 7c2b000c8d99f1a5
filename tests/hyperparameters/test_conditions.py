"""A hyperparameter has an effect exactly where its record says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optuna.distributions import CategoricalDistribution
import pytest

from optuna_nnhp.hyperparameters.catalogue import CATALOGUE
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import Hyperparameter
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import GPTTemplate
from optuna_nnhp.training.cohort import Member
from tests.tiny import classes
from tests.tiny import numbers

TABLES = {
    "binary": DNNTemplate(*classes(), device="cpu"),
    "regression": DNNTemplate(*numbers(), device="cpu"),
}
TEXT = "She sells sea shells by the sea shore, and he does not. " * 60
LANGUAGE = GPTTemplate(TEXT, fixed={"iterations": 24}, device="cpu")
SMALL: dict[str, Any] = {"width": 16, "hidden_layers": 2, "epochs": 12, "batch_size": 32}
SMALL_GPT: dict[str, Any] = {"layers": 1, "heads": 2, "context": 32, "batch_tokens": 64}
# What these do is seen in what is trained on, and for how long.
BY_SIGNATURE = ("vocabulary", "seconds", "train_tokens")


def two_values(spec: Hyperparameter) -> tuple[Any, Any]:
    """Two that differ in effect."""
    if spec.name == "vocabulary":  # the text is short
        return 265, 275
    distribution: Any = spec.distribution
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0], distribution.choices[-1]
    return spec.grid_values[0], spec.grid_values[-1]


def cases(task: str) -> Iterator[Any]:
    known = specs(task)
    for spec in known.values():
        for ruler in {**spec.active_if, **spec.inactive_if}:
            distribution: Any = known[ruler].distribution
            is_choice = isinstance(distribution, CategoricalDistribution)
            values = distribution.choices if is_choice else known[ruler].grid_values
            for value in values if is_choice else {known[ruler].default, *values[:2]}:
                yield pytest.param(task, spec, {ruler: value}, id=f"{spec.name}-{value}")


def course(member: Member, problem: Any) -> list[Any]:
    """All evaluations of a trial, to its end."""
    cohort, seen = problem.cohort([member]), list[Any]()
    while not seen or seen[-1].ended == [None]:
        seen.append(cohort.train_round())
    return [(scores.train_loss, scores.validation_loss) for scores in seen]


@pytest.mark.parametrize(
    "task, spec, others", [case for task in (*TABLES, "language") for case in cases(task)]
)
def test_effects(task: str, spec: Hyperparameter, others: dict[str, Any]) -> None:
    problem: Any = TABLES.get(task, LANGUAGE)
    small = SMALL if task in TABLES else SMALL_GPT
    if others.get("tokens") == "bpe":
        pytest.importorskip("tokenizers")
    base = {n: h.default for n, h in specs(task).items()} | problem.fixed | small | others
    if spec.name in BY_SIGNATURE:
        base |= {"iterations": 0, "train_tokens": 0, "seconds": 0.05} | others
    members = [problem.member(0, {**base, spec.name: v}) for v in two_values(spec)]
    if spec.name in BY_SIGNATURE:
        one, other = (problem.signature(member) for member in members)
    else:
        one, other = (course(member, problem) for member in members)
    assert (one != other) is spec.is_active(base)


def test_rulers_are_hyperparameters_and_their_values_make_sense() -> None:
    rules = [(n, v) for h in CATALOGUE for c in (h.active_if, h.inactive_if) for n, v in c.items()]
    assert rules
    for name, values in rules:
        others = [h for h in CATALOGUE if h.name == name]
        for value in values:
            assert any(fits(other, value) for other in others), (name, value)


def fits(spec: Hyperparameter, value: Any) -> bool:
    try:
        spec.check(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "params, acts",
    [
        ({"loss": "focal"}, True),
        ({"loss": "cross_entropy"}, False),
        ({"epochs": 3}, True),  # nobody says what loss
    ],
)
def test_acts(params: dict[str, Any], acts: bool) -> None:
    assert specs("binary")["focal_gamma"].is_active(params) is acts
