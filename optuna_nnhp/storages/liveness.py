"""Tells which workers of this machine live: each keeps a file locked until its process ends."""

from __future__ import annotations

from contextlib import suppress
import hashlib
import os
from pathlib import Path
import socket
import sys
import tempfile
from uuid import uuid4

import optuna

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

_process_token = uuid4().hex
_locked: dict[tuple[int, str], int] = {}  # files that a process keeps locked, by worker


def new_worker_name() -> str:
    """Return a name for one process's work on one study, which nobody else has.

    Example:
        >>> name = new_worker_name()
        >>> name.split(":")[1] == str(os.getpid()), name == new_worker_name()
        (True, False)
    """
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


def process_id() -> str:
    """Return a name of this process, which no other process of any machine has.

    Example:
        >>> process_id().startswith(f"{os.getpid()}:")
        True
    """
    return f"{os.getpid()}:{_process_token}"


def boot_id() -> str:
    """Return a name of this machine's kernel since its start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def machine_id() -> str:
    """Return what two processes have in common if each can see whether the other one lives.

    That is the kernel and the folder of the locked files: containers may have their own.
    """
    folder = _lock_folder()
    if folder is None:
        return process_id()
    state = folder.stat()
    return f"{boot_id()}/{state.st_dev}:{state.st_ino}"


def lock_worker(worker: str) -> bool:
    """Keep a worker's file locked from now on, and return whether that is possible here."""
    folder = _lock_folder()
    if folder is None or sys.platform == "win32":
        return False
    import fcntl

    path = _path(folder, worker)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)  # others look at it for a moment only
        except OSError:
            os.close(file)
            path.unlink()
            raise
    except OSError as error:
        _logger.debug(f"A worker's file cannot be locked: {error}")
        return False
    _locked[os.getpid(), worker] = file
    return True


def touch_worker(worker: str) -> None:
    """Renew the time of a worker's file; make it again if somebody has deleted it."""
    file = _locked.get((os.getpid(), worker))
    if file is None:
        return
    os.utime(file)
    if os.fstat(file).st_nlink == 0 and lock_worker(worker):
        os.close(file)


def unlock_worker(worker: str) -> None:
    """Delete a worker's file at the end of its work."""
    file = _locked.pop((os.getpid(), worker), None)
    folder = _lock_folder()
    if file is not None and folder is not None:
        with suppress(FileNotFoundError):
            _path(folder, worker).unlink()
        os.close(file)


def is_worker_alive(worker: str) -> bool | None:
    """Return whether a worker of this machine lives, None if it has no file here.

    The kernel unlocks the file when the worker's process ends in any way.

    Example:
        >>> _ = lock_worker("me")
        >>> is_worker_alive("me")
        True
        >>> unlock_worker("me")
        >>> is_worker_alive("me") is None
        True
    """
    if (os.getpid(), worker) in _locked:  # to open and close the file would unlock it
        return True
    folder = _lock_folder()
    if folder is None or sys.platform == "win32":
        return None
    import fcntl

    try:
        file = os.open(_path(folder, worker), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _path(folder: Path, worker: str) -> Path:
    return folder / f"{hashlib.blake2b(worker.encode(), digest_size=12).hexdigest()}.lock"


def _lock_folder() -> Path | None:
    """Return this user's folder of locked files, None where there can be none."""
    if sys.platform == "win32":
        return None
    folder = Path(tempfile.gettempdir(), f"optuna_nnhp-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Anybody can put a folder or a link there.
        is_own = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:
        return None
    return folder if is_own else None
