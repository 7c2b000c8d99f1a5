"""The configuration that a study of GPTs begins with, by the time and the text there are."""

from __future__ import annotations

from optuna_nnhp.hyperparameters.record import Value

# What the measurements in tests/benchmarks/LOG.md came to, on two cores of a CPU.
SHORT, MIDDLE = 9.0, 20.0  # seconds of training: two and three layers see more text, up to here
OFTEN = 10.0  # passes over the text from which dropout pays
TOKENS_PER_SECOND = 80_000  # of four layers of width 64

COMMON: dict[str, Value] = {
    "learning_rate_decay": "linear",
    "warmup": 0.0,
    "final_fraction": 1e-2,
    "momentum": 0.95,
    "squared_decay": 0.99,
    "weight_decay": 1e-7,
    "clip_norm": 100.0,
    "dropout": 0.005,
}


def defaults_for(seconds: float, characters: int) -> dict[str, Value]:
    """Values that differ from the catalogue's defaults.

    Args:
        seconds:
            A trial's budget of training.
        characters:
            Of the training part.

    Example:
        >>> defaults_for(3.0, 10**6)["layers"], defaults_for(100.0, 10**6)["context"]
        (2, 128)
    """
    values = dict(COMMON)
    if seconds <= MIDDLE:
        values |= {"layers": 2 if seconds <= SHORT else 3}
    else:
        values |= {"context": 128, "batch_tokens": 1536}
    if seconds * TOKENS_PER_SECOND > OFTEN * characters:
        values |= {"dropout": 0.1}
    return values
