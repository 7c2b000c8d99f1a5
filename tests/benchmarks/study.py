"""Whole studies: `optimize("dnn")` against plain Optuna on the same data, space and seconds.

    python -m tests.benchmarks.study --json study.json
    python -m tests.benchmarks.study --pruning-effect --data digits

Plain Optuna is the loop of `plain.py`. Each side runs alone, in a process of its own; which one
is first changes from seed to seed. The table shows medians over the repeats, each with another
seed, and the ratios within a repeat. A model-epoch is one network's pass over the training part.
The time to plain Optuna's final best value counts from the call, the preparation of the data
included: until Optuna was *told* of a trial with such a value, and until such a value was first
*seen* in a trial that became COMPLETE. Where it was not reached, the whole time stands for it.
Shares are of the whole call; asking and bookkeeping are what a study costs beside training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
import statistics
import sys
from typing import Any

from tests.benchmarks.common import gemm_peak
from tests.benchmarks.common import median
from tests.benchmarks.common import take_turns
from tests.benchmarks.common import write_json
from tests.benchmarks.ours import ours
from tests.benchmarks.plain import plain
from tests.benchmarks.sides import DATA
from tests.benchmarks.sides import Settings
from tests.benchmarks.sides import Side

Figures = dict[str, float | None]
Runner = Callable[[Callable[[Settings], Side], Settings], Side]
TIMEOUT, TRIALS, EPOCHS = 120.0, 100, 50
GEMM_REPEATS = 5


def apart(side: Callable[[Settings], Side], settings: Settings) -> Side:
    """Run a side in a new process: nothing of the other one is in memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(side, settings).result()


def here(side: Callable[[Settings], Side], settings: Settings) -> Side:
    """Run a side in this process."""
    return side(settings)


@dataclass(frozen=True)
class Run:
    """Both sides with one seed."""

    seed: int
    plain: Side
    ours: Side
    gemm: float  # flops per second, beside them

    def figures(self) -> Figures:
        """Return the figures of which medians are taken."""
        figures: Figures = {"gemm": self.gemm}
        for name, side in (("plain", self.plain), ("ours", self.ours)):
            figures |= {f"{label}.{name}": getattr(side, label) for label in COUNTED}
            figures[f"rate.{name}"] = side.epochs / side.seconds
            for way in ("told", "seen"):
                figures[f"{way}.{name}"] = self._time_to_best(side, way)
        figures["rate.ratio"] = _ratio(figures["rate.ours"], figures["rate.plain"])
        for way in ("told", "seen"):
            ours = figures[f"{way}.ours"] if self.reached(way) else self.ours.seconds
            figures[f"{way}.ratio"] = _ratio(figures[f"{way}.plain"], ours)
        sections = self.ours.sections
        shares = {n: sections.get(n, 0.0) / self.ours.seconds for n in SECTIONS}
        figures |= {f"share.{name}": share for name, share in shares.items()}
        figures["share.beside training"] = shares["asking"] + shares["bookkeeping"]
        return figures | {"occupancy": self.ours.occupancy}

    def reached(self, way: str) -> bool:
        """Return whether our side reached plain Optuna's final best value."""
        return self._time_to_best(self.ours, way) is not None

    def _time_to_best(self, side: Side, way: str) -> float | None:
        best = self.plain.best
        return None if best is None else side.reached(getattr(side, way), best)


COUNTED = (
    *("seconds", "finished", "complete", "pruned", "cut_short", "failed"),
    *("epochs", "best", "peak_mib", "start_mib"),
)
SECTIONS = ("asking", "training", "bookkeeping")
ROWS = (  # of the table: title, key, format
    ("seconds", "seconds", ".1f"),
    ("trials finished", "finished", ".0f"),
    ("  of them pruned", "pruned", ".0f"),
    ("trials cut short", "cut_short", ".0f"),
    ("trials failed", "failed", ".0f"),
    ("model-epochs", "epochs", ".0f"),
    ("model-epochs per second", "rate", ".1f"),
    ("best {metric}, validation", "best", ".4f"),
    ("seconds to plain's best, told", "told", ".1f"),
    ("seconds to plain's best, seen", "seen", ".1f"),
    ("peak memory, MiB", "peak_mib", ".0f"),
    ("  of it before the call", "start_mib", ".0f"),
)


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def compare(settings: Settings, run: Runner) -> Run:
    """Run both sides one after the other, and measure the GEMM peak in between."""
    sides = [("plain", plain), ("ours", ours)]
    ran, peaks = dict[str, Side](), list[float]()
    for name, side in sides if settings.seed % 2 == 0 else sides[::-1]:
        ran[name] = run(side, settings)
        peaks += take_turns({"gemm": gemm_peak()}, GEMM_REPEATS)["gemm"]
    return Run(settings.seed, ran["plain"], ran["ours"], statistics.median(peaks))


def medians(runs: list[Run]) -> Figures:
    """Median of each figure over the repeats."""
    each = [run.figures() for run in runs]
    return {key: median([figures[key] for figures in each]) for key in each[0]}


def _cell(number: float | None, form: str) -> str:
    return f"{'-' if number is None else format(number, form):>14s}"


