"""Tells outages of a storage from errors, and when to call it again."""

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

FIRST_PAUSE, MAX_PAUSE = 1.0, 30.0  # seconds between attempts
# Errors that only a storage that answers raises.
ANSWERS = (KeyError, UpdateFinishedTrialError, DuplicatedStudyError)
MAX_REASON_LENGTH = 300  # characters
# SQLAlchemy's errors of a query, not of the database.
QUERY_ERRORS = ("IntegrityError", "DataError", "ProgrammingError", "NotSupportedError")
CONFLICTS = ("40001", "40P01")  # PostgreSQL: one of two conflicting transactions was cancelled


class StorageUnavailable(RuntimeError):
    """The storage does not answer, and nothing in memory can be used instead.

    The text says why, without any password. Try again later: see
    `BufferedStorage.wait_until_available`.
    """


class CircuitBreaker:
    """Calls a storage; after an outage it refuses calls until the next attempt is due.

    The pause before the next attempt doubles from 1 to 30 seconds. It does not sleep.

    Args:
        url:
            The storage's URL, so that its password can be hidden.

    Example:
        >>> breaker = CircuitBreaker()
        >>> breaker.call(lambda: 1 + 1)
        2
    """

    def __init__(self, url: str = "") -> None:
        self._url = url
        self._lock = threading.Lock()
        self._failures = 0
        self._outage_began, self._retry_at = 0.0, 0.0
        self._reason: str | None = None
        self._needs_write = False  # only a write can end the outage

    @property
    def is_available(self) -> bool:
        """Whether the last attempt was answered."""
        return self._reason is None

    @property
    def allows_call(self) -> bool:
        """Whether an attempt is due now."""
        return self._reason is None or time.monotonic() >= self._retry_at

    @property
    def retry_at(self) -> float:
        """Clock of the next attempt, seconds."""
        return self._retry_at

    def call(
        self, function: Callable[[], Answer], *, writes: bool = False, retry: bool = True
    ) -> Answer:
        """Call the storage.

        Args:
            function:
                Calls it.
            writes:
                Whether it writes. A full disk can be read: an outage found by a write ends only
                with a write.
            retry:
                Whether it may be called again at once if its connection was an old one.

        Raises:
            StorageUnavailable: If the storage does not answer, or the next attempt is not due.
        """
        if not self.allows_call:
            raise self._error()
        try:
            try:
                answer = function()
            except Exception as error:
                if not (retry and self.is_available and is_stale_connection(error)):
                    raise
                answer = function()
        except ANSWERS:
            self._record_success(writes)
            raise
        except Exception as error:
            if not is_outage(error):
                raise
            self._record_outage(error, writes)
        else:
            self._record_success(writes)
            return answer
        raise self._error()  # here, so that a driver's own text is not shown above it

    def _error(self) -> StorageUnavailable:
        return StorageUnavailable(f"The storage is unavailable: {self._reason}")

    def _record_success(self, writes: bool) -> None:
        if self.is_available:
            return
        with self._lock:
            if self.is_available or (self._needs_write and not writes):
                return
            seconds = time.monotonic() - self._outage_began
            self._reason, self._failures, self._needs_write = None, 0, False
        _logger.info(f"The storage is available again after {seconds:.0f} s.")

    def _record_outage(self, error: Exception, writes: bool) -> None:
        with self._lock:
            is_new, now = self.is_available, time.monotonic()
            self._reason = outage_reason(error, self._url)
            self._needs_write |= writes
            self._outage_began = now if is_new else self._outage_began
            pause = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures, 10))
            self._failures += 1
            self._retry_at = now + pause
        if is_new:
            _logger.warning(
                f"The storage is unavailable: {self._reason}. Running trials continue; their data "
                "is kept in memory and written later."
            )


def is_outage(error: BaseException) -> bool:
    """Return whether an error says that a storage is away, busy or full, not that a call is wrong.

    Example:
        >>> is_outage(OSError("No space left on device")), is_outage(KeyError("no such study"))
        (True, False)
    """
    cause = _cause(error)
    if isinstance(cause, OSError | StorageInternalError):
        return True
    # Code that raises one of these has imported its module; SQLAlchemy alone takes 0.3 s.
    if alchemy := sys.modules.get("sqlalchemy.exc"):
        if isinstance(cause, tuple(getattr(alchemy, name) for name in QUERY_ERRORS)):
            return _is_broken_connection(cause)
        is_database = isinstance(cause, alchemy.DBAPIError | alchemy.TimeoutError)
        if is_database or _is_broken_connection(cause):
            return True
    for module, name in (("grpc", "RpcError"), ("redis.exceptions", "RedisError")):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(cause, kind):
            return True
    # Optuna's lock of a journal, when another process has waited for it for too long.
    return isinstance(cause, RuntimeError) and "did not possess lock" in str(cause)


def is_stale_connection(error: BaseException) -> bool:
    """Return whether a second attempt may succeed: the connection was from before a restart."""
    cause = _cause(error)
    code = getattr(getattr(cause, "orig", None), "pgcode", None)
    return _is_broken_connection(cause) or code in CONFLICTS


def outage_reason(error: BaseException, url: str = "") -> str:
    """Return an outage's reason in one line without passwords.

    Args:
        error:
            The error.
        url:
            The storage's URL, if it is known.

    Example:
        >>> outage_reason(OSError("cannot open postgresql://me:secret@host/db\\nCheck the host."))
        'cannot open postgresql://me:***@host/db'
    """
    cause = _cause(error)
    text = str(cause)
    if callable(details := getattr(cause, "details", None)):  # gRPC's own text has many lines
        text = str(details() or text)
    line = first_line(text.strip() or type(cause).__name__, url)
    return line.rstrip(" .")[:MAX_REASON_LENGTH]


def _is_broken_connection(cause: BaseException) -> bool:
    """Return whether SQLAlchemy says that a connection is broken, or was in its last use."""
    is_follow_up = type(cause).__name__ == "PendingRollbackError"
    return is_follow_up or bool(getattr(cause, "connection_invalidated", False))


def _cause(error: BaseException) -> BaseException:
    """Return the error behind Optuna's own one, whose text fits anything."""
    is_wrapped = isinstance(error, StorageInternalError) and error.__cause__ is not None
    return error.__cause__ if is_wrapped and error.__cause__ is not None else error
