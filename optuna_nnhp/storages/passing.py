"""The part of a storage around another one that concerns studies as a whole."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import suppress
import threading
from typing import Any

import optuna
from optuna import Study
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial

from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.operations import json_copy

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

ABOUT_STUDIES = (
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
)


class PassingStorage(BaseStorage, BaseHeartbeat):
    """Hands what concerns studies as a whole, and heartbeats, to another storage.

    While that does not answer, questions get the last answer, and attributes wait.

    Args:
        backend:
            Any Optuna storage.

    Attributes:
        notes: Attributes of studies that are not written yet, by study id, kind and key.
    """

    def __init__(self, backend: BaseStorage) -> None:
        self.backend = backend
        self.notes: dict[tuple[int, str, str], Any] = {}
        self._lock = threading.RLock()
        self._reach = CircuitBreaker(str(getattr(backend, "url", "")))
        self._answers: dict[tuple[str, Any], Any] = {}

    def _know(self, name: str, of: Any) -> Any:
        """What the backend's method says, or has said when it could last be asked."""
        with self._lock:
            try:
                answer = self._reach.ask(lambda: getattr(self.backend, name)(of))
            except StorageUnavailable:
                if (name, of) not in self._answers:
                    raise
                return self._answers[name, of]
            self._answers[name, of] = answer
            return answer

    def name_of(self, study_id: int) -> str:
        """A study's name, without asking if it is known.

        Raises:
            StorageUnavailable: If it is not known, and the storage does not answer.
        """
        if ("get_study_name_from_id", study_id) in self._answers:
            return str(self._answers["get_study_name_from_id", study_id])
        for (question, name), answer in self._answers.items():
            if question == "get_study_id_from_name" and answer == study_id:
                return str(name)
        return self.get_study_name_from_id(study_id)

    def _note(self, kind: str, study_id: int, key: str, value: Any) -> None:
        """Write an attribute of a study, or keep it for later."""
        with self._lock:
            if not self._reach.may_try:
                self.notes[study_id, kind, key] = json_copy(value)
                return
            write = getattr(self.backend, f"set_study_{kind}_attr")
            try:
                self._reach.ask(lambda: write(study_id, key, value), writes=True)
            except StorageUnavailable:
                self.notes[study_id, kind, key] = json_copy(value)
            else:
                self.notes.pop((study_id, kind, key), None)

    def send_notes(self) -> None:
        """Write the attributes of studies that wait.

        Raises:
            StorageUnavailable: If they must wait on.
        """
        with self._lock:
            for (study_id, kind, key), value in list(self.notes.items()):
                write = getattr(self.backend, f"set_study_{kind}_attr")
                try:
                    self._reach.ask(lambda: write(study_id, key, value), writes=True)  # noqa: B023
                except KeyError:
                    _logger.warning(f"The attribute {key!r} is of a study that is no more.")
                del self.notes[study_id, kind, key]

    def _attributes(self, kind: str, study_id: int) -> dict[str, Any]:
        with self._lock:
            known = self._know(f"get_study_{kind}_attrs", study_id)
            waiting = {
                key: value
                for (study, which, key), value in self.notes.items()
                if (study, which) == (study_id, kind)
            }
            return {**known, **waiting} if waiting else known

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """As the backend."""
        study_id = self._reach.ask(
            lambda: self.backend.create_new_study(directions, study_name),
            writes=True,
            again=study_name is not None,
        )
        if study_name is not None:
            self._answers["get_study_id_from_name", study_name] = study_id
        return study_id

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """As the backend, as soon as it answers."""
        self._note("user", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """As the backend, as soon as it answers."""
        self._note("system", study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """As the backend."""
        return int(self._know("get_study_id_from_name", study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """As the backend."""
        return str(self._know("get_study_name_from_id", study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """As the backend."""
        return list(self._know("get_study_directions", study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """As the backend, with what waits."""
        return self._attributes("user", study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """As the backend, with what waits."""
        return self._attributes("system", study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """As the backend."""
        with self._lock:
            return self._reach.ask(self.backend.get_all_studies)

    def record_heartbeat(self, trial_id: int) -> None:
        """As the backend, if it answers."""
        backend = self.backend
        if isinstance(backend, BaseHeartbeat):
            with suppress(StorageUnavailable):
                self._reach.ask(lambda: backend.record_heartbeat(trial_id), writes=True)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        backend = self.backend
        if isinstance(backend, BaseHeartbeat):
            return self._reach.ask(lambda: backend._get_stale_trial_ids(study_id))
        return []

    def get_heartbeat_interval(self) -> int | None:
        """As the backend, None if it has no heartbeat."""
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend.get_heartbeat_interval()
        return None

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None] | None:
        """As the backend, None if it has no heartbeat."""
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend.get_heartbeat_stale_trial_callback()
        return None
