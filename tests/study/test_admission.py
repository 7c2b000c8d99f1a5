"""Slow leaders wait until the study can afford them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from optuna_nnhp.study.admission import Admission
from optuna_nnhp.study.autotune import Throughput
from optuna_nnhp.study.running import FairQueue


def leader(seconds: float, enqueued: bool = False) -> Any:
    return SimpleNamespace(member=seconds, is_enqueued=enqueued)


@pytest.fixture
def admission(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ten seconds into a study; a leader's round may take a fiftieth of that."""
    monkeypatch.setattr(
        Admission, "_measure_throughput", lambda _, seconds: Throughput(1, seconds)
    )
    budget = SimpleNamespace(timeout=100.0, seconds=10.0, is_over=lambda: False)
    queue: list[Any] = []
    problem: Any = SimpleNamespace(sequential=False)
    source: Any = SimpleNamespace(
        is_stopped=False,
        ask_failed=False,
        queue=queue,
        n_trials_left=lambda: len(queue),
        ask=lambda count: [queue.pop(0) for _ in range(count)],
    )
    return Admission(source, FairQueue(), None, problem, budget)  # type: ignore[arg-type]


def test_slow_leader_waits_until_its_round_is_a_small_part_of_the_time(
    admission: Admission,
) -> None:
    slow, quick = leader(1.0), leader(0.1)
    admission.source.queue[:] = [slow, quick]  # type: ignore[attr-defined]
    assert admission._next_leader() is quick
    assert admission.deferred == [slow]
    admission.budget.seconds = 49.0  # type: ignore[misc]
    admission.source.queue[:] = [leader(0.1)]  # type: ignore[attr-defined]
    assert admission._next_leader() is not slow
    admission.budget.seconds = 51.0  # type: ignore[misc]
    assert admission._next_leader() is slow
    assert admission.deferred == []


def test_the_fastest_of_many_slow_leaders_starts_first(admission: Admission) -> None:
    admission.source.queue[:] = [leader(s) for s in (5.0, 3.0, 4.0, 6.0, 0.1)]  # type: ignore[attr-defined]
    first = admission._next_leader()
    assert first is not None and first.member == 3.0  # type: ignore[comparison-overlap]
    assert len(admission.deferred) == 3 and len(admission.source.queue) == 1  # type: ignore[attr-defined]


def test_a_slow_leader_starts_if_no_other_is_left(admission: Admission) -> None:
    admission.source.queue[:] = [leader(5.0)]  # type: ignore[attr-defined]
    last = admission._next_leader()
    assert last is not None and admission.deferred == []
    assert admission._next_leader() is None


@pytest.mark.parametrize("change", ["no timeout", "cohort size", "enqueued"])
def test_slow_leaders_start_at_once_without_a_timeout_with_a_cohort_size_or_if_enqueued(
    admission: Admission, change: str
) -> None:
    slow = leader(5.0, change == "enqueued")
    admission.source.queue[:] = [slow, leader(0.1)]  # type: ignore[attr-defined]
    if change == "no timeout":
        admission.budget.timeout = None
    if change == "cohort size":
        admission.cohort_size = 3
    assert admission._next_leader() is slow
