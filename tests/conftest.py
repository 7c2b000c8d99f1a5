from __future__ import annotations

from collections.abc import Iterator
import importlib.util
import os
from pathlib import Path

import optuna
import pytest
import torch

from optuna_nnhp.engine.library import ENGINE_VARIABLE
from tests.postgresql import postgresql as postgresql
from tests.postgresql import postgresql_server as postgresql_server


@pytest.fixture(params=["c", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine that computes networks on the CPU: the test runs once with each."""
    name: str = request.param
    if name == "c" and not is_engine_built() and "CI" not in os.environ:
        pytest.skip("the compiled engine has not been built")
    monkeypatch.setenv(ENGINE_VARIABLE, name)
    return name


def is_engine_built() -> bool:
    """Return whether the compiled engine is there."""
    return importlib.util.find_spec("optuna_nnhp.engine._mlp_engine") is not None


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Torch's global generator starts each test from the same seed."""
    torch.manual_seed(0)


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
