"""Leases of workers: how the death of a worker is noticed on this machine and on others."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
import hashlib
import math
import os
from pathlib import Path
import socket
import sys
import tempfile
import threading
import time
from typing import Any
from uuid import uuid4

import optuna
from optuna.storages import BaseStorage

from optuna_nnhp.storages.journal_file import boot_id
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.write_buffer import adapter_for

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

LEASE_PREFIX = "optuna_nnhp:lease:"  # of a study's system attributes; the worker's name follows
Leases = dict[str, dict[str, Any]]  # by worker
RENEWAL_INTERVAL = 15.0  # seconds
LEASE_DURATION = 60.0  # seconds without a renewal, after which a worker's trials may be taken over
MAX_CLOCK_DIFFERENCE = 3600.0  # seconds between two machines' clocks
FIRST_RETRY_INTERVAL = 1.0  # seconds between attempts to write a lease for the first time
_process_token = uuid4().hex
_locked: dict[tuple[int, str], int] = {}  # files that a process keeps locked, by worker


def new_worker_name() -> str:
    """Return a unique name for one process's work on one study.

    Example:
        >>> name = new_worker_name()
        >>> name.split(":")[1] == str(os.getpid()), name == new_worker_name()
        (True, False)
    """
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


def process_id() -> str:
    """Return a name of this process that is unique among all machines.

    Example:
        >>> process_id().startswith(f"{os.getpid()}:")
        True
    """
    return f"{os.getpid()}:{_process_token}"


def machine_id() -> str:
    """Return a name that is the same for processes that can tell whether the others are alive.

    It consists of the kernel and the folder of the locked files: containers may have their own.
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

    path = _lock_file_path(folder, worker)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)  # other processes lock it only for a moment
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
            _lock_file_path(folder, worker).unlink()
        os.close(file)


