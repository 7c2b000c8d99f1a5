"""What stays at its default in the second and third part."""

from __future__ import annotations

from collections.abc import Collection

from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.hyperparameters.spec import Value


def defaults(task: str) -> dict[str, Value]:
    """The catalogue's default of all that is tuned.

    Example:
        >>> defaults("regression")["batch_size"]
        64
    """
    return default_params(task, resolve_space(task)[0])


def all_but(task: str, tuned: Collection[str], epochs: int) -> dict[str, Value]:
    """The defaults as what is not tuned; no trial ends before it has its epochs.

    Example:
        >>> fixed = all_but("regression", ["learning_rate"], epochs=50)
        >>> "learning_rate" in fixed, fixed["patience"]
        (False, 50)
    """
    kept = {name: value for name, value in defaults(task).items() if name not in tuned}
    return kept | {"epochs": epochs, "patience": epochs}
