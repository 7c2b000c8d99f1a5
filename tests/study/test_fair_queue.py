"""Cohorts take turns fairly, and their occupancy is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import FairQueue
from optuna_nnhp.training.cohort import Member


def make_run(
    members: int, slots: int, done: int = 0, signature: str = "a", can_append: bool = True
) -> CohortRun:
    cohort: Any = SimpleNamespace(rounds_done=[done] * members, can_append=can_append)
    trials: Any = dict.fromkeys(range(members))
    return CohortRun(cohort, signature, Member(0, 0, {}), trials, slots)


def shares(runs: list[CohortRun], seconds: dict[int, float], turns: int = 3000) -> list[float]:
    """Return each cohort's share of the time, given the seconds of one of its rounds."""
    queue, spent = FairQueue(), dict.fromkeys(map(id, runs), 0.0)
    for each in runs:
        queue.add(each)
    for _ in range(turns):
        chosen = queue.next()
        assert chosen is not None
        queue.record_turn(chosen, len(chosen.running), 0.1, work=seconds[id(chosen)])
        spent[id(chosen)] += seconds[id(chosen)]
    return [spent[id(each)] / sum(spent.values()) for each in runs]


def test_members_get_equal_shares_of_the_time_whatever_their_rounds_cost() -> None:
    slow, fast = make_run(4, 4), make_run(12, 12)
    assert shares([slow, fast], {id(slow): 1.0, id(fast): 0.01}) == pytest.approx(
        [0.25, 0.75], abs=0.01
    )


def test_a_members_share_grows_with_its_rounds() -> None:
    young, old = make_run(10, 10), make_run(1, 4, done=9)
    assert shares([young, old], {id(young): 0.1, id(old): 0.1}) == pytest.approx(
        [0.5, 0.5], abs=0.01
    )


def test_a_new_cohort_starts_with_the_least_virtual_time_of_the_others() -> None:
    queue, old, new = FairQueue(), make_run(1, 1), make_run(1, 1)
    queue.add(old)
    queue.record_turn(old, 1, 0.1, work=1000.0)
    queue.add(new)
    assert new.virtual_time == old.virtual_time


def test_a_cohort_without_members_gets_no_turn() -> None:
    queue, empty = FairQueue(), make_run(0, 4)
    queue.add(empty)
    assert queue.next() is None
    assert queue.runs == []


def test_occupancy_is_members_over_slots_weighted_by_time() -> None:
    queue, full, thin = FairQueue(), make_run(4, 4), make_run(1, 4)
    thin.refills = True
    queue.record_turn(full, 4, 3.0, work=1.0)
    queue.record_turn(thin, 1, 1.0, work=1.0)
    assert queue.occupancy == pytest.approx((12 + 1) / (12 + 4))


def test_slots_that_are_not_refilled_do_not_reduce_the_occupancy() -> None:
    queue, old = FairQueue(), make_run(1, 4)
    queue.record_turn(old, 1, 1.0, work=1.0)
    assert queue.occupancy == 1.0


@pytest.mark.parametrize(
    ("signature", "can_append", "found"),
    [("a", True, True), ("b", True, False), ("a", False, False)],
)
def test_trials_join_only_cohorts_of_their_signature_that_accept_members(
    signature: str, can_append: bool, found: bool
) -> None:
    queue = FairQueue()
    queue.add(make_run(2, 4, signature="a", can_append=can_append))
    assert (queue.with_signature(signature) is not None) == found
