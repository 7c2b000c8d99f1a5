"""Optuna's own tests of a storage, on those that need a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna.testing.pytest_storages import StorageTestCase
import pytest

from optuna_nnhp.storages.buffered import BufferedStorage
from tests.storages.test_outages import Place


@pytest.fixture(params=["postgresql", "grpc"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BufferedStorage]:
    backend: BaseStorage = Place(request.param, tmp_path, request).open()
    yield BufferedStorage(backend)
    if isinstance(backend, optuna.storages.RDBStorage):
        backend.engine.dispose()


class TestContract(StorageTestCase):
    """Optuna's own tests of a storage."""
