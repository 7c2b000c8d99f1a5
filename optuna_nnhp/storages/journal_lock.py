"""The lock of a journal file, which a killed process of this machine does not keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
import hashlib
import math
import os
from pathlib import Path
import time

import optuna
from optuna.storages.journal import JournalFileOpenLock
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock

from optuna_nnhp.storages.lease import machine_id

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25  # seconds between looks at a lock
PATIENCE = 10.0  # seconds that one attempt waits for a lock
GRACE = 30  # seconds, as in Optuna, after which a lock is nobody's whoever made it
MACHINE_BITS, PROCESS_BITS = 36, 22  # of an owner's number; Linux has 2^22 processes at most


class WatchedLock(JournalFileSymlinkLock):
    """Optuna's lock of a journal, but a process of this machine that has died does not keep it.

    As there, whoever can make a symbolic link beside the journal has the lock, so that plain
    Optuna processes and these exclude each other. Here the time stamp of the link says who made
    it: a machine and a process as one number of nanoseconds, which is a date in the 1970s. A
    longer link would say it, too, but make every append slower by a third.

    Args:
        filepath:
            The journal.
        patience:
            Seconds that `acquire` waits; after one that was in vain a second.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "study.journal")
        >>> path.touch()
        >>> lock = WatchedLock(str(path))
        >>> lock.acquire(), path.with_name("study.journal.lock").resolve() == path.resolve()
        (True, True)
        >>> lock.release()
    """

    def __init__(self, filepath: str, patience: float = PATIENCE) -> None:
        super().__init__(filepath, GRACE)
        self.patience = patience
        self.is_held, self._is_tired = False, False
        self._made = (-1, -1)  # what the link looked like that is this process's
        self._seen: tuple[object, float] | None = None  # what a lock looked like, since when

    def acquire(self) -> bool:
        """Wait for the lock.

        Raises:
            TimeoutError: If another process keeps it for longer than the patience lasts.
            OSError: If no link can be made.
        """
        patience = min(self.patience, 1.0) if self._is_tired else self.patience
        end, pause = time.monotonic() + patience, FIRST_PAUSE
        name = os.path.basename(self._lock_target_file)  # a link is read from where it is
        while True:
            try:
                os.symlink(name, self._lock_file)
            except FileExistsError:
                pass
            else:
                self._sign()
                return True
            if self._is_abandoned() and self._break():
                continue
            if time.monotonic() > end:
                self._is_tired = True
                raise TimeoutError(f"{self._lock_file} has been kept for {patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _sign(self) -> None:
        """Say on the link who made it."""
        self._seen, self.is_held, self._is_tired = None, True, False
        stamp = _stamp(*_owner())
        with suppress(OSError, NotImplementedError):  # then nobody will know
            os.utime(self._lock_file, ns=(stamp, stamp), follow_symlinks=False)
        self._made = _look(self._lock_file)

    def release(self) -> None:
        """Give the lock back, or what another process that got tired of waiting has left of it."""
        self.is_held = False
        with suppress(OSError):
            if _look(self._lock_file) == self._made:
                os.unlink(self._lock_file)
                return
        name = os.path.basename(self._lock_target_file)
        _logger.warning(f"Another process has taken the lock of {name} away from this one.")

    def _is_abandoned(self) -> bool:
        """Whether the lock is a dead process's, or has looked the same for too long."""
        try:
            link = _look(self._lock_file)
        except OSError:
            return False  # it is free again
        if _is_dead(_owner_of(link[1])):
            return True
        look = link, os.stat(self._lock_target_file).st_mtime_ns
        if self._seen is None or self._seen[0] != look:
            self._seen = look, time.monotonic()
        return time.monotonic() - self._seen[1] > (self.grace_period or math.inf)

    def _break(self) -> bool:
        """Remove a lock that is abandoned, and no other: only one process at a time looks."""
        with _alone(self._lock_target_file) as is_alone:
            if not is_alone or not self._is_abandoned():
                return False
            with suppress(FileNotFoundError):
                os.unlink(self._lock_file)
        self._seen = None
        _logger.warning(f"The lock {self._lock_file} was left by a process that is gone.")
        return True


def lock_of(path: str | Path) -> BaseJournalFileLock:
    """The lock of a journal; where making a link needs a privilege Optuna's other one."""
    if os.name == "nt":
        return JournalFileOpenLock(str(path))
    return WatchedLock(str(path))


# --- Who has made a link ---


def _look(link: str) -> tuple[int, int]:
    """What tells a link from every other one, its time stamp last."""
    state = os.lstat(link)
    return state.st_ino, state.st_mtime_ns


def _owner() -> tuple[int, int]:
    """This machine and this process."""
    digest = hashlib.blake2b(machine_id().encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - MACHINE_BITS), os.getpid()


def _stamp(machine_number: int, process_id: int) -> int:
    """An owner as a time in nanoseconds.

    Example:
        >>> _owner_of(_stamp(5, 17)), _stamp(2**36 - 1, 2**22 - 1) / 1e9 < 10 * 365 * 86400
        ((5, 17), True)
    """
    # A file system that rounds time changes the machine, so that nobody judges.
    return (process_id % (1 << PROCESS_BITS)) << MACHINE_BITS | machine_number


def _owner_of(stamp: int) -> tuple[int, int] | None:
    """Who made a link; None if that is not known."""
    if not 0 < stamp < 1 << (MACHINE_BITS + PROCESS_BITS):
        return None
    process_id, machine_number = divmod(stamp, 1 << MACHINE_BITS)
    return machine_number, process_id


def _is_dead(owner: tuple[int, int] | None) -> bool:
    """Whether a process of this machine is gone; of others nobody here can know."""
    if owner is None or owner[0] != _owner()[0]:
        return False
    number = owner[1]
    try:
        state, *_ = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return _does_not_exist(number)
    except OSError:
        return False
    return state in "ZX"  # it is dead, and its parent has not asked yet


def _does_not_exist(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _alone(path: str) -> Iterator[bool]:
    """Whether no other process of this machine looks at the lock just now."""
    import fcntl  # Windows has no such module, and no such lock

    file = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without it, where Optuna does not ask either
            pass
        yield True
    finally:
        os.close(file)
