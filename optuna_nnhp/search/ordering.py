"""The order of a study's finished trials, pruned ones among them."""

from __future__ import annotations

import math

from optuna.trial import FrozenTrial
from optuna.trial import TrialState


def sort_key(trial: FrozenTrial, sign: float) -> tuple[int, float, float]:
    """TPE's order: by value, then the pruned by how far they came, then the infeasible.

    Args:
        trial:
            A finished trial of a study of one objective, that has not failed.
        sign:
            1 where small values are good, -1 where large ones are.

    Returns:
        A key to sort by, small for good trials.

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
