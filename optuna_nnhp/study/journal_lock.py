"""The lock of a journal file, which a killed process of this machine does not keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
import hashlib
import math
import os
from pathlib import Path
import re
import time

import optuna
from optuna.storages.journal import JournalFileOpenLock
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock

from optuna_nnhp.study.lease import machine
from optuna_nnhp.study.lease import process

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25  # seconds between looks at a lock
PATIENCE = 10.0  # seconds that one attempt waits for a lock
GRACE = 30  # seconds, as in Optuna, after which a lock is nobody's whoever made it
BITS = 32  # of each of the three numbers in an owner's name


class WatchedLock(JournalFileSymlinkLock):
    """Optuna's lock of a journal, but a process of this machine that has died does not keep it.

    As there, whoever can make a symbolic link beside the journal has the lock, so that plain
    Optuna processes and these exclude each other. Here the link leads to the journal by a detour
    that says who made it, as ``././/./study.journal``: a name in zeros and ones. It comes
    into being along with the link, so that nobody can be killed in between.

    Args:
        filepath:
            The journal.
        patience:
            Seconds that `acquire` waits.

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
        self.is_held = False
        self._seen: tuple[object, float] | None = None  # what a lock looked like, since when

    def acquire(self) -> bool:
        """Wait for the lock.

        Raises:
            TimeoutError: If another process keeps it for longer than the patience lasts.
            OSError: If no link can be made.
        """
        end, pause = time.monotonic() + self.patience, FIRST_PAUSE
        target = _detour(_owner(), Path(self._lock_target_file).name)
        while True:
            try:
                os.symlink(target, self._lock_file)
            except FileExistsError:
                pass
            else:
                self._seen, self.is_held = None, True
                return True
            if self._is_abandoned() and self._break():
                continue
            if time.monotonic() > end:
                raise TimeoutError(f"{self._lock_file} has been kept for {self.patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def release(self) -> None:
        """Give the lock back, or what another process that got tired of waiting has left of it."""
        self.is_held, name = False, Path(self._lock_target_file).name
        with suppress(OSError):
            if os.readlink(self._lock_file) == _detour(_owner(), name):
                os.unlink(self._lock_file)
                return
        _logger.warning(f"Another process has taken the lock of {name} away from this one.")

    def _is_abandoned(self) -> bool:
        """Whether the lock is a dead process's, or has looked the same for too long."""
        try:
            target, link = os.readlink(self._lock_file), os.lstat(self._lock_file)
        except OSError:
            return False  # it is free again
        if _is_dead(_owner_of(target)):
            return True
        look = link.st_ino, link.st_mtime_ns, os.stat(self._lock_target_file).st_mtime_ns
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

Owner = tuple[int, int, int]  # machine, process, when it started


def _owner() -> Owner:
    """This process."""
    number, _, started = process().partition("@")
    digest = hashlib.blake2b(machine().encode(), digest_size=BITS // 8).digest()
    return int.from_bytes(digest), int(number), int(started or 0) % 2**BITS


def _detour(owner: Owner, name: str) -> str:
    """A path to a file in the link's own folder that says who made it."""
    digits = "".join(f"{number:0{BITS}b}" for number in owner)
    return digits.replace("0", "./").replace("1", ".//") + name


def _owner_of(target: str) -> Owner | None:
    """Who made a link; None if that is no process of ours."""
    match = re.match(rf"((?:\.//?){{{3 * BITS}}})[^/]", target)
    if match is None:
        return None
    digits = match.group(1).replace(".//", "1").replace("./", "0")
    machine_number, number, started = (
        int(digits[start : start + BITS], 2) for start in range(0, 3 * BITS, BITS)
    )
    return machine_number, number, started


def _is_dead(owner: Owner | None) -> bool:
    """Whether a process of this machine is gone; of others nobody here can know."""
    if owner is None or owner[0] != _owner()[0]:
        return False
    _, number, started = owner
    stat = Path(f"/proc/{number}/stat")
    try:
        state, *rest = stat.read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return _does_not_exist(number)
    except OSError:
        return False
    # A dead process's number may be used again, or its parent may not have asked for it yet.
    return state in "ZX" or int(rest[18]) % 2**BITS != started


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
