"""Budget, signal handling, time by section and progress bar of a study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
import math
import signal
import threading
import time
from types import FrameType
from types import TracebackType

from tqdm import tqdm

REDRAW_EVERY = 0.1  # seconds


@dataclass
class Budget:
    """Limit a study by number of trials and by time.

    Args:
        n_trials:
            Trials of the whole study, those of earlier calls included; None for no bound.
        timeout:
            Seconds of this call; None for no bound.
        interrupted:
            Whether SIGINT was received: running trials end with their current values.
        released:
            Whether SIGTERM was received: running trials are requeued.
        workers:
            Processes that share the trials: each starts at most its share of the remaining ones.

    Example:
        >>> Budget(n_trials=10, timeout=None).n_trials_left(finished=7)
        3
    """

    n_trials: int | None
    timeout: float | None
    interrupted: bool = False
    released: bool = False
    workers: int = 1
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def interrupt(self) -> None:
        """End the study as on SIGINT."""
        self.interrupted = True

    def release(self) -> None:
        """End the study as on SIGTERM."""
        self.released = True

    def set_timeout(self, seconds: float | None) -> None:
        """Change the limit on the seconds of this call."""
        self.timeout = seconds

    def out_of_time(self) -> bool:
        """Return whether running trials must stop at once."""
        return self.interrupted or (self.timeout is not None and self.seconds >= self.timeout)

    def is_over(self) -> bool:
        """Return whether no more trials start."""
        return self.released or self.out_of_time()

    @property
    def seconds_left(self) -> float:
        """Seconds until the timeout, infinite without one."""
        return math.inf if self.timeout is None else self.timeout - self.seconds

    def n_trials_left(self, finished: int) -> int | None:
        """Return how many trials may still start in this process; None if unlimited."""
        if self.n_trials is None:
            return None
        return math.ceil(max(0, self.n_trials - finished) / self.workers)


@contextmanager
def graceful_shutdown(budget: Budget, *, releases: bool = True) -> Iterator[None]:
    """End the study tidily on the first Ctrl-C or SIGTERM, and at once on the second.

    Only the main thread can catch signals; in another one nothing changes.

    Args:
        budget:
            Receives the signals' flags.
        releases:
            Whether SIGTERM requeues trials; otherwise it acts like Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore_handlers() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request_stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT or not releases:
            budget.interrupt()
        else:
            budget.release()
        restore_handlers()

    for number in before:
        signal.signal(number, request_stop)
    try:
        yield
    finally:
        restore_handlers()


class ProgressBar:
    """Show progress, the best value and the number of running trials in one line.

    Args:
        show:
            Whether to show it.
        budget:
            Trials if it counts trials, else seconds.
        finished:
            Trials finished before this call.
    """

    def __init__(self, show: bool, budget: Budget, finished: int) -> None:
        self._budget, self._drawn = budget, 0.0
        total = budget.n_trials if budget.n_trials is not None else budget.timeout
        unit = "trials" if budget.n_trials is not None else "s"
        self._bar = tqdm(
            total=total,
            initial=min(finished, total or finished) if unit == "trials" else 0,
            disable=not show,
            bar_format="{percentage:3.0f}%|{bar:24}| {n:.0f}/{total:.0f} {unit}{postfix}",
            unit=unit,
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, finished: int, running: int, best: float | None) -> None:
        """Redraw at most ten times a second."""
        if time.monotonic() - self._drawn < REDRAW_EVERY and running:
            return
        self._drawn = time.monotonic()
        done = finished if self._budget.n_trials is not None else self._budget.seconds
        self._bar.n = min(done, self._bar.total) if self._bar.total is not None else done
        text = f"best {best:.6g}" if best is not None else "no value yet"
        self._bar.set_postfix_str(f"{text}, {finished} trials done, {running} running")


class Timing:
    """Measure seconds by section; nested sections are not counted twice.

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
        """Add the time spent in the block to a section."""
        self._count()
        self._inside.append(section)
        try:
            yield
        finally:
            self._count()
            self._inside.pop()

    def move_seconds(self, source: str, target: str, seconds: float) -> None:
        """Move seconds from one section to another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def _count(self) -> None:
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now
