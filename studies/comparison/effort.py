"""Compute the cost of a study's trials, and its best value as a function of the cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from optuna.trial import FrozenTrial
from optuna.trial import TrialState

# Attributes of a trial: its generation and parent in a population, its schedule.
GENERATION, PARENT, SCHEDULE = "generation", "parent", "schedule"


@dataclass(frozen=True)
class Point:
    """A new best value of a study.

    Args:
        seconds:
            Time since the call.
        epochs:
            Model-epochs of all trials that had ended by then.
        value:
            The best value of a COMPLETE trial so far.
    """

    seconds: float
    epochs: float
    value: float


def networks(trial: FrozenTrial) -> int:
    """Return how many networks a trial trained: with hypergradients, one more per moved value.

    Example:
        >>> import optuna
        >>> course = {"schedule": [[0, {"learning_rate": 0.1, "dropout": 0.2}, False]]}
        >>> networks(optuna.trial.create_trial(value=0.0, user_attrs=course))
        3
        >>> networks(optuna.trial.create_trial(value=0.0))
        1
    """
    attributes = trial.user_attrs
    if GENERATION in attributes or not attributes.get(SCHEDULE):  # no perturbed copies
        return 1
    _, moved, _ = attributes[SCHEDULE][0]
    return 1 + len(moved)


def model_epochs(trials: Sequence[FrozenTrial]) -> list[float]:
    """Return the sum of the epochs of each trial's networks.

    The epochs that a trial of a population inherited from its parent do not count. Training after
    the last evaluation of an interrupted trial is not counted either.

    Args:
        trials:
            All trials of a study, by their numbers.
    """
    counted = []
    for trial in trials:
        parent = trial.user_attrs.get(PARENT)
        before = 0.0 if parent is None else trials[parent].user_attrs.get("epochs", 0.0)
        own = max(0.0, trial.user_attrs.get("epochs", 0.0) - before)
        counted.append(networks(trial) * own)
    return counted


def best_values_of(
    trials: Sequence[FrozenTrial], start: datetime, *, maximize: bool
) -> tuple[Point, ...]:
    """Return each new best value of a study with its cost.

    Args:
        trials:
            All trials of a study, by their numbers.
        start:
            When the study was called.
        maximize:
            Whether a greater value is better.
    """
    ended = [
        (trial.datetime_complete, trial, epochs)
        for trial, epochs in zip(trials, model_epochs(trials), strict=True)
        if trial.datetime_complete is not None
    ]
    best_values, spent = list[Point](), 0.0
    for moment, trial, epochs in sorted(ended, key=lambda e: (e[0], e[1].number)):
        spent += epochs
        if trial.state != TrialState.COMPLETE or trial.value is None:
            continue
        if not best_values or is_better(trial.value, best_values[-1].value, maximize=maximize):
            best_values.append(Point((moment - start).total_seconds(), spent, trial.value))
    return tuple(best_values)


def is_better(value: float, than: float, *, maximize: bool) -> bool:
    """Return whether a value is better than another one."""
    return value > than if maximize else value < than


def value_at(best_values: Sequence[Point], axis: str, spent: float) -> float | None:
    """Return the best value after some ``"seconds"`` or ``"epochs"``; None before the first.

    Example:
        >>> course = [Point(1.0, 50.0, 0.8), Point(2.5, 90.0, 0.9)]
        >>> value_at(course, "seconds", 2.0), value_at(course, "epochs", 10.0)
        (0.8, None)
    """
    place = bisect_right([getattr(point, axis) for point in best_values], spent)
    return best_values[place - 1].value if place else None


def reached(best_values: Sequence[Point], value: float, *, maximize: bool) -> Point | None:
    """Return the point where a study was first at least as good as a value, None if never.

    Example:
        >>> reached([Point(1.0, 50.0, 0.8), Point(2.5, 90.0, 0.9)], 0.85, maximize=True).seconds
        2.5
    """
    for point in best_values:
        if not is_better(value, point.value, maximize=maximize):
            return point
    return None
