"""Leases: each worker of a study renews one in the storage, so that its death is noticed."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
import math
import threading
import time
from typing import Any

import optuna
from optuna.storages import BaseStorage

from optuna_nnhp.storages.liveness import is_worker_alive
from optuna_nnhp.storages.liveness import lock_worker
from optuna_nnhp.storages.liveness import machine_id
from optuna_nnhp.storages.liveness import touch_worker
from optuna_nnhp.storages.liveness import unlock_worker
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.write_buffer import adapter_for

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

LEASE_PREFIX = "optuna_nnhp:lease:"  # of a study's system attributes; the worker's name follows
Leases = dict[str, dict[str, Any]]  # by worker
RENEWAL_INTERVAL = 15.0  # seconds
LEASE_DURATION = 60.0  # seconds without a renewal, after which a worker's trials may be taken over
MAX_CLOCK_DIFFERENCE = 3600.0  # seconds between two machines' clocks
FIRST_RETRY_INTERVAL = 1.0  # seconds between attempts to write a lease for the first time


@dataclass
class Lease:
    """A worker's sign of life in a study's storage, and its view of the other workers' leases.

    Whether a worker of this machine lives is known to the kernel, see `liveness`. Any other worker
    is dead if its lease has not changed for `LEASE_DURATION` seconds by this process's clock,
    whatever the others' clocks say; for two renewal intervals, if it is more than an hour old.

    Only time in which the storage answers counts: nobody can renew a lease in a storage that is
    unavailable. Once it answers again, all workers have the whole time anew.

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
    _renewing: set[str] = field(default_factory=set)  # others that were seen to renew theirs
    _read_at: float = -math.inf  # when `_known` was read
    _answered_at: float = -math.inf  # when the storage has answered last, to any call
    _available_since: float = -math.inf  # silence before that says nothing
    _is_available: bool = False
    _is_written: bool = False

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._machine_id = ""

    def __enter__(self) -> Lease:
        self._machine_id = machine_id() if lock_worker(self.worker) else ""
        self._stop.clear()
        self._is_written = False  # not again, if this is another `with`
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
        """Return whether a worker can do nothing any more."""
        lease = (self.read() if leases is None else leases).get(worker)
        if lease is not None and lease.get("ended"):
            return True
        is_alive = is_worker_alive(worker)
        if is_alive is not None:
            return not is_alive
        return self._is_local(lease) or self._is_silent(worker, lease)

    def may_be_dead(self, worker: str, leases: Leases | None = None) -> bool:
        """Return whether a worker may be dead, which only waiting would tell.

        So is one of another machine that was not seen to renew its lease when it should have.
        """
        leases = self.read() if leases is None else leases
        lease = leases.get(worker)
        if self.is_dead(worker, leases) or is_worker_alive(worker) or self._is_local(lease):
            return False
        if worker not in self._seen:  # it ended between two looks
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
        except Exception as error:  # drivers raise types of their own
            _logger.debug(f"The leases could not be read: {type(error).__name__}")
            self._note_answer(False)
        else:
            self._read_at = self._note_answer(True)
            names = [name for name in attributes if name.startswith(LEASE_PREFIX)]
            self._known = {name.removeprefix(LEASE_PREFIX): attributes[name] for name in names}
        return self._known

    def _note_answer(self, is_available: bool) -> float:
        """Note whether the storage has answered, and return the time.

        This worker's own renewals count too: between two readings it may train for long, and an
        outage then concerns all workers.
        """
        with self._lock:  # the thread writes while others read
            now = _now()
            if not is_available:
                self._is_available = False
                return now
            # Perhaps nobody has asked in between.
            if not self._is_available or now - self._answered_at > 2 * self.renewal_interval:
                self._available_since = now
            self._is_available, self._answered_at = True, now
            return now

    def _keep_renewing(self) -> None:
        # Without any lease nobody would miss a worker of another machine that is killed now.
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
            self._note_answer(False)
        else:
            self._note_answer(True)
            self._is_written = True


def _now() -> float:
    """Return a clock that nobody sets, and that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
