from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from tests.postgresql import postgresql as postgresql
from tests.postgresql import postgresql_server as postgresql_server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements are kept out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """Scripts quieten Optuna for their whole process; not for the next test."""
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Lines that the package logs; Optuna's root logger does not propagate to pytest's."""
    logger = optuna.logging.get_logger("optuna")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
