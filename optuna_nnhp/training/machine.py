"""What training asks of the machine: threads and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import ctypes
import functools
import logging
import threading

import torch

_logger = logging.getLogger(f"optuna.{__name__}")

# Below this much arithmetic a step is faster on one thread. Two threads on two cores, one of them
# taken by another process, took 896 us a model-step instead of 53 us (64 networks of 2 x 64
# units, batch 32): threads wait for each other after every operation. By size and not by
# measurement, because sums split over threads are rounded differently: the same seed must give
# the same study.
FLOPS_FOR_THREADS = 3e8

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # more is refused
NEVER_TRIM = 2**31 - 1


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """Within, torch computes on one thread if a step is small, else on as many as before.

    Args:
        flops:
            Floating-point operations of one step.

    Example:
        >>> with threads_for(1e6):
        ...     torch.get_num_threads()
        1
    """
    _threads.enter()
    if flops < FLOPS_FOR_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        _threads.leave()


class _Threads:
    """How many threads torch had before the first of several trainings at once."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 0

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_num_threads()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_num_threads(self._before)


_threads = _Threads()


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed instead of returning it to the system.

    Every step frees and asks for the same megabytes; fresh pages from the system cost more than
    the arithmetic (1.2 to 1.5 ms for 5 MB, against 0.1 ms for a ReLU on it).

    Returns:
        Whether the C library did so; only glibc can.

    Source:
        mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        _logger.debug("This C library has no mallopt: freed memory goes back to the system.")
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
    )


def to_device(name: str | torch.device | None) -> torch.device:
    """The device to train on: the one named, or CUDA if there is any, or the CPU.

    Raises:
        ValueError: If the named device does not exist here.

    Example:
        >>> to_device("cpu")
        device(type='cpu')
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`device` must be usable here, but {name} is not: {reason}") from error
    return device
