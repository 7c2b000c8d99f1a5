"""Write a command-line script around `optimize`: common options, one-line errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
import sys
from typing import Any

from optuna.exceptions import OptunaError

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.search.methods import METHODS

EXIT_ERROR = 2
STUDY_OPTIONS = ("timeout", "n_trials", "method", "storage", "study_name", "seed", "workers")


def study_parser(
    description: str | None, *, storage: str | None = None, timeout: float = 60.0
) -> argparse.ArgumentParser:
    """Make a parser with the options that every study has.

    These are ``--timeout``, ``--n-trials``, ``--method``, ``--storage``, ``--study-name``,
    ``--seed`` and ``--workers``; add those of your script.

    Args:
        description:
            Text of ``--help``, usually the script's ``__doc__``.
        storage:
            Default of ``--storage``; None if the script chooses one.
        timeout:
            Seconds to search if neither ``--timeout`` nor ``--n-trials`` is given.

    Example:
        >>> options = study_parser("Tune.", storage="a.journal").parse_args(["--seed", "3"])
        >>> options.seed, options.storage, study_arguments(options)["timeout"]
        (3, 'a.journal', 60.0)
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(default_timeout=timeout)
    add = parser.add_argument
    add(
        "--timeout",
        type=float,
        help=f"seconds to search (default {timeout:g}, or no limit with --n-trials)",
    )
    add("--n-trials", type=int, help="end when the study has this many trials")
    add(
        "--method",
        default="bayes",
        help=f"how to search: {', '.join(METHODS)} (default %(default)s)",
    )
    add(
        "--storage",
        default=storage,
        help="journal file or database URL to keep the study in (default "
        f"{storage or 'a journal file named after the data'})",
    )
    add("--study-name", help="name in the storage (default: from the data and the metric)")
    add("--seed", type=int, default=0, help="seed of everything (default %(default)s)")
    add("--workers", type=int, default=1, help="processes that share the study (default 1)")
    return parser


def study_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `optimize` that the options of `study_parser` stand for.

    Args:
        options:
            What the parser has read.

    Example:
        >>> study_arguments(study_parser(None).parse_args(["--n-trials", "9"]))["timeout"]
    """
    arguments = {name: getattr(options, name) for name in STUDY_OPTIONS}
    if options.timeout is None and options.n_trials is None:
        arguments["timeout"] = options.default_timeout
    return {**arguments, "show_progress_bar": True}


def run_script(script: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a script, and print an error as one line without passwords.

    Args:
        script:
            Its work.
        options:
            What it is called with.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.

    Example:
        >>> run_script(lambda options: None, argparse.Namespace())
        0
    """
    try:
        script(options)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError, OptunaError) as error:
        storage = getattr(options, "storage", None) or ""
        print(f"error: {hide_passwords(error, storage)}", file=sys.stderr)
        return EXIT_ERROR
    return 0
