"""How many trials make a cohort: measured, and remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from optuna_nnhp.engine.library import ENGINE_VARIABLE
from optuna_nnhp.engine.mlp import load_library
from optuna_nnhp.study import autotune
from optuna_nnhp.study.autotune import Throughput
from optuna_nnhp.study.autotune import measure_throughput
from optuna_nnhp.study.autotune import seconds_per_step
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from tests.tiny import TINY
from tests.tiny import numbers


@pytest.fixture
def problem() -> DNNTemplate:
    return DNNTemplate(*numbers(), fixed=TINY)


@pytest.fixture
def leader(problem: DNNTemplate) -> Member:
    return problem.member(0, problem.defaults())


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is known yet; the file of what is."""
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "optuna_nnhp" / "cohort_sizes.json"


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is left out, where a test does not want it back."""
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")


def pretend(monkeypatch: pytest.MonkeyPatch, step: dict[int, float]) -> list[int]:
    """Steps take this long, by the number of members; what is tried is noted."""
    tried: list[int] = []

    def fake(cohort: Cohort) -> float:
        tried.append(len(cohort.members))
        return step[len(cohort.members)]

    monkeypatch.setattr(autotune, "seconds_per_step", fake)
    return tried


@pytest.mark.parametrize(
    ("step", "most", "size", "each", "tried"),
    [
        ({1: 1e-3, 4: 1e-3, 16: 1e-3, 20: 1e-3}, 20, 20, 5e-5, [1, 4, 16, 20]),
        ({1: 1e-3, 4: 1e-3, 16: 3.9e-3}, 20, 4, 2.5e-4, [1, 4, 16]),  # no faster any more
        ({1: 1e-3, 4: 4.1e-3}, 20, 1, 1e-3, [1, 4]),  # a stack is slower
        ({1: 5e-2}, 20, 1, 5e-2, [1]),  # slow networks gain nothing, and cost time to try
        ({1: 1e-3}, 1, 1, 1e-3, [1]),
    ],
)
def test_the_smallest_stack_that_is_about_the_fastest(
    problem: DNNTemplate,
    leader: Member,
    step: dict[int, float],
    most: int,
    size: int,
    each: float,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = pretend(monkeypatch, step)
    pace = measure_throughput(problem, leader, most)
    assert noted == tried
    assert pace.size == size
    assert pace.round == pytest.approx(2 * each)  # 64 rows, batches of 32


@pytest.fixture
def engine_on_three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is back, and nothing is read or written."""
    monkeypatch.undo()
    if load_library() is None:
        pytest.skip("there was no C compiler")
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_write_cache", lambda known: None)
    monkeypatch.setattr(autotune, "_read_cache", dict)
    monkeypatch.setattr(autotune, "available_threads", lambda: 3)


def test_the_engine_has_members_for_all_its_threads(
    engine_on_three_threads: None,
    problem: DNNTemplate,
    leader: Member,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = pretend(monkeypatch, {1: 1e-3, 12: 4e-3, 20: 20e-3 / 3})
    assert measure_throughput(problem, leader, 20).size == 12  # more are no faster
    assert noted == [1, 12, 20]


def test_one_slow_member_tells_enough_of_the_engine(
    engine_on_three_threads: None,
    problem: DNNTemplate,
    leader: Member,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = pretend(monkeypatch, {1: 3e-3})
    assert measure_throughput(problem, leader, 20) == Throughput(12, 6e-3)
    assert noted == [1]


def test_it_is_measured_once_also_by_the_next_process(
    problem: DNNTemplate, leader: Member, forgotten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = pretend(monkeypatch, {1: 1e-3, 4: 1e-3})
    first = measure_throughput(problem, leader, 4)
    monkeypatch.setattr(autotune, "_known", {})
    assert measure_throughput(problem, leader, 4) == first == Throughput(4, pytest.approx(5e-4))
    assert tried == [1, 4]
    assert forgotten.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": [1, "x"]}'])
def test_a_damaged_file_is_measured_anew(
    problem: DNNTemplate,
    leader: Member,
    forgotten: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgotten.parent.mkdir()
    forgotten.write_text(text)
    pretend(monkeypatch, {1: 1e-3, 2: 1e-3})
    assert measure_throughput(problem, leader, 2).size == 2
    monkeypatch.setattr(autotune, "_known", {})
    assert measure_throughput(problem, leader, 2).size == 2


def test_without_a_place_for_the_file(
    problem: DNNTemplate, leader: Member, forgotten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten.parent.write_text("a file where the folder should be")
    pretend(monkeypatch, {1: 1e-3, 2: 1e-3})
    assert measure_throughput(problem, leader, 2).size == 2


@pytest.mark.parametrize("batch_size", [1, 32, 64])
def test_steps_are_timed(batch_size: int) -> None:
    problem = DNNTemplate(*numbers(), fixed=TINY | {"batch_size": batch_size})
    cohort = problem.cohort(autotune._copy_leader(problem.member(0, problem.defaults()), 3))
    assert 0 < seconds_per_step(cohort) < 10
