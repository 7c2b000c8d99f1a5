from __future__ import annotations

from collections.abc import Iterator
import logging

import pytest


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Lines of the package from INFO on; Optuna's root logger does not propagate to pytest's."""
    logger = logging.getLogger("optuna.optuna_nnhp.data")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    # With both handlers in the chain a line would count twice.
    propagate, logger.propagate = logger.propagate, False
    yield caplog
    logger.propagate = propagate
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)
