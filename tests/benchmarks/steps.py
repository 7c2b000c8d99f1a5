"""Step times of a cohort against loops that train one network after the other.

    python -m tests.benchmarks.steps --json steps.json

"loader" is the loop of Optuna's own PyTorch example: a `DataLoader` and plain Adam. "loop" is a
competent one: data in memory and torch's fused AdamW. "bare" is a cohort, an epoch of the same
data with its evaluation; "varied" is a cohort in which every hyperparameter differs between the
members, dropout and clipping included. All sides take turns, each with torch's default threads;
the table shows medians: microseconds per network and step, the ratios of the loop's times to
them, and the shares of the GEMM peak that the arithmetic (6 flops per example and weight) is.
The peak is that of a large float32 product, "bmm" that of the shape's own hidden layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
import re
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from tests.benchmarks.common import bmm_rate
from tests.benchmarks.common import gemm_peak
from tests.benchmarks.common import paired
from tests.benchmarks.common import take_turns
from tests.benchmarks.common import write_json
from tests.members import CLASSES
from tests.members import FEATURES
from tests.members import PLAIN
from tests.members import task
from tests.members import varied


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    width: int
    layers: int
    batch: int
    k: int

    @property
    def sizes(self) -> list[int]:
        """Units of each layer, inputs and outputs included."""
        return [FEATURES, *[self.width] * self.layers, CLASSES]

    @property
    def flops(self) -> int:
        """Of one step of one network: forward, and backward to weights and to inputs."""
        return 6 * self.batch * sum(a * b for a, b in pairwise(self.sizes))

    def __str__(self) -> str:
        return f"{self.width} x {self.layers}, batch {self.batch}, k {self.k}"


SHAPES = (Shape(64, 2, 32, 64), Shape(64, 4, 16, 64), Shape(128, 2, 64, 32), Shape(256, 3, 128, 8))
STEPS = 20  # of one repeat
REPEATS = 7


def network_of(shape: Shape) -> nn.Sequential:
    """A single network."""
    parts: list[nn.Module] = []
    for a, b in pairwise(shape.sizes[:-1]):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(shape.width, CLASSES))


def loader_loop(shape: Shape, steps: int) -> Callable[[], int]:
    """One repeat of the loop as people write it; returns its steps."""
    network = network_of(shape)
    arrays = task(rows=shape.batch * steps).arrays
    data = TensorDataset(arrays.train_x, arrays.train_y)
    loader = DataLoader(data, batch_size=shape.batch, shuffle=True)
    optimizer = torch.optim.Adam(network.parameters())

    def repeat() -> int:
        network.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
        return len(loader)

    return repeat


def baseline(shape: Shape, steps: int) -> Callable[[], int]:
    """One repeat of the competent loop that trains a single network; returns its steps."""
    network = network_of(shape)
    stepper = torch.optim.AdamW(network.parameters(), fused=True)
    arrays = task(rows=shape.batch * steps).arrays

    def repeat() -> int:
        for rows in torch.randperm(len(arrays.train_y)).split(shape.batch):
            stepper.zero_grad()
            loss = nn.functional.cross_entropy(network(arrays.train_x[rows]), arrays.train_y[rows])
            loss.backward()
            stepper.step()
        return steps

    return repeat


def stacked(shape: Shape, steps: int, vary: bool) -> Callable[[], int]:
    """One repeat of a cohort; returns the steps of all its networks."""
    static: dict[str, Any] = {"width": shape.width, "hidden_layers": shape.layers}
    static |= {"batch_size": shape.batch, "epochs": 10**6, "width_shape": "constant"}
    plain = [Member(i, i, PLAIN | static) for i in range(shape.k)]
    members = varied(shape.k, **static) if vary else plain
    cohort = Cohort(members, task(rows=shape.batch * steps))

    def repeat() -> int:
        before = sum(cohort.iterations)
        cohort.train_round()
        return sum(cohort.iterations) - before

    return repeat


def microseconds(repeat: Callable[[], int]) -> Callable[[], float]:
    """Measures the time of one repeat per network and step."""

    def measure() -> float:
        start = time.perf_counter()
        steps = repeat()
        return (time.perf_counter() - start) / steps * 1e6

    return measure


def measure(shape: Shape, steps: int, repeats: int) -> dict[str, Any]:
    """Medians of all sides, which take turns, and of the ratios within a turn."""
    sides = {
        "loader": microseconds(loader_loop(shape, steps)),
        "loop": microseconds(baseline(shape, steps)),
        "bare": microseconds(stacked(shape, steps, vary=False)),
        "varied": microseconds(stacked(shape, steps, vary=True)),
        "gemm": gemm_peak(),
        "bmm": bmm_rate(shape.k, shape.batch, shape.width),
    }
    times = take_turns(sides, repeats)
    row: dict[str, Any] = {"shape": str(shape), "k": shape.k, "flops": shape.flops}
    row |= {name: statistics.median(t) for name, t in times.items()}
    for name in ("bare", "varied"):
        row[f"loop/{name}"] = paired(times["loop"], times[name])
        row[f"loader/{name}"] = paired(times["loader"], times[name])
        needed = [1e6 * shape.flops / peak for peak in times["gemm"]]  # microseconds at the peak
        row[f"{name} share of peak"] = paired(needed, times[name])
    return row


COLUMNS = (  # of the table: title, key, format, factor
    ("loader", "loader", "9.1f", 1),
    ("loop", "loop", "9.1f", 1),
    ("bare", "bare", "9.1f", 1),
    ("ratio", "loop/bare", "7.1f", 1),
    ("varied", "varied", "9.1f", 1),
    ("ratio", "loop/varied", "7.1f", 1),
    ("of peak: bare", "bare share of peak", "15.1%", 1),
    ("varied", "varied share of peak", "8.1%", 1),
    ("GFLOP/s: gemm", "gemm", "15.1f", 1e-9),
    ("bmm", "bmm", "7.1f", 1e-9),
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    wide = [int(form.split(".")[0]) for _, _, form, _ in COLUMNS]
    titles = [f"{column[0]:>{w}s}" for column, w in zip(COLUMNS, wide, strict=True)]
    lines = [f"{'':28s}" + "".join(titles)]
    for row in rows:
        cells = [f"{row[key] * factor:{form}}" for _, key, form, factor in COLUMNS]
        lines.append(f"{row['shape']:28s}" + "".join(cells))
    return "\n".join(lines)


def as_shape(text: str) -> Shape:
    """A shape as the command line names it."""
    match = re.fullmatch(r"(\d+)x(\d+)/(\d+):(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxLAYERS/BATCH:K, but got {text!r}.")
    return Shape(*map(int, match.groups()))


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write the same as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", type=as_shape, default=SHAPES, metavar="WIDTHxLAYERS/BATCH:K"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns, after one to warm up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    options = parser.parse_args(argv)
    rows = [measure(shape, options.steps, options.repeats) for shape in options.shapes]
    print(table(rows))
    write_json(options.json, {"steps": options.steps, "repeats": options.repeats, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
