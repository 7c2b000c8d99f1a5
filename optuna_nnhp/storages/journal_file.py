"""A journal file that survives killed processes: opening, repairing and appending."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import nullcontext
from contextlib import suppress
import json
import os
from pathlib import Path
import re
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from optuna_nnhp.storages._optuna_internals import BaseJournalFileLock
from optuna_nnhp.storages._optuna_internals import get_lock_file
from optuna_nnhp.storages._optuna_internals import journal_lock
from optuna_nnhp.storages.journal_lock import KernelReleasedLock
from optuna_nnhp.storages.journal_lock import lock_for

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

LINE_START = b'{"op_code":'
BLOCK_SIZE = 65536  # bytes read at once when looking for the start of the last line


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
        super().__init__(str(path), lock_for(path))
        self.path = Path(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Return the entries from a number on; torn lines among them are repaired."""
        number = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                number += 1
                yield log
        except json.JSONDecodeError:
            if not repair(self.path, all_lines=True, lock=journal_lock(self)):
                raise
            yield from super().read_logs(number)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries."""
        lines = encode(logs)
        with get_lock_file(journal_lock(self)):
            append(self.path, lines)


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
    repair(path)
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


def encode(logs: Iterable[dict[str, Any]]) -> bytes:
    """Return entries as lines of a journal.

    Raises:
        TypeError: If JSON cannot keep them.

    Example:
        >>> encode([{"op_code": 1}])
        b'{"op_code":1}\\n'
    """
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()


def append(path: str | Path, lines: bytes) -> None:
    """Append lines to a journal that this process has locked, and remove a torn line before them.

    Unlike Optuna's own method it does not make a file where the journal has been moved away.

    Args:
        path:
            The journal.
        lines:
            See `encode`.

    Raises:
        OSError: If it cannot be written; its last line is whole all the same.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
    try:
        _remove_torn_end(file, path)
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except BaseException:
            with suppress(OSError):  # a disk may be so full that even this is impossible
                _remove_torn_end(file, path)
            raise
    finally:
        os.close(file)


def repair(
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

    Raises:
        OSError: If the file cannot be read or written.
    """
    lock = lock or lock_for(path)
    file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(file).st_size
        if not all_lines and _whole_size(file) == size and _has_valid_end(file):
            return False
        is_held = isinstance(lock, KernelReleasedLock) and lock.is_held
        # A line may be just being written.
        with nullcontext() if is_held else get_lock_file(lock):
            is_torn = _remove_torn_end(file, path)
            if all_lines or not _has_valid_end(file):
                is_torn |= _blank_torn_starts(file, path)
            return is_torn
    finally:
        os.close(file)


def _remove_torn_end(file: int, path: str | Path) -> bool:
    """Remove an unfinished last line."""
    size, whole = os.fstat(file).st_size, _whole_size(file)
    if whole == size:
        return False
    os.ftruncate(file, whole)
    _logger.warning(
        f"Removed the unfinished last line of {Path(path).name} ({size - whole} bytes)."
    )
    return True


def _whole_size(file: int) -> int:
    """Return the bytes up to the end of the last finished line."""
    end = os.fstat(file).st_size
    if not end or _read(file, end - 1, 1) == b"\n":
        return end
    return _line_start(file, end)


def _has_valid_end(file: int) -> bool:
    """Return whether the last line of a file that ends with a line's end is JSON."""
    end = os.fstat(file).st_size
    start = _line_start(file, end - 1)
    return end == 0 or _is_json(_read(file, start, end - start))


def _line_start(file: int, end: int) -> int:
    """Return the start of the line that ends at a place."""
    while end > 0:
        start = max(0, end - BLOCK_SIZE)
        place = _read(file, start, end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def _read(file: int, start: int, count: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, count)


def _blank_torn_starts(file: int, path: str | Path) -> bool:
    """Write blanks over torn lines that are followed by another, whole line's text."""
    start, is_torn = 0, False
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        torn = 0 if _is_json(line) else _torn_size(line)
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


def _torn_size(line: bytes) -> int:
    """Return the bytes before the text of a whole line, 0 if there is none."""
    places = [match.start() for match in re.finditer(re.escape(LINE_START), line)]
    return next((place for place in places if place and _is_json(line[place:])), 0)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
