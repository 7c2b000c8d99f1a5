"""The specification of a hyperparameter: name, range, default and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
import math
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalChoiceType
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_nnhp.errors import short_repr
from optuna_nnhp.errors import unknown_name

Value = CategoricalChoiceType  # None, bool, int, float or str


def is_in_distribution(distribution: BaseDistribution, value: Value) -> bool:
    """Return whether a distribution contains a value.

    Example:
        >>> is_in_distribution(IntDistribution(0, 10, step=5), 7)
        False
    """
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # such as 0 on a logarithmic range
        return False


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """The specification of one hyperparameter; its effect is implemented in the same file.

    Args:
        name:
            The parameter's name in every Optuna trial.
        distribution:
            The default range.
        default:
            The value of the first trial, and of every trial where the parameter is not tuned.
        grid_values:
            The values of a grid search.
        help:
            One line: its effect and when to change it.
        domain:
            The lowest and the highest allowed value, both included; a range or a fixed value
            given by a user must lie inside. If None, a categorical value must be one of the
            choices, and a number is not bounded.
        static:
            Whether it determines shapes or the computation graph: only trials with equal values
            are stacked.
        tuned:
            Whether it is in the default space; otherwise it is fixed to its default.
        mutable:
            Whether its value may change during training. Hyperparameters of the network, its
            initial weights or the whole schedule may not.
        task:
            ``"any"``, ``"table"`` (both ``"classification"`` and ``"regression"``), one of these
            two, or ``"language"``.
        zero_below:
            Values below this one are used as 0, which is "off". So "off or log-uniform" is one
            continuous parameter, which Optuna's TPE can model jointly with the others.
        infinite_above:
            Values above this one are used as infinity, which is "off" for a bound such as that
            of gradient clipping.
        active_if:
            The values of other hyperparameters, by name, that it needs to have an effect.
        inactive_if:
            The values of other hyperparameters, by name, with which it has no effect.

    Example:
        >>> from optuna_nnhp.hyperparameters.regularization import WEIGHT_DECAY
        >>> WEIGHT_DECAY.effective_value(1e-6), WEIGHT_DECAY.effective_value(1e-3)
        (0.0, 0.001)
    """

    name: str
    distribution: BaseDistribution
    default: Value
    grid_values: tuple[Value, ...]
    help: str
    domain: tuple[float, float] | None = None
    static: bool = False
    tuned: bool = True
    mutable: bool = False
    task: str = "any"
    zero_below: float | None = None
    infinite_above: float | None = None
    active_if: Mapping[str, tuple[Value, ...]] = field(default_factory=dict, hash=False)
    inactive_if: Mapping[str, tuple[Value, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for value in (self.default, *self.grid_values):
            self.check(value)
            if not is_in_distribution(self.distribution, value):
                raise ValueError(f"{value!r} must lie in the range of `{self.name}`.")

    def effective_value(self, value: Value) -> Value:
        """Return the value that training uses: 0 (or infinity) if the value means "off"."""
        if self.zero_below is not None and float(value or 0) < self.zero_below:
            return 0.0
        if self.infinite_above is not None and float(value or 0) > self.infinite_above:
            return math.inf
        return value

    def is_active(self, params: Mapping[str, Value]) -> bool:
        """Return whether it has an effect, given the values of other hyperparameters.

        Args:
            params:
                Values of other hyperparameters by name; conditions on missing ones are ignored.

        Example:
            >>> from optuna_nnhp.hyperparameters.loss import HUBER_DELTA
            >>> HUBER_DELTA.is_active({"loss": "huber"}), HUBER_DELTA.is_active({"loss": "mse"})
            (True, False)
        """
        return all(params[n] in v for n, v in self.active_if.items() if n in params) and not any(
            params[n] in v for n, v in self.inactive_if.items() if n in params
        )

    def check(self, value: Any) -> None:
        """Raise unless ``value`` is allowed.

        Raises:
            ValueError: If it is not one of the choices, not a number, or outside the domain.
        """
        if isinstance(self.distribution, CategoricalDistribution) and self.domain is None:
            if not any(isinstance(value, type(c)) and value == c for c in self._choices()):
                raise unknown_name(f"a choice of `{self.name}`", value, map(str, self._choices()))
            return
        low, high = self.domain or (-math.inf, math.inf)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise ValueError(
                f"`{self.name}` must be a number between {low:g} and {high:g}, but got "
                f"{short_repr(value)}."
            )
        if self.is_integer and int(value) != value:
            raise ValueError(f"`{self.name}` must be a whole number, but got {value!r}.")

    def check_distribution(self, distribution: object) -> None:
        """Raise a ValueError unless ``distribution`` is one of Optuna's with allowed values."""
        if not isinstance(distribution, BaseDistribution):
            raise ValueError(
                f"`space[{self.name!r}]` must be an Optuna distribution such as "
                f"{self.distribution}, but got {short_repr(distribution)}."
            )
        if isinstance(distribution, CategoricalDistribution):
            ends = distribution.choices
        else:
            assert isinstance(distribution, IntDistribution | FloatDistribution)
            ends = (distribution.low, distribution.high)
        for end in ends:
            self.check(end)
        if self.is_integer and isinstance(distribution, FloatDistribution):
            raise ValueError(
                f"`{self.name}` must be a whole number, but `space` gives {distribution}."
            )

    @property
    def is_integer(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.default, int) and not isinstance(self.default, bool)

    def describe_range(self) -> str:
        """Return the default range as text, for the catalogue's table."""
        if isinstance(self.distribution, CategoricalDistribution):
            return ", ".join(map(str, self._choices()))
        assert isinstance(self.distribution, IntDistribution | FloatDistribution)
        text = f"{self.distribution.low:g} to {self.distribution.high:g}"
        text += ", log" if self.distribution.log else ""
        text += f"; off below {self.zero_below:g}" if self.zero_below is not None else ""
        return text + (
            f"; off above {self.infinite_above:g}" if self.infinite_above is not None else ""
        )

    def describe_value(self, value: Value) -> str:
        """Return a value as text: ``"off"`` if it switches the effect off."""
        effective = self.effective_value(value)
        if effective == math.inf or (self.zero_below is not None and effective == 0):
            return "off"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def _choices(self) -> tuple[Value, ...]:
        assert isinstance(self.distribution, CategoricalDistribution)
        return tuple(self.distribution.choices)
