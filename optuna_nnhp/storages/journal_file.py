"""Journal files that survive killed processes: lock, repair, and operations in one append."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import nullcontext
from contextlib import suppress
from datetime import UTC
from datetime import datetime
import hashlib
import json
import os
from pathlib import Path
import re
import socket
import time
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal import JournalFileOpenLock
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import FrozenTrial

from optuna_nnhp.storages._optuna_internals import BaseJournalFileLock
from optuna_nnhp.storages._optuna_internals import JournalOperation
from optuna_nnhp.storages._optuna_internals import JournalState
from optuna_nnhp.storages._optuna_internals import get_lock_file
from optuna_nnhp.storages._optuna_internals import journal_lock
from optuna_nnhp.storages._optuna_internals import journal_path
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import PlannedWrites
from optuna_nnhp.storages.operations import StudyCounts
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.operations import TrialStatus
from optuna_nnhp.storages.operations import json_round_trip
from optuna_nnhp.storages.operations import plan_writes

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

LINE_START = b'{"op_code":'
BLOCK_SIZE = 65536  # bytes read at once when looking for the start of the last line
FIRST_PAUSE, MAX_PAUSE = 0.001, 0.25  # seconds between attempts
TIMEOUT, TIMEOUT_AFTER_FAILURE = 10.0, 1.0  # seconds of one `acquire`
NO_STAMP = 0
GRACE_PERIOD = 30  # seconds, as in Optuna, after which an unchanged link may be removed
ATTR_CODES = {
    ("study", "user"): JournalOperation.SET_STUDY_USER_ATTR,
    ("study", "system"): JournalOperation.SET_STUDY_SYSTEM_ATTR,
    ("trial", "user"): JournalOperation.SET_TRIAL_USER_ATTR,
    ("trial", "system"): JournalOperation.SET_TRIAL_SYSTEM_ATTR,
}

Log = dict[str, Any]


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
        self._made = _inode_and_time(self.link)
        return True

    def _is_abandoned(self, has_flock: bool) -> bool:
        link, changed = _inode_and_time(self.link), os.stat(self.path).st_mtime_ns
        if self._seen[:2] != (link, changed):
            self._seen = link, changed, time.monotonic()
        is_old = time.monotonic() - self._seen[2] > (self.grace_period or GRACE_PERIOD)
        return is_old or (has_flock and link[1] == self._stamp != NO_STAMP)

    def release(self) -> None:
        """Release the lock, unless another process has taken it away from this one."""
        self.is_held = False
        try:
            is_own = _inode_and_time(self.link) == self._made
            if is_own:
                os.unlink(self.link)
        except FileNotFoundError:
            is_own = False
        finally:
            self._close()
        if not is_own:
            _logger.warning(f"Another process has taken the lock of {Path(self.path).name} away.")


def _inode_and_time(link: str) -> tuple[int, int]:
    """Return what tells a link from every other one: its inode and its time."""
    state = os.lstat(link)
    return state.st_ino, state.st_mtime_ns


def make_journal_lock(path: str | Path) -> BaseJournalFileLock:
    """Return the lock of a journal; on Windows, where links need a privilege, Optuna's own."""
    return JournalFileOpenLock(str(path)) if os.name == "nt" else KernelReleasedLock(str(path))


