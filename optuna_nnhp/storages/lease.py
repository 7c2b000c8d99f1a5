"""Who works on a study, and who of them still lives: leases in the storage."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import functools
import math
import os
from pathlib import Path
import socket
import threading
import time
from typing import Any
from uuid import uuid4

import optuna
from optuna.storages import BaseStorage

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

LEASE_PREFIX = "optuna_nnhp:lease:"  # system attributes of a study: this and a worker's name
Leases = dict[str, dict[str, Any]]  # by worker
RENEWAL_INTERVAL = 15.0  # seconds from one renewal to the next
LEASE_DURATION = 60.0  # seconds without a renewal, after which others may take a worker's trials
LONG = 3600.0  # seconds that no two machines' clocks differ by
AGAIN = 1.0  # seconds from one attempt at the first writing to the next


def new_worker_name() -> str:
    """A name for one process's work on one study, that nobody else has.

    Example:
        >>> name = new_worker_name()
        >>> name.split(":")[1] == str(os.getpid()), name == new_worker_name()
        (True, False)
    """
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


@dataclass
class Lease:
    """A worker's sign of life in a study's storage, and its view of the others'.

    A worker whose process is gone on this machine is dead at once. Any other one is dead when its
    lease has not changed for `LEASE_DURATION` seconds by this process's clock, whatever the
    others' clocks say; for two beats, if it is more than an hour old.

    Only time in which the storage answers counts: nobody can renew a lease in a storage that is
    away. Once it answers again, all have the whole time anew.

    Args:
        storage:
            The study's storage.
        study_id:
            The study.
        worker:
            This worker's name, see `new_worker_name`.
        renewal_interval:
            Seconds from one renewal to the next.
        duration:
            Seconds after which an unchanged lease is over.

    Example:
        >>> study = optuna.create_study()
        >>> lease = Lease(study._storage, study._study_id, new_worker_name())
        >>> with lease:
        ...     lease.is_dead(lease.worker)
        False
        >>> lease.is_dead(lease.worker), lease.is_dead("a plain Optuna process_id")
        (True, False)
    """

    storage: BaseStorage
    study_id: int
    worker: str
    renewal_interval: float = RENEWAL_INTERVAL
    duration: float = LEASE_DURATION
    _beats: int = 0
    _seen: dict[str, tuple[Any, float]] = field(default_factory=dict)  # of others, and since when
    _known: Leases = field(default_factory=dict)
    _renewing: set[str] = field(default_factory=set)  # others that were seen to live
    _read_at: float = -math.inf  # when `_known` was read
    _answered: float = -math.inf  # when the storage has answered last, to whatever was asked
    _counts_from: float = -math.inf  # since when it answers: silence before says nothing
    _is_away: bool = True
    _is_written: bool = False

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Lease:
        _here.add(self.worker)
        self._over.clear()
        self._is_written = False  # not again, if this is another `with`
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="optuna_nnhp-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        _here.discard(self.worker)
        self._write({"ended": True})

    def is_dead(self, worker: str, leases: Leases | None = None) -> bool:
        """Whether a worker can do nothing any more."""
        lease = (self.read() if leases is None else leases).get(worker)
        return _is_gone_without_lease(worker) if lease is None else self._is_dead(worker, lease)

    def is_doubtful(self, worker: str, leases: Leases | None = None) -> bool:
        """Whether a worker may be dead, which only waiting would tell.

        So is one of another machine that was not seen to renew its lease when it should have.
        """
        lease = (self.read() if leases is None else leases).get(worker)
        if lease is None or self._is_dead(worker, lease) or lease["machine_id"] == machine_id():
            return False
        since = self._seen[worker][1]
        is_late = since < self._counts_from or self._read_at - since > 2 * self.renewal_interval
        return is_late or worker not in self._renewing

    def _is_dead(self, worker: str, lease: dict[str, Any]) -> bool:
        if lease.get("ended"):
            return True
        if lease["machine_id"] == machine_id():
            return worker not in _here if lease["process_id"] == process_id() else _is_gone(lease)
        known, since = self._seen.get(worker, (None, self._read_at))
        if known != lease:
            if known is not None:
                self._renewing.add(worker)
            since = self._read_at
            self._seen[worker] = lease, since
        is_old = time.time() - float(lease["at"]) > LONG  # or the storage was away for so long
        silent = self._read_at - max(since, self._counts_from)
        return silent > (
            min(2 * self.renewal_interval, self.duration) if is_old else self.duration
        )

    def read(self) -> Leases:
        """All leases; those of before while the storage does not answer."""
        try:
            attributes = self.storage.get_study_system_attrs(self.study_id)
        except Exception as error:  # drivers raise types of their own
            _logger.debug(f"The leases could not be read: {type(error).__name__}")
            self._note_answer(False)
        else:
            self._read_at = self._note_answer(True)
            names = [name for name in attributes if name.startswith(LEASE_PREFIX)]
            self._known = {name.removeprefix(LEASE_PREFIX): attributes[name] for name in names}
        return self._known

    def _note_answer(self, is_there: bool) -> float:
        """Note whether the storage has answered, and the time.

        This worker's own renewals count too: between two readings it may train for long, and an
        outage then is one for all.
        """
        with self._lock:  # the thread writes while others read
            now = _now()
            if not is_there:
                self._is_away = True
                return now
            if (
                self._is_away or now - self._answered > 2 * self.renewal_interval
            ):  # nobody may have asked
                self._counts_from = now
            self._is_away, self._answered = False, now
            return now

    def _keep(self) -> None:
        # Without any lease a worker of another machine that is killed now would never be missed.
        while not self._over.wait(
            self.renewal_interval if self._is_written else min(AGAIN, self.renewal_interval)
        ):
            self._renew()

    def _renew(self) -> None:
        self._beats += 1
        identity = {"machine_id": machine_id(), "process_id": process_id()}
        self._write({"beat": self._beats, "at": round(time.time(), 3), **identity})

    def _write(self, lease: dict[str, Any]) -> None:
        """Write the lease. A storage that is away may come back."""
        try:
            self.storage.set_study_system_attr(self.study_id, LEASE_PREFIX + self.worker, lease)
        except Exception as error:  # drivers raise types of their own
            _logger.debug(f"The lease could not be renewed: {type(error).__name__}")
            self._note_answer(False)
        else:
            self._note_answer(True)
            self._is_written = True


_here: set[str] = set()  # workers of this process that are at work


@functools.cache
def _identity(number: int) -> tuple[str, str]:
    """This machine since its last start, and this process; by the process's number."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:  # two containers may have one name, and two processes one number
        parts = [boot.read_text().strip(), str(namespace.readlink())]
    except OSError:  # not Linux
        parts = []
    return "/".join([socket.gethostname(), *parts]), f"{number}@{_started(number)}"


