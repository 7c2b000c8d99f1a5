"""Helpers of the benchmarks: paired repeats, medians, GEMM peak, memory, JSON."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import UTC
from datetime import datetime
import json
import os
from pathlib import Path
import platform
import resource
import statistics
import sys
import time
from typing import Any

import torch

GEMM_SIZE = 1024  # of the square matrices whose product is taken for the peak


def take_turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure the sides in turns, so that a slow moment of the machine affects all of them.

    The first turn warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            measured = side()
            if turn:
                times[name].append(measured)
    return times


def paired(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def median(numbers: Sequence[float | None]) -> float | None:
    """Return the median of the numbers that are not None; None if all are."""
    known = [number for number in numbers if number is not None]
    return statistics.median(known) if known else None


def gemm_peak(size: int = GEMM_SIZE) -> Callable[[], float]:
    """Measure flops per second of a float32 product of two square matrices (sgemm).

    On as many threads as torch has by default: the whole machine, which is what a share of it
    is to mean, also where one of the sides computes on one thread.
    """
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)

    def measure() -> float:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return 2 * size**3 / (time.perf_counter() - start)

    return measure


def bmm_rate(k: int, batch: int, width: int, times: int = 20) -> Callable[[], float]:
    """Measure flops per second of a stack's hidden layer, ``(k, batch, width)`` times weights."""
    x, weights = torch.randn(k, batch, width), torch.randn(k, width, width)
    out = torch.empty(k, batch, width)

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(times):
            torch.bmm(x, weights, out=out)
        return times * 2 * k * batch * width**2 / (time.perf_counter() - start)

    return measure


def peak_memory() -> float:
    """Return the peak memory of this process in MiB.

    On Linux not by `getrusage`: its number is handed down to a new process by its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """Return the versions and the machine of a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
    }


def write_json(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write figures and machine as JSON, if a path is given."""
    if path is not None:
        text = json.dumps({"machine": machine(), **record}, indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
