"""Default configuration of a study of GPTs, which depends on the time and the text."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution

from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.templates.presets import preset

# Measured on two cores of a CPU, see tests/benchmarks/LOG.md.
# Up to these seconds of training, two and three layers are best, because they see more text.
SHORT_TRIAL_SECONDS, MEDIUM_TRIAL_SECONDS = 9.0, 20.0
DROPOUT_EPOCHS = 10.0  # with more passes over the text than this, dropout is useful
TOKENS_PER_SECOND = 80_000  # with four layers of width 64
TOKENS_PER_STEP = 768  # roughly, to convert a budget in steps to seconds

TRIAL_TIMEOUT_FRACTION = 0.1  # training time of a trial without a budget, as a part of the timeout
DEFAULT_TRIAL_SECONDS = 30.0  # training time of a trial without a budget and a timeout
BUDGET_NAMES = ("seconds", "train_tokens", "iterations")

# The catalogue's names of the presets' normalizations, which have gains.
NORMALIZATIONS = {"layer": "layer-gain"}

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
            Training time of a trial.
        characters:
            Length of the text's training part.

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
    """Return the hyperparameters of a preset at the scale "cpu".

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
    """Return the training time of a trial in seconds, estimated if its budget has another unit.

    Args:
        fixed:
            The user's fixed values; at most one of `BUDGET_NAMES`.
        space:
            The user's distributions.
        timeout:
            Seconds of the whole study; None without a limit.

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
