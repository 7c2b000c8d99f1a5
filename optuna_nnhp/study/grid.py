"""Grids: each point once, also after an interruption and with several workers."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
import itertools
from typing import Any

from optuna import Study
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.hyperparameters.record import Value


def check_grid(sampler: GridSampler, names: Collection[str]) -> None:
    """Raise unless a grid holds exactly the hyperparameters that are tuned.

    Raises:
        ValueError: If it lacks one or has another one.

    Example:
        >>> check_grid(GridSampler({"depth": [1, 2]}), ["depth"])
    """
    grid = sampler._search_space
    if set(grid) != set(names):
        lacks, more = sorted({*names} - {*grid}), sorted({*grid} - {*names})
        raise ValueError(
            "The grid must hold what is tuned and nothing else (`space`, `fixed`), but it lacks "
            f"[{', '.join(lacks)}] and has [{', '.join(more)}] besides."
        )


def enqueue_grid(study: Study, sampler: GridSampler, defaults: Mapping[str, Value]) -> None:
    """Enqueue the default configuration and every point that no trial of the study has.

    Optuna's sampler itself expects to be asked within `Study.optimize`, gives two workers the
    same point, and never comes back to one whose trial was killed.

    Args:
        study:
            The study.
        sampler:
            Only its grid is used.
        defaults:
            Tried first in a new study; a point of the grid is not tried twice.

    Example:
        >>> import optuna
        >>> study = optuna.create_study()
        >>> enqueue_grid(study, GridSampler({"depth": [1, 2]}), {"depth": 2})
        >>> [t.system_attrs["fixed_params"] for t in study.trials]
        [{'depth': 2}, {'depth': 1}]
    """
    grid = sampler._search_space
    trials = study.get_trials(deepcopy=False)
    first = {name: values[0] for name, values in grid.items()} | dict(defaults)
    points = [dict(zip(grid, p, strict=True)) for p in itertools.product(*grid.values())]
    known = {_key(_point(t)) for t in trials if t.state != TrialState.FAIL}
    for point in points if trials else [first, *points]:
        if _key(point) not in known:
            known.add(_key(point))
            study.enqueue_trial(point)


def points_left(study: Study) -> int:
    """How many trials of the grid wait to be started."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return sum("fixed_params" in trial.system_attrs for trial in waiting)


def _point(trial: FrozenTrial) -> dict[str, Any]:
    return trial.params or trial.system_attrs.get("fixed_params", {})


def _key(point: Mapping[str, Any]) -> str:
    return repr(sorted(point.items()))
