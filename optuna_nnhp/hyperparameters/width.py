"""Neurons per hidden layer: the width, and how it changes with depth."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution

from optuna_nnhp.hyperparameters.spec import Hyperparameter

# Tuned widths on 86 tables: quartiles 320, 592, 800 with an upper bound of 1024 (same source as
# in depth.py); smaller widths suit small tables and slow computers.
WIDTH = Hyperparameter(
    name="width",
    distribution=IntDistribution(16, 1024, log=True),
    default=256,
    grid_values=(32, 64, 128, 256, 512),
    domain=(1, 65536),
    task="table",
    help="Neurons of the first hidden layer. Trials are stacked if their widths round up to "
    "the same power of two.",
)
WIDTH_SHAPE = Hyperparameter(
    name="width_shape",
    distribution=CategoricalDistribution(("constant", "funnel")),
    default="constant",
    grid_values=("constant", "funnel"),
    task="table",
    inactive_if={"hidden_layers": (1,)},
    help="constant: all hidden layers have `width` neurons; funnel: widths decrease linearly to "
    "a quarter at the last hidden layer.",
)
FUNNEL_MIN_RATIO = 0.25


def layer_widths(width: int, shape: str, hidden_layers: int) -> list[int]:
    """Return the number of neurons of each hidden layer.

    Example:
        >>> layer_widths(128, "constant", 3)
        [128, 128, 128]
        >>> layer_widths(128, "funnel", 4)
        [128, 96, 64, 32]
    """
    if shape == "constant" or hidden_layers == 1:
        return [width] * hidden_layers
    slope = (1 - FUNNEL_MIN_RATIO) / (hidden_layers - 1)
    return [max(1, round(width * (1 - slope * layer))) for layer in range(hidden_layers)]


def padded_width(width: int) -> int:
    """Return the width of a stack's layers: the next power of two, at least 16.

    Trials of different widths share a stack. The units beyond a trial's own width stay zero, so
    padding does not change its results (see `networks.mlp.StackedMLP`).

    Example:
        >>> padded_width(100), padded_width(128), padded_width(3)
        (128, 128, 16)
    """
    return max(16, 1 << (width - 1).bit_length())


def scale_width_to_octave(width: int, padded: int) -> int:
    """Scale a width by a power of two into ``(padded / 2, padded]``.

    So a trial with any proposed width can join an existing stack; the ratio of the width to its
    padded width is kept.

    Example:
        >>> (
        ...     scale_width_to_octave(100, 512),
        ...     scale_width_to_octave(700, 64),
        ...     scale_width_to_octave(20, 16),
        ... )
        (400, 44, 10)
    """
    if padded_width(width) == padded:
        return width
    power_of_two = 1 << (width - 1).bit_length()
    return max(padded // 2 + 1, round(width * padded / power_of_two))
