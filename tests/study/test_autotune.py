"""The number of trials of a cohort is measured once and remembered."""

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
def cache_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty the cache and return the path of its file."""
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "optuna_nnhp" / "cohort_sizes.json"


@pytest.fixture(autouse=True)
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the compiled engine off."""
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")


def fake_step_times(monkeypatch: pytest.MonkeyPatch, step: dict[int, float]) -> list[int]:
    """Fake the seconds of a step by the number of members; return the numbers that are tried."""
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
def test_the_smallest_cohort_that_is_about_as_fast_as_the_fastest_is_chosen(
    problem: DNNTemplate,
    leader: Member,
    step: dict[int, float],
    most: int,
    size: int,
    each: float,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried_sizes = fake_step_times(monkeypatch, step)
    throughput = measure_throughput(problem, leader, most)
    assert tried_sizes == tried
    assert throughput.size == size
    assert throughput.round == pytest.approx(2 * each)  # 64 rows, batches of 32


@pytest.fixture
def engine_on_three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the engine on, with three threads and without a cache file."""
    monkeypatch.undo()
    if load_library() is None:
        pytest.skip("there was no C compiler")
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_write_cache", lambda known: None)
    monkeypatch.setattr(autotune, "_read_cache", dict)
    monkeypatch.setattr(autotune, "available_threads", lambda: 3)


def test_the_engine_gets_enough_members_for_all_its_threads(
    engine_on_three_threads: None,
    problem: DNNTemplate,
    leader: Member,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried_sizes = fake_step_times(monkeypatch, {1: 1e-3, 12: 4e-3, 20: 20e-3 / 3})
    assert measure_throughput(problem, leader, 20).size == 12  # more are no faster
    assert tried_sizes == [1, 12, 20]


def test_a_slow_network_is_measured_with_one_member_in_the_engine(
    engine_on_three_threads: None,
    problem: DNNTemplate,
    leader: Member,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried_sizes = fake_step_times(monkeypatch, {1: 3e-3})
    assert measure_throughput(problem, leader, 20) == Throughput(12, 6e-3)
    assert tried_sizes == [1]


def test_a_cohort_size_is_measured_once_for_all_processes(
    problem: DNNTemplate, leader: Member, cache_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fake_step_times(monkeypatch, {1: 1e-3, 4: 1e-3})
    first = measure_throughput(problem, leader, 4)
    monkeypatch.setattr(autotune, "_known", {})
    assert measure_throughput(problem, leader, 4) == first == Throughput(4, pytest.approx(5e-4))
    assert tried == [1, 4]
    assert cache_file.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": [1, "x"]}'])
def test_cohort_sizes_are_measured_again_if_the_cache_file_is_damaged(
    problem: DNNTemplate,
    leader: Member,
    cache_file: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache_file.parent.mkdir()
    cache_file.write_text(text)
    fake_step_times(monkeypatch, {1: 1e-3, 2: 1e-3})
    assert measure_throughput(problem, leader, 2).size == 2
    monkeypatch.setattr(autotune, "_known", {})
    assert measure_throughput(problem, leader, 2).size == 2


def test_cohort_sizes_are_measured_without_a_place_for_the_cache_file(
    problem: DNNTemplate, leader: Member, cache_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_file.parent.write_text("a file where the folder should be")
    fake_step_times(monkeypatch, {1: 1e-3, 2: 1e-3})
    assert measure_throughput(problem, leader, 2).size == 2


@pytest.mark.parametrize("batch_size", [1, 32, 64])
def test_steps_are_timed(batch_size: int) -> None:
    problem = DNNTemplate(*numbers(), fixed=TINY | {"batch_size": batch_size})
    cohort = problem.cohort(autotune._copy_leader(problem.member(0, problem.defaults()), 3))
    assert 0 < seconds_per_step(cohort) < 10
