"""Default configuration of a study of GPTs, which depends on the time and the text."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution

from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.templates.presets import preset

# What the measurements in tests/benchmarks/LOG.md came to, on two cores of a CPU.
SHORT_TRIAL_SECONDS, MEDIUM_TRIAL_SECONDS = (
    9.0,
    20.0,
)  # seconds of training: two and three layers see more text, up to here
DROPOUT_EPOCHS = 10.0  # passes over the text from which dropout pays
TOKENS_PER_SECOND = 80_000  # of four layers of width 64
TOKENS_PER_STEP = 768  # about, where the budget is a number of steps

TRIAL_TIMEOUT_FRACTION = (
    0.1  # of the timeout: a trial's seconds of training, if nothing else is said
)
DEFAULT_TRIAL_SECONDS = 30.0  # without a timeout
BUDGET_NAMES = ("seconds", "train_tokens", "iterations")

NORMALIZATIONS = {"layer": "layer-gain"}  # of presets, which have gains

COMMON_DEFAULTS: dict[str, Value] = {
    "learning_rate_decay": "linear",
    "warmup": 0.0,
    "min_lr_ratio": 1e-2,
    "momentum": 0.95,
    "beta2": 0.99,
    "weight_decay": 1e-7,
    "clip_norm": 100.0,
    "dropout": 0.005,
}


def defaults_for(seconds: float, characters: int) -> dict[str, Value]:
    """Return the values that differ from the catalogue's defaults.

    Args:
        seconds:
            A trial's budget of training.
        characters:
            Of the training part.

    Example:
        >>> defaults_for(3.0, 10**6)["layers"], defaults_for(100.0, 10**6)["context"]
        (2, 128)
    """
    values = dict(COMMON_DEFAULTS)
    if seconds <= MEDIUM_TRIAL_SECONDS:
        values |= {"layers": 2 if seconds <= SHORT_TRIAL_SECONDS else 3}
    else:
        values |= {"context": 128, "batch_tokens": 1536}
    if seconds * TOKENS_PER_SECOND > DROPOUT_EPOCHS * characters:
        values |= {"dropout": 0.1}
    return values


def preset_params(name: str) -> dict[str, Value]:
    """Return a published configuration's values, scaled to a CPU.

    Example:
        >>> preset_params("gpt2")["weight_init"]
        'gpt2'
    """
    params = preset(name, scale="cpu").params
    values = {n: v for n, v in params.items() if n not in ("iterations", "vocabulary")}
    normalization = str(values["normalization"])
    values["normalization"] = NORMALIZATIONS.get(normalization, normalization)
    return values | {"weight_init": "gpt2"}


def expected_trial_seconds(
    fixed: Mapping[str, Value], space: Mapping[str, BaseDistribution], timeout: float | None
) -> float:
    """Return the training seconds of a trial, estimated if its budget is of another kind.

    Args:
        fixed:
            Values that a user gives; one of `BUDGET_NAMES` may be among them.
        space:
            Distributions that a user gives.
        timeout:
            Seconds of the whole study, if it has an end.

    Raises:
        ValueError: If more than one budget is given.

    Example:
        >>> (
        ...     expected_trial_seconds({}, {}, timeout=80.0),
        ...     expected_trial_seconds({"train_tokens": 400_000}, {}, None),
        ... )
        (8.0, 5.0)
    """
    given = [name for name in BUDGET_NAMES if fixed.get(name) or name in space]
    if len(given) > 1:
        raise ValueError(f"A trial must have one budget, but got {' and '.join(given)}.")
    if fixed.get("seconds"):
        return float(fixed["seconds"] or 0)
    if fixed.get("train_tokens"):
        return float(fixed["train_tokens"] or 0) / TOKENS_PER_SECOND
    if fixed.get("iterations"):
        return float(fixed["iterations"] or 0) * TOKENS_PER_STEP / TOKENS_PER_SECOND
    return DEFAULT_TRIAL_SECONDS if timeout is None else TRIAL_TIMEOUT_FRACTION * timeout