class JournalFile(JournalFileBackend):
    """Optuna's journal file, with a lock and a last line that survive killed processes.

    Args:
        path:
            The file; it is made if there is none.

    Example:
        >>> from tempfile import mkdtemp
        >>> journal = JournalFile(Path(mkdtemp(), "study.journal"))
        >>> journal.append_logs([{"op_code": 1}])
        >>> list(journal.read_logs(0))
        [{'op_code': 1}]
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path), make_journal_lock(path))
        self.path = Path(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Return the entries from a number on; torn lines among them are repaired."""
        number = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                number += 1
                yield log
        except json.JSONDecodeError:
            if not remove_unfinished_line(self.path, all_lines=True, lock=journal_lock(self)):
                raise
            yield from super().read_logs(number)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries."""
        lines = encode_logs(logs)
        with get_lock_file(journal_lock(self)):
            append_lines(self.path, lines)


def open_journal(path: str | Path) -> JournalStorage:
    """Open the storage in a journal file, and repair a line that a killed process has torn.

    Args:
        path:
            The file; it is made if there is none.

    Raises:
        OSError: If it cannot be read or written.
        ValueError: If it is damaged otherwise, or no journal.

    Example:
        >>> from tempfile import mkdtemp
        >>> open_journal(Path(mkdtemp(), "study.journal")).get_all_studies()
        []
    """
    journal, name = JournalFile(path), Path(path).name
    if not _is_journal(path):
        raise ValueError(f"{name} must be a journal of Optuna, but holds something else.")
    remove_unfinished_line(path)
    try:
        return JournalStorage(journal)
    except ValueError as error:
        reason = f"{name} must hold one JSON object a line, but is damaged: {error}"
        raise ValueError(reason) from error


def _is_journal(path: str | Path) -> bool:
    """Return whether a file starts as a journal does, however short it is.

    A table whose name was given by mistake may end without a new line, and must not be repaired.
    """
    with open(path, "rb") as file:
        start = file.read(BLOCK_SIZE).lstrip(b"\0 \r\n")[: len(LINE_START)]
    return LINE_START.startswith(start)


def encode_logs(logs: Iterable[dict[str, Any]]) -> bytes:
    """Return entries as lines of a journal; raise TypeError if JSON cannot hold them."""
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()


def append_lines(path: str | Path, lines: bytes) -> None:
    """Append lines to a journal that this process has locked, and remove a torn line before them.

    Unlike Optuna's own method it does not make a file where the journal has been moved away.

    Raises:
        OSError: If it cannot be written; its last line is whole all the same.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
    try:
        _remove_unfinished_end(file, path)
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except BaseException:
            with suppress(OSError):  # a disk may be so full that even this is impossible
                _remove_unfinished_end(file, path)
            raise
    finally:
        os.close(file)


def remove_unfinished_line(
    path: str | Path, *, all_lines: bool = False, lock: BaseJournalFileLock | None = None
) -> bool:
    """Remove a last line that a killed process or a full disk has left unfinished.

    Where other processes have written behind a torn line, blanks replace it, so that every other
    line keeps its place.

    Args:
        path:
            The journal.
        all_lines:
            Whether to check all lines, and not only the last one.
        lock:
            The journal's lock if there is one already; this process may hold it.

    Returns:
        Whether a line was torn.

    """
    lock = lock or make_journal_lock(path)
    file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(file).st_size
        if not all_lines and _size_of_finished_lines(file) == size and _has_valid_end(file):
            return False
        is_held = isinstance(lock, KernelReleasedLock) and lock.is_held
        # A line may be just being written.
        with nullcontext() if is_held else get_lock_file(lock):
            is_torn = _remove_unfinished_end(file, path)
            if all_lines or not _has_valid_end(file):
                is_torn |= _blank_unfinished_starts(file, path)
            return is_torn
    finally:
        os.close(file)


def _remove_unfinished_end(file: int, path: str | Path) -> bool:
    """Remove an unfinished last line."""
    size, whole = os.fstat(file).st_size, _size_of_finished_lines(file)
    if whole == size:
        return False
    os.ftruncate(file, whole)
    _logger.warning(
        f"Removed the unfinished last line of {Path(path).name} ({size - whole} bytes)."
    )
    return True


def _size_of_finished_lines(file: int) -> int:
    """Return the bytes up to the end of the last finished line."""
    end = os.fstat(file).st_size
    if not end or _read_bytes(file, end - 1, 1) == b"\n":
        return end
    return _line_start(file, end)


def _has_valid_end(file: int) -> bool:
    """Return whether the last line of a file that ends with a line's end is JSON."""
    end = os.fstat(file).st_size
    start = _line_start(file, end - 1)
    return end == 0 or _is_json(_read_bytes(file, start, end - start))


