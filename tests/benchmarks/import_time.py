"""Measure how long `import optuna_nnhp` takes beside the packages that every user has anyway.

    python -m tests.benchmarks.import_time --repeats 15

Each import runs in a new process; the two sides take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
import statistics
import subprocess
import sys
import time

from tests.benchmarks.common import paired
from tests.benchmarks.common import take_turns
from tests.benchmarks.common import write_json

REPEATS = 15
SIDES = {
    "torch + optuna + pandas": "import torch, optuna, pandas",
    "optuna_nnhp": "import optuna_nnhp",
}


def seconds_of(code: str) -> Callable[[], float]:
    """Return a function that runs code in a new process and returns the seconds."""

    def measure() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return measure


def main(argv: list[str] | None = None) -> int:
    """Measure both sides and print their medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(argv)
    times = take_turns({name: seconds_of(code) for name, code in SIDES.items()}, options.repeats)
    base, ours = times.values()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = paired(ours, base)
    for name, value in medians.items():
        print(f"{name:25s}{value:7.3f} s")
    print(f"{'ratio':25s}{ratio:7.3f}")
    write_json(options.json, {"seconds": medians, "ratio": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
