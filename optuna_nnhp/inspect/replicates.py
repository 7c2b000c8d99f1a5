"""What the best configurations came to with other seeds, read from a study."""

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
    """A trial's configuration, trained again with other seeds.

    The value in the study is not among `values`: it was chosen for being good, so that a part of
    it is luck.

    Args:
        number:
            The trial's number.
        value:
            Its value in the study.
        values:
            One for each other seed; None where training diverged.
        maximize:
            Whether a greater value is better.

    Example:
        >>> again = ReplicatedTrial(7, value=0.9, values=(0.8, 0.6), maximize=True)
        >>> round(again.mean, 3), round(again.std, 3), again.words
        (0.7, 0.141, '0.7 ± 0.1414 over 2 seeds')
    """

    number: int
    value: float
    values: Sequence[float | None]
    maximize: bool

    @property
    def diverged(self) -> int:
        """Replicates without a value."""
        return sum(value is None for value in self.values)

    @property
    def mean(self) -> float:
        """Mean over the seeds; infinite, on the bad side, if one diverged: none can rely on it."""
        if self.diverged:
            return -math.inf if self.maximize else math.inf
        return statistics.fmean(value for value in self.values if value is not None)

    @property
    def std(self) -> float:
        """Standard deviation over the seeds, NaN if there is none."""
        if self.diverged or len(self.values) < 2:
            return math.nan
        return statistics.stdev(value for value in self.values if value is not None)

    @property
    def words(self) -> str:
        """Mean and standard deviation as a reader wants them."""
        n = len(self.values)
        if self.diverged:
            return f"{self.diverged} of {n} diverged with other seeds"
        if n == 1:
            return f"{self.mean:.4g} with another seed"
        return f"{self.mean:.4g} ± {self.std:.4g} over {n} seeds"


def replicated_trials(study: optuna.Study) -> list[ReplicatedTrial]:
    """The replicated trials of a study, that with the best mean first; of equal ones the best.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trials([optuna.trial.create_trial(value=v) for v in (1.0, 1.1)])
        >>> record = {"0": {"seeds": [5], "values": [3.0]}, "1": {"seeds": [5], "values": [2.0]}}
        >>> study.set_user_attr("replicates", record)
        >>> [again.number for again in replicated_trials(study)]
        [1, 0]
    """
    record = study.user_attrs.get(REPLICATES)
    if not record:
        return []
    maximize = study.direction == StudyDirection.MAXIMIZE
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = [
        ReplicatedTrial(trial.number, trial.value or 0.0, entry["values"], maximize)
        for trial in trials
        if (entry := record.get(str(trial.number))) and entry["values"]
    ]
    sign = -1.0 if maximize else 1.0
    return sorted(found, key=lambda r: (sign * r.mean, sign * r.value, r.number))


def best_replicated_trial(study: optuna.Study) -> ReplicatedTrial | None:
    """The one with the best mean, of those with as many replicates as any, or one less.

    A mean over few seeds is luck again, and one less is what a timeout may leave of a turn. None
    if the study has found a better configuration since, which has no replicates yet.

    Example:
        >>> best_replicated_trial(optuna.create_study()) is None
        True
    """
    found = replicated_trials(study)
    if not found or not _has_the_best(study, found):
        return None
    most = max((len(again.values) for again in found), default=0)
    return next((again for again in found if len(again.values) >= most - 1), None)


def _has_the_best(study: optuna.Study, found: list[ReplicatedTrial]) -> bool:
    """Whether the configuration of the study's best trial is among the replicated ones."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    best = min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number))
    return any(trials[again.number].params == best.params for again in found)


def replicates_dataframe(study: optuna.Study) -> pd.DataFrame:
    """One row for each replicated trial, that with the best mean first.

    Example:
        >>> list(replicates_dataframe(optuna.create_study()).columns)
        ['number', 'value', 'mean', 'std', 'n', 'diverged']
    """
    columns = ["number", "value", "mean", "std", "n", "diverged"]
    rows = [
        (r.number, r.value, r.mean, r.std, len(r.values), r.diverged)
        for r in replicated_trials(study)
    ]
    return pd.DataFrame(rows, columns=columns)
