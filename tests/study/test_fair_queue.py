"""Who is trained next, and how full the cohorts were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import FairQueue
from optuna_nnhp.training.cohort import Member


def run(
    members: int, slots: int, done: int = 0, signature: str = "a", can_append: bool = True
) -> CohortRun:
    cohort: Any = SimpleNamespace(rounds_done=[done] * members, can_append=can_append)
    trials: Any = dict.fromkeys(range(members))
    return CohortRun(cohort, signature, Member(0, 0, {}), trials, slots)


def shares(runs: list[CohortRun], seconds: dict[int, float], turns: int = 3000) -> list[float]:
    """What part of the time each cohort gets, given the seconds of one of its rounds."""
    pool, spent = FairQueue(), dict.fromkeys(map(id, runs), 0.0)
    for each in runs:
        pool.add(each)
    for _ in range(turns):
        chosen = pool.next()
        assert chosen is not None
        pool.note(chosen, len(chosen.running), 0.1, work=seconds[id(chosen)])
        spent[id(chosen)] += seconds[id(chosen)]
    return [spent[id(each)] / sum(spent.values()) for each in runs]


def test_members_have_equal_claims_whatever_their_rounds_cost() -> None:
    slow, fast = run(4, 4), run(12, 12)
    assert shares([slow, fast], {id(slow): 1.0, id(fast): 0.01}) == pytest.approx(
        [0.25, 0.75], abs=0.01
    )


def test_a_claim_grows_with_the_rounds_that_are_survived() -> None:
    young, old = run(10, 10), run(1, 4, done=9)
    assert shares([young, old], {id(young): 0.1, id(old): 0.1}) == pytest.approx(
        [0.5, 0.5], abs=0.01
    )


def test_a_new_cohort_starts_beside_the_others_and_does_not_take_all_the_time() -> None:
    pool, old, new = FairQueue(), run(1, 1), run(1, 1)
    pool.add(old)
    pool.note(old, 1, 0.1, work=1000.0)
    pool.add(new)
    assert new.virtual_time == old.virtual_time


def test_a_cohort_without_members_has_no_turn() -> None:
    pool, empty = FairQueue(), run(0, 4)
    pool.add(empty)
    assert pool.next() is None
    assert pool.runs == []


def test_occupancy_is_members_over_slots_by_time() -> None:
    pool, full, thin = FairQueue(), run(4, 4), run(1, 4)
    thin.refills = True
    pool.note(full, 4, 3.0, work=1.0)
    pool.note(thin, 1, 1.0, work=1.0)
    assert pool.occupancy == pytest.approx((12 + 1) / (12 + 4))


def test_a_cohort_that_is_not_filled_any_more_is_compacted() -> None:
    pool, old = FairQueue(), run(1, 4)
    pool.note(old, 1, 1.0, work=1.0)
    assert pool.occupancy == 1.0


@pytest.mark.parametrize(
    ("signature", "can_append", "found"),
    [("a", True, True), ("b", True, False), ("a", False, False)],
)
def test_who_can_be_joined(signature: str, can_append: bool, found: bool) -> None:
    pool = FairQueue()
    pool.add(run(2, 4, signature="a", can_append=can_append))
    assert (pool.with_signature(signature) is not None) == found
