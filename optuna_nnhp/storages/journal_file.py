"""A journal file that survives killed processes: how it is opened, mended and appended to."""

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
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.storages.journal._file import get_lock_file

from optuna_nnhp.storages.journal_lock import WatchedLock
from optuna_nnhp.storages.journal_lock import lock_of

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

START = b'{"op_code":'  # of every line
BLOCK = 65536  # bytes read at once when looking for the last line's start


class JournalFile(JournalFileBackend):
    """Optuna's journal file, with a lock and an end that survive killed processes.

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
        super().__init__(str(path), lock_of(path))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The lines from one on, by number; torn ones among them are mended."""
        number = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                number += 1
                yield log
        except json.JSONDecodeError:
            if not mend(self._file_path, everywhere=True, lock=self._lock):
                raise
            yield from super().read_logs(number)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines."""
        lines = encoded(logs)
        with get_lock_file(self._lock):
            append(self._file_path, lines)


def open_journal(path: str | Path) -> JournalStorage:
    """The storage in a journal file, mended first where a killed process has left it torn.

    Args:
        path:
            The file; it is made if there is none.

    Raises:
        OSError: If it cannot be read or written.
        ValueError: If it is damaged beyond that, or something else.

    Example:
        >>> from tempfile import mkdtemp
        >>> open_journal(Path(mkdtemp(), "study.journal")).get_all_studies()
        []
    """
    journal, name = JournalFile(path), Path(path).name
    if not _is_journal(path):
        raise ValueError(f"{name} must be a journal of Optuna, but holds something else.")
    mend(path)
    try:
        return JournalStorage(journal)
    except ValueError as error:
        reason = f"{name} must hold one JSON object a line, but is damaged: {error}"
        raise ValueError(reason) from error


def _is_journal(path: str | Path) -> bool:
    """Whether a file begins as a journal does, however short it is.

    A table, whose name was given by mistake, may end without a new line: that is not to be mended.
    """
    with open(path, "rb") as file:
        begin = file.read(BLOCK).lstrip(b"\0 \r\n")[: len(START)]
    return START.startswith(begin)


def encoded(logs: Iterable[dict[str, Any]]) -> bytes:
    """The lines of a journal.

    Raises:
        TypeError: If JSON cannot keep them.

    Example:
        >>> encoded([{"op_code": 1}])
        b'{"op_code":1}\\n'
    """
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()


def append(path: str | Path, lines: bytes) -> None:
    """Append lines to a journal whose lock this process has; a torn line before them goes.

    Unlike Optuna's own it does not make a file where the journal has been moved away.

    Args:
        path:
            The journal.
        lines:
            See `encoded`.

    Raises:
        OSError: If it cannot be written; then the last line is whole all the same.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
    try:
        _cut(file, path)
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except BaseException:
            with suppress(OSError):  # on whose disk nothing can be done, not even this
                _cut(file, path)
            raise
    finally:
        os.close(file)


def mend(
    path: str | Path, *, everywhere: bool = False, lock: BaseJournalFileLock | None = None
) -> bool:
    """Remove a last line that was never finished: a process was killed, or a disk was full.

    Where others have written behind a torn line already, blanks take its place, so that every
    other line stays where it is.

    Args:
        path:
            The journal.
        everywhere:
            Whether to look at all lines, and not only at the last one.
        lock:
            The journal's lock, if there is one already; it may be this process's.

    Returns:
        Whether there was anything to mend.

    Raises:
        OSError: If the file cannot be read or written.
    """
    lock = lock or lock_of(path)
    file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        if not everywhere and _whole(file) == os.fstat(file).st_size and _ends_well(file):
            return False
        is_ours = isinstance(lock, WatchedLock) and lock.is_held
        with nullcontext() if is_ours else get_lock_file(lock):  # a line may be just being written
            is_torn = _cut(file, path)
            return ((not _ends_well(file) or everywhere) and _blank_torn(file, path)) or is_torn
    finally:
        os.close(file)


def _cut(file: int, path: str | Path) -> bool:
    """Remove an unfinished last line."""
    size, whole = os.fstat(file).st_size, _whole(file)
    if whole == size:
        return False
    os.ftruncate(file, whole)
    _logger.warning(
        f"The last line of {Path(path).name} was not finished: its {size - whole} bytes are gone."
    )
    return True


def _whole(file: int) -> int:
    """Bytes up to the end of the last finished line."""
    end = os.fstat(file).st_size
    if not end or _read(file, end - 1, 1) == b"\n":
        return end
    return _line_start(file, end)


def _ends_well(file: int) -> bool:
    """Whether the last line of a file that ends with a line's end is one that can be read."""
    end = os.fstat(file).st_size
    start = _line_start(file, end - 1)
    return end == 0 or _is_json(_read(file, start, end - start))


def _line_start(file: int, end: int) -> int:
    """Where the line begins that a place is in."""
    while end > 0:
        start = max(0, end - BLOCK)
        place = _read(file, start, end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def _read(file: int, start: int, count: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, count)


def _blank_torn(file: int, path: str | Path) -> bool:
    """Put blanks for the beginnings of lines that end with another line's whole text."""
    start, is_torn = 0, False
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        torn = 0 if _is_json(line) else _torn(line)
        if torn:
            os.lseek(file, start, os.SEEK_SET)
            os.write(file, b" " * torn)
            _logger.warning(f"Line {number} of {Path(path).name} began with a torn one.")
            is_torn = True
        start += len(line)
    if is_torn:
        os.fsync(file)
    return is_torn


def _torn(line: bytes) -> int:
    """How many bytes before the text of a whole line are another one's; 0 if there is none."""
    places = [match.start() for match in re.finditer(re.escape(START), line)]
    return next((place for place in places if place and _is_json(line[place:])), 0)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
