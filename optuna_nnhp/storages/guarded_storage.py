"""Calls a storage through a circuit breaker: studies as a whole, heartbeats, and waiting."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
import threading
import time
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from optuna_nnhp.storages._optuna_internals import BaseHeartbeat
from optuna_nnhp.storages._optuna_internals import FrozenStudy
from optuna_nnhp.storages._optuna_internals import stale_trial_ids
from optuna_nnhp.storages.circuit_breaker import CircuitBreaker
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.operations import json_round_trip
from optuna_nnhp.storages.write_buffer import Key
from optuna_nnhp.storages.write_buffer import StudyCache
from optuna_nnhp.storages.write_buffer import WriteBuffer

POLL_INTERVAL = 0.1  # seconds between checks whether waiting is to end
STUDY_QUERIES = (  # their last answers are used while the storage is unavailable
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
)


class GuardedStorage(BaseStorage, BaseHeartbeat):
    """Calls the backend through a circuit breaker, and uses its last answers in an outage.

    Attributes of studies are written at once. In an outage they join the pending operations.

    Args:
        backend:
            The storage.
        breaker:
            Guards all calls of the backend.
        buffer:
            The pending operations.
    """

    def __init__(self, backend: BaseStorage, breaker: CircuitBreaker, buffer: WriteBuffer) -> None:
        self.backend, self._breaker, self._buffer = backend, breaker, buffer
        self._lock = threading.RLock()
        self._last_answers: dict[tuple[str, Any], Any] = {}

    @abstractmethod
    def flush(self) -> Mapping[Key, Exception]:
        """Write the pending operations, if the storage answers, and return the rejections."""

    @property
    def is_available(self) -> bool:
        """Whether the storage has answered the last call; if not, writes wait."""
        return self._breaker.is_available

    def wait_until_available(
        self, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Try again until the storage answers, at first after a second, later every 30 s.

        Pending changes are written then.

        Args:
            seconds:
                Maximum time to wait.
            stop:
                Ends the waiting when it returns True.

        Returns:
            Whether the storage answers.
        """
        end = time.monotonic() + seconds
        while not self._breaker.is_available:
            if stop():
                return False
            if self._breaker.allows_call and self._probe():
                return True
            now = time.monotonic()
            if now >= end:
                return False
            time.sleep(max(0.0, min(POLL_INTERVAL, self._breaker.retry_at - now, end - now)))
        return True

    def _probe(self) -> bool:
        """Try to write everything; if there is nothing to write, ask for something."""
        self.flush()
        if self._breaker.is_available or not self._breaker.allows_call:
            return self._breaker.is_available
        cache = next(iter(self._buffer.studies.values()), None)
        try:
            with self._lock:
                if cache is None:
                    self._breaker.call(self.backend.get_all_studies)
                else:
                    self._buffer.sync(cache)
        except StorageUnavailable:
            return False
        return True

    def _write_through(self, name: str, *arguments: Any, retry: bool = True) -> Any:
        """Call a method of the backend that writes at once."""
        method = getattr(self.backend, name)
        return self._breaker.call(lambda: method(*arguments), writes=True, retry=retry)

    def _query_or_last_answer(self, name: str, argument: Any) -> Any:
        """Return the backend's answer, or its last one while it is unavailable."""
        with self._lock:
            try:
                answer = self._breaker.call(lambda: getattr(self.backend, name)(argument))
            except StorageUnavailable:
                if (name, argument) not in self._last_answers:
                    raise
                return self._last_answers[name, argument]
            self._last_answers[name, argument] = answer
            return answer

    def study_name(self, study_id: int) -> str:
        """Return a study's name, without a call of the backend if it is known.

        Raises:
            StorageUnavailable: If it is not known, and the storage does not answer.
        """
        if ("get_study_name_from_id", study_id) in self._last_answers:
            return str(self._last_answers["get_study_name_from_id", study_id])
        for (query, name), answer in self._last_answers.items():
            if query == "get_study_id_from_name" and answer == study_id:
                return str(name)
        return self.get_study_name_from_id(study_id)

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Create a study."""
        is_named = study_name is not None
        study_id = int(
            self._write_through("create_new_study", directions, study_name, retry=is_named)
        )
        if is_named:
            self._last_answers["get_study_id_from_name", study_name] = study_id
        return study_id

    def _set_study_attr(self, attr: StudyAttr) -> None:
        """Write an attribute of a study, or keep it until the storage is available."""
        with self._lock:
            key = attr.study_id, attr.kind, attr.key
            attr.value = self._buffer.adapter.as_stored(attr.value)
            try:
                (outcome,) = self._breaker.call(
                    lambda: self._buffer.adapter.apply([attr]), writes=True
                )
            except StorageUnavailable:
                attr.value = json_round_trip(attr.value)
                self._buffer.add_study_attr(attr)
                return
            self._buffer.pending.pop(key, None)
            if isinstance(outcome, Exception):
                raise outcome

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute of a study at once, or as soon as the storage is available."""
        self._set_study_attr(StudyAttr(study_id, "user", key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a system attribute of a study at once, or as soon as the storage is available."""
        self._set_study_attr(StudyAttr(study_id, "system", key, value))

    def _study_attrs(self, study_id: int, kind: str) -> dict[str, Any]:
        with self._lock:
            written = self._query_or_last_answer(f"get_study_{kind}_attrs", study_id)
            pending = {
                op.key: op.value
                for op in self._buffer.pending.values()
                if isinstance(op, StudyAttr) and (op.study_id, op.kind) == (study_id, kind)
            }
            return {**written, **pending} if pending else written

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's user attributes, with pending ones."""
        return self._study_attrs(study_id, "user")

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's system attributes, with pending ones."""
        return self._study_attrs(study_id, "system")

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return a study's id."""
        return int(self._query_or_last_answer("get_study_id_from_name", study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return a study's name."""
        return str(self._query_or_last_answer("get_study_name_from_id", study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return the directions of a study's objectives."""
        return list(self._query_or_last_answer("get_study_directions", study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies of the backend."""
        with self._lock:
            return self._breaker.call(self.backend.get_all_studies)

    def _fresh_study_cache(self, study_id: int) -> StudyCache:
        """Return a study's cache, fresh enough to read."""
        if study_id in self._buffer.studies:
            return self._buffer.study(study_id)
        return self._study_cache(study_id)

    def _study_cache(self, study_id: int) -> StudyCache:
        """Return a study's cache of any age, to add trials to it."""
        if study_id not in self._buffer.studies:
            self._buffer.study(study_id)
            for query in STUDY_QUERIES:
                self._query_or_last_answer(query, study_id)
        return self._buffer.studies[study_id]

    # --- Heartbeats ---

    def record_heartbeat(self, trial_id: int) -> None:
        """Record a heartbeat, if the backend has them and answers."""
        if isinstance(self.backend, BaseHeartbeat):
            with suppress(StorageUnavailable):
                self._write_through("record_heartbeat", trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        backend = self.backend
        if isinstance(backend, BaseHeartbeat):
            return self._breaker.call(lambda: stale_trial_ids(backend, study_id))
        return []

    def get_heartbeat_interval(self) -> int | None:
        """Return the backend's heartbeat interval, None if it has no heartbeat."""
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend.get_heartbeat_interval()
        return None

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None] | None:
        """Return the backend's callback for stale trials, None if it has no heartbeat."""
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend.get_heartbeat_stale_trial_callback()
        return None
