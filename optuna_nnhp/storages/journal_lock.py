"""The lock of a journal file, which a killed process of this machine does not keep."""

from __future__ import annotations

from contextlib import suppress
import hashlib
import os
from pathlib import Path
import time

import optuna
from optuna.storages.journal import JournalFileOpenLock
from optuna.storages.journal import JournalFileSymlinkLock

from optuna_nnhp.storages._optuna_internals import BaseJournalFileLock
from optuna_nnhp.storages.liveness import boot_id

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

FIRST_PAUSE, MAX_PAUSE = 0.001, 0.25  # seconds between attempts
TIMEOUT, TIMEOUT_AFTER_FAILURE = 10.0, 1.0  # seconds of one `acquire`
NO_STAMP = 0
GRACE_PERIOD = 30  # seconds, as in Optuna, after which an unchanged link is nobody's


class KernelReleasedLock(JournalFileSymlinkLock):
    """Takes `flock` on the journal, and then Optuna's symbolic link for plain Optuna processes.

    The kernel releases `flock` when a process dies. A link with this machine's stamp (as its time)
    was left by a dead process, since processes of this machine make it with `flock` only.
    """

    def __init__(self, filepath: str, timeout: float = TIMEOUT) -> None:
        super().__init__(filepath, GRACE_PERIOD)
        self.path, self.link, self.timeout = filepath, f"{filepath}.lock", timeout
        self.is_held, self._has_failed, self._file = False, False, -1
        self._made, self._seen = (-1, -1), ((-1, -1), 0, 0.0)  # links: this one's, and another's
        self._stamp = int.from_bytes(hashlib.blake2b(boot_id().encode(), digest_size=7).digest())

    def acquire(self) -> bool:
        """Wait for the lock; raise TimeoutError if another process keeps it for too long."""
        timeout = min(self.timeout, TIMEOUT_AFTER_FAILURE if self._has_failed else self.timeout)
        end, pause = time.monotonic() + timeout, FIRST_PAUSE
        self._file = os.open(self.path, os.O_RDONLY)
        try:
            while not self._make_link():
                if time.monotonic() > end:
                    raise TimeoutError(f"{self.link} has been kept for {timeout:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
        except BaseException:
            self._has_failed = True
            self._close()
            raise
        self.is_held, self._has_failed = True, False
        return True

    def _flock(self) -> bool:
        import fcntl  # Windows has no such module

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without it, where a link says nothing about its process
            self._stamp = NO_STAMP
        return True

    def _close(self) -> None:
        """Release `flock`; closing alone would not if a child process was forked meanwhile."""
        import fcntl

        with suppress(OSError):  # a file system without it
            fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)

    def _make_link(self) -> bool:
        """Make the link if this process has `flock`, or if the link there is abandoned."""
        may_make = has_flock = self._flock()
        with suppress(FileNotFoundError):
            if self._is_abandoned(has_flock):
                os.unlink(self.link)
                _logger.warning(f"Removed the lock {self.link} of a process that is gone.")
                may_make = True
        try:
            if not may_make:
                return False
            os.symlink(os.path.basename(self.path), self.link)  # it is relative to its folder
        except FileExistsError:
            return False
        if has_flock:
            with suppress(OSError, NotImplementedError):  # a link without a stamp is not judged
                os.utime(self.link, ns=(self._stamp, self._stamp), follow_symlinks=False)
        self._made = _identity(self.link)
        return True

    def _is_abandoned(self, has_flock: bool) -> bool:
        link, changed = _identity(self.link), os.stat(self.path).st_mtime_ns
        if self._seen[:2] != (link, changed):
            self._seen = link, changed, time.monotonic()
        is_old = time.monotonic() - self._seen[2] > (self.grace_period or GRACE_PERIOD)
        return is_old or (has_flock and link[1] == self._stamp != NO_STAMP)

    def release(self) -> None:
        """Release the lock, unless another process has taken it away from this one."""
        self.is_held = False
        try:
            is_own = _identity(self.link) == self._made
            if is_own:
                os.unlink(self.link)
        except FileNotFoundError:
            is_own = False
        finally:
            self._close()
        if not is_own:
            _logger.warning(f"Another process has taken the lock of {Path(self.path).name} away.")


def _identity(link: str) -> tuple[int, int]:
    """Return what tells a link from every other one: its inode and its time."""
    state = os.lstat(link)
    return state.st_ino, state.st_mtime_ns


def lock_for(path: str | Path) -> BaseJournalFileLock:
    """Return the lock of a journal; on Windows, where links need a privilege, Optuna's own."""
    return JournalFileOpenLock(str(path)) if os.name == "nt" else KernelReleasedLock(str(path))
