"""Grids: plan the points before a study; start each point once, for any number of workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence
import time
from typing import Any

import optuna
from optuna import Study
from optuna import Trial
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.engine.library import single_threaded_blas
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.search.grid import MAX_GRID_POINTS
from optuna_nnhp.search.grid import Grid
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.search.grid import Point
from optuna_nnhp.search.grid import check_grid_values
from optuna_nnhp.search.grid import default_grid_values
from optuna_nnhp.search.grid import point_key
from optuna_nnhp.search.grid import to_stored_value
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.study._optuna_internals import grid_of
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.study.autotune import measure_throughput
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.outcomes import CAUSE
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.outcomes import counts_towards_n_trials
from optuna_nnhp.study.outcomes import retries_grid_point
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.training.cohort import Member

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

FIXED_PARAMS = "fixed_params"  # system attribute of trials that were enqueued
MAX_LISTED_POINTS = 10_000  # of a grid that is too large to list, without `n_trials`
# The time of a grid is estimated from so many points, spread over the grid, or from those that are
# measured in so many seconds.
MAX_PROBED_POINTS, PROBE_SECONDS = 16, 3.0
ADVICE = (
    "give fewer `levels`, pin more in `fixed`, or take the part that fits, spread over the "
    "grid, with `method_options={'partial': True}`."
)


def make_grid(
    problem: Problem,
    budget: Budget,
    levels: Mapping[str, Sequence[Value]] | None = None,
    partial: bool = False,
    seed: int = 0,
) -> GridPointsSampler:
    """Return the points of a grid, in an order whose beginning is spread over the grid.

    The default configuration comes first if it is on the grid. Points that differ only in
    parameters without effect (`huber_delta` with another loss) are one point. `GridQueue.enqueue`
    checks whether the grid fits into a timeout and into a continued study.

    Args:
        problem:
            Problem to tune.
        budget:
            Limits on trials and time.
        levels:
            Values by name; other tuned parameters keep their defaults. If None, the catalogue's
            values of all tuned parameters (see `search.grid.default_grid_values`).
        partial:
            Whether a part of the grid is enough if the budget is too small.
        seed:
            Seed of the order.

    Raises:
        ValueError: If a value is not in its range, or the grid is larger than the budget.
    """
    grid = _all_combinations(problem, levels)
    if not partial:
        _check_count(grid, budget)
    most = budget.n_trials if partial else None
    if most is None:
        most = MAX_LISTED_POINTS if grid.count > MAX_GRID_POINTS else grid.count
    points, defaults = grid.sobol_order(seed, most), problem.defaults()
    if grid.levels.keys() <= defaults.keys() and grid.contains(
        held := _as_stored_point(defaults, problem.space)
    ):
        first = {**grid.other_values, **grid.canonical({name: held[name] for name in grid.levels})}
        points = [first, *(point for point in points if point_key(point) != point_key(first))][
            :most
        ]
    part = f"; {len(points):,} are tried, spread over it" if len(points) < grid.count else ""
    return GridPointsSampler(points, f"{grid}{part}", is_part=partial)


def _all_combinations(problem: Problem, levels: Mapping[str, Sequence[Value]] | None) -> Grid:
    """Return all combinations of a problem's grid values."""
    space, known = problem.space, problem.specs()
    if not space:
        raise ValueError("A grid must have something to tune, but everything is in `fixed`.")
    if levels is None:
        chosen = {name: default_grid_values(d, known.get(name)) for name, d in space.items()}
    else:
        chosen = check_grid_values(levels, space, known)
    defaults = _as_stored_point(problem.defaults(), space)
    rest = {
        name: defaults[name] if name in defaults else default_grid_values(d, known.get(name))[0]
        for name, d in space.items()
        if name not in chosen
    }
    inactive_values = {name: defaults.get(name, values[0]) for name, values in chosen.items()}
    return Grid(chosen, rest, problem.fixed, inactive_values, known)


def _as_stored_point(point: Mapping[str, Value], space: Mapping[str, BaseDistribution]) -> Point:
    return {name: to_stored_value(value, space[name]) for name, value in point.items()}


def _check_count(grid: Grid, budget: Budget) -> None:
    """Raise if a grid has more points than there are trials, or than can be listed."""
    trials = budget.n_trials
    if trials is not None and grid.count > trials:
        raise ValueError(
            f"A grid must have at most `n_trials` points, {trials:,}, but has {grid}: {ADVICE}"
        )
    if grid.count > MAX_GRID_POINTS:
        raise ValueError(
            f"A grid must have at most {MAX_GRID_POINTS:,} points, but has {grid}: {ADVICE}"
        )


