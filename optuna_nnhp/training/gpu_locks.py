"""Which GPU a worker trains on: one that no other worker of its study has."""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import logging
import os
from pathlib import Path
import sys
import tempfile
import threading

import torch

_logger = logging.getLogger(f"optuna.{__name__}")

# By process (a fork is another one), study and GPU: the file whose lock this process holds. It is
# never closed: the system gives the lock back when the process ends, however it does.
_claimed: dict[tuple[int, str, str], int] = {}
_lock = threading.Lock()


def gpu_uuids() -> list[str]:
    """What tells the GPUs that this process may use from all others, in CUDA's order.

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
    """The first GPU of this machine that no other process has for a study, else the CPU.

    It is this process's until it ends; who asks again gets the same one. Other studies may share
    it.

    Args:
        study:
            A name that no other study has.
        known:
            The GPUs, see `gpu_uuids`; those of this process if None.
        folder:
            Where all processes of this machine find the locks; the temporary folder if None.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> claim_device("a study without GPUs", known=[])
        device(type='cpu')
        >>> with TemporaryDirectory() as name:
        ...     claim_device("a study", known=["GPU-1", "GPU-2"], folder=Path(name))
        device(type='cuda', index=0)
    """
    known = gpu_uuids() if known is None else known
    place = Path(tempfile.gettempdir()) if folder is None else folder
    mark = hashlib.blake2b(study.encode(), digest_size=8).hexdigest()
    with _lock:
        mine = [i for i, gpu in enumerate(known) if (os.getpid(), mark, gpu) in _claimed]
        if mine:
            return torch.device("cuda", mine[0])
        for i, gpu in enumerate(known):
            name = hashlib.blake2b(gpu.encode(), digest_size=8).hexdigest()
            file = _open_locked(place / f"optuna_nnhp-{mark}-{name}.lock")
            if file is not None:
                _claimed[os.getpid(), mark, gpu] = file
                return torch.device("cuda", i)
    if known:
        _logger.warning(
            f"Other workers of this study have the {len(known)} GPUs of this machine: this one "
            "trains on the CPU. With `device='cuda:0'` it would share the first GPU."
        )
    return torch.device("cpu")


def _open_locked(path: Path) -> int | None:
    """An open file with a lock, None if another process has it."""
    if sys.platform == "win32":  # which has no flock: there each worker takes the first GPU
        return os.open(path, os.O_RDWR | os.O_CREAT)
    import fcntl

    # A link that somebody put there is not followed; a lock needs no right to write.
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(path, flags | os.O_RDONLY, 0o644)
    except OSError as error:
        _logger.warning(f"A GPU must be locked to be used, but its lock cannot be: {error}")
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file
