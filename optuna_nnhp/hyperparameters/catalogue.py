"""The catalogue as a table and as a search space, and the check of a user's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import pandas as pd

from optuna_nnhp.errors import short_repr
from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.activation import ACTIVATION
from optuna_nnhp.hyperparameters.batch_size import BATCH_SIZE
from optuna_nnhp.hyperparameters.depth import HIDDEN_LAYERS
from optuna_nnhp.hyperparameters.epochs import EPOCHS
from optuna_nnhp.hyperparameters.epochs import ITERATIONS
from optuna_nnhp.hyperparameters.learning_rate import EMBEDDING_RATE
from optuna_nnhp.hyperparameters.learning_rate import GPT_LEARNING_RATE
from optuna_nnhp.hyperparameters.learning_rate import LEARNING_RATE
from optuna_nnhp.hyperparameters.learning_rate import LEARNING_RATE_DECAY
from optuna_nnhp.hyperparameters.learning_rate import MIN_LR_RATIO
from optuna_nnhp.hyperparameters.learning_rate import WARMUP
from optuna_nnhp.hyperparameters.loss import FOCAL_GAMMA
from optuna_nnhp.hyperparameters.loss import HUBER_DELTA
from optuna_nnhp.hyperparameters.loss import LOSS_CLASSIFICATION
from optuna_nnhp.hyperparameters.loss import LOSS_REGRESSION
from optuna_nnhp.hyperparameters.muon import GPT_OPTIMIZER
from optuna_nnhp.hyperparameters.muon import MUON_LEARNING_RATE
from optuna_nnhp.hyperparameters.optimizer import BETA2
from optuna_nnhp.hyperparameters.optimizer import MOMENTUM
from optuna_nnhp.hyperparameters.optimizer import OPTIMIZER
from optuna_nnhp.hyperparameters.regularization import CLIP_NORM
from optuna_nnhp.hyperparameters.regularization import DROPOUT
from optuna_nnhp.hyperparameters.regularization import L1
from optuna_nnhp.hyperparameters.regularization import LABEL_SMOOTHING
from optuna_nnhp.hyperparameters.regularization import MIN_IMPROVEMENT
from optuna_nnhp.hyperparameters.regularization import NORMALIZATION
from optuna_nnhp.hyperparameters.regularization import PATIENCE
from optuna_nnhp.hyperparameters.regularization import WEIGHT_DECAY
from optuna_nnhp.hyperparameters.spec import Hyperparameter
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.transformer import TRANSFORMER
from optuna_nnhp.hyperparameters.weight_init import WEIGHT_INIT
from optuna_nnhp.hyperparameters.width import WIDTH
from optuna_nnhp.hyperparameters.width import WIDTH_SHAPE

CATALOGUE: tuple[Hyperparameter, ...] = (
    WEIGHT_INIT,
    HIDDEN_LAYERS,
    WIDTH,
    WIDTH_SHAPE,
    ACTIVATION,
    LOSS_CLASSIFICATION,
    FOCAL_GAMMA,
    LOSS_REGRESSION,
    HUBER_DELTA,
    OPTIMIZER,
    MOMENTUM,
    BETA2,
    LEARNING_RATE,
    LEARNING_RATE_DECAY,
    WARMUP,
    MIN_LR_RATIO,
    BATCH_SIZE,
    EPOCHS,
    ITERATIONS,
    DROPOUT,
    WEIGHT_DECAY,
    L1,
    NORMALIZATION,
    LABEL_SMOOTHING,
    CLIP_NORM,
    PATIENCE,
    MIN_IMPROVEMENT,
    *TRANSFORMER,
    GPT_OPTIMIZER,
    MUON_LEARNING_RATE,
    GPT_LEARNING_RATE,
    EMBEDDING_RATE,
)


def specs(task: str) -> dict[str, Hyperparameter]:
    """Return the hyperparameters of a task by name.

    Args:
        task:
            ``"binary"``, ``"multiclass"``, ``"regression"`` or ``"language"``.

    Example:
        >>> specs("regression")["loss"].default
        'mse'
    """
    kinds = {"regression": ("table", "regression"), "language": ("language",)}
    kind = kinds.get(task, ("table", "classification"))
    return {h.name: h for h in CATALOGUE if h.task in ("any", *kind)}


def mutable_names() -> frozenset[str]:
    """Return the names of the hyperparameters that may change during training.

    Example:
        >>> "learning_rate" in mutable_names(), "hidden_layers" in mutable_names()
        (True, False)
    """
    return frozenset(h.name for h in CATALOGUE if h.mutable)


def catalogue() -> pd.DataFrame:
    """Return a table of all hyperparameters: range, default, grid values and effect.

    Returns:
        A frame with a row for each hyperparameter and the columns ``name``, ``task`` (any,
        table, classification, regression or language), ``range``, ``default``, ``grid_values``
        (what a grid visits), ``static`` (whether trials must share it to be trained as one stack),
        ``mutable`` (whether it may change while a network trains),
        ``tuned`` (whether the default space holds it) and ``help``.

    Example:
        >>> catalogue().set_index("name").loc["hidden_layers", "range"]
        '1 to 8'
    """
    return pd.DataFrame(
        {
            "name": h.name,
            "task": h.task,
            "range": h.describe_range(),
            "default": h.describe_value(h.default),
            "grid_values": ", ".join(h.describe_value(level) for level in h.grid_values),
            "static": h.static,
            "mutable": h.mutable,
            "tuned": h.tuned,
            "help": h.help,
        }
        for h in CATALOGUE
    )


def resolve_space(
    task: str,
    space: Mapping[str, BaseDistribution] | None = None,
    fixed: Mapping[str, Value] | None = None,
) -> tuple[dict[str, BaseDistribution], dict[str, Value]]:
    """Return the search space and the fixed values of a study.

    Args:
        task:
            ``"binary"``, ``"multiclass"``, ``"regression"`` or ``"language"``.
        space:
            Distributions that replace the default ones, or add hyperparameters that are not
            tuned by default.
        fixed:
            Values of hyperparameters that are not tuned. 0 switches off a hyperparameter with
            `zero_below`, infinity one with `infinite_above`.

    Returns:
        The distributions of the tuned hyperparameters, and the values of all others; together
        they name every hyperparameter of the task once.

    Raises:
        ValueError: If a name is unknown or given twice, or a value or range is not allowed.

    Example:
        >>> space, fixed = resolve_space("regression", fixed={"batch_size": 128})
        >>> "batch_size" in space, fixed["batch_size"], fixed["epochs"]
        (False, 128, 50)
    """
    known = specs(task)
    space = as_plain_dict("space", space)
    fixed = as_plain_dict("fixed", fixed)
    for name in (*space, *fixed):
        if name not in known:
            raise unknown_name(f"a hyperparameter of {task} networks", name, known)
        if name in space and name in fixed:
            raise ValueError(f"`{name}` must be in `space` or in `fixed`, but is in both.")
    for name, distribution in space.items():
        known[name].check_distribution(distribution)
    for name, value in fixed.items():
        known[name].check(value)
    has_epochs = "epochs" in space or "epochs" in fixed
    has_iterations = "iterations" in space or fixed.get("iterations")
    if has_epochs and has_iterations:
        raise ValueError("The budget must be `epochs` or `iterations`, but both are given.")
    tuned = {
        name: space.get(name, h.distribution)
        for name, h in known.items()
        if name in space or (h.tuned and name not in fixed)
    }
    rest = {name: fixed.get(name, h.default) for name, h in known.items() if name not in tuned}
    return tuned, rest


def as_plain_dict(argument: str, mapping: Any) -> dict[str, Any]:
    """Return a user's mapping as a dict, with NumPy numbers converted to Python numbers.

    Args:
        argument:
            The name of the argument: ``"space"`` or ``"fixed"``.
        mapping:
            Distributions or values by name; None is an empty mapping.

    Raises:
        ValueError: If `mapping` is not a mapping, or a name is not a string.

    Example:
        >>> as_plain_dict("fixed", {"epochs": np.int64(3)}), as_plain_dict("space", None)
        ({'epochs': 3}, {})
    """
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        what = "distributions" if argument == "space" else "values"
        raise ValueError(f"`{argument}` must map names to {what}, but got {short_repr(mapping)}.")
    for name in mapping:
        if not isinstance(name, str):
            raise ValueError(
                f"The names in `{argument}` must be texts, but one is {short_repr(name)}."
            )
    return {n: v.item() if isinstance(v, np.generic) else v for n, v in mapping.items()}


def default_params(task: str, space: Mapping[str, BaseDistribution]) -> dict[str, Value]:
    """Return the catalogue's defaults for the parameters of a space.

    A default outside a user's range is clipped to it. A default that is not among a user's
    choices is left out, so that the sampler chooses the value.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> default_params("binary", {"learning_rate": FloatDistribution(0.01, 0.1)})
        {'learning_rate': 0.01}
    """
    known = specs(task)
    defaults: dict[str, Value] = {}
    for name, distribution in space.items():
        value = known[name].default
        if isinstance(distribution, CategoricalDistribution):
            if value not in distribution.choices:
                continue
        else:
            value = nearest_value(value, distribution)
        defaults[name] = value
    return defaults


def nearest_value(value: Value, distribution: BaseDistribution) -> Value:
    """Return the nearest value in a numeric range; return a categorical value unchanged.

    Example:
        >>> (
        ...     nearest_value(0.0, FloatDistribution(0.005, 0.6, log=True)),
        ...     nearest_value(9, IntDistribution(1, 4)),
        ... )
        (0.005, 4)
    """
    if not isinstance(distribution, IntDistribution | FloatDistribution):
        return value
    low, high, step = distribution.low, distribution.high, distribution.step
    number = min(max(float(value or 0), low), high)
    if step is not None:
        number = min(low + round((number - low) / step) * step, high)
    return int(number) if isinstance(distribution, IntDistribution) else number


def effective_params(task: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """Return parameters as training uses them: an effect that is off is 0 (or infinity).

    Example:
        >>> effective_params("binary", {"dropout": 0.01, "clip_norm": 50.0})
        {'dropout': 0.0, 'clip_norm': inf}
    """
    known = specs(task)
    return {name: known[name].effective_value(value) for name, value in params.items()}
