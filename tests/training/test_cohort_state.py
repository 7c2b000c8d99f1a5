"""A cohort put back goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import GPTTemplate
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort_state import CohortState
from optuna_nnhp.training.cohort_state import get_cohort_state
from optuna_nnhp.training.cohort_state import members_from_state
from optuna_nnhp.training.cohort_state import restore_cohort
from optuna_nnhp.training.cohort_state import select_state
from optuna_nnhp.training.weight_files import load_with_checksum
from optuna_nnhp.training.weight_files import save_with_checksum
from tests.members import task
from tests.members import varied

Kind = tuple[Callable[[Sequence[Member]], Cohort], list[Member]]
TEXT = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(300))


def perceptrons(normalization: str) -> Kind:
    """By the compiled engine, where there is one."""
    members = varied(6, normalization=normalization, epochs=5)
    return lambda some: Cohort(some, task()), members


def plain_modules() -> Kind:
    """By autograd, with running statistics and dropout."""

    def network(params: Any) -> nn.Module:
        width = params["units"]
        return nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 2)
        )

    X = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    fixed = {"units": 8, "epochs": 4, "batch_size": 16}
    problem = CustomNetworkTemplate(network, X, X[:, 0] > 0, fixed=fixed)
    rates = (0.1, 0.01, 0.001)
    params = [{**problem.defaults(), "learning_rate": rate} for rate in rates]
    return problem.cohort, [problem.member(i, p) for i, p in enumerate(params)]


def language(**fixed: Any) -> Kind:
    """By the compiled engine for language models, where there is one."""
    problem = GPTTemplate(TEXT, fixed={"width": 16, "layers": 1, "context": 16, **fixed})
    params = [{**problem.defaults(), "dropout": rate} for rate in (0.0, 0.2)]
    return problem.cohort, [problem.member(i, p) for i, p in enumerate(params)]


KINDS: dict[str, Callable[[], Kind]] = {
    "none": lambda: perceptrons("none"),
    "batch": lambda: perceptrons("batch"),
    "layer": lambda: perceptrons("layer"),
    "own": plain_modules,
    "gpt": lambda: language(iterations=54),
}


def through_files(cohort: Cohort, folder: Path) -> CohortState:
    snapshot = get_cohort_state(cohort)
    save_with_checksum(folder / "s", snapshot.tensors, snapshot.metadata)
    return CohortState(*load_with_checksum(folder / "s"))


def finish(cohort: Cohort) -> list[str]:
    """What further training brings: all scores, and the best weights."""
    course: list[str] = []
    while cohort.members:
        scores = cohort.train_round()
        assert scores is not None
        course.append(repr(scores))
        ended = {p for p, end in zip(scores.indices, scores.ended, strict=True) if end}
        stay = [place for place in range(len(cohort.members)) if place not in ended]
        if not stay:
            break
        if ended:
            cohort.select(stay)
    course += [repr(w.tolist()) for w in cohort.best_weights.values()]
    return course


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_between_rounds(kind: str, rounds: int, tmp_path: Path) -> None:
    make, members = KINDS[kind]()
    cohort = make(members)
    for _ in range(rounds):
        cohort.train_round()
    kept = through_files(cohort, tmp_path)
    rest = finish(cohort)
    assert finish(restore_cohort(make, kept)) == rest
    whole = make(members)
    for _ in range(rounds):
        whole.train_round()
    assert finish(whole) == rest


@pytest.mark.parametrize("kind", ["own", "gpt"])
@pytest.mark.parametrize("steps", [1, 2])
def test_in_the_middle_of_a_round(kind: str, steps: int, tmp_path: Path) -> None:
    make, members = KINDS[kind]()
    cohort, whole = make(members), make(members)
    for _ in range(2):  # one pause after another
        asked = iter(range(steps))
        assert cohort.train_round(lambda: next(asked, None) is None) is None  # noqa: B023
        assert cohort.steps_into_round and not cohort.can_append
        cohort = restore_cohort(make, through_files(cohort, tmp_path))
    assert repr(cohort.train_round()) == repr(whole.train_round())
    assert finish(cohort) == finish(whole)


def test_state_restores_members_in_different_rounds(tmp_path: Path) -> None:
    make, members = perceptrons("none")
    cohort = make(members[:3])
    cohort.train_round()
    cohort.append(members[3:])
    cohort.train_round()
    cohort.select([0, 2, 3, 5])
    kept = through_files(cohort, tmp_path)
    assert members_from_state(kept.metadata) == cohort.members
    assert finish(restore_cohort(make, kept)) == finish(cohort)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_goes_on_as_in_the_whole(kind: str, tmp_path: Path) -> None:
    make, members = KINDS[kind]()
    cohort = make(members)
    cohort.train_round()
    part = select_state(through_files(cohort, tmp_path), [1])
    sizes = list[int]()

    def small(some: Sequence[Member]) -> Cohort:
        sizes.append(len(some))
        return make(some)

    alone = restore_cohort(small, part)
    assert sizes == [1]
    cohort.select([1])
    assert finish(alone) == finish(cohort)


def test_a_budget_in_seconds_stays_the_same_number_of_steps(tmp_path: Path) -> None:
    make, members = language(seconds=0.05)
    cohort = make(members)
    cohort.train_round()
    kept = through_files(cohort, tmp_path)
    assert kept.metadata["total_steps"] == cohort.total_steps
    assert finish(restore_cohort(make, kept)) == finish(cohort)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.tensors.pop("flat.steps"), "differs in flat.steps"),
        (lambda s: s.tensors.update({"flat.exp_avg": torch.zeros(2, 2)}), r"flat.exp_avg must be"),
        (lambda s: s.tensors.update({"more": torch.zeros(1)}), "differs in more"),
    ],
)
def test_another_cohort_is_refused(change: Callable[[CohortState], object], message: str) -> None:
    make, members = perceptrons("none")
    kept = get_cohort_state(make(members))
    change(kept)
    with pytest.raises(ValueError, match=message):
        restore_cohort(make, kept)
