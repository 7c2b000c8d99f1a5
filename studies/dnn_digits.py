"""Tune a network on handwritten digits, in about a minute.

The data are the 1,797 images of 8 x 8 grey pixels that come with scikit-learn, ten classes.
A fifth of them is put aside before the study and used once, at the end: what the best trial
reaches there is the honest figure. Run it again to continue the study for another minute.
"""

from __future__ import annotations

import argparse
import sys

from optuna.exceptions import OptunaError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from optuna_nnhp import optimize
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.inspect.report import closing_report
from optuna_nnhp.search import METHODS

TIMEOUT = 60.0  # seconds
STORAGE = "dnn_digits.journal"
METRIC = "accuracy"
METHOD = "bayes"
TEST_SHARE = 0.2
SEED = 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, help=f"seconds to search (default {TIMEOUT:g})"
    )
    parser.add_argument(
        "--n-trials", type=int, help="end when the study has this many trials (default: no limit)"
    )
    parser.add_argument(
        "--method", default=METHOD, help=f"how to search: {', '.join(METHODS)} (default {METHOD})"
    )
    parser.add_argument(
        "--storage",
        default=STORAGE,
        help=f"journal file or database URL to keep the study in (default {STORAGE})",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"seed of everything (default {SEED})"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the study and sum it up."""
    options = parse(argv)
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(
        X, y, test_size=TEST_SHARE, stratify=y, random_state=options.seed
    )
    try:
        result = optimize(
            "dnn",
            X,
            y,
            metric=METRIC,
            timeout=options.timeout,
            n_trials=options.n_trials,
            method=options.method,
            storage=options.storage,
            seed=options.seed,
            show_progress_bar=True,
        )
        test = {f"{METRIC} on the {len(y_test)} digits put aside": result.score(X_test, y_test)}
        print(closing_report(result, options.storage, test))
    except (ValueError, OSError, RuntimeError, OptunaError) as error:
        print(f"error: {hide_passwords(error, options.storage)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
