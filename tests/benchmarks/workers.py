"""Two workers at one thread each against one worker at one thread: model-epochs per second.

    python -m tests.benchmarks.workers --json workers.json

All trials have one shape and one budget, so that both sides do the same work, and each side runs
in a process of its own; they take turns. What counts is between the first end of a cohort after
all workers are at work and the last one, of each worker: starting a process, which takes seconds
once, and the end of a study, when one worker has nothing left to do, are not scaling. A
model-epoch is one network's pass over the training part. The bar is 1.8.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
import functools
from multiprocessing import get_context
from pathlib import Path
import statistics
import sys
from tempfile import TemporaryDirectory
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial
import torch

from optuna_nnhp import optimize
from tests.benchmarks.common import paired
from tests.benchmarks.common import take_turns
from tests.benchmarks.common import write_json
from tests.benchmarks.ours import storage_in
from tests.benchmarks.sides import Settings

SECONDS, REPEATS = 45.0, 5
SHAPE: dict[str, Any] = {
    **{"hidden_layers": 2, "width": 64, "batch_size": 32, "normalization": "none"},
    **{"patience": 10**6},
}


@dataclass(frozen=True)
class Note:
    """A callback that notes when a trial ended, by whom, and how many epochs it had."""

    path: Path

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.user_attrs.get("cause") != "finished":
            return
        with self.path.open("a") as file:
            who, epochs = trial.user_attrs["worker"], trial.user_attrs["epochs"]
            file.write(f"{time.time()} {who} {epochs}\n")


def rate(lines: list[str], workers: int) -> float:
    """Return the model-epochs per second of all workers together.

    Example:
        >>> rate(["0 a 5", "1 b 5", "2 a 5", "3 b 5", "4 a 5"], workers=2)
        5.0
    """
    ends: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        at, who, epochs = line.split()
        ends[who].append((float(at), float(epochs)))
    if len(ends) != workers:
        raise RuntimeError(f"All {workers} workers must end trials, but only {len(ends)} did.")
    begin = max(own[0][0] for own in ends.values())
    total = 0.0
    for own in ends.values():
        later = [(at, epochs) for at, epochs in own if at >= begin]
        first = later[0][0]  # a cohort's members end within milliseconds
        counted = [(at, epochs) for at, epochs in later if at > first + 0.05]
        if not counted:
            raise RuntimeError("Each worker must end two cohorts or more: give it more seconds.")
        total += sum(epochs for _, epochs in counted) / (counted[-1][0] - first)
    return total


def side(options: argparse.Namespace, workers: int) -> float:
    """Measure the model-epochs per second of workers with one thread each."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(workers)
    with TemporaryDirectory() as name:
        note = Note(Path(name) / "ends.txt")
        optimize(
            "dnn",
            **Settings(options.data).table(),
            fixed={**SHAPE, "epochs": options.epochs},
            timeout=options.timeout,
            method=options.method,
            pruner=optuna.pruners.NopPruner(),
            storage=storage_in(Path(name), options.storage),
            cohort_size=options.cohort_size,
            callbacks=[note],
            device="cpu",
            workers=workers,
        )
        return rate(note.path.read_text().splitlines(), workers)


def apart(options: argparse.Namespace, workers: int) -> float:
    """Measure the same in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(side, options, workers).result()


def arguments() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--timeout", type=float, default=SECONDS, help="seconds of each run")
    add("--repeats", type=int, default=REPEATS, help="pairs, beside a first one to warm up")
    add("--workers", type=int, default=2, help="of the larger side")
    add("--data", default="digits", help="digits, classes or regression")
    add("--epochs", type=int, default=50, help="of a trial")
    add("--cohort-size", type=int, default=32, help="trials that are trained at once")
    add("--method", default="random", help="how trials are proposed")
    add("--storage", choices=("journal", "sqlite"), default="journal", help="where the study is")
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the figures, and write the same as JSON."""
    options = arguments().parse_args(argv)
    many = f"{options.workers} workers"
    sides = {
        "1 worker": functools.partial(apart, options, 1),
        many: functools.partial(apart, options, options.workers),
    }
    times = take_turns(sides, options.repeats)
    ratio = paired(times[many], times["1 worker"])
    for name, rates in times.items():
        print(f"{name:12s}{statistics.median(rates):10.1f} model-epochs per second")
    each = [a / b for a, b in zip(times[many], times["1 worker"], strict=True)]
    print(f"{'ratio':12s}{ratio:10.2f} ({min(each):.2f} to {max(each):.2f})")
    asked = {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items()}
    write_json(options.json, {"arguments": asked, "rates": times, "ratio": ratio})
    return 0


if __name__ == "__main__":
    # By its name: what workers get must be found in this module by other processes.
    from tests.benchmarks import workers

    sys.exit(workers.main())
