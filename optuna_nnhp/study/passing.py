"""The part of a storage around another one that adds nothing of its own."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial


class PassingStorage(BaseStorage, BaseHeartbeat):
    """Hands what concerns studies as a whole, and heartbeats, to another storage.

    Args:
        backend:
            Any Optuna storage.
    """

    def __init__(self, backend: BaseStorage) -> None:
        self.backend = backend

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """As the backend."""
        return self.backend.create_new_study(directions, study_name)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """As the backend."""
        self.backend.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """As the backend."""
        self.backend.set_study_system_attr(study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """As the backend."""
        return self.backend.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """As the backend."""
        return self.backend.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """As the backend."""
        return self.backend.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """As the backend."""
        return self.backend.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """As the backend."""
        return self.backend.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """As the backend."""
        return self.backend.get_all_studies()

    def record_heartbeat(self, trial_id: int) -> None:
        """As the backend."""
        if isinstance(self.backend, BaseHeartbeat):
            self.backend.record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        if isinstance(self.backend, BaseHeartbeat):
            return self.backend._get_stale_trial_ids(study_id)
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
