"""Zooming in: random search in a box that closes in on the best trials, round by round."""

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
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.boxes import NarrowingConfig
from optuna_nnhp.search.boxes import ParameterAxis
from optuna_nnhp.search.boxes import Region
from optuna_nnhp.search.boxes import narrow
from optuna_nnhp.search.ordering import sort_key

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

ROUND_SIZE, PATIENCE = 16, 10  # with 5, studies of 24 parameters stopped after 145 to 609 trials
ELITE_DIVISOR, MAX_ELITES, MIN_ELITES = 5, 12, 4  # one of five trials, within bounds
EXPLORATION_PROBABILITY = 0.03  # of the values that are drawn from the whole range
# With a chance of 0.05, as statistics would have it, boxes close in too slowly; a wrong cut is
# mended by the values from the whole range.
NARROWING = NarrowingConfig(
    min_width_ratio=0.5, trim_fraction=0.2, cut_p_value=0.4, drop_p_value=0.05
)
N_RECENT_TRIALS = 500  # trials that tell what was tried: those of the last boxes

SortKey = tuple[int, float, float]
Positions = dict[ParameterAxis, float]


class ZoomSampler(BaseSampler):
    """Draws values at random from a box that closes in on the best trials.

    After each round of trials the box is drawn anew around the best of all trials so far. An
    interval becomes at most half as wide, and only loses what was tried and is avoided by the
    best; where the best trial lies on a bound of the box, the box grows beyond it. Choices are
    dropped once none of the best trials has them and they rank clearly behind the others. One
    value in thirty is drawn from its whole range, so that what was cut unluckily can come back.

    A round is over when enough trials that began in it have ended, so many trials at a time
    (several workers, cohorts) do not make it hurry. Pruned trials count, behind all COMPLETE ones
    and by how far they came. The box follows from the finished trials alone: a study can be
    continued, and several workers see the same box.

    Args:
        round_size:
            Trials of a round.
        patience:
            Rounds without a better trial after which ``study.optimize`` stops. A round counts if
            a trial ends COMPLETE in it that began after the best was known; pruned ones do not
            tell how far those that run will come. None to go on for ever.
        seed:
            Seed.

    Raises:
        ValueError: If ``round_size`` is under 5 or ``patience`` under 1.

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
        """Draw other random numbers, as in a new thread."""
        self._rng.rng.seed()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing: every value is drawn by itself, so that spaces may be conditional."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, see `infer_relative_search_space`.

        Raises:
            ValueError: If the study has several objectives.
        """
        self._raise_error_if_multi_objective(study)
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A value of the box, seldom one of the whole range.

        Raises:
            ValueError: If the study has several objectives.
        """
        self._raise_error_if_multi_objective(study)
        asked = self._asked
        if asked is None or asked[0] != trial._trial_id:  # for all parameters of a trial once
            asked = self._asked = trial._trial_id, self._round_history.refresh(study)
        axis = self._round_history.axis(param_name, param_distribution)
        whole, rng = axis.full_range(), self._rng.rng
        part = whole if rng.rand() < EXPLORATION_PROBABILITY else asked[1].box.get(axis, whole)
        return axis.sample(part, rng)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Stop the study if it has not got better for long; this trial counts with the next."""
        if self._patience is None or study._is_multi_objective():
            return
        if self._round_history.refresh(study).rounds_without_improvement < self._patience:
            return
        with suppress(RuntimeError):  # outside of `optimize` there is nothing to stop
            study.stop()
            _logger.info(f"No better trial in {self._patience} rounds: the study stops.")


@dataclass(frozen=True)
class RoundState:
    """What is known at the beginning of a round.

    Args:
        number:
            How many rounds there were before.
        n_finished:
            How many finished trials there were.
        started_at:
            When the last of them ended; None in the first round.
        box:
            What is left of each parameter's range; all of it where nothing is said.
        best:
            Rank of the best trial.
        improved_at:
            When the round ended in which it got better; None before the first did.
        rounds_without_improvement:
            Rounds since then in which a trial that began later was trained to its end.
    """

    number: int = 0
    n_finished: int = 0
    started_at: datetime | None = None
    box: dict[ParameterAxis, Region] = field(default_factory=dict)
    best: SortKey | None = None
    improved_at: datetime | None = None
    rounds_without_improvement: int = 0


