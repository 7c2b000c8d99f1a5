"""The best trials of a study, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import optuna

from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.training.cohort import Cohort

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

Ranking = Sequence[tuple[float, int]]


@dataclass
class BestTrials:
    """Knows the best COMPLETE trials, and keeps the weights of those that were trained here.

    Args:
        maximize:
            Whether a greater value is better.
        weights:
            Where they go.
        size:
            How many.

    Attributes:
        places: Values, the smaller the better, and numbers.
        best: The best value.

    Example:
        >>> best_trials = BestTrials(True, BestWeights(None))
        >>> (
        ...     best_trials.add(0.5, 3),
        ...     best_trials.add(0.5, 4),
        ...     best_trials.add(0.7, 5),
        ...     best_trials.best,
        ... )
        (True, False, True, 0.7)
    """

    maximize: bool
    weights: BestWeights
    size: int = 1
    ranking: Ranking = field(default_factory=list)
    best: float | None = None

    def add(self, value: float, number: int) -> bool:
        """Note a trial; whether it is one of the best. Of equal ones the first is."""
        self.ranking = places = self._with(value, number)
        if places[0][1] == number:
            self.best = value
        return any(number == entry[1] for entry in places)

    def would_rank(self, value: float, number: int) -> bool:
        """Whether a trial would be one of the best."""
        return any(number == entry[1] for entry in self._with(value, number))

    def _with(self, value: float, number: int) -> Ranking:
        """The places with one more trial."""
        entry = (-value if self.maximize else value, number)
        return sorted({*self.ranking, entry})[: self.size]

    def is_better(self, value: Any, than: Any) -> bool:
        """Whether a value beats another one; None is beaten by all."""
        if value is None or than is None:
            return value is not None
        return bool(value > than if self.maximize else value < than)

    def keep_weights(self, cohort: Cohort, place: int) -> None:
        """Keep a member's best weights."""
        number = cohort.members[place].number
        try:
            self.weights.save(number, cohort.best_network(place))
        except OSError as error:  # a full disk: the result can train it again
            _logger.warning(f"The weights of trial {number} could not be kept: {error}")

    def delete_others(self, before: Ranking) -> None:
        """Forget the weights of those that are not among the best any more.

        Args:
            before:
                The places before the trials that Optuna has been told of since.
        """
        if self.ranking != before:
            self.weights.delete_others([number for _, number in self.ranking])
