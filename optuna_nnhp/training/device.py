"""The device of training: choose it, claim it for one process, measure its memory."""

from __future__ import annotations

from collections.abc import Sequence
import ctypes
import functools
import hashlib
import logging
import os
from pathlib import Path
import sys
import tempfile
import threading

import torch

from optuna_nnhp.errors import exception_chain
from optuna_nnhp.errors import short_repr

_logger = logging.getLogger(f"optuna.{__name__}")

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
MAX_MMAP_THRESHOLD = 32 * 2**20  # the largest value that glibc accepts
MAX_TRIM_THRESHOLD = 2**31 - 1
OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)

# Open lock files by process ID (a fork has another one), hash of the study's name, and GPU. They
# are never closed: the system releases a lock when its process ends, even if it is killed.
_claimed: dict[tuple[int, str, str], int] = {}
_lock = threading.Lock()


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Return the named device; if the name is None, CUDA if available, else the CPU.

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


def gpu_uuids() -> list[str]:
    """Return the UUIDs of the GPUs that this process may use, in CUDA's order.

    Example:
        >>> len(gpu_uuids()) == torch.cuda.device_count()
        True
    """
    return [
        str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
    ]


def claim_device(
    study: str, known: Sequence[str] | None = None, folder: Path | None = None
) -> torch.device:
    """Claim the first GPU that no other process of a study has claimed; else return the CPU.

    The claim lasts until this process ends; a second call returns the same GPU. Processes of
    other studies may claim the GPU too. The lock files lie in a folder that all processes of this
    machine share, by default the system's temporary folder; by default the known UUIDs are those
    of `gpu_uuids`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> claim_device("a study without GPUs", known=[])
        device(type='cpu')
        >>> with TemporaryDirectory() as name:
        ...     claim_device("a study", known=["GPU-1", "GPU-2"], folder=Path(name))
        device(type='cuda', index=0)
    """
    known = gpu_uuids() if known is None else known
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    study_hash = hashlib.blake2b(study.encode(), digest_size=8).hexdigest()
    with _lock:
        claimed = [i for i, gpu in enumerate(known) if (os.getpid(), study_hash, gpu) in _claimed]
        if claimed:
            return torch.device("cuda", claimed[0])
        for i, gpu in enumerate(known):
            gpu_hash = hashlib.blake2b(gpu.encode(), digest_size=8).hexdigest()
            file = _open_locked(folder / f"optuna_nnhp-{study_hash}-{gpu_hash}.lock")
            if file is not None:
                _claimed[os.getpid(), study_hash, gpu] = file
                return torch.device("cuda", i)
    if known:
        _logger.warning(
            f"Other workers of this study use the {len(known)} GPUs of this machine: this worker "
            "trains on the CPU. Pass `device='cuda:0'` to share the first GPU."
        )
    return torch.device("cpu")


def _open_locked(path: Path) -> int | None:
    """Open and lock a file; return None if another process holds the lock."""
    if sys.platform == "win32":  # no flock, so every worker claims the first GPU
        return os.open(path, os.O_RDWR | os.O_CREAT)
    import fcntl

    # O_NOFOLLOW: another user may have put a link there. Locking needs no write permission.
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(path, flags | os.O_RDONLY, 0o644)
    except OSError as error:
        _logger.warning(f"A GPU is not used because its lock file cannot be opened: {error}")
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory instead of returning it to the system.

    Every step frees and allocates the same megabytes. Fresh pages from the system cost more than
    the arithmetic: 1.2 to 1.5 ms for 5 MB, against 0.1 ms for a ReLU of that size.

    Returns:
        Whether the C library accepted the settings; only glibc supports them.

    Source:
        mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        _logger.debug("The C library has no mallopt: freed memory is returned to the system.")
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        and mallopt(M_TRIM_THRESHOLD, MAX_TRIM_THRESHOLD)
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or an error that caused it, reports that memory is exhausted.

    Torch raises `OutOfMemoryError` on a GPU, but a `RuntimeError` on a CPU.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shape"))
        (True, False)
    """
    for cause in exception_chain(error):
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return True
        message = str(cause).lower() if isinstance(cause, RuntimeError) else ""
        if any(text in message for text in OUT_OF_MEMORY_MESSAGES):
            return True
    return False


def free_memory(device: torch.device) -> int:
    """Return a device's free memory in bytes; 4 GiB if the system does not report it.

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
        _logger.debug("This system does not report how much memory is free.")
        return 4 * 2**30
