"""What all workers of a study are told, and how each comes to know that it shall end."""

from __future__ import annotations

from collections.abc import Mapping
import os
import threading
import time
from uuid import uuid4

import optuna
from optuna import Study
from optuna.trial import FrozenTrial

from optuna_nnhp.study.budget import Budget

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

CONTROL_KEY = (
    "optuna_nnhp:control"  # system attribute of a study: the last thing its workers are told
)
STOP, INTERRUPT, RELEASE = "stop", "interrupt", "release"
PARENT_CHECK_INTERVAL = 1.0  # seconds: how often a worker looks whether its parent is there
# How often it reads what it is told: seconds, and more for each worker, since all of them read.
MESSAGE_CHECK_INTERVAL, MESSAGE_CHECK_INTERVAL_PER_WORKER = 2.0, 0.02


def send_control_message(study: Study, what: str) -> str:
    """Tell all workers of a study something; the mark by which they know it from what was before.

    Args:
        study:
            The study.
        what:
            `STOP`: no more trials. `INTERRUPT` or `RELEASE`: as on SIGINT or SIGTERM.
    """
    mark = uuid4().hex
    study._storage.set_study_system_attr(
        study._study_id, CONTROL_KEY, {"what": what, "mark": mark}
    )
    return mark


def last_control_message_id(study: Study) -> str | None:
    """The mark of the last thing that a study's workers were told."""
    return dict(_read(study)).get("mark")


def _read(study: Study) -> Mapping[str, str]:
    attributes = study._storage.get_study_system_attrs(study._study_id)
    return dict(attributes.get(CONTROL_KEY, {}))


class ShutdownWatcher:
    """Sees to it that a worker ends when it should.

    That is when its parent is gone, or when all workers are told so, which it does itself when
    the study is stopped here: it is a callback.

    Args:
        study:
            The opened study.
        budget:
            How long.
        last_message_id:
            What workers had been told before, see `last_control_message_id`.
        workers:
            How many there are.
        parent:
            Number of the process without which it ends, if there is one.
    """

    def __init__(
        self,
        study: Study,
        budget: Budget,
        last_message_id: str | None = None,
        workers: int = 1,
        parent: int | None = None,
    ) -> None:
        self._study, self._budget, self._last_message_id = study, budget, last_message_id
        self._message_check_interval, self._parent = (
            MESSAGE_CHECK_INTERVAL + MESSAGE_CHECK_INTERVAL_PER_WORKER * workers,
            parent,
        )
        self._is_stopped = False
        self._over = threading.Event()

    def __enter__(self) -> ShutdownWatcher:
        self._check()
        self._thread = threading.Thread(target=self._poll, name="optuna_nnhp-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def __call__(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the others that the study is stopped; a callback of it."""
        if study._stop_flag and not self._is_stopped:
            self._is_stopped = True
            self._last_message_id = send_control_message(study, STOP)

    def _poll(self) -> None:
        due = time.monotonic() + self._message_check_interval
        while not self._over.wait(PARENT_CHECK_INTERVAL):
            if self._parent is not None and os.getppid() != self._parent:
                self._budget.released = True
            if self._is_stopped:  # a loop that has just begun may have forgotten it
                self._study._stop_flag = True
            if time.monotonic() >= due:
                self._check()
                due = time.monotonic() + self._message_check_interval

    def _check(self) -> None:
        """Read what all workers are told."""
        try:
            said = _read(self._study)
        except Exception as error:  # drivers raise types of their own, and a storage comes back
            _logger.debug(f"What workers are told could not be read: {type(error).__name__}")
            return
        if not said or said["mark"] == self._last_message_id:
            return
        self._last_message_id, what = said["mark"], said["what"]
        if what == STOP:
            self._is_stopped = self._study._stop_flag = True
        elif what == INTERRUPT:
            self._budget.interrupted = True
        else:
            self._budget.released = True
