"""Tune a network on handwritten digits, in about a minute.

The data are the 1,797 images of 8 x 8 grey pixels that come with scikit-learn, ten classes.
A fifth of them is put aside before the study and used once, at the end: what the best trial
reaches there is the honest figure. Run it again to continue the study for another minute.
"""

from __future__ import annotations

import argparse
import sys

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optuna_nnhp import cli
from optuna_nnhp import closing_report
from optuna_nnhp import optimize

METRIC = "accuracy"
TEST_SHARE = 0.2


def tune(options: argparse.Namespace) -> None:
    """Run the study and sum it up."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(
        X, y, test_size=TEST_SHARE, stratify=y, random_state=options.seed
    )
    result = optimize("dnn", X, y, metric=METRIC, **cli.study_arguments(options))
    test = {f"{METRIC} on the {len(y_test)} digits put aside": result.score(X_test, y_test)}
    print(closing_report(result, options.storage, test))


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run the study; return the exit code."""
    parser = cli.study_parser(__doc__, storage="dnn_digits.journal")
    return cli.run_script(tune, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
