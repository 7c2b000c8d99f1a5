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

from optuna_nnhp import PRESETS
from optuna_nnhp import cli
from optuna_nnhp import closing_report
from optuna_nnhp import optimize

TIMEOUT = 120.0  # seconds
TOKENS = 300  # that the best model writes


def tune(options: argparse.Namespace) -> None:
    """Run the study, save the model, let it write, and sum up."""
    name = (Path(options.files[0]).stem or "text") if options.files else "python_help"
    options.storage = options.storage or f"{name}.journal"
    given = {"seconds": options.seconds, "tokens": options.tokens}
    result = optimize(
        "gpt",
        [Path(file) for file in options.files] or None,
        preset=options.preset,
        fixed={name: value for name, value in given.items() if value is not None},
        **cli.study_arguments(options),
    )
    folder = result.save(options.out or f"{name}-model")
    report = closing_report(result, options.storage, {"model": f"{folder} (optuna_nnhp.load)"})
    try:
        print(result.generate(options.prompt, tokens=TOKENS), end="\n\n")
    except ValueError as error:
        raise ValueError(f"`--prompt` cannot be continued: {error}") from error
    finally:
        print(report)


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run the study; return the exit code."""
    parser = cli.study_parser(__doc__, timeout=TIMEOUT)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", help="text files or folders (default: Python's help)")
    add("--seconds", type=float, help="training of a trial (default: a tenth of the timeout)")
    add("--tokens", help="char, byte or bpe (default: char for small alphabets, else byte)")
    add("--preset", help=f"begin with a published recipe, on this scale: {', '.join(PRESETS)}")
    add("--prompt", help="what the best model continues (default: a new line)")
    add("--out", help="folder for the best model (default: FILE's name with -model, here)")
    return cli.run_script(tune, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