def is_worker_alive(worker: str) -> bool | None:
    """Return whether a worker of this machine is alive, None if it has no file here.

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
        file = os.open(_lock_file_path(folder, worker), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _lock_file_path(folder: Path, worker: str) -> Path:
    return folder / f"{hashlib.blake2b(worker.encode(), digest_size=12).hexdigest()}.lock"


def _lock_folder() -> Path | None:
    """Return this user's folder of locked files, None where there can be none."""
    if sys.platform == "win32":
        return None
    folder = Path(tempfile.gettempdir(), f"optuna_nnhp-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Any user may have put a folder or a link there.
        is_own = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:
        return None
    return folder if is_own else None


@dataclass
class Lease:
    """Renews a worker's lease in a study's storage, and reads the leases of the other workers.

    The kernel tells whether a worker of this machine is alive, see `is_worker_alive`. Any other
    worker is dead if its lease has not changed for `LEASE_DURATION` seconds by this process's
    clock. Two renewal intervals are enough if the lease is more than an hour old.

    Time in which the storage is unavailable does not count, because nobody can renew a lease then.
    When the storage answers again, the time of all workers starts at zero.

    Args:
        storage:
            The study's storage.
        study_id:
            The study.
        worker:
            This worker's name, see `new_worker_name`.
        renewal_interval:
            Seconds between two renewals.
        duration:
            Seconds after which an unchanged lease is over.

    Example:
        >>> study = optuna.create_study()
        >>> lease = Lease(study._storage, study._study_id, "host:17:0123abcd")
        >>> with lease:
        ...     lease.is_dead(lease.worker)
        False
        >>> lease.is_dead(lease.worker), lease.is_dead("a plain Optuna process")
        (True, False)
    """

    storage: BaseStorage
    study_id: int
    worker: str
    renewal_interval: float = RENEWAL_INTERVAL
    duration: float = LEASE_DURATION
    _renewals: int = 0
    _seen: dict[str, tuple[Any, float]] = field(default_factory=dict)  # of others, and since when
    _known: Leases = field(default_factory=dict)
    _renewing: set[str] = field(default_factory=set)  # other workers whose renewals were seen
    _read_at: float = -math.inf  # when `_known` was read
    _answered_at: float = -math.inf  # when the storage has answered last, to any call
    _available_since: float = -math.inf  # renewals cannot be missed before that
    _is_available: bool = False
    _is_written: bool = False

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._machine_id = ""

    def __enter__(self) -> Lease:
        self._machine_id = machine_id() if lock_worker(self.worker) else ""
        self._stop.clear()
        self._is_written = False  # each `with` writes the lease anew
        self._renew()
        name = "optuna_nnhp-lease"
        self._thread = threading.Thread(target=self._keep_renewing, name=name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        unlock_worker(self.worker)
        self._write({"ended": True})

    def is_dead(self, worker: str, leases: Leases | None = None) -> bool:
        """Return whether a worker has ended or was killed."""
        lease = (self.read() if leases is None else leases).get(worker)
        if lease is not None and lease.get("ended"):
            return True
        is_alive = is_worker_alive(worker)
        if is_alive is not None:
            return not is_alive
        return self._is_local(lease) or self._is_silent(worker, lease)

    def may_be_dead(self, worker: str, leases: Leases | None = None) -> bool:
        """Return whether it is too early to say that a worker is alive or dead.

        That holds for a worker of another machine until this process has seen it renew its lease,
        and again when a renewal is late.
        """
        leases = self.read() if leases is None else leases
        lease = leases.get(worker)
        if self.is_dead(worker, leases) or is_worker_alive(worker) or self._is_local(lease):
            return False
        if worker not in self._seen:  # its lease was removed between two reads
            return False
        since = self._seen[worker][1]
        is_late = self._read_at - since > 2 * self.renewal_interval
        return since < self._available_since or is_late or worker not in self._renewing

    @staticmethod
    def _is_local(lease: dict[str, Any] | None) -> bool:
        return lease is not None and lease["machine_id"] == machine_id()

    def _is_silent(self, worker: str, lease: dict[str, Any] | None) -> bool:
        """Return whether a worker of another machine has not renewed its lease for too long."""
        if worker not in self._seen or self._seen[worker][0] != lease:
            if worker in self._seen:
                self._renewing.add(worker)
            self._seen[worker] = lease, self._read_at
        silence = self._read_at - max(self._seen[worker][1], self._available_since)
        limit = self.duration
        # An old lease, unless the storage was unavailable for so long.
        if lease is not None and time.time() - float(lease["at"]) > MAX_CLOCK_DIFFERENCE:
            limit = min(2 * self.renewal_interval, limit)
        return silence > limit

    def read(self) -> Leases:
        """Return all leases; the last ones read while the storage does not answer."""
        try:
            attributes = self.storage.get_study_system_attrs(self.study_id)
        except Exception as error:  # drivers raise their own types
            _logger.debug(f"The leases could not be read: {type(error).__name__}")
            self._record_answer(False)
        else:
            self._read_at = self._record_answer(True)
            names = [name for name in attributes if name.startswith(LEASE_PREFIX)]
            self._known = {name.removeprefix(LEASE_PREFIX): attributes[name] for name in names}
        return self._known

    def _record_answer(self, is_available: bool) -> float:
        """Note whether the storage has answered, and return the time.

        This worker's own renewals count too: between two readings it may train for long, and an
        outage then concerns all workers.
        """
        with self._lock:  # the thread writes while others read
            now = _now()
            if not is_available:
                self._is_available = False
                return now
            # Without calls for so long, an outage in between was not noticed.
            if not self._is_available or now - self._answered_at > 2 * self.renewal_interval:
                self._available_since = now
            self._is_available, self._answered_at = True, now
            return now

    def _keep_renewing(self) -> None:
        # Other machines cannot notice the death of a worker before its first lease is written.
        first = min(FIRST_RETRY_INTERVAL, self.renewal_interval)
        while not self._stop.wait(self.renewal_interval if self._is_written else first):
            self._renew()

    def _renew(self) -> None:
        self._renewals += 1
        touch_worker(self.worker)
        now = round(time.time(), 3)
        self._write({"renewals": self._renewals, "at": now, "machine_id": self._machine_id})

    def _write(self, lease: dict[str, Any]) -> None:
        """Write the lease; an unavailable storage may come back."""
        try:
            attr = StudyAttr(self.study_id, "system", LEASE_PREFIX + self.worker, lease)
            (outcome,) = adapter_for(self.storage).apply([attr])
            if isinstance(outcome, Exception):
                raise outcome
        except Exception as error:  # drivers raise types of their own
            _logger.debug(f"The lease could not be renewed: {type(error).__name__}")
            self._record_answer(False)
        else:
            self._record_answer(True)
            self._is_written = True


def _now() -> float:
    """Return a clock in seconds that is never set back and includes time of a sleeping machine."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
