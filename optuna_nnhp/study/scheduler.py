"""The scheduler: ask for trials, train them as cohorts, report, prune, tell, refill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from dataclasses import dataclass
from dataclasses import field
import time
from typing import Any
from typing import ClassVar

import optuna
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.study.admission import Admission
from optuna_nnhp.study.asking import CUT_SHORT
from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.deferred import DeferredStorage
from optuna_nnhp.study.loop import Budget
from optuna_nnhp.study.loop import Progress
from optuna_nnhp.study.loop import inside_optimize
from optuna_nnhp.study.loop import tidy_interrupts
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.pool import Pool
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.timing import Timing
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.checkpoint import BestWeights
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.machine import single_blas

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

Callback = Callable[[Study, FrozenTrial], None]

REPORT_EVERY = 2.0  # seconds between reports of running trials, unless a pruner reads them


@dataclass
class Scheduler:
    """Runs a study.

    Args:
        study:
            The opened study; its storage is a `DeferredStorage`.
        problem:
            What is tuned.
        budget:
            How long.
        weights:
            Where the best trials' weights go.
        callbacks:
            Called after every trial with the study and the trial, as by Optuna.
        cohort_size:
            Trials in a cohort; None to choose it by memory and measurement.
        show_progress_bar:
            Whether to draw a progress bar.
        kept:
            Of how many of the best trials the weights are kept.

    Attributes:
        history: Best value so far of every trial, by round and trial number, of the whole study.
        best: Best value of the study.
        leader: Number of the trial that has it.
        podium: The best trials, whose weights are kept: values, the smaller the better, and
            numbers.
        pool: The cohorts in training.
        timing: Where the time went.
        has_portfolio: Whether the template's portfolio is tried beside the default.
    """

    study: Study
    problem: Problem
    budget: Budget
    weights: BestWeights
    callbacks: Sequence[Callback] = ()
    cohort_size: int | None = None
    show_progress_bar: bool = False
    kept: int = 1
    history: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    best: float | None = None
    leader: int | None = None
    podium: list[tuple[float, int]] = field(default_factory=list)
    pool: Pool = field(default_factory=Pool)
    timing: Timing = field(default_factory=Timing)
    has_portfolio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        storage = self.study._storage
        if not isinstance(storage, DeferredStorage):
            raise TypeError(f"The study's storage must be a DeferredStorage, but is {storage}.")
        self.storage = storage
        self.asker = Asker(self.study, self.problem, self.budget, storage)
        self.admission = Admission(self.asker, self.pool, self.cohort_size)
        self.trainer = ThreadPoolExecutor(1, "optuna_nnhp-trainer")

    def run(self) -> None:
        """Train cohorts until the budget is spent, or somebody stops the study."""
        sampler = self.study.sampler
        self._recall()
        if self.asker.left() == 0:
            _logger.info(f"The study has its {self.asker.finished} trials already: nothing to do.")
        with (
            inside_optimize(self.study),
            single_blas,
            tidy_interrupts(self.budget),
            Progress(self.show_progress_bar, self.budget, self.asker.finished) as self.progress,
        ):
            try:
                self._train_all()
                self._drop_waiting()
            except BaseException:
                self._fail_all()
                raise
            finally:
                self.study.sampler = sampler  # a grid's points were asked through another one
                self.trainer.shutdown()
                self._note_timing()
                self.storage.flush()

    def _train_all(self) -> None:
        """Ask for trials and train them, until there are no more."""
        self._admit()
        while (live := self.pool.next()) or self.admission.has_more():
            if live:
                self._train(live)
            self._admit()

    def _note_timing(self) -> None:
        """Note on the study where this call's time went."""
        wall = self.budget.seconds
        if not self.pool.offered:
            return
        shares = {name: round(s / wall, 4) for name, s in self.timing.seconds.items()}
        note = {"seconds": round(wall, 2), "occupancy": round(self.pool.occupancy, 4), **shares}
        self.study.set_user_attr("timing", note)

    def _recall(self) -> None:
        """Take in what the study holds already; begin a new one with the defaults."""
        trials = self.study.get_trials(deepcopy=False)
        self.asker.begin(with_portfolio=self.has_portfolio)
        for trial in trials:
            best: float | None = None
            for step, value in sorted(trial.intermediate_values.items()):
                best = value if best is None or self._is_better(value, best) else best
                self.history[step][trial.number] = best
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                self._enters(trial.value, trial.number)

    def _admit(self) -> None:
        with self.timing("asking"):
            self.admission.admit()

    # --- Training ---

    def _train(self, live: Live) -> None:
        """Train one cohort to its next evaluation, judge, and end who has ended."""
        members = len(live.running)
        before, work = live.cohort.iterations[0], live.cohort.work_of_step
        scores, seconds = self._train_round(live.cohort)
        if live.rounds == 0 and scores is not None:
            self.admission.first_round = seconds
        self.pool.note(live, members, seconds, work * (live.cohort.iterations[0] - before))
        with self.timing("bookkeeping"):
            if scores is None:
                cause = "interrupted" if self.budget.interrupted else "timeout"
                self._end_some(live, {place: cause for place in range(members)})
            else:
                self._end_some(live, self._judge(live, scores))
            self.storage.flush_if_due()
        self.progress.show(self.asker.finished, self.pool.alive, self.best)

    def _train_round(self, cohort: Cohort) -> tuple[Scores | None, float]:
        """A cohort's scores, and how many seconds it trained for them.

        The engine leaves Python to others while it computes: then followers are asked for.
        """
        started = time.monotonic()
        if cohort.native is None:
            with self.timing("training"):
                scores = cohort.train_round(self.budget.out_of_time)
            return scores, time.monotonic() - started
        ended: list[float] = []

        def train() -> Scores | None:
            try:
                return cohort.train_round(self.budget.out_of_time)
            finally:
                ended.append(time.monotonic())

        with self.timing("training"):
            future = self.trainer.submit(train)
            try:
                self.admission.prepare(future.done)
            finally:
                late = time.monotonic()
                wait([future])
        self.timing.move("training", "asking", max(0.0, late - ended[0]))
        return future.result(), ended[0] - started

    def _judge(self, live: Live, scores: Scores) -> dict[int, str]:
        """Note one evaluation's scores; the places of those who end, and why."""
        evaluated = [live.running[live.cohort.members[place].number] for place in scores.places]
        before = [trial.last_round for trial in evaluated]
        for i, trial in enumerate(evaluated):
            trial.take(scores, i)
            if (standing := trial.standing) is not None:
                self.history[scores.rounds[i]][trial.member.number] = standing
        self._report(live, evaluated)
        ends = {
            place: "ended elsewhere"
            for place, member in enumerate(live.cohort.members)
            if live.running[member.number].told
        }
        kept: dict[tuple[int, bool], set[int]] = {}  # by round, of the openers or of all
        for place, trial, previous, ended in zip(
            scores.places, evaluated, before, scores.ended, strict=True
        ):
            if trial.told:
                continue
            if ended is not None:
                ends[place] = ended
            elif self._is_pruned(trial, previous, kept):
                ends[place] = "pruned"
        return ends

    def _report(self, live: Live, evaluated: Sequence[RunningTrial]) -> None:
        now = time.monotonic()
        by_rule = isinstance(self.study.pruner, CohortHalvingPruner)
        if by_rule and now - live.reported_at < REPORT_EVERY:
            return
        live.reported_at = now
        for trial in live.running.values() if by_rule else evaluated:
            try:
                trial.report()
            except UpdateFinishedTrialError:
                self._lose(trial)

    def _lose(self, trial: RunningTrial) -> None:
        """Note that somebody else has ended a trial; what they said of it stays."""
        trial.told = True
        _logger.warning(f"Trial {trial.member.number} was ended by another process.")

    def _is_pruned(
        self, trial: RunningTrial, previous: int, kept: dict[tuple[int, bool], set[int]]
    ) -> bool:
        """Whether the pruner ends a trial after this evaluation."""
        pruner, done = self.study.pruner, trial.last_round
        if not isinstance(pruner, CohortHalvingPruner):
            return bool(trial.trial.should_prune())
        if trial.is_baseline or not pruner.is_rung(done, previous):
            return False
        key = done, trial.is_opener
        if key not in kept:
            values = self.history[done]
            if trial.is_opener:  # one of each shape comes to its end: shapes differ late
                running, shape = self.asker.running, trial.signature
                rivals = {n for n, t in running.items() if t.is_opener and t.signature == shape}
                values = {n: value for n, value in values.items() if n in rivals}
            kept[key] = pruner.keep(values, maximize=self.problem.maximize)
        return trial.member.number not in kept[key]

    # --- Ends ---

    def _end_some(self, live: Live, ends: dict[int, str]) -> None:
        """End some members, by their places, and shrink the cohort to the others."""
        if not ends:
            return
        cohort = live.cohort
        stay = [place for place in range(len(cohort.members)) if place not in ends]
        self._end_trials(live, {cohort.members[place].number: c for place, c in ends.items()})
        if stay:
            cohort.keep(stay)

    def _end_trials(self, live: Live, causes: Mapping[int, str]) -> None:
        """End trials, by their numbers; the cohort stays as it is."""
        places = {member.number: place for place, member in enumerate(live.cohort.members)}
        told, before = [live.running[number] for number in causes], self.podium
        with self.storage.batch():
            for running, cause in zip(told, causes.values(), strict=True):
                self._end(running, cause, live.cohort, places[running.member.number])
        for number in causes:
            del live.running[number], self.asker.running[number]
        self._drop_weights(before)
        self.asker.finished += len(told)
        self._call_back(told)

    def _end(self, running: RunningTrial, cause: str, cohort: Cohort, place: int) -> None:
        """Tell Optuna of one trial's end, its best weights kept first if it leads."""
        if running.told:
            return
        try:
            running.describe(self.problem, cohort.iterations[place], cause)
        except UpdateFinishedTrialError:
            self._lose(running)
            return
        state, number = self._state(running, cause), running.member.number
        is_complete = state == TrialState.COMPLETE and running.best is not None
        if is_complete and self._enters(running.best or 0.0, number):
            self._keep_weights(cohort, place)
        running.tell(self.study, state)

    def _enters(self, value: float, number: int) -> bool:
        """Note a COMPLETE trial; whether it is one of the best. Of equal ones the first is."""
        entry = (-value if self.problem.maximize else value, number)
        self.podium = sorted([*self.podium, entry])[: self.kept]
        if entry == self.podium[0]:
            self.best, self.leader = value, number
        return entry in self.podium

    def _drop_weights(self, before: Sequence[tuple[float, int]]) -> None:
        """Forget the weights of those that are not among the best any more."""
        if self.podium != before:  # and only now that Optuna knows of the others
            self.weights.drop_others([number for _, number in self.podium])

    def _keep_weights(self, cohort: Cohort, place: int) -> None:
        number = cohort.members[place].number
        try:
            self.weights.put(number, cohort.best_network(place))
        except OSError as error:  # a full disk: the result can train it again
            _logger.warning(f"The weights of trial {number} could not be kept: {error}")

    def _state(self, running: RunningTrial, cause: str) -> TrialState:
        """What an end means to Optuna."""
        if cause in ("finished", "early stopping"):
            return TrialState.COMPLETE
        if cause in CUT_SHORT:
            # Cut short it says little of its configuration, unless it is the best already.
            if running.standing is None:
                return TrialState.FAIL
            if self._is_better(running.best, self.best):
                return TrialState.COMPLETE
        return TrialState.PRUNED

    def _fail_all(self) -> None:
        """Fail all that run, whatever they have; an error on its way is not for callbacks."""
        with self.storage.batch():
            for running in self.asker.running.values():
                try:
                    running.fail(self.study, self.problem, "error")
                except UpdateFinishedTrialError:
                    self._lose(running)

    def _drop_waiting(self) -> None:
        """Fail those that were asked for and had no time to begin."""
        is_stopped = self.budget.interrupted or self.study._stop_flag
        cause = "interrupted" if is_stopped else "timeout"
        asked = [*self.admission.waiting, *self.admission.parked]
        with self.storage.batch():
            for running in asked:
                try:
                    running.fail(self.study, self.problem, cause)
                except UpdateFinishedTrialError:
                    self._lose(running)
                del self.asker.running[running.member.number]
        self._call_back(asked)

    def _call_back(self, told: Sequence[RunningTrial]) -> None:
        if not self.callbacks:
            return
        trials = self.study.get_trials(deepcopy=False)
        for running in told:
            for callback in self.callbacks:
                callback(self.study, trials[running.member.number])

    def _is_better(self, value: Any, than: Any) -> bool:
        if value is None or than is None:
            return value is not None
        return bool(value > than if self.problem.maximize else value < than)
