"""All methods with the same seconds, on digits and on a regression, and what each comes to.

    python studies/compare_methods.py --timeout 8 --seeds 4

Three parts; each says whether what is claimed of the methods holds, with the numbers:

- methods: every method on the default space of the networks for tables, with the same seconds.
  A grid takes levels of six hyperparameters, all else at its default, and the part of it that
  fits into the time, spread over it. One study runs after the other; with every seed another
  method begins, so that a machine that gets slower does so for all. Two studies before, which
  are not counted, warm up; the measurements of cohort sizes are a part of each study, as on a
  new machine. No method is to be worse than random, and zoom and bayes are to be better.
  As in every study, random, zoom, bayes, bayes-gp and evolution begin with the template's own
  first configurations, the others with the default one alone or a point of their grid.
- gradient: from a learning rate of 1e-5 and of 1, with all else at its default, one run along
  the gradient is to come within 2 % of the validation loss of the best of eight rates.
- population: with what can change while a network trains, a population is to beat the best of
  as many fixed schedules, in the same number of model-epochs, on one data set at least.

A model-epoch is one network's pass over the training part; the twins along a gradient count as
the networks that they are, the generations of a population once. The data are the digits of
scikit-learn, judged by log loss since accuracy has too few steps to tell methods apart, and
Friedman's first regression (2,000 rows, noise 1), by rmse. A fifth is put aside before each
study; the column `unseen` is what the best model reaches there. The whole takes about twelve
minutes on two cores.
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

if not __package__:  # run as a file: what it is made of is found from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies.comparison import gradient
from studies.comparison import methods
from studies.comparison import population
from studies.comparison.data import DATA
from studies.comparison.data import METRIC
from studies.comparison.data import OTHER_METRIC
from studies.comparison.data import load
from studies.comparison.figure import figure_of
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
    told = f"seconds of each study of the first part (default {TIMEOUT:g})"
    add("--timeout", "--seconds", type=float, default=TIMEOUT, metavar="SECONDS", help=told)
    add("--seeds", type=int, default=SEEDS, help=f"how many, from 0 on (default {SEEDS})")
    add("--epochs", type=int, default=EPOCHS, help=f"of a trial, at most (default {EPOCHS})")
    for name, known in (("parts", PARTS), ("methods", tuple(METHODS)), ("data", DATA)):
        told = f"some of {','.join(known)} (default: all)"
        add(f"--{name}", default=",".join(known), metavar="NAMES", help=told)
    told = f"what judges trials on the digits (default {METRIC})"
    add("--metric", choices=(METRIC, OTHER_METRIC), default=METRIC, help=told)
    add("--figure", type=Path, default=Path(FIGURE), help=f"where to write it (default {FIGURE})")
    told = f"where to write it; the other parts' stand beside it (default {TABLE})"
    add("--table", type=Path, default=Path(TABLE), help=told)
    options = parser.parse_args(argv)
    for name, known in (("parts", PARTS), ("methods", tuple(METHODS)), ("data", DATA)):
        setattr(options, name, _names(name, getattr(options, name), known))
    if options.seeds < 1:
        raise ValueError(f"`--seeds` must be at least 1, but got {options.seeds}.")
    return options


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names from a list with commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"`--{option}` must be of {', '.join(known)}, but got {name!r}.")
    return names


def part_methods(options: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """The first part, and its figure."""
    fixed = {"epochs": options.epochs}
    for method in methods.WARM_UP:
        data = load(options.data[0], 0, options.metric)
        methods.run(data, method, 0, options.timeout, fixed=fixed)
    runs: methods.Runs = []
    plan = list(methods.turns(options.data, options.methods, options.seeds))
    with tqdm(plan, desc="methods", unit="study") as bar:
        for name, method, seed in bar:
            bar.set_postfix_str(f"{method} on {name}, seed {seed}")
            data = load(name, seed, options.metric)
            runs.append(methods.run(data, method, seed, options.timeout, fixed=fixed))
    figure_of(runs, options.timeout).write_html(options.figure, include_plotlyjs=True)
    return methods.table_of(runs), methods.claims(runs)


def part_gradient(options: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """The second part."""
    found: list[gradient.GradientRun] = []
    plan = [(seed, name) for seed in range(options.seeds) for name in options.data]
    for seed, name in tqdm(plan, desc="gradient", unit="sweep"):
        found += gradient.descents(load(name, seed, options.metric), seed, options.epochs)
    return gradient.table_of(found), gradient.claims(found)


def part_population(options: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """The third part."""
    runs: methods.Runs = []
    plan = [(seed, name) for seed in range(options.seeds) for name in options.data]
    for seed, name in tqdm(plan, desc="population", unit="pair"):
        runs += population.both(load(name, seed, options.metric), seed, options.epochs)
    return population.table_of(runs), population.claims(runs)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, write their tables and the figure, and say what holds."""
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
