"""Where a study's time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
import time


class Timing:
    """Seconds by section; a section within another one is not counted twice.

    Example:
        >>> timing = Timing()
        >>> with timing("telling"):
        ...     with timing("storage"):
        ...         pass
        >>> sorted(timing.seconds)
        ['storage', 'telling']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the time within for a section."""
        self._count()
        self._inside.append(section)
        try:
            yield
        finally:
            self._count()
            self._inside.pop()

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count some seconds of one section for another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def _count(self) -> None:
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now
