"""Send control messages to all workers of a study, and stop a worker when it must end."""

from __future__ import annotations

from collections.abc import Mapping
import os
import threading
import time
from uuid import uuid4

import optuna
from optuna import Study
from optuna.trial import FrozenTrial

from optuna_nnhp.study._optuna_internals import is_stopped
from optuna_nnhp.study._optuna_internals import stop
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.study.budget import Budget

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

CONTROL_KEY = "optuna_nnhp:control"  # system attribute of a study: the last control message
STOP, INTERRUPT, RELEASE = "stop", "interrupt", "release"
PARENT_CHECK_INTERVAL = 1.0  # seconds between two checks whether the parent process exists
# Seconds between two reads of the control message. Every worker reads, so it grows with each one.
MESSAGE_CHECK_INTERVAL, MESSAGE_CHECK_INTERVAL_PER_WORKER = 2.0, 0.02


def send_control_message(study: Study, command: str) -> str:
    """Send a command to all workers of a study.

    Args:
        study:
            The study.
        command:
            `STOP`: start no more trials. `INTERRUPT` or `RELEASE`: end as on SIGINT or SIGTERM.

    Returns:
        The message's id, by which workers tell it from earlier messages.
    """
    message = {"command": command, "id": uuid4().hex}
    storage_of(study).set_study_system_attr(study_id(study), CONTROL_KEY, message)
    return message["id"]


def last_control_message_id(study: Study) -> str | None:
    """Return the id of the last control message of a study; None if there is none."""
    return _read_control_message(study).get("id")


def _read_control_message(study: Study) -> Mapping[str, str]:
    """Return the last control message of a study; empty if there is none."""
    attributes = storage_of(study).get_study_system_attrs(study_id(study))
    return dict(attributes.get(CONTROL_KEY, {}))


class ShutdownWatcher:
    """Ends a worker when its parent process is gone or a control message tells it to.

    It is also a callback of the study: when the study is stopped in this process, it sends a
    `STOP` message to the other workers.

    Args:
        study:
            The opened study.
        budget:
            Budget of this worker, through which it ends.
        last_message_id:
            Id of the last message before this worker started, see `last_control_message_id`.
        n_workers:
            Number of workers of the study.
        parent:
            Process id of the parent; None if the worker does not depend on one.
    """

    def __init__(
        self,
        study: Study,
        budget: Budget,
        last_message_id: str | None = None,
        n_workers: int = 1,
        parent: int | None = None,
    ) -> None:
        self._study, self._budget, self._parent = study, budget, parent
        self._last_message_id = last_message_id
        self._interval = MESSAGE_CHECK_INTERVAL + MESSAGE_CHECK_INTERVAL_PER_WORKER * n_workers
        self._is_stopped = False
        self._exiting = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="optuna_nnhp-shutdown-watcher", daemon=True
        )

    def __enter__(self) -> ShutdownWatcher:
        self._check_message()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._exiting.set()
        self._thread.join()

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Send `STOP` to the other workers once the study is stopped here."""
        if is_stopped(study) and not self._is_stopped:
            self._is_stopped = True
            self._last_message_id = send_control_message(study, STOP)

    def _watch(self) -> None:
        """Check the parent process and the control message until the worker ends."""
        next_check = time.monotonic() + self._interval
        while not self._exiting.wait(PARENT_CHECK_INTERVAL):
            if self._parent is not None and os.getppid() != self._parent:
                self._budget.release()
            if self._is_stopped:  # a tuner that starts after the message resets the flag
                stop(self._study)
            if time.monotonic() >= next_check:
                self._check_message()
                next_check = time.monotonic() + self._interval

    def _check_message(self) -> None:
        """Read the control message and obey it if it is new."""
        try:
            message = _read_control_message(self._study)
        except Exception as error:  # drivers raise their own types; the storage may come back
            _logger.debug(f"Could not read the control message: {type(error).__name__}")
            return
        if not message or message["id"] == self._last_message_id:
            return
        self._last_message_id = message["id"]
        if message["command"] == STOP:
            self._is_stopped = True
            stop(self._study)
        elif message["command"] == INTERRUPT:
            self._budget.interrupt()
        else:
            self._budget.release()
