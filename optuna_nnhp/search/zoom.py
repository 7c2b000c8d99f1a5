"""Random search in a box that closes in on the best trials, round by round."""

from __future__ import annotations

from bisect import bisect_left
from bisect import insort
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from datetime import datetime
import threading
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search._optuna_internals import LazyRandomState
from optuna_nnhp.search._optuna_internals import all_trials
from optuna_nnhp.search._optuna_internals import check_single_objective
from optuna_nnhp.search._optuna_internals import study_key
from optuna_nnhp.search._optuna_internals import trial_id
from optuna_nnhp.search.narrowing import NarrowingConfig
from optuna_nnhp.search.narrowing import ParameterAxis
from optuna_nnhp.search.narrowing import Region
from optuna_nnhp.search.narrowing import narrow
from optuna_nnhp.search.ordering import sort_key

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# Rounds; with a patience of 5, studies of 24 parameters stopped after 145 to 609 trials.
ROUND_SIZE, PATIENCE = 16, 10
ELITE_DIVISOR, MAX_ELITES, MIN_ELITES = 5, 12, 4  # one of five trials is an elite, within bounds
EXPLORATION_PROBABILITY = 0.03  # that a value is drawn from the whole range
# With the usual p-value of 0.05 boxes close in too slowly. Values drawn from the whole range
# repair a wrong cut.
NARROWING = NarrowingConfig(
    min_width_ratio=0.5, trim_fraction=0.2, cut_p_value=0.4, drop_p_value=0.05
)
N_RECENT_TRIALS = 500  # the trials whose values count as tried

SortKey = tuple[int, float, float]
Positions = dict[ParameterAxis, float]