def table(data: str, runs: list[Run], figures: Figures) -> str:
    """One data set's figures as text."""
    lines = [
        f"{data + f' ({len(runs)} repeats)':34s}{'plain Optuna':>14s}{'ours':>14s}{'ratio':>14s}"
    ]
    for title, key, form in ROWS:
        cells = _cell(figures[f"{key}.plain"], form) + _cell(figures[f"{key}.ours"], form)
        if f"{key}.ratio" in figures:
            cells += _cell(figures[f"{key}.ratio"], ".2f")
        lines.append(f"{title.format(metric=runs[0].plain.metric):34s}{cells}")
    missed = sum(not run.reached("told") for run in runs)
    if missed:
        lines.append(f"plain's best value not reached in {missed} of {len(runs)} repeats")
    shares = {name: figures[f"share.{name}"] for name in (*SECTIONS, "beside training")}
    shares["occupancy"] = figures["occupancy"]
    lines.append("ours: " + ", ".join(f"{n} {_cell(s, '.1%').strip()}" for n, s in shares.items()))
    lines.append(f"GEMM peak: {(figures['gemm'] or 0) / 1e9:.0f} GFLOP/s")
    return "\n".join(lines)


def compare_all(options: argparse.Namespace, run: Runner) -> dict[str, Any]:
    """All data sets; prints a table for each."""
    record: dict[str, Any] = {"data": {}}
    ratios: dict[str, list[float]] = {"told": [], "seen": []}
    for data in options.data:
        base = settings_of(options, data)
        base = replace(base, timeout=options.timeout, trials=options.trials)
        seeds = range(options.seed, options.seed + options.repeats)
        runs = [compare(replace(base, seed=seed), run) for seed in seeds]
        figures = medians(runs)
        print(table(data, runs, figures), end="\n\n")
        told = [asdict(r) | {"reached": r.reached("told")} for r in runs]
        record["data"][data] = {"medians": figures, "runs": told}
        for way, found in ratios.items():
            ratio = figures[f"{way}.ratio"]
            found += [] if ratio is None else [ratio]
    for way, found in ratios.items():
        mean = statistics.geometric_mean(found) if found else None
        record[f"geometric mean of {way} ratios"] = mean
        label = f"time to plain's best, {way}, geometric mean over {len(found)} data sets:"
        print(f"{label:62s}{_cell(mean, '.2f')}")
    return record


def pruning_effect(options: argparse.Namespace, run: Runner) -> dict[str, Any]:
    """The same number of random trials with the default pruner and without one.

    Only what is asked at the same moment is the same on both sides: when trials end is what
    decides whom the next ones are stacked with.
    """
    record: dict[str, Any] = {"data": {}}
    print(f"{'':24s}{'best':>12s}{'unpruned':>12s}{'epochs':>12s}{'unpruned':>12s}{'share':>9s}")
    for data in options.data:
        runs, shares = list[dict[str, Any]](), list[float]()
        for seed in range(options.seed, options.seed + options.repeats):
            base = settings_of(options, data)
            base = replace(base, seed=seed, trials=options.trials or TRIALS, method="random")
            pruned, whole = run(ours, base), run(ours, replace(base, pruning=False))
            share = pruned.epochs / whole.epochs
            shares.append(share)
            runs.append({"pruned": asdict(pruned), "unpruned": asdict(whole), "share": share})
            cells = f"{_cell(pruned.best, '.4f')[2:]}{_cell(whole.best, '.4f')[2:]}"
            cells += f"{pruned.epochs:12.0f}{whole.epochs:12.0f}{share:9.2f}"
            print(f"{data + ', seed ' + str(seed):24s}{cells}")
        record["data"][data] = {"runs": runs, "share of epochs": statistics.median(shares)}
    return record


def settings_of(options: argparse.Namespace, data: str) -> Settings:
    """What all runs on one data set have in common."""
    return Settings(
        data,
        target=options.target,
        epochs=options.epochs,
        storage=options.storage,
        threads=options.plain_threads,
        kept_sizes=options.kept_sizes,
    )


def arguments() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--timeout", type=float, default=TIMEOUT, help="seconds for each side")
    add("--data", default="all", help=f"{', '.join(DATA)}, all, or the path of a CSV file")
    add("--target", help="column of the CSV file that is to be predicted")
    add("--repeats", type=int, default=1, help="each with the next seed")
    add("--seed", type=int, default=0, help="of the first repeat")
    add("--epochs", type=int, default=EPOCHS, help="of a trial, at most")
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    storages = ("journal", "sqlite", "memory")
    add("--storage", choices=storages, default="journal", help="of ours; plain: memory")
    add("--plain-threads", type=int, help="torch's threads in plain Optuna, else its default")
    add("--kept-sizes", action="store_true", help="ours knows cohort sizes measured earlier")
    add("--pruning-effect", action="store_true", help="ours with and without pruning, instead")
    add("--trials", type=int, help=f"at most; --pruning-effect: so many, {TRIALS} if not given")
    add("--one-process", action="store_true", help="quicker to start; memory means nothing then")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and write the same as JSON."""
    parser = arguments()
    options = parser.parse_args(argv)
    options.data = DATA if options.data == "all" else (options.data,)
    if options.data[0] not in DATA and options.target is None:
        parser.error("a CSV file needs its --target.")
    run = here if options.one_process else apart
    record = (pruning_effect if options.pruning_effect else compare_all)(options, run)
    asked = {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items()}
    write_json(options.json, {"arguments": asked, **record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
