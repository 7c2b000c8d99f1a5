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

from optuna_nnhp import METRICS
from optuna_nnhp import cli
from optuna_nnhp import closing_report
from optuna_nnhp import optimize


def tune(options: argparse.Namespace) -> None:
    """Run the study, save the model, and sum up."""
    name = Path(options.file).stem or "table"
    options.storage = options.storage or f"{name}.journal"
    result = optimize(
        "dnn",
        options.file,
        target=options.target,
        task=options.task,
        metric=options.metric,
        **cli.study_arguments(options),
    )
    folder = result.save(options.out or f"{name}-model")
    print(closing_report(result, options.storage, {"model": f"{folder} (optuna_nnhp.load)"}))


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run the study; return the exit code."""
    parser = cli.study_parser(__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="the CSV file, with a header")
    add("--target", required=True, metavar="COLUMN", help="what to predict")
    add("--task", help="classification or regression (default: inferred from the target)")
    add("--metric", help=f"what judges a trial: {', '.join(METRICS)} (default: accuracy or rmse)")
    add("--out", help="folder for the best model (default: FILE's name with -model, here)")
    return cli.run_script(tune, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