def _line_start(file: int, end: int) -> int:
    """Return the start of the line that ends at a place."""
    while end > 0:
        start = max(0, end - BLOCK_SIZE)
        place = _read_bytes(file, start, end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def _read_bytes(file: int, start: int, count: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, count)


def _blank_unfinished_starts(file: int, path: str | Path) -> bool:
    """Write blanks over torn lines that are followed by another, whole line's text."""
    start, is_torn = 0, False
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        torn = 0 if _is_json(line) else _size_of_unfinished_start(line)
        if torn:
            os.lseek(file, start, os.SEEK_SET)
            os.write(file, b" " * torn)
            name = Path(path).name
            _logger.warning(f"Removed a torn line at the start of line {number} of {name}.")
            is_torn = True
        start += len(line)
    if is_torn:
        os.fsync(file)
    return is_torn


def _size_of_unfinished_start(line: bytes) -> int:
    """Return the bytes before the text of a whole line, 0 if there is none."""
    places = [match.start() for match in re.finditer(re.escape(LINE_START), line)]
    return next((place for place in places if place and _is_json(line[place:])), 0)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def boot_id() -> str:
    """Return a name of this machine's kernel since its start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


class JournalAdapter:
    """Appends the entries of all operations with one synchronization of the disk.

    Under the file's lock nobody else can append, so that the conditions of the operations hold.

    """

    def __init__(self, storage: JournalStorage, file: JournalFileBackend) -> None:
        self._storage = storage
        self._journal = JournalState(storage)
        self._lock, self._path = journal_lock(file), journal_path(file)

    def apply(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Append the operations whose conditions hold.

        Raises:
            OSError: If the file cannot be written; it holds whole lines all the same.
        """
        with self._journal.exclusive():
            with get_lock_file(self._lock):
                self._journal.sync()  # with it what an attempt that failed has left
                planned = self._plan_operations(ops)
                first_id = len(self._journal.trials)
                lines = encode_logs(self._journal.with_worker_id(_journal_entries(planned)))
                if lines:
                    append_lines(self._path, lines)
            errors = self._journal.sync()
        planned.set_ids(range(first_id, first_id + len(planned.new)))
        return [_error_or_outcome(outcome, errors) for outcome in planned.outcomes]

    def _plan_operations(self, ops: Sequence[Operation]) -> PlannedWrites:
        trials, studies = dict[int, TrialStatus](), dict[int, StudyCounts]()
        for op in ops:
            if isinstance(op, Op) and op.trial_id in self._journal.trials:
                trials[op.trial_id] = TrialStatus.of(self._journal.trials[op.trial_id])
            needs_study = not isinstance(op, Op) or op.trial_id is None or op.limit is not None
            if needs_study and op.study_id not in studies:
                known = self._journal.trials_of(op.study_id)
                if known is not None:
                    studies[op.study_id] = StudyCounts.of(known)
        return plan_writes(ops, trials, studies)

    def read(self, study_id: int, unfinished: set[int], last_trial_id: int) -> list[FrozenTrial]:
        """Return all trials: a journal is kept in memory."""
        return self._storage.get_all_trials(study_id, deepcopy=False)

    def as_stored(self, value: Any) -> Any:
        """Return a value as JSON returns it."""
        return json_round_trip(value)


def _error_or_outcome(outcome: Outcome, errors: Mapping[int, Exception]) -> Outcome:
    """Return the error of an operation whose entries Optuna refuses, such as an odd parameter."""
    return errors.get(outcome.trial_id, outcome) if isinstance(outcome, Applied) else outcome


def _journal_entries(planned: PlannedWrites) -> Iterator[Log]:
    """Return the journal's entries for planned operations."""
    for trial_id, change in planned.changes.items():
        yield from _trial_logs(trial_id, change)
    for op in planned.new:
        change = op.change_with_token
        yield {
            "op_code": JournalOperation.CREATE_TRIAL,
            "study_id": op.study_id,
            "datetime_start": change.started and _utc(change.started),
            "state": change.state,
            "value": None,
            "values": None,
            "distributions": {},
            "params": {},
            "user_attrs": change.user_attrs,
            "system_attrs": change.system_attrs,
            "intermediate_values": {},
        }
    for attr in planned.study_attrs:
        entry = {"study_id": attr.study_id, f"{attr.kind}_attr": {attr.key: attr.value}}
        yield {"op_code": ATTR_CODES["study", attr.kind], **entry}


def _trial_logs(trial_id: int, change: TrialChange) -> Iterator[Log]:
    """Return the entries for a trial that exists; the one of its state is last."""
    trial = {"trial_id": trial_id}
    for name, (value, distribution) in change.params.items():
        yield {
            "op_code": JournalOperation.SET_TRIAL_PARAM,
            **trial,
            "param_name": name,
            "param_value_internal": value,
            "distribution": distribution_to_json(distribution),
        }
    for kind, attrs in (("system", change.system_attrs), ("user", change.user_attrs)):
        for key, attribute in attrs.items():
            code = ATTR_CODES["trial", kind]
            yield {"op_code": code, **trial, f"{kind}_attr": {key: attribute}}
    for step, number in change.intermediate_values.items():
        code = JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE
        yield {"op_code": code, **trial, "step": step, "intermediate_value": number}
    if change.state is not None:
        code = JournalOperation.SET_TRIAL_STATE_VALUES
        log = {"op_code": code, **trial, "state": change.state, "values": change.values}
        times = {"datetime_start": change.started, "datetime_complete": change.completed}
        yield log | {name: _utc(time) for name, time in times.items() if time is not None}


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
