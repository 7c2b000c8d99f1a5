"""Tune a small GPT on a text of your own.

    python studies/gpt_text.py input.txt --timeout 300

Takes a file, several files or a folder; without any, Python's own documentation. The last tenth
of the text judges the trials by bits per byte. The first trial is a good configuration for the
time there is; the others look for a better one. At the end the best model writes a few lines, and
is saved: `optuna_nnhp.load(folder).generate("Once")`. The same line again continues the study.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import sys
from typing import Any

from optuna.exceptions import OptunaError

from optuna_nnhp import optimize
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.inspect.report import closing_report
from optuna_nnhp.search import METHODS
from optuna_nnhp.templates.presets import PRESETS

TIMEOUT = 120.0  # seconds, if neither --timeout nor --n-trials is given
METHOD = "bayes"
SEED = 0
TOKENS = 300  # that the best model writes


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", help="text files or folders (default: Python's help)")
    add("--timeout", type=float, help=f"seconds to search (default {TIMEOUT:g})")
    add("--n-trials", type=int, help="end when the study has this many trials")
    add("--seconds", type=float, help="training of a trial (default: a tenth of the timeout)")
    add("--tokens", help="char, byte or bpe (default: char for small alphabets, else byte)")
    add("--preset", help=f"begin with a published recipe, on this scale: {', '.join(PRESETS)}")
    add("--method", default=METHOD, help=f"how to search: {', '.join(METHODS)}")
    add("--prompt", help="what the best model continues (default: a new line)")
    add("--storage", help="journal file or database URL (default: FILE's name with .journal)")
    add("--study-name", help="name in the storage (default: from the data)")
    add("--seed", type=int, default=SEED, help=f"seed of everything (default {SEED})")
    add("--out", help="folder for the best model (default: FILE's name with -model, here)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the study, save the model, and sum up."""
    options = parse(argv)
    name = (Path(options.files[0]).stem or "text") if options.files else "python_help"
    storage = options.storage or f"{name}.journal"
    timeout = TIMEOUT if options.timeout is None and options.n_trials is None else options.timeout
    wishes = {"seconds": options.seconds, "tokens": options.tokens}
    fixed: dict[str, Any] = {n: value for n, value in wishes.items() if value is not None}
    try:
        result = optimize(
            "gpt",
            [Path(file) for file in options.files] or None,
            preset=options.preset,
            fixed=fixed,
            timeout=timeout,
            n_trials=options.n_trials,
            method=options.method,
            storage=storage,
            study_name=options.study_name,
            seed=options.seed,
            show_progress_bar=True,
        )
        folder = result.save(options.out or f"{name}-model")
        report = closing_report(result, storage, {"model": f"{folder} (optuna_nnhp.load)"})
    except (ValueError, OSError, RuntimeError, OptunaError, ModuleNotFoundError) as error:
        print(f"error: {hide_passwords(error, storage)}", file=sys.stderr)
        return 2
    code = 0
    try:
        print(result.generate(options.prompt, tokens=TOKENS), end="\n\n")
    except ValueError as error:
        print(f"error: `--prompt` cannot be continued: {error}", file=sys.stderr)
        code = 2
    print(report)
    return code


if __name__ == "__main__":
    sys.exit(main())