class ZoomSampler(BaseSampler):
    """Draw random values from a box that closes in on the best trials.

    After each round of trials, the box is computed again from the best of all trials so far. An
    interval shrinks to half its width at most, and loses only values that were tried and that the
    best trials do not have. If the best trial lies on a bound of the box, the box grows beyond it.
    Choices are dropped if none of the best trials has them and they rank clearly behind the
    others. One value in thirty is drawn from the whole range, so that a wrong cut can be undone.

    A round ends when ``round_size`` trials that began in it have finished, so that many trials at
    a time (several workers, cohorts) do not shorten it. Pruned trials count; they rank behind all
    COMPLETE ones, by their last step. The box depends on the finished trials alone: a study can be
    continued, and several workers use the same box.

    Args:
        round_size:
            The number of trials in a round, at least 5.
        patience:
            The number of rounds without a better trial after which ``study.optimize`` stops; None
            for no such stop. A round counts if a trial ends COMPLETE in it that began after the
            best one had ended; pruned trials do not show what running trials will reach.
        seed:
            Seed of the random numbers.

    Raises:
        ValueError: If ``round_size`` is below 5 or ``patience`` below 1.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(sampler=ZoomSampler(seed=0))
        >>> study.optimize(lambda trial: trial.suggest_float("x", -9, 9) ** 2, n_trials=100)
        >>> study.best_value < 1e-3
        True
    """

    def __init__(
        self,
        *,
        round_size: int = ROUND_SIZE,
        patience: int | None = PATIENCE,
        seed: int | None = None,
    ) -> None:
        if round_size < ELITE_DIVISOR:
            raise ValueError(
                f"`round_size` must be at least {ELITE_DIVISOR}, but got {round_size}."
            )
        if patience is not None and patience < 1:
            raise ValueError(f"`patience` must be at least 1, but got {patience}.")
        self._patience, self._round_history = patience, RoundHistory(round_size)
        self._rng = LazyRandomState(seed)
        self._asked: tuple[int, RoundState] | None = None

    def reseed_rng(self) -> None:
        """Reseed the random numbers."""
        self._rng.rng.seed()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return no space: values are drawn one by one, so that spaces may be conditional."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return no values; see `infer_relative_search_space`.

        Raises:
            ValueError: If the study has several objectives.
        """
        check_single_objective(self, study)
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a value from the box, or sometimes from the whole range.

        Raises:
            ValueError: If the study has several objectives.
        """
        check_single_objective(self, study)
        asked = self._asked
        if asked is None or asked[0] != trial_id(trial):  # once for all parameters of a trial
            asked = self._asked = trial_id(trial), self._round_history.refresh(study)
        axis = self._round_history.axis(param_name, param_distribution)
        whole, rng = axis.full_range(), self._rng.rng
        part = whole if rng.rand() < EXPLORATION_PROBABILITY else asked[1].box.get(axis, whole)
        return axis.sample(part, rng)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Stop the study after `patience` rounds without a better trial, this one not included."""
        if self._patience is None or len(study.directions) > 1:
            return
        if self._round_history.refresh(study).rounds_without_improvement < self._patience:
            return
        with suppress(RuntimeError):  # outside of `study.optimize`
            study.stop()
            _logger.info(f"The study stops: no better trial in {self._patience} rounds.")


@dataclass(frozen=True)
class RoundState:
    """The state of the search at the beginning of a round.

    Args:
        number:
            The number of rounds before.
        n_finished:
            The number of finished trials then.
        started_at:
            When the last of them ended; None in the first round.
        box:
            The region of each parameter; one that is missing has its whole range.
        best:
            Sort key of the best trial.
        improved_at:
            When the last round with a better trial ended; None before the first did.
        rounds_without_improvement:
            The number of rounds since then with a COMPLETE trial that began later.
    """

    number: int = 0
    n_finished: int = 0
    started_at: datetime | None = None
    box: dict[ParameterAxis, Region] = field(default_factory=dict)
    best: SortKey | None = None
    improved_at: datetime | None = None
    rounds_without_improvement: int = 0


class RoundHistory:
    """The rounds of one study, computed from its finished trials alone. A copy of it is empty.

    Trials are processed in the order in which they ended. If one appears late, as another worker's
    may, the rounds since its end are computed again.

    Args:
        size:
            The number of trials in a round.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.RLock()
        self._study: tuple[BaseStorage, int] | None = None
        self._reset()

    def __reduce__(self) -> tuple[type[RoundHistory], tuple[int]]:
        return RoundHistory, (self.size,)

    def _reset(self) -> None:
        self._axes: dict[str, list[ParameterAxis]] = {}
        self._trials: list[FrozenTrial] = []
        self._unfinished: list[int] = []  # trial numbers
        self._order: list[tuple[datetime, int]] = []  # end and number of finished trials
        self._positions: dict[int, Positions] = {}
        self._restart_from([RoundState()])

    def _restart_from(self, states: list[RoundState]) -> None:
        """Continue from the last of some round states."""
        self._round_states, self._n_processed = states, states[-1].n_finished
        self._n_new, self._has_evidence = 0, False
        numbers = (number for _, number in self._order[: self._n_processed])
        self._ranked = sorted((self._sort_key(number), number) for number in numbers)

    def axis(self, name: str, distribution: BaseDistribution) -> ParameterAxis:
        """Return the axis of a parameter, the same object for equal distributions."""
        with self._lock:
            axes = self._axes.setdefault(name, [])
            for axis in axes:
                if axis.distribution == distribution:
                    return axis
            axes.append(ParameterAxis(name, distribution))
            return axes[-1]

    def refresh(self, study: Study) -> RoundState:
        """Process the trials that ended since the last call, and return the round's state."""
        which = study_key(study)
        with self._lock:
            if self._study != which:
                self._study = which
                self._reset()
            seen = len(self._trials)
            self._trials = all_trials(study)
            self._sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
            self._unfinished += range(seen, len(self._trials))
            ended = [n for n in self._unfinished if self._trials[n].state.is_finished()]
            if ended:
                self._unfinished = [
                    n for n in self._unfinished if not self._trials[n].state.is_finished()
                ]
                self._insert(ended)
            return self._round_states[-1]

    def _insert(self, ended: list[int]) -> None:
        """Insert trials into the order of their ends, and process all trials from there on."""
        keys = []
        for number in ended:
            trial = self._trials[number]
            if trial.state != TrialState.FAIL:
                assert trial.datetime_complete is not None
                keys.append((trial.datetime_complete, number))
        if not keys:
            return
        first = bisect_left(self._order, min(keys))
        for key in keys:
            insort(self._order, key)
        if first < self._n_processed:
            self._restart_from(
                [current for current in self._round_states if current.n_finished <= first]
            )
        while self._n_processed < len(self._order):
            self._process_next_trial()

    def _process_next_trial(self) -> None:
        """Process the next trial, and end the round if it is the round's last one."""
        ended, number = self._order[self._n_processed]
        self._n_processed += 1
        insort(self._ranked, (self._sort_key(number), number))
        current, trial = self._round_states[-1], self._trials[number]
        start = trial.datetime_start
        self._n_new += _started_after(start, current.started_at)
        # Pruned trials do not show what running trials will reach.
        if trial.state == TrialState.COMPLETE and _started_after(start, current.improved_at):
            self._has_evidence = True
        if self._n_new >= self.size:
            self._round_states.append(self._next_round(current, ended))
            self._n_new, self._has_evidence = 0, False

    def _next_round(self, current: RoundState, ended: datetime) -> RoundState:
        """Return the state of the next round."""
        number, box, best = current.number + 1, self._narrowed_box(current.box), self._ranked[0][0]
        if best != current.best:
            return RoundState(number, self._n_processed, ended, box, best, improved_at=ended)
        rounds_without_improvement = current.rounds_without_improvement + self._has_evidence
        return RoundState(
            number,
            self._n_processed,
            ended,
            box,
            best,
            current.improved_at,
            rounds_without_improvement,
        )

    def _narrowed_box(self, old: dict[ParameterAxis, Region]) -> dict[ParameterAxis, Region]:
        """Return the box around the best trials."""
        count = min(max(self._n_processed // ELITE_DIVISOR, MIN_ELITES), MAX_ELITES)
        elites = [self._positions_of(number) for _, number in self._ranked[:count]]
        recent = {
            number
            for _, number in self._order[
                max(0, self._n_processed - N_RECENT_TRIALS) : self._n_processed
            ]
        }
        tried = [self._positions_of(number) for _, number in self._ranked if number in recent]
        return {
            axis: narrow(
                axis,
                old.get(axis, axis.full_range()),
                [row[axis] for row in elites if axis in row],
                [row[axis] for row in tried if axis in row],
                NARROWING,
            )
            for axis in {axis: None for row in (*elites, *tried) for axis in row} | old
        }

    def _sort_key(self, number: int) -> SortKey:
        return sort_key(self._trials[number], self._sign)

    def _positions_of(self, number: int) -> Positions:
        """Return the positions of a trial's values."""
        if number not in self._positions:
            trial = self._trials[number]
            axes = {name: self.axis(name, d) for name, d in trial.distributions.items()}
            self._positions[number] = {
                axis: axis.position(trial.params[name]) for name, axis in axes.items()
            }
        return self._positions[number]


def _started_after(start: datetime | None, moment: datetime | None) -> bool:
    """Return whether a trial began after a moment; True if either is unknown."""
    return start is None or moment is None or start >= moment
