"""How many threads compute: torch's own, those of NumPy's and SciPy's BLAS, and the engine's."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import functools
import importlib
import logging
import math
import threading
import time

from threadpoolctl import ThreadpoolController
import torch

_logger = logging.getLogger(f"optuna.{__name__}")

# Below this much arithmetic a step is faster on one thread. Two threads on two cores, one of them
# taken by another process, took 896 us a model-step instead of 53 us (64 networks of 2 x 64
# units, batch 32): threads wait for each other after every operation. By size and not by
# measurement, because sums split over threads are rounded differently, and the same seed should
# give the same study; but see STALL.
MIN_FLOPS_FOR_THREADS = 1e8

# Two threads with another process on one of two cores: a step of 16 networks of 2 x 256 units took
# 1.5 s instead of 9 ms. Then one thread is better for a while, though it rounds otherwise.
STALL_FACTOR = 3.0  # times what one thread takes
STALL_SECONDS = 60.0  # seconds


@contextmanager
def limited_threads(flops: float) -> Iterator[Callable[[], None]]:
    """Within, torch computes on one thread if steps are small, else on as many as before.

    The products that other threads ask of NumPy and scipy are computed on one thread each.

    Args:
        flops:
            Floating-point operations of one step.

    Returns:
        To be called before every step. Of large steps it has the first computed on one thread,
        to notice when several threads keep each other waiting.

    Example:
        >>> with limited_threads(1e6) as before_step:
        ...     before_step()
        ...     torch.get_num_threads()
        1
    """
    with single_threaded_blas:
        _threads.enter()
        try:
            if flops < MIN_FLOPS_FOR_THREADS or _threads.before == 1:
                torch.set_num_threads(1)
            yield _StallDetector().before_step if torch.get_num_threads() > 1 else no_op
        finally:
            _threads.leave()


def no_op() -> None:
    """What is done before a step where threads stay as they are."""


class _StallDetector:
    """Compares steps on several threads with the first one, which has one thread."""

    stalled_until = -math.inf  # of the whole process, seconds

    def __init__(self) -> None:
        self._steps, self._since, self._single = 0, 0.0, math.inf

    def before_step(self) -> None:
        now = time.monotonic()
        if self._steps == 0:
            torch.set_num_threads(1)
        elif self._steps == 1:
            self._single = now - self._since
            if now > _StallDetector.stalled_until:
                torch.set_num_threads(_threads.before)
        elif now - self._since > STALL_FACTOR * self._single and torch.get_num_threads() > 1:
            _StallDetector.stalled_until = now + STALL_SECONDS
            torch.set_num_threads(1)
            _logger.info("Threads wait for each other, the cores are busy: training on one.")
        self._steps, self._since = self._steps + 1, now


class _TorchThreads:
    """How many threads torch had before the first of several trainings at once."""

    def __init__(self) -> None:
        self._lock, self._inside, self.before = threading.Lock(), 0, 0

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self.before = torch.get_num_threads()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_num_threads(self.before)

    @property
    def full(self) -> int:
        """Threads outside of trainings."""
        with self._lock:
            return self.before if self._inside else torch.get_num_threads()


_threads = _TorchThreads()


class _SingleThreadedBlas:
    """Has each product of NumPy and scipy computed on one thread, while anybody wants that."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = _thread_pools().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


@functools.cache
def _thread_pools() -> ThreadpoolController:
    importlib.import_module("scipy.linalg")  # only BLAS libraries that are loaded are found

    return ThreadpoolController()


# For as long as possible, a whole study: OpenBLAS's own threads spin for a while after each of its
# products and each change of their number, on the cores that the engine's threads work on (the
# epochs of a single network of 2 x 256 units took twice as long).
single_threaded_blas = _SingleThreadedBlas()


def available_threads() -> int:
    """How many threads may work for a training, which has fewer of torch's own.

    Example:
        >>> available_threads() >= 1
        True
    """
    return _threads.full
