"""Tune a network on a CSV file of your own.

    python studies/dnn_csv.py houses.csv --target price --timeout 120

The file needs a header; columns may be numbers, texts, booleans or dates, and may have gaps.
Text targets (or few whole numbers) make a classification, other numbers a regression. A fifth
of the rows judges the trials. The best model is saved: `optuna_nnhp.load(folder).predict(table)`.
Run the same line again to continue the same study.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import sys

from optuna.exceptions import OptunaError

from optuna_nnhp import optimize
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.inspect.report import closing_report
from optuna_nnhp.search import METHODS
from optuna_nnhp.training.metrics import METRICS

TIMEOUT = 60.0  # seconds, if neither --timeout nor --n-trials is given
METHOD = "bayes"
SEED = 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="the CSV file, with a header")
    parser.add_argument("--target", required=True, metavar="COLUMN", help="what to predict")
    parser.add_argument(
        "--task",
        help="classification or regression, if the target leaves it open (default: inferred)",
    )
    parser.add_argument(
        "--metric",
        help=f"what judges a trial: {', '.join(METRICS)} (default: accuracy or rmse)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        help=f"seconds to search (default {TIMEOUT:g} unless --n-trials is given)",
    )
    parser.add_argument("--n-trials", type=int, help="end when the study has this many trials")
    parser.add_argument(
        "--method", default=METHOD, help=f"how to search: {', '.join(METHODS)} (default {METHOD})"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that share the study (default 1)"
    )
    parser.add_argument(
        "--storage", help="journal file or database URL (default: FILE's name with .journal, here)"
    )
    parser.add_argument(
        "--study-name", help="name in the storage (default: from the data and the metric)"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"seed of everything (default {SEED})"
    )
    parser.add_argument(
        "--out", help="folder for the best model (default: FILE's name with -model, here)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the study, save the model, and sum up."""
    options = parse(argv)
    name = Path(options.file).stem or "table"
    storage = options.storage or f"{name}.journal"
    timeout = TIMEOUT if options.timeout is None and options.n_trials is None else options.timeout
    try:
        result = optimize(
            "dnn",
            options.file,
            target=options.target,
            task=options.task,
            metric=options.metric,
            timeout=timeout,
            n_trials=options.n_trials,
            method=options.method,
            storage=storage,
            study_name=options.study_name,
            seed=options.seed,
            show_progress_bar=True,
            workers=options.workers,
        )
        folder = result.save(options.out or f"{name}-model")
        print(closing_report(result, storage, {"model": f"{folder} (optuna_nnhp.load)"}))
    except (ValueError, OSError, RuntimeError, OptunaError) as error:
        print(f"error: {hide_passwords(error, storage)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
