"""Values of all trials of a study by round, and its best trials."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
import math
import time
from typing import Any

import optuna
from optuna import Study
from optuna.trial import TrialState

from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.weight_files import BestWeights

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

Ranking = Sequence[tuple[float, int]]


class BestTrials:
    """Rank the best COMPLETE trials, and keep the weights of those that were trained here.

    Args:
        maximize:
            Whether a greater value is better.
        weights:
            Where the weights are stored.
        size:
            How many trials are ranked.

    Attributes:
        ranking: Values, the smaller the better, and numbers of the ranked trials.
        best: The best value.

    Example:
        >>> best_trials = BestTrials(True, BestWeights(None))
        >>> [best_trials.add(value, number) for value, number in ((0.5, 3), (0.5, 4), (0.7, 5))]
        [True, False, True]
        >>> best_trials.best
        0.7
    """

    def __init__(self, maximize: bool, weights: BestWeights, size: int = 1) -> None:
        self.maximize, self.weights, self.size = maximize, weights, size
        self.ranking: Ranking = []
        self.best: float | None = None

    def add(self, value: float, number: int) -> bool:
        """Add a trial and return whether it is ranked; of equal trials the first one is."""
        self.ranking = self._with(value, number)
        if self.ranking[0][1] == number:
            self.best = value
        return any(number == entry[1] for entry in self.ranking)

    def would_rank(self, value: float, number: int) -> bool:
        """Return whether a trial would be ranked."""
        return any(number == entry[1] for entry in self._with(value, number))

    def _with(self, value: float, number: int) -> Ranking:
        entry = (-value if self.maximize else value, number)
        return sorted({*self.ranking, entry})[: self.size]

    def is_better(self, value: Any, than: Any) -> bool:
        """Return whether a value is better than another one; any value is better than None."""
        if value is None or than is None:
            return value is not None
        return bool(value > than if self.maximize else value < than)

    def keep_weights(self, cohort: Cohort, index: int) -> None:
        """Store the best weights of a member."""
        number = cohort.members[index].number
        try:
            self.weights.save(number, cohort.best_network(index))
        except OSError as error:  # for example a full disk; the result can retrain the trial
            _logger.warning(f"The weights of trial {number} could not be stored: {error}")

    def delete_others(self, before: Ranking) -> None:
        """Delete the weights of trials that are no longer ranked.

        Args:
            before:
                The ranking before the trials that have ended since.
        """
        if self.ranking != before:
            self.weights.delete_others([number for _, number in self.ranking])


class StudyHistory:
    """Hold the values of all trials of a study, those of other workers included.

    Args:
        study:
            The study.
        best_trials:
            Its best trials.

    Attributes:
        values: The best value so far of every trial, by round and trial number.
        last_sync: Clock of the last call of `sync`, seconds.
    """

    def __init__(self, study: Study, best_trials: BestTrials) -> None:
        self.study, self.best_trials = study, best_trials
        self.values: dict[int, dict[int, float]] = defaultdict(dict)
        self.last_sync = -math.inf
        self._ended = set[int]()  # numbers of trials that have been read completely

    def sync(self, running: dict[int, RunningTrial]) -> None:
        """Read what other workers have found.

        Args:
            running:
                Trials of this worker, which `record` knows better.
        """
        self.last_sync = time.monotonic()
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in self._ended or trial.number in running:
                continue
            best: float | None = None
            for step, value in sorted(trial.intermediate_values.items()):
                if best is None or self.best_trials.is_better(value, best):
                    best = value
                self.values[step][trial.number] = best
            if trial.state.is_finished():
                self._ended.add(trial.number)
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                self.best_trials.add(trial.value, trial.number)

    def record(self, running: RunningTrial) -> None:
        """Add the last evaluation of a trial that trains here."""
        if (value := running.best_so_far) is not None:
            self.values[running.last_round][running.member.number] = value
