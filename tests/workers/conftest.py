from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
import multiprocessing

import pytest

from tests.tiny import ENVIRONMENT


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Yield one process pool for all tests; each process takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(4, mp_context=context) as executor:
            yield executor
