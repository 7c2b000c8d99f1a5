"""Measure what a team brings: two threads that share the steps of one large network.

    python -m tests.benchmarks.team

"alone" trains the same network without a team. In "team" two threads share its steps where the
engine would let them, which it does for a cohort of one; the rows with more members show what the
divided sums cost where there is no team. Both sides take turns; the table shows the medians of
microseconds per network and step, and of the ratios alone / team (above 1: the team is faster).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import statistics
import sys
from unittest import mock

from optuna_nnhp.engine import mlp
from tests.benchmarks.common import paired
from tests.benchmarks.common import take_turns
from tests.benchmarks.steps import Shape
from tests.benchmarks.steps import as_shape
from tests.benchmarks.steps import microseconds
from tests.benchmarks.steps import stacked

SHAPES = (
    *(Shape(256, 3, 128, k) for k in (1, 8)),
    *(Shape(128, 2, 64, 1), Shape(256, 2, 64, 1), Shape(512, 3, 128, 1)),
)
STEPS = 40  # of one repeat
REPEATS = 15


def side(shape: Shape, steps: int, min_team_flops: float) -> Callable[[], float]:
    """Return a function that trains one round and returns the microseconds of a step."""
    with mock.patch.object(mlp, "MIN_TEAM_FLOPS", min_team_flops):
        return microseconds(stacked(shape, steps, vary=False))


def measure(shape: Shape, steps: int, repeats: int) -> tuple[float, float, float]:
    """Return the medians of both sides and of their ratio."""
    sides = {
        "alone": side(shape, steps, float("inf")),
        "team": side(shape, steps, mlp.MIN_TEAM_FLOPS),
    }
    times = take_turns(sides, repeats)
    alone, team = times["alone"], times["team"]
    return statistics.median(alone), statistics.median(team), paired(alone, team)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", type=as_shape, default=SHAPES, metavar="WIDTHxLAYERS/BATCH:K"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns, after one to warm up")
    options = parser.parse_args(argv)
    print(f"{'':28s}{'alone':>9s}{'team':>9s}{'ratio':>7s}")
    for shape in options.shapes:
        alone, team, ratio = measure(shape, options.steps, options.repeats)
        print(f"{shape!s:28s}{alone:9.1f}{team:9.1f}{ratio:7.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
