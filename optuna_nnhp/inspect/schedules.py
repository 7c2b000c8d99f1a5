"""Read how the hyperparameters of a trial changed during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.trial import FrozenTrial
import pandas as pd

from optuna_nnhp.study.running import SCHEDULE
from optuna_nnhp.training.batches import epochs


@dataclass(frozen=True)
class HyperparameterSchedule:
    """The hyperparameter values of a trial during training.

    Args:
        trial:
            The trial.
        begins:
            Epochs at which the segments of the schedule begin; the first is 0.
        values:
            Values of all hyperparameters, one mapping per segment.
        restarts:
            Those of ``begins`` at which the trial restarted from its initial weights.
    """

    trial: FrozenTrial
    begins: Sequence[float]
    values: Sequence[dict[str, Any]]
    restarts: Sequence[float]

    @cached_property
    def segments(self) -> list[tuple[float, dict[str, Any]]]:
        """Return begin and values of each segment."""
        return list(zip(self.begins, self.values, strict=True))


def schedule_of(study: optuna.Study, trial: FrozenTrial) -> HyperparameterSchedule:
    """Return the schedule of a trial; it has one segment if no value changed.

    Args:
        study:
            The trial's study.
        trial:
            The trial.

    Example:
        >>> study = optuna.create_study()
        >>> study.set_user_attr("rounds_per_epoch", 3)
        >>> stored = [[0, {"dropout": 0.1}, False], [6, {"dropout": 0.2}, True]]
        >>> attributes = {"schedule": stored}
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
        >>> schedule = schedule_of(study, study.best_trial)
        >>> schedule.segments, schedule.restarts
        ([(0, {'dropout': 0.1}), (2, {'dropout': 0.2})], [2])
    """
    rounds = study.user_attrs.get("rounds_per_epoch", 1)
    stored = trial.user_attrs.get(SCHEDULE) or [[0, {}, False]]
    begins = [epochs(begin, rounds) for begin, _, _ in stored]
    return HyperparameterSchedule(
        trial,
        begins,
        [{**trial.params, **changed} for _, changed, _ in stored],
        [begin for begin, (_, _, restarts) in zip(begins, stored, strict=True) if restarts],
    )


def schedule_dataframe(study: optuna.Study, trial: FrozenTrial) -> pd.DataFrame:
    """Return one row per segment of a trial's schedule, with the epoch at which it begins.

    Args:
        study:
            The trial's study.
        trial:
            The trial.

    Example:
        >>> study = optuna.create_study()
        >>> study.add_trial(optuna.trial.create_trial(value=1.0))
        >>> schedule_dataframe(study, study.best_trial).to_dict("records")
        [{'epoch': 0}]
    """
    segments = schedule_of(study, trial).segments
    return pd.DataFrame([{"epoch": begin, **values} for begin, values in segments])
