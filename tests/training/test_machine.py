from __future__ import annotations

import platform

import pytest
import torch

from optuna_nnhp.training.machine import FLOPS_FOR_THREADS
from optuna_nnhp.training.machine import keep_freed_memory
from optuna_nnhp.training.machine import threads_for


@pytest.mark.parametrize(("share", "threads"), [(0.5, 1), (2.0, 3)])
def test_small_steps_run_on_one_thread(share: float, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(share * FLOPS_FOR_THREADS):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_are_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads_for(1.0):
        raise KeyError
    assert torch.get_num_threads() == before


def test_glibc_keeps_freed_memory() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
