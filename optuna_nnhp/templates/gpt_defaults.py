"""The configuration that a study of GPTs begins with, by the time and the text there are."""

from __future__ import annotations

from optuna_nnhp.hyperparameters.record import Value

# What the measurements in tests/benchmarks/LOG.md came to, on two cores of a CPU.
SHORT = 5.0  # seconds of training: two layers see more text than four, up to here
LONG = 40.0  # from here on a longer context pays
OFTEN = 10.0  # passes over the text from which dropout pays

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
    if seconds <= SHORT:
        values |= {"layers": 2}
    if seconds >= LONG:
        values |= {"context": 128, "batch_tokens": 1536}
    # Some 60,000 tokens a second: what two cores came to at width 64.
    if seconds * 60_000 > OFTEN * characters:
        values |= {"dropout": 0.1}
    return values