def machine_id() -> str:
    """What two processes have in common if each can see whether the other one lives."""
    return _identity(os.getpid())[0]


def process_id() -> str:
    """This process, also if its number is used again: number and start, in clock ticks.

    Example:
        >>> process_id().startswith(f"{os.getpid()}@")
        True
    """
    return _identity(os.getpid())[1]


def _started(number: int) -> str:
    """When a process started; an empty text where that is not to be known.

    Raises:
        ProcessLookupError: If there is no such process.
    """
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError as error:
        if Path("/proc/self/stat").exists():
            raise ProcessLookupError(number) from error
        return ""
    except OSError:
        return ""
    state, *others = text.rpartition(")")[2].split()  # the name before may hold anything
    if state in "ZX":  # dead, and its parent has not asked yet
        raise ProcessLookupError(number)
    return others[18]


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether the process of a lease of this machine is no more."""
    number, _, started = str(lease["process_id"]).partition("@")
    try:
        return _started(int(number)) != started or _does_not_exist(int(number))
    except ProcessLookupError:
        return True


def _is_gone_without_lease(worker: str) -> bool:
    """The same of a worker without a lease, by its number alone.

    It was killed before its first writing was through, or is of an older version, whose names
    end with the number.
    """
    host, _, rest = worker.partition(":")
    number, _, _ = rest.partition(":")
    if host != socket.gethostname() or not number.isdecimal() or worker in _here:
        return False
    return int(number) == os.getpid() or _does_not_exist(int(number))


def _does_not_exist(number: int) -> bool:
    if os.name == "nt":  # where signal 0 is not a question
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _now() -> float:
    """A clock that nobody sets, and that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
