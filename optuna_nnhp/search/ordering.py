"""The order of a study's finished trials, including pruned ones."""

from __future__ import annotations

import math

from optuna.trial import FrozenTrial
from optuna.trial import TrialState


def sort_key(trial: FrozenTrial, sign: float) -> tuple[int, float, float]:
    """Return a key that sorts trials as TPE does, the best first.

    Complete trials come first, by value; then pruned ones, by their last step and its value; then
    trials that violate constraints, by the violation.

    Args:
        trial:
            A finished trial of a study with one objective; not a failed one.
        sign:
            1 if small values are good, -1 if large ones are.

    Example:
        >>> import optuna
        >>> sort_key(optuna.trial.create_trial(value=0.5), sign=1.0)
        (0, 0.5, 0.0)
    """
    violation = sum(excess for excess in trial.constraints.values() if excess > 0)
    if violation > 0:
        return 2, violation, 0.0
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None
        return 0, sign * trial.value, 0.0
    if not trial.intermediate_values:
        return 1, 1.0, 0.0
    step, value = max(trial.intermediate_values.items())
    return 1, -float(step), math.inf if math.isnan(value) else sign * value
