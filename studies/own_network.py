"""Tune a network of your own: here a small convolutional one, on handwritten digits.

The function `network` below is all there is to it: it takes the parameters of a trial and returns
a plain torch module. What it reads is tuned, beside everything that has to do with training
(optimizer, learning rate, batch size, ...). Trials whose networks have one structure are trained
as one stack. Copy this file and put your own function and data in.

The data are the 1,797 images of 8 x 8 grey pixels that come with scikit-learn. A fifth of them
is put aside before the study and used once, at the end: what the best trial reaches there is the
honest figure. Run it again to continue the study for another minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import sys
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from optuna_nnhp import cli
from optuna_nnhp import closing_report
from optuna_nnhp import optimize

METRIC = "accuracy"
TEST_SHARE = 0.2

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
SPACE = {
    "channels": IntDistribution(4, 32, log=True),
    "kernel": CategoricalDistribution((3, 5)),
    "blocks": IntDistribution(1, 2),
    "activation": CategoricalDistribution(tuple(ACTIVATIONS)),  # fewer than the catalogue's
}
FIXED = {"epochs": 20}


def network(params: Mapping[str, Any]) -> nn.Module:
    """Convolutions, each block with twice the channels on half the side.

    Args:
        params:
            All parameters of a trial: those of `SPACE`, and the catalogue's, such as ``dropout``.

    Shape:
        - Input of the network: ``(batch, 1, 8, 8)``; output: ``(batch, 10)``.
    """
    layers: list[nn.Module] = []
    channels, kernel, side = 1, params["kernel"], 8
    for block in range(params["blocks"]):
        wider = params["channels"] * 2**block
        layers += [
            nn.Conv2d(channels, wider, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(wider),
            ACTIVATIONS[params["activation"]](),
            nn.MaxPool2d(2),
        ]
        channels, side = wider, side // 2
    head = nn.Linear(channels * side * side, 10)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(params["dropout"]), head)


def tune(options: argparse.Namespace) -> None:
    """Run the study and sum it up."""
    X, y = load_digits(return_X_y=True)
    images = X.reshape(-1, 1, 8, 8) / 16  # from 0 to 1: arrays are taken as they are
    images, images_test, y, y_test = train_test_split(
        images, y, test_size=TEST_SHARE, stratify=y, random_state=options.seed
    )
    result = optimize(
        network=network,
        X=images,
        y=y,
        space=SPACE,
        fixed=FIXED,
        metric=METRIC,
        **cli.study_arguments(options),
    )
    score = result.score(images_test, y_test)
    test = {f"{METRIC} on the {len(y_test)} digits put aside": score}
    print(closing_report(result, options.storage, test))


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run the study; return the exit code."""
    parser = cli.study_parser(__doc__, storage="own_network.journal")
    return cli.run_script(tune, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
