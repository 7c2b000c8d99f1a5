from __future__ import annotations

import pytest
from threadpoolctl import threadpool_info
from threadpoolctl import threadpool_limits
import torch

from optuna_nnhp.engine import library
from optuna_nnhp.engine.library import MIN_FLOPS_FOR_THREADS
from optuna_nnhp.engine.library import limited_threads


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (2.0, 3)])
def test_small_steps_run_on_one_thread(share: float, count: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with limited_threads(share * MIN_FLOPS_FOR_THREADS):
            assert torch.get_num_threads() == count
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_are_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), limited_threads(1.0):
        raise KeyError
    assert torch.get_num_threads() == before


def test_threads_that_wait_for_each_other_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    clock = [0.0]
    monkeypatch.setattr(library.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(library._StallDetector, "stalled_until", -1.0)
    torch.set_num_threads(2)
    try:
        used = []
        with limited_threads(10 * MIN_FLOPS_FOR_THREADS) as before_step:
            # One thread takes 1 s, two take 0.6 s, then 50 s.
            for seconds in (1.0, 0.6, 0.6, 50.0, 1.0, 1.0):
                before_step()
                used.append(torch.get_num_threads())
                clock[0] += seconds
        assert used == [1, 2, 2, 2, 1, 1]
        with limited_threads(10 * MIN_FLOPS_FOR_THREADS) as before_step:  # for a while it stays so
            for _ in range(3):
                before_step()
                assert torch.get_num_threads() == 1
                clock[0] += 1.0
        clock[0] += library.STALL_SECONDS
        with limited_threads(10 * MIN_FLOPS_FOR_THREADS) as before_step:
            for count in (1, 2):
                before_step()
                assert torch.get_num_threads() == count
                clock[0] += 1.0
    finally:
        torch.set_num_threads(before)


def test_blas_has_one_thread_within_and_as_many_as_before_after() -> None:
    def blas_threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        with library.single_threaded_blas:
            with library.single_threaded_blas, limited_threads(1.0):
                assert blas_threads() == {1}
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_the_engine_may_use_the_threads_that_torch_may_not() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with limited_threads(1.0):
            assert (torch.get_num_threads(), library.available_threads()) == (1, 3)
    finally:
        torch.set_num_threads(before)
