"""What training asks of the machine: threads and memory."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from optuna_nnhp.errors import exception_chain
from optuna_nnhp.errors import short_repr

_logger = logging.getLogger(f"optuna.{__name__}")

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
MAX_MMAP_THRESHOLD = 32 * 2**20  # more is refused
MAX_TRIM_THRESHOLD = 2**31 - 1


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
