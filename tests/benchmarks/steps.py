"""Step times of a cohort against a competent loop that trains one network after the other.

    python -m tests.benchmarks.steps

The baseline is an in-memory loop with torch's fused AdamW. Both sides take turns; the table shows
medians in microseconds per network and step, and their ratio. "varied": every hyperparameter
differs between the members, dropout and clipping included.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from tests.members import CLASSES
from tests.members import FEATURES
from tests.members import PLAIN
from tests.members import task
from tests.members import varied

SHAPES = ((64, 2, 32, 64), (64, 4, 16, 64), (128, 2, 64, 32), (256, 3, 128, 8))
STEPS = 20  # of one repeat
REPEATS = 7


def baseline(width: int, layers: int, batch: int) -> Callable[[], None]:
    """One repeat of the loop that trains a single network."""
    sizes = [FEATURES] + [width] * layers
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b), nn.ReLU()]
    network = nn.Sequential(*parts, nn.Linear(width, CLASSES))
    stepper = torch.optim.AdamW(network.parameters(), fused=True)
    arrays = task(rows=batch * STEPS).arrays

    def repeat() -> None:
        for rows in torch.randperm(len(arrays.train_y)).split(batch):
            stepper.zero_grad()
            loss = nn.functional.cross_entropy(network(arrays.train_x[rows]), arrays.train_y[rows])
            loss.backward()
            stepper.step()

    return repeat


def stacked(width: int, layers: int, batch: int, k: int, vary: bool) -> Callable[[], None]:
    """One repeat of a cohort: an epoch of the same data, with its evaluation."""
    shape: dict[str, Any] = {"width": width, "hidden_layers": layers, "batch_size": batch}
    shape |= {"epochs": 10**6, "width_shape": "constant"}
    plain = [Member(i, i, PLAIN | shape) for i in range(k)]
    members = varied(k, **shape) if vary else plain
    cohort = Cohort(members, task(rows=batch * STEPS))

    def repeat() -> None:
        cohort.train_round()

    return repeat


def microseconds(repeat: Callable[[], None], networks: int) -> float:
    """Time of one repeat per network and step."""
    start = time.perf_counter()
    repeat()
    return (time.perf_counter() - start) / STEPS / networks * 1e6


def measure(width: int, layers: int, batch: int, k: int) -> dict[str, Any]:
    """Medians of all sides, which take turns."""
    sides = {
        "loop": (baseline(width, layers, batch), 1),
        "bare": (stacked(width, layers, batch, k, vary=False), k),
        "varied": (stacked(width, layers, batch, k, vary=True), k),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS + 1):
        for name, (repeat, networks) in sides.items():
            times[name].append(microseconds(repeat, networks))
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}  # first: warm-up
    return {"shape": f"{width} x {layers}, batch {batch}, k {k}", **medians}


def main() -> int:
    """Print the table, and the same as JSON."""
    rows = [measure(*shape) for shape in SHAPES]
    print(f"{'':28s}{'loop':>9s}{'bare':>9s}{'ratio':>7s}{'varied':>9s}{'ratio':>7s}")
    for row in rows:
        bare, vary = row["loop"] / row["bare"], row["loop"] / row["varied"]
        cells = f"{row['bare']:9.1f}{bare:7.1f}{row['varied']:9.1f}{vary:7.1f}"
        print(f"{row['shape']:28s}{row['loop']:9.1f}{cells}")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
