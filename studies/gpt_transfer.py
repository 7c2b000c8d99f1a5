"""Tune a narrow GPT, train a wide one with what was found, and compare with tuning wide.

    python studies/gpt_transfer.py input.txt --timeout 300

Under muP (Yang et al. 2022, arXiv:2203.03466) the best learning rate of a narrow network is that
of a wide one. Both ways get the same seconds: one tunes the rates at the narrow width, the other
at the wide one, where fewer trials fit in. Then each trains the wide network once, for as many
tokens, with the best rates it found. Without FILE Python's own documentation is the text.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
import sys
from typing import Any

from optuna.distributions import FloatDistribution

from optuna_nnhp import Result
from optuna_nnhp import optimize

TIMEOUT = 240.0  # seconds of each of the two searches
NARROW, WIDE = 64, 256
TOKENS = 200_000  # that a trial trains on
FINAL_TOKENS = 400_000  # that both wide networks are trained on at last
SPACE = {
    "learning_rate": FloatDistribution(5e-4, 0.1, log=True),
    "embedding_rate": FloatDistribution(0.3, 10.0, log=True),
}
FIXED: dict[str, Any] = {
    **{"layers": 2, "context": 64, "batch_tokens": 768},
    **{"optimizer": "adamw", "muon_learning_rate": 0.02, "parametrization": "mup"},
    **{"momentum": 0.9, "beta2": 0.99, "clip_norm": math.inf},
    **{"learning_rate_decay": "linear", "warmup": 0.05, "min_lr_ratio": 0.01},
    **{"dropout": 0.0, "weight_decay": 0.0},
}
SEED = 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", help="text files or folders (default: Python's help)")
    add("--timeout", type=float, default=TIMEOUT, help="seconds of each of the two searches")
    add("--narrow", type=int, default=NARROW, help=f"width to tune at (default {NARROW})")
    add("--wide", type=int, default=WIDE, help=f"width to train at (default {WIDE})")
    add("--train-tokens", type=int, default=TOKENS, help="of a trial")
    add("--final-tokens", type=int, default=FINAL_TOKENS, help="of the two last trainings")
    add("--seed", type=int, default=SEED, help=f"seed of everything (default {SEED})")
    return parser.parse_args(argv)


def settings(options: argparse.Namespace, width: int, tokens: int) -> dict[str, Any]:
    """What is not tuned, at a width; the same for both ways."""
    return FIXED | {"width": width, "base_width": options.narrow, "train_tokens": tokens}


def source(options: argparse.Namespace) -> list[Path] | None:
    """The text."""
    return [Path(file) for file in options.files] or None


def search(options: argparse.Namespace, width: int) -> Result:
    """Tune the rates at a width."""
    return optimize(
        "gpt",
        source(options),
        space=SPACE,
        fixed=settings(options, width, options.train_tokens),
        timeout=options.timeout,
        storage=None,
        seed=options.seed,
        show_progress_bar=True,
    )


def train_wide(options: argparse.Namespace, rates: dict[str, Any]) -> float:
    """Bits per byte of the wide network with some rates."""
    fixed = settings(options, options.wide, options.final_tokens) | rates
    result = optimize(
        "gpt", source(options), fixed=fixed, n_trials=1, storage=None, seed=options.seed
    )
    return result.best_value


def main(argv: list[str] | None = None) -> int:
    """Search twice, train twice, compare."""
    options = parse(argv)
    try:
        lines = []
        for width in (options.narrow, options.wide):
            found = search(options, width)
            value = train_wide(options, found.best_params)
            rates = ", ".join(f"{name}={rate:.3g}" for name, rate in found.best_params.items())
            lines.append(
                f"tuned at width {width:4d}: {len(found.study.trials):3d} trials, {rates}; "
                f"width {options.wide} then comes to {value:.4f} bits per byte"
            )
        print("\n".join(lines))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
