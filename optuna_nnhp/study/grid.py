"""Grids: the default configuration first, then each point once, then the end."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

from optuna import Study
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial

from optuna_nnhp.hyperparameters.record import Value

OFF_GRID = -1


def prepare_grid(
    sampler: GridSampler, names: Collection[str], defaults: Mapping[str, Value]
) -> None:
    """Make the default configuration the grid's first point, if it is one.

    Optuna gives the trial of number n the n-th point of a shuffled list.

    Args:
        sampler:
            The user's sampler.
        names:
            What is tuned.
        defaults:
            The configuration of the first trial.

    Raises:
        ValueError: If the grid does not hold exactly the hyperparameters that are tuned.

    Example:
        >>> sampler = GridSampler({"depth": [1, 2, 3, 4]}, seed=0)
        >>> prepare_grid(sampler, ["depth"], {"depth": 2})
        >>> sampler._all_grids[0]
        (2,)
    """
    grid = sampler._param_names
    if set(grid) != set(names):
        lacks, more = sorted({*names} - {*grid}), sorted({*grid} - {*names})
        raise ValueError(
            "The grid must hold what is tuned and nothing else (`space`, `fixed`), but it lacks "
            f"[{', '.join(lacks)}] and has [{', '.join(more)}] besides."
        )
    place = _place(sampler, defaults)
    if place != OFF_GRID:
        points = sampler._all_grids
        points[0], points[place] = points[place], points[0]


def enqueue_default(study: Study, sampler: GridSampler, defaults: Mapping[str, Value]) -> None:
    """Let a study begin with the default configuration, as the grid's point that it is.

    `Study.enqueue_trial` alone would have the point trained twice, and Optuna's sampler raises
    a KeyError when such a trial ends while one point is left.

    Source:
        https://github.com/optuna/optuna/issues/6073: no grid point for enqueued trials.
    """
    attributes = {
        "fixed_params": _whole(sampler, defaults),
        "grid_id": _place(sampler, defaults),
        "search_space": sampler._search_space,
    }
    study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=attributes))


def points_left(study: Study, sampler: GridSampler) -> int:
    """How many trials are still to start: points of the grid, and a default beside it.

    Example:
        >>> import optuna
        >>> sampler = GridSampler({"depth": [1, 2, 3]}, seed=0)
        >>> study = optuna.create_study(sampler=sampler)
        >>> study.optimize(lambda t: t.suggest_int("depth", 1, 3), n_trials=2)
        >>> points_left(study, sampler)
        1
    """

    def is_of_grid(trial: FrozenTrial) -> bool:
        grid = trial.system_attrs.get("search_space")
        return grid is not None and sampler._same_search_space(grid)

    trials = [t for t in study.get_trials(deepcopy=False) if is_of_grid(t)]
    started = {t.system_attrs["grid_id"] for t in trials if t.state != TrialState.WAITING}
    beside: int = sum(
        t.state == TrialState.WAITING and t.system_attrs["grid_id"] == OFF_GRID for t in trials
    )
    return len(sampler._all_grids) - len(started - {OFF_GRID}) + beside


def _whole(sampler: GridSampler, defaults: Mapping[str, Value]) -> dict[str, Any]:
    """The defaults; where the space has none, the first value of the grid."""
    return {name: values[0] for name, values in sampler._search_space.items()} | dict(defaults)


def _place(sampler: GridSampler, defaults: Mapping[str, Value]) -> int:
    whole = _whole(sampler, defaults)
    point = tuple(whole[name] for name in sampler._param_names)
    points: list[tuple[Any, ...]] = list(sampler._all_grids)
    return points.index(point) if point in points else OFF_GRID