class RoundHistory:
    """The rounds of one study, which follow from its finished trials alone. A copy is empty.

    Trials are looked at in the order in which they ended. If one turns up late, such as another
    worker's, the rounds since its end are gone through again.

    Args:
        size:
            Trials of a round.
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
        self._unfinished: list[int] = []  # numbers of trials that had not ended
        self._order: list[tuple[datetime, int]] = []  # end and number of those that had
        self._positions: dict[int, Positions] = {}
        self._restart_from([RoundState()])

    def _restart_from(self, stages: list[RoundState]) -> None:
        """Go on from the last of some stages."""
        self._round_states, self._at = stages, stages[-1].n_finished
        self._n_new, self._has_evidence = 0, False
        numbers = (number for _, number in self._order[: self._at])
        self._ranked = sorted((self._sort_key(number), number) for number in numbers)

    def axis(self, name: str, distribution: BaseDistribution) -> ParameterAxis:
        """The axis of a parameter, the same for equal distributions."""
        with self._lock:
            axes = self._axes.setdefault(name, [])
            for axis in axes:
                if axis.distribution == distribution:
                    return axis
            axes.append(ParameterAxis(name, distribution))
            return axes[-1]

    def refresh(self, study: Study) -> RoundState:
        """The stage after all trials that have ended by now."""
        which = study._storage, study._study_id
        with self._lock:
            if self._study != which:
                self._study = which
                self._reset()
            seen = len(self._trials)
            self._trials = study._get_trials(deepcopy=False)
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
        """Put trials where they belong in the order, and go on from there."""
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
        if first < self._at:
            self._restart_from(
                [stage for stage in self._round_states if stage.n_finished <= first]
            )
        while self._at < len(self._order):
            self._advance()

    def _advance(self) -> None:
        """Look at the next trial, and end the round if it is the last."""
        ended, number = self._order[self._at]
        self._at += 1
        insort(self._ranked, (self._sort_key(number), number))
        stage, trial = self._round_states[-1], self._trials[number]
        start = trial.datetime_start
        self._n_new += _started_after(start, stage.started_at)
        # Trials that were pruned early say nothing about where those that run will end.
        if trial.state == TrialState.COMPLETE and _started_after(start, stage.improved_at):
            self._has_evidence = True
        if self._n_new >= self.size:
            self._round_states.append(self._next(stage, ended))
            self._n_new, self._has_evidence = 0, False

    def _next(self, stage: RoundState, ended: datetime) -> RoundState:
        """The next round's stage."""
        number, box, best = stage.number + 1, self._narrowed_box(stage.box), self._ranked[0][0]
        if best != stage.best:
            return RoundState(number, self._at, ended, box, best, improved_at=ended)
        rounds_without_improvement = stage.rounds_without_improvement + self._has_evidence
        return RoundState(
            number, self._at, ended, box, best, stage.improved_at, rounds_without_improvement
        )

    def _narrowed_box(self, old: dict[ParameterAxis, Region]) -> dict[ParameterAxis, Region]:
        """The box around the best trials."""
        count = min(max(self._at // ELITE_DIVISOR, MIN_ELITES), MAX_ELITES)
        elites = [self._positions_of(number) for _, number in self._ranked[:count]]
        recent = {
            number for _, number in self._order[max(0, self._at - N_RECENT_TRIALS) : self._at]
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
        """The places of a trial's values."""
        if number not in self._positions:
            trial = self._trials[number]
            axes = {name: self.axis(name, d) for name, d in trial.distributions.items()}
            self._positions[number] = {
                axis: axis.position(trial.params[name]) for name, axis in axes.items()
            }
        return self._positions[number]


def _started_after(start: datetime | None, moment: datetime | None) -> bool:
    """Whether a trial began after a moment; one without a beginning is given the benefit."""
    return start is None or moment is None or start >= moment
