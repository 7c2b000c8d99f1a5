"""What training asks of the machine: threads and memory."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import ctypes
import functools
import logging
import math
from pathlib import Path
import threading
import time

from threadpoolctl import ThreadpoolController
import torch

from optuna_nnhp.errors import exception_chain
from optuna_nnhp.errors import short_repr

_logger = logging.getLogger(f"optuna.{__name__}")

# Below this much arithmetic a step is faster on one thread. Two threads on two cores, one of them
# taken by another process, took 896 us a model-step instead of 53 us (64 networks of 2 x 64
# units, batch 32): threads wait for each other after every operation. By size and not by
# measurement, because sums split over threads are rounded differently, and the same seed should
# give the same study; but see STALL.
MIN_FLOPS_FOR_THREADS = 1e8

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
MAX_MMAP_THRESHOLD = 32 * 2**20  # more is refused
MAX_TRIM_THRESHOLD = 2**31 - 1


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
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        and mallopt(M_TRIM_THRESHOLD, MAX_TRIM_THRESHOLD)
    )


def resolve_device(name: str | torch.device | None) -> torch.device:
    """The device to train on: the one named, or CUDA if there is any, or the CPU.

    Raises:
        ValueError: If the named device does not exist here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, str | torch.device):
        raise ValueError(f"`device` must be a name or a torch.device, but got {short_repr(name)}.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`device` must be usable here, but {name} is not: {reason}") from error
    return device


OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there was no memory.

    Torch says so with a type of its own on a GPU, and by words alone on a CPU.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shape"))
        (True, False)
    """
    for one in exception_chain(error):
        if isinstance(one, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(one, RuntimeError) and any(
            w in str(one).lower() for w in OUT_OF_MEMORY_MESSAGES
        ):
            return True
    return False


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without anybody's loss; 4 GiB where nobody tells.

    Example:
        >>> free_memory(torch.device("cpu")) > 2**20
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kilobytes)
    except (OSError, ValueError):
        _logger.debug("This system does not tell how much memory is free.")
        return 4 * 2**30
