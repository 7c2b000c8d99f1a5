"""Read from a study which values its best configurations reached with other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
import statistics

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pandas as pd

from optuna_nnhp.study.replicates import REPLICATES


@dataclass(frozen=True)
class ReplicatedTrial:
    """A trial whose configuration was retrained with other seeds.

    The trial's own value is not among `values`: it was selected for being good, so part of it is
    luck.

    Args:
        number:
            Number of the trial.
        value:
            Value of the trial in the study.
        values:
            One value per other seed; None where training diverged.
        maximize:
            Whether a larger value is better.

    Example:
        >>> trial = ReplicatedTrial(7, value=0.9, values=(0.8, 0.6), maximize=True)
        >>> round(trial.mean, 3), round(trial.std, 3), trial.text
        (0.7, 0.141, '0.7 ± 0.1414 over 2 seeds')
    """

    number: int
    value: float
    values: Sequence[float | None]
    maximize: bool

    @property
    def n_diverged(self) -> int:
        """Return the number of replicates without a value."""
        return sum(value is None for value in self.values)

    @property
    def mean(self) -> float:
        """Return the mean over the seeds; if a replicate diverged, infinity on the bad side."""
        if self.n_diverged:
            return -math.inf if self.maximize else math.inf
        return statistics.fmean(value for value in self.values if value is not None)

    @property
    def std(self) -> float:
        """Return the standard deviation; NaN if a replicate diverged or there is only one."""
        if self.n_diverged or len(self.values) < 2:
            return math.nan
        return statistics.stdev(value for value in self.values if value is not None)

    @property
    def text(self) -> str:
        """Return mean and standard deviation as text."""
        n = len(self.values)
        if self.n_diverged:
            return f"{self.n_diverged} of {n} diverged with other seeds"
        if n == 1:
            return f"{self.mean:.4g} with another seed"
        return f"{self.mean:.4g} ± {self.std:.4g} over {n} seeds"


def replicated_trials(study: optuna.Study) -> list[ReplicatedTrial]:
    """Return the replicated trials of a study, best mean first; ties are ordered by value.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trials([optuna.trial.create_trial(value=v) for v in (1.0, 1.1)])
        >>> record = {"0": {"seeds": [5], "values": [3.0]}, "1": {"seeds": [5], "values": [2.0]}}
        >>> study.set_user_attr("replicates", record)
        >>> [trial.number for trial in replicated_trials(study)]
        [1, 0]
    """
    record = study.user_attrs.get(REPLICATES)
    if not record:
        return []
    maximize = study.direction == StudyDirection.MAXIMIZE
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    replicated = [
        ReplicatedTrial(trial.number, trial.value or 0.0, entry["values"], maximize)
        for trial in trials
        if (entry := record.get(str(trial.number))) and entry["values"]
    ]
    sign = -1.0 if maximize else 1.0
    return sorted(replicated, key=lambda t: (sign * t.mean, sign * t.value, t.number))


def best_replicated_trial(study: optuna.Study) -> ReplicatedTrial | None:
    """Return the replicated trial with the best mean.

    Only trials with the largest number of replicates, or one less, are considered: the mean of
    few replicates is luck, and a timeout may interrupt the last replicate of some trials.

    Returns:
        The trial. None if there are no replicates, or if the study has found a better
        configuration since, which has none.

    Example:
        >>> best_replicated_trial(optuna.create_study()) is None
        True
    """
    trials = replicated_trials(study)
    if not trials or not _include_best(study, trials):
        return None
    largest = max(len(trial.values) for trial in trials)
    return next(trial for trial in trials if len(trial.values) >= largest - 1)


def _include_best(study: optuna.Study, replicated: list[ReplicatedTrial]) -> bool:
    """Return whether the configuration of the study's best trial is among the replicated ones."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    best = min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number))
    return any(trials[trial.number].params == best.params for trial in replicated)


def replicates_dataframe(study: optuna.Study) -> pd.DataFrame:
    """Return one row per replicated trial, best mean first.

    Example:
        >>> list(replicates_dataframe(optuna.create_study()).columns)
        ['number', 'value', 'mean', 'std', 'n', 'diverged']
    """
    columns = ["number", "value", "mean", "std", "n", "diverged"]
    rows = [
        (t.number, t.value, t.mean, t.std, len(t.values), t.n_diverged)
        for t in replicated_trials(study)
    ]
    return pd.DataFrame(rows, columns=columns)
