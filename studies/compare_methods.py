"""Compare all methods with the same time, on digits and on a regression.

    python studies/compare_methods.py --timeout 8 --seeds 4

There are three parts. Each prints whether its claims about the methods hold, with the numbers:

- methods: all methods have the same seconds on the default space of networks on tables. The grid
  has levels of six hyperparameters, all others keep their defaults, and as many of its points as
  the time allows are visited, spread over the grid. The studies run one after the other; each
  seed starts with another method, so that a machine that becomes slower affects all methods.
  Two studies that are not counted warm the machine up. Each study measures its cohort sizes
  itself, as on a new machine. Claims: no method is worse than random; zoom and bayes are better.
  As in every study, random, zoom, bayes, bayes-gp and evolution start with the default
  configuration and the template's portfolio; the other methods start with the default alone or
  with a grid point.
- gradient: hypergradients start from a learning rate of 1e-5 and of 1, and all other parameters
  from their defaults. Claim: one run comes within 2 % of the validation loss of the best of eight
  constant rates.
- population: only parameters that can change during training are tuned. Claim: on at least one
  data set, a population is better than the best of as many fixed schedules in the same number of
  model-epochs.

A model-epoch is one pass of one network over the training part. Perturbed copies count as
networks of their own; what a member of a population inherits from its parent is counted once.
The data sets are the digits of scikit-learn, with log loss (accuracy takes too few values to
distinguish the methods), and Friedman's first regression (2,000 rows, noise 1), with rmse. A
fifth of the rows is split off before each study; the column `unseen` is the best model's score
on them. The whole comparison takes about twelve minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

import optuna
import pandas as pd
from tqdm import tqdm

from optuna_nnhp import METHODS

if not __package__:  # run as a file: import the other modules from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies.comparison import gradient
from studies.comparison import methods
from studies.comparison import population
from studies.comparison.data import DATA
from studies.comparison.data import METRIC
from studies.comparison.data import OTHER_METRIC
from studies.comparison.data import load
from studies.comparison.figure import plot_best_values
from studies.comparison.noise import RULE

TIMEOUT = 8.0  # seconds of each study of the first part
SEEDS = 4
EPOCHS = 50  # of a trial, at most
PARTS = ("methods", "gradient", "population")
FIGURE, TABLE = "compare_methods.html", "compare_methods.csv"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    shown = f"seconds of each study of the first part (default {TIMEOUT:g})"
    add("--timeout", "--seconds", type=float, default=TIMEOUT, metavar="SECONDS", help=shown)
    add("--seeds", type=int, default=SEEDS, help=f"number of seeds, from 0 on (default {SEEDS})")
    add("--epochs", type=int, default=EPOCHS, help=f"budget of a trial (default {EPOCHS})")
    for name, known in (("parts", PARTS), ("methods", tuple(METHODS)), ("data", DATA)):
        shown = f"some of {','.join(known)} (default: all)"
        add(f"--{name}", default=",".join(known), metavar="NAMES", help=shown)
    shown = f"metric of studies on the digits (default {METRIC})"
    add("--metric", choices=(METRIC, OTHER_METRIC), default=METRIC, help=shown)
    add("--figure", type=Path, default=Path(FIGURE), help=f"where to write it (default {FIGURE})")
    shown = f"where to write it; other parts have files beside it (default {TABLE})"
    add("--table", type=Path, default=Path(TABLE), help=shown)
    options = parser.parse_args(argv)
    for name, known in (("parts", PARTS), ("methods", tuple(METHODS)), ("data", DATA)):
        setattr(options, name, _names(name, getattr(options, name), known))
    if options.seeds < 1:
        raise ValueError(f"`--seeds` must be at least 1, but got {options.seeds}.")
    return options


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names in a comma-separated list, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"`--{option}` must be of {', '.join(known)}, but got {name!r}.")
    return names


def part_methods(options: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """Run the first part and write its figure."""
    fixed = {"epochs": options.epochs}
    for method in methods.WARM_UP:
        data = load(options.data[0], 0, options.metric)
        methods.run(data, method, 0, options.timeout, fixed=fixed)
    runs: methods.Runs = []
    plan = list(methods.run_order(options.data, options.methods, options.seeds))
    with tqdm(plan, desc="methods", unit="study") as bar:
        for name, method, seed in bar:
            bar.set_postfix_str(f"{method} on {name}, seed {seed}")
            data = load(name, seed, options.metric)
            runs.append(methods.run(data, method, seed, options.timeout, fixed=fixed))
    plot_best_values(runs, options.timeout).write_html(options.figure, include_plotlyjs=True)
    return methods.table_of(runs), methods.claims(runs)


def part_gradient(options: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """Run the second part."""
    found: list[gradient.GradientRun] = []
    plan = [(seed, name) for seed in range(options.seeds) for name in options.data]
    for seed, name in tqdm(plan, desc="gradient", unit="sweep"):
        found += gradient.run_gradients(load(name, seed, options.metric), seed, options.epochs)
    return gradient.table_of(found), gradient.claims(found)


def part_population(options: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """Run the third part."""
    runs: methods.Runs = []
    plan = [(seed, name) for seed in range(options.seeds) for name in options.data]
    for seed, name in tqdm(plan, desc="population", unit="pair"):
        runs += population.both(load(name, seed, options.metric), seed, options.epochs)
    return population.table_of(runs), population.claims(runs)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, write their tables and the figure, and print which claims hold."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run = {"methods": part_methods, "gradient": part_gradient, "population": part_population}
    said: list[str] = []
    try:
        options = parse(argv)
        for part in options.parts:
            table, claims = run[part](options)
            path: Path = options.table
            path = path if part == "methods" else path.with_stem(f"{path.stem}_{part}")
            table.to_csv(path, index=False)
            shown = table.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.5g}")
            print(f"{part}: {path}\n{shown}\n")
            said += claims
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([RULE, *(f"- {claim}" for claim in said)]))
    if "methods" in options.parts:
        print(f"figure: {options.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