def check_grid(sampler: GridSampler, space: Mapping[str, BaseDistribution]) -> None:
    """Raise unless a grid of Optuna has exactly the tuned parameters, within their ranges.

    Example:
        >>> from optuna.distributions import IntDistribution
        >>> check_grid(GridSampler({"depth": [1, 2]}), {"depth": IntDistribution(1, 8)})
    """
    grid = grid_of(sampler)
    if set(grid) != set(space):
        lacks, more = sorted({*space} - {*grid}), sorted({*grid} - {*space})
        raise ValueError(
            "The grid must hold what is tuned and nothing else (`space`, `fixed`), but it lacks "
            f"[{', '.join(lacks)}] and has [{', '.join(more)}] besides."
        )
    count = Grid(check_grid_values(grid, space, {}), {}, {}, {}, {}).count
    if count > MAX_GRID_POINTS:
        raise ValueError(
            f"A grid must have at most {MAX_GRID_POINTS:,} points, but has {count:,}."
        )


def to_grid_points_sampler(
    sampler: GridSampler | GridPointsSampler, problem: Problem
) -> GridPointsSampler:
    """Return the points of a grid; those of Optuna's sampler after the default configuration.

    Optuna's sampler itself works only within `Study.optimize`, may propose one point to two
    workers, and does not repeat a point whose trial was killed.
    """
    if isinstance(sampler, GridPointsSampler):
        return sampler
    grid = Grid(check_grid_values(grid_of(sampler), problem.space, {}), {}, {}, {}, {})
    points = grid.sobol_order(seed=0)
    first = points[0] | _as_stored_point(problem.defaults(), problem.space)
    return GridPointsSampler(
        [first, *(p for p in points if point_key(p) != point_key(first))], str(grid), is_part=True
    )


