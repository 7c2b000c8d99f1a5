"""Search spaces that mix the user's own parameters with the catalogue's."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import math

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_nnhp.errors import short_repr
from optuna_nnhp.hyperparameters.catalogue import as_plain_dict
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.spec import is_in_distribution


class RecordingParams(Mapping[str, Value]):
    """Holds a trial's parameters for the user's function, and records which ones it reads.

    Args:
        values:
            All parameters of the trial.

    Attributes:
        names: The names of the parameters that were read.
        missing: The names that were asked for but do not exist.

    Example:
        >>> params = RecordingParams({"width": 8, "depth": 2})
        >>> params["width"], params.get("heads", 4), params.names, params.missing
        (8, 4, {'width'}, ['heads'])
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)
        self.names: set[str] = set()
        self.missing: list[str] = []

    def __getitem__(self, name: str) -> Value:
        if name not in self._values:
            self.missing.append(name)
            raise KeyError(name)
        self.names.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def custom_space(
    task: str,
    space: Mapping[str, BaseDistribution] | None,
    fixed: Mapping[str, Value] | None,
) -> tuple[set[str], tuple[dict[str, BaseDistribution], dict[str, Value]]]:
    """Check the user's own parameters and add the catalogue's.

    Args:
        task:
            ``"binary"``, ``"multiclass"`` or ``"regression"``.
        space:
            Distributions of the user's and the catalogue's parameters.
        fixed:
            Fixed values of the user's and the catalogue's parameters.

    Returns:
        The names of the user's own parameters; then the space and the fixed values of all
        parameters.

    Raises:
        ValueError: If a name is in both, or a value or range cannot be used.

    Example:
        >>> own, (space, fixed) = custom_space(
        ...     "binary", {"heads": IntDistribution(1, 8)}, {"l1": 0}
        ... )
        >>> own, list(space)[0], "l1" in space, fixed["l1"]
        ({'heads'}, 'heads', False, 0)
    """
    known, space, fixed = specs(task), as_plain_dict("space", space), as_plain_dict("fixed", fixed)
    own_ranges = {n: d for n, d in space.items() if n not in known}
    own_values = {n: v for n, v in fixed.items() if n not in known}
    for name, distribution in own_ranges.items():
        if not isinstance(distribution, BaseDistribution):
            raise ValueError(
                f"`space[{name!r}]` must be an Optuna distribution, but got "
                f"{short_repr(distribution)}."
            )
        if any(math.isinf(end) for end in _float_bounds(distribution)):
            raise ValueError(f"The range of {name!r} must be finite, but got {distribution}.")
        for choice in getattr(distribution, "choices", ()):
            if not isinstance(choice, None | bool | int | float | str):
                raise ValueError(
                    f"The choices of {name!r} must be numbers, texts or truth values, but one is "
                    f"{short_repr(choice)}."
                )
        if name in own_values:
            raise ValueError(f"{name!r} must be in `space` or in `fixed`, but is in both.")
    for name, value in own_values.items():
        if not isinstance(value, None | bool | int | float | str):
            raise ValueError(
                f"`fixed[{name!r}]` must be a number, a text or a truth value, but got "
                f"{short_repr(value)}."
            )
    tuned, rest = resolve_space(
        task,
        {n: d for n, d in space.items() if n in known},
        {n: v for n, v in fixed.items() if n in known},
    )
    own = {*own_ranges, *own_values}
    return own, ({**own_ranges, **tuned}, {**own_values, **rest})


def _float_bounds(distribution: BaseDistribution) -> tuple[float, ...]:
    if isinstance(distribution, FloatDistribution):
        return distribution.low, distribution.high
    return ()


def midpoint(distribution: BaseDistribution) -> Value:
    """Return the middle of a range (of its logarithm if `log`), or the first choice.

    Example:
        >>> (
        ...     midpoint(IntDistribution(4, 64, log=True)),
        ...     midpoint(FloatDistribution(0, 1, step=0.25)),
        ... )
        (16, 0.5)
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    value = math.sqrt(low * high) if distribution.log else (low + high) / 2
    if step is not None:
        value = low + math.floor((value - low) / step + 0.5) * step
    if isinstance(distribution, IntDistribution):
        return int(min(value, high))
    return float(min(value, high))


def default_values(task: str, space: Mapping[str, BaseDistribution]) -> dict[str, Value]:
    """Return the catalogue's defaults where the space admits them, else the ranges' midpoints.

    Example:
        >>> space = {"heads": IntDistribution(1, 3), "epochs": IntDistribution(1, 9)}
        >>> default_values("binary", space)
        {'heads': 2, 'epochs': 9}
    """
    known = specs(task)
    ours = default_params(task, {n: d for n, d in space.items() if n in known})
    ours = {n: value for n, value in ours.items() if is_in_distribution(space[n], value)}
    return {n: midpoint(d) for n, d in space.items() if n not in known} | ours


def boundary_values(distribution: BaseDistribution) -> tuple[Value, ...]:
    """Return the lowest and highest value of a range, or all choices.

    Example:
        >>> (
        ...     boundary_values(IntDistribution(1, 8)),
        ...     boundary_values(CategoricalDistribution(("a", "b", "c"))),
        ... )
        ((1, 8), ('a', 'b', 'c'))
    """
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low, distribution.high
