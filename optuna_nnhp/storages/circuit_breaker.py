"""Whether a storage answers: what is an outage and what an error, and when to try again."""

from __future__ import annotations

from collections.abc import Callable
import sys
import threading
import time
from typing import TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.exceptions import StorageInternalError
from optuna.exceptions import UpdateFinishedTrialError

from optuna_nnhp.errors import first_line

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

Answer = TypeVar("Answer")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds from one attempt to the next
ANSWERS = (KeyError, UpdateFinishedTrialError, DuplicatedStudyError)  # only a storage says so
LONGEST_REASON = 300  # letters
# What SQLAlchemy calls errors of the question, not of the database.
REAL = ("IntegrityError", "DataError", "ProgrammingError", "NotSupportedError")
STALE = ("40001", "40P01")  # PostgreSQL: two were in each other's way, and this one gave up


class StorageUnavailable(RuntimeError):
    """The storage does not answer now, and nothing is kept here that would do instead.

    The text says why, without any password. Try again later: see
    `BufferedStorage.wait_until_available`.
    """


class CircuitBreaker:
    """Asks a storage, and once it does not answer only when the time has come.

    The pause before the next attempt doubles from 1 to 30 seconds. There is no sleeping: before
    its time a question is refused at once.

    Args:
        url:
            The storage's URL, so that its password can be hidden.

    Example:
        >>> reach = CircuitBreaker()
        >>> reach.ask(lambda: 1 + 1)
        2
    """

    def __init__(self, url: str = "") -> None:
        self._url = url
        self._lock = threading.Lock()
        self._failures = 0
        self._since, self._due = 0.0, 0.0
        self._reason: str | None = None
        self._is_for_writing = False

    @property
    def is_up(self) -> bool:
        """Whether the last attempt was answered."""
        return self._reason is None

    @property
    def may_try(self) -> bool:
        """Whether an attempt is allowed now."""
        return self._reason is None or time.monotonic() >= self._due

    @property
    def due(self) -> float:
        """Clock of the next attempt."""
        return self._due

    def ask(
        self, question: Callable[[], Answer], *, writes: bool = False, again: bool = True
    ) -> Answer:
        """Ask the storage.

        Args:
            question:
                What asks it.
            writes:
                Whether it writes. A full disk can be read: what was found out by writing is over
                only when something is written.
            again:
                Whether it may be asked once more at once, if a connection was an old one.

        Raises:
            StorageUnavailable: If the storage does not answer, or did not lately.
        """
        if not self.may_try:
            raise self._error()
        try:
            try:
                answer = question()
            except Exception as error:
                if not (again and self.is_up and is_stale(error)):
                    raise
                answer = question()
        except ANSWERS:
            self._note_answer(writes)
            raise
        except Exception as error:
            if not is_outage(error):
                raise
            self._note_outage(error, writes)
        else:
            self._note_answer(writes)
            return answer
        raise self._error()  # here, so that a driver's own text is not shown above it

    def _error(self) -> StorageUnavailable:
        return StorageUnavailable(f"The storage cannot be reached: {self._reason}")

    def _note_answer(self, writes: bool) -> None:
        if self.is_up:
            return
        with self._lock:
            if self.is_up or (self._is_for_writing and not writes):
                return
            seconds = time.monotonic() - self._since
            self._reason, self._failures, self._is_for_writing = None, 0, False
        _logger.info(f"The storage can be reached again after {seconds:.0f} s.")

    def _note_outage(self, error: Exception, writes: bool) -> None:
        with self._lock:
            is_new, now = self.is_up, time.monotonic()
            self._reason = reason_of(error, self._url)
            self._is_for_writing |= writes
            self._since = now if is_new else self._since
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures, 10))
            self._failures += 1
            self._due = now + pause
        if is_new:
            _logger.warning(
                f"The storage cannot be reached: {self._reason}. What runs goes on; what it "
                "writes is kept in memory until the storage is back."
            )


def is_outage(error: BaseException) -> bool:
    """Whether an error says that a storage is away, busy or full, and not that a call is wrong.

    Example:
        >>> is_outage(OSError("No space left on device")), is_outage(KeyError("no such study"))
        (True, False)
    """
    cause = _cause(error)
    if isinstance(cause, OSError | StorageInternalError):
        return True
    # Whoever raises one of these has imported its module; SQLAlchemy alone takes 0.3 s.
    if alchemy := sys.modules.get("sqlalchemy.exc"):
        if isinstance(cause, tuple(getattr(alchemy, name) for name in REAL)):
            return _is_lost(cause)
        if isinstance(cause, alchemy.DBAPIError | alchemy.TimeoutError) or _is_lost(cause):
            return True
    for module, name in (("grpc", "RpcError"), ("redis.exceptions", "RedisError")):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(cause, kind):
            return True
    # Optuna's lock of a journal, when another process has waited for it for too long.
    return isinstance(cause, RuntimeError) and "did not possess lock" in str(cause)


def is_stale(error: BaseException) -> bool:
    """Whether the next attempt may do: the connection was one from before a restart."""
    cause = _cause(error)
    code = getattr(getattr(cause, "orig", None), "pgcode", None)
    return _is_lost(cause) or code in STALE


def reason_of(error: BaseException, url: str = "") -> str:
    """An outage in one line without passwords.

    Args:
        error:
            The error.
        url:
            The storage's URL, if it is known.

    Example:
        >>> reason_of(OSError("cannot open postgresql://me:secret@host/db\\nCheck the host."))
        'cannot open postgresql://me:***@host/db'
    """
    cause = _cause(error)
    text = str(cause)
    if callable(details := getattr(cause, "details", None)):  # gRPC's own text has many lines
        text = str(details() or text)
    return first_line(text.strip() or type(cause).__name__, url).rstrip(" .")[:LONGEST_REASON]


def _is_lost(cause: BaseException) -> bool:
    """Whether SQLAlchemy says that a connection is broken, or was when it was last used."""
    is_follow_up = type(cause).__name__ == "PendingRollbackError"
    return is_follow_up or bool(getattr(cause, "connection_invalidated", False))


def _cause(error: BaseException) -> BaseException:
    """What Optuna's own error stands for: its text is about anything that may have happened."""
    is_wrapped = isinstance(error, StorageInternalError) and error.__cause__ is not None
    return error.__cause__ if is_wrapped and error.__cause__ is not None else error