class GridQueue:
    """Enqueues the points of a grid in a study, and starts each of them once.

    Two workers that start at the same time may both enqueue them. The trial with the lowest number
    then belongs to the point. The first worker that finds another one fails it, and it does not
    count.

    Args:
        study:
            The study.
        storage:
            Storage of the study.

    Example:
        >>> storage = BufferedStorage(optuna.storages.InMemoryStorage())
        >>> points = GridQueue(optuna.create_study(storage=storage), storage)
        >>> points.add([{"depth": 2}, {"depth": 1}])
        >>> points.add([{"depth": 2}])
        >>> points.end_duplicates()
        >>> [points.n_points_left, points.take().number, points.take().number, points.take()]
        [2, 0, 1, None]
    """

    def __init__(self, study: Study, storage: BufferedStorage) -> None:
        self._study, self._storage = study, storage
        self._numbers: dict[str, list[int]] = defaultdict(list)  # of trials, by key of their point
        self._known = 0  # number of trials in `_numbers`

    @property
    def n_points_left(self) -> int:
        """Return the number of points that have not started."""
        return len(self._waiting())

    def enqueue(self, plan: GridPointsSampler, problem: Problem, budget: Budget) -> None:
        """Enqueue the points that have no trial, as many as the budget has trials left.

        Points whose trial was stopped early are tried again, and after all others those whose
        trial failed.

        Raises:
            ValueError: If the budget is too small for the points that are left, and a part of the
                grid is not enough.
        """
        self._storage.refresh()
        trials = self._study.get_trials(deepcopy=False)
        owners = {
            point_key(grid_point_of(t)): t for t in reversed(trials) if not retries_grid_point(t)
        }
        found = [(point, owners.get(point_key(point))) for point in plan.points]
        missing = [point for point, owner in found if owner is None]
        begun = sum(o is not None and o.state != TrialState.WAITING for _, o in found)
        failed = {
            point_key(grid_point_of(t))
            for t in trials
            if retries_grid_point(t) and counts_towards_n_trials(t, on_grid=True)
        }
        missing.sort(key=lambda point: point_key(point) in failed)
        fresh = [point for point in missing if point_key(point) not in failed]
        waiting = [
            grid_point_of(t) for t in reversed(owners.values()) if t.state == TrialState.WAITING
        ]
        ended = sum(
            t.state.is_finished() and counts_towards_n_trials(t, on_grid=True) for t in trials
        )
        running = sum(t.state == TrialState.RUNNING for t in owners.values())
        left = budget.n_trials_left(ended + running)
        _logger.info(f"The grid has {plan.text}{f'; begun before: {begun:,}' if trials else ''}.")
        if not plan.is_part:
            _check_left(problem, budget, left, [*fresh, *waiting])
        self.add(missing if left is None else missing[: max(0, left - len(waiting))])
        self.end_duplicates()

    def add(self, points: Sequence[Point]) -> None:
        """Enqueue points in one operation."""
        templates = [
            optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={FIXED_PARAMS: point})
            for point in points
        ]
        if templates:
            self._storage.create_new_trials(study_id(self._study), templates)

    def end_duplicates(self) -> None:
        """Fail waiting trials whose point has another trial already."""
        self._storage.refresh()
        trials = self._read_trials()
        with self._storage.batch():
            for trial in trials:
                waits = trial.state == TrialState.WAITING and FIXED_PARAMS in trial.system_attrs
                if waits and self._is_duplicate(trial, trials) and self._start_trial(trial):
                    self._end_as_duplicate(trial)

    def take(self) -> Trial | None:
        """Start the trial of the next point and return it; None if no point is left."""
        for trial in self._waiting():
            if not self._start_trial(trial):
                continue
            if not self._is_duplicate(trial, self._read_trials()):
                return Trial(self._study, id_of(trial))
            self._end_as_duplicate(trial)
        return None

    def _waiting(self) -> list[FrozenTrial]:
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return [trial for trial in waiting if FIXED_PARAMS in trial.system_attrs]

    def _start_trial(self, trial: FrozenTrial) -> bool:
        """Start a trial and return whether no other worker had started it."""
        try:
            return self._storage.set_trial_state_values(id_of(trial), TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _end_as_duplicate(self, trial: FrozenTrial) -> None:
        self._storage.set_trial_user_attr(id_of(trial), CAUSE, TrialOutcome.DUPLICATE.value)
        self._storage.set_trial_state_values(id_of(trial), TrialState.FAIL)

    def _read_trials(self) -> list[FrozenTrial]:
        """Return all trials, and add the new ones to `_numbers`."""
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[self._known :]:
            self._numbers[point_key(grid_point_of(trial))].append(trial.number)
        self._known = len(trials)
        return trials

    def _is_duplicate(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        """Return whether a trial with a lower number has the same point."""
        same = self._numbers[point_key(grid_point_of(trial))]
        return any(n < trial.number and not retries_grid_point(trials[n]) for n in same)


def grid_point_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's parameters, including enqueued values that are not suggested yet."""
    return {**trial.system_attrs.get(FIXED_PARAMS, {}), **trial.params}


def _check_left(
    problem: Problem, budget: Budget, left: int | None, points: Sequence[Point]
) -> None:
    """Raise if the budget is too small for the points that are left."""
    if left and len(points) > left:
        raise ValueError(
            f"What is left of a grid must be at most as many points as `n_trials` leaves trials, "
            f"{left:,}, but is {len(points):,}: {ADVICE}"
        )
    if budget.timeout is None or left == 0 or not points:
        return
    seconds = len(points) * _mean_seconds_per_point(problem, points[:MAX_PROBED_POINTS])
    if seconds > budget.seconds_left:
        raise ValueError(
            f"A grid must fit into the timeout of {budget.timeout:,g} s, but {len(points):,} "
            f"points take about {seconds:,.0f} s if none ends early: {ADVICE}"
        )


def _mean_seconds_per_point(problem: Problem, points: Sequence[Mapping[str, Value]]) -> float:
    """Estimate the mean seconds of a trial; points that cannot be trained take none."""
    seconds, started = list[float](), time.monotonic()
    with single_threaded_blas:
        for point in points:
            try:
                seconds.append(estimate_seconds(problem, problem.member(0, point)))
            except TrialError:
                seconds.append(0.0)
            if time.monotonic() - started > PROBE_SECONDS:
                break
    return sum(seconds) / len(seconds)


def estimate_seconds(problem: Problem, member: Member) -> float:
    """Return the seconds of a trial's whole budget, which are given or measured."""
    params = member.params
    if params.get("seconds") and not (params["iterations"] or params["train_tokens"]):
        return float(params["seconds"] or 0)
    step = getattr(problem, "seconds_per_step", None)
    if step is not None:  # the template measures its steps itself
        return float(step(member) * problem.attributes(member)["budget_iterations"])
    problem.signature(member)  # raises an error if the member cannot be trained
    pace = measure_throughput(problem, member, problem.cohort_size(member))
    cohort = problem.cohort([member])
    return pace.round * cohort.total_steps[0] / cohort.batches.per_round
