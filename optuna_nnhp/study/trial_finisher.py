"""What Optuna is told of trials: their values, and how they end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
import time
from typing import Any

import optuna
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.study.failures import error_line
from optuna_nnhp.study.failures import outcome_of_error
from optuna_nnhp.study.failures import record_error
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.running import TRIAL_TIMEOUT
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.device import is_out_of_memory
from optuna_nnhp.training.weight_files import BestWeights

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

REPORT_INTERVAL = 2.0  # seconds between reports of running trials, unless a pruner reads them
MAX_SAME_ERROR = 3  # so many first trials that fail with the same error end a study

Callback = Callable[[Study, FrozenTrial], None]


Ranking = Sequence[tuple[float, int]]


class TrialFinisher:
    """Report and end trials: tell Optuna, keep the best weights, run the callbacks.

    Args:
        study:
            The opened study.
        problem:
            What is tuned.
        storage:
            The study's storage.
        source:
            The trials that train here.
        best_trials:
            The study's best trials.
        callbacks:
            Called after every trial with the study and the trial, as by Optuna.
        trial_timeout:
            Seconds of training that each trial may take; None for no bound.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        storage: BufferedStorage,
        source: TrialSource,
        best_trials: BestTrials,
        callbacks: Sequence[Callback] = (),
        trial_timeout: float | None = None,
    ) -> None:
        self.study, self.problem, self.storage = study, problem, storage
        self.source, self.best_trials = source, best_trials
        self.callbacks, self.trial_timeout = callbacks, trial_timeout
        self.first_errors: list[str] = []  # of trials that failed before any was evaluated
        self.reports_all = isinstance(self.study.pruner, CohortHalvingPruner)

    def report(self, run: CohortRun, evaluated: Sequence[RunningTrial]) -> None:
        """Report new values to the storage, now and then; at once if a pruner reads them."""
        now = time.monotonic()
        if self.reports_all and now - run.last_report < REPORT_INTERVAL:
            return
        run.last_report = now
        for trial in run.running.values() if self.reports_all else evaluated:
            try:
                trial.report()
            except UpdateFinishedTrialError:
                self.record_ended_elsewhere(trial)

    def end(self, run: CohortRun, outcomes: Mapping[int, TrialOutcome]) -> None:
        """End trials of a cohort, by their numbers; the cohort stays as it is."""
        places = {member.number: place for place, member in enumerate(run.cohort.members)}
        told, before = [run.running[number] for number in outcomes], self.best_trials.ranking
        with self.storage.batch() as rejections:
            for running, outcome in zip(told, outcomes.values(), strict=True):
                if not running.is_finished:
                    self._end_trial(running, outcome, run.cohort, places[running.member.number])
        self._mark_rejected(told, rejections)
        for number in outcomes:
            del run.running[number]
        self.best_trials.delete_others(before)
        self.source.end(told)
        self.run_callbacks(told)

    def exceeds_timeout(self, running: RunningTrial, more: float = 0.0) -> bool:
        """Whether a trial, trained for some seconds more, has taken longer than each may."""
        return self.trial_timeout is not None and running.trained + more > self.trial_timeout

    def _end_trial(
        self, running: RunningTrial, outcome: TrialOutcome, cohort: Cohort, place: int
    ) -> None:
        """Tell Optuna of one trial's end, its best weights kept first if it leads."""
        try:
            if outcome == TrialOutcome.TRIAL_TIMEOUT:
                running.trial.set_user_attr(TRIAL_TIMEOUT, self.trial_timeout)
            state, number = self._final_state(running, outcome), running.member.number
            is_complete = state == TrialState.COMPLETE and running.best is not None
            if is_complete and self.best_trials.would_rank(running.best or 0.0, number):
                self._set_exact_value(running, cohort, place)
            running.numerics_context = cohort.numerics_context[place]
            running.describe(self.problem, cohort.iterations[place], outcome)
        except UpdateFinishedTrialError:
            self.record_ended_elsewhere(running)
            return
        if is_complete and self.best_trials.add(running.best or 0.0, number):
            self.best_trials.keep_weights(cohort, place)
        running.tell(self.source.tell, state)

    def _set_exact_value(self, running: RunningTrial, cohort: Cohort, place: int) -> None:
        """Set the value of a trial to that of its best weights, evaluated alone."""
        try:
            running.exact_value = cohort.evaluate_best(place)
        except (
            Exception
        ) as error:  # out of memory for one more network, or an error of a user's function
            _logger.warning(
                f"Trial {running.member.number} could not be evaluated alone and keeps its value "
                f"from its cohort: {error}"
            )

    def _final_state(self, running: RunningTrial, outcome: TrialOutcome) -> TrialState:
        """Return the state that Optuna is told."""
        return outcome.final_state(
            has_value=running.best_so_far is not None,
            is_best=self.best_trials.is_better(running.best, self.best_trials.best),
        )

    def fail(self, running: RunningTrial, error: Exception, *, counts: bool = True) -> None:
        """End a trial that raises an error when trained alone.

        Args:
            running:
                The trial.
            error:
                What it raises.
            counts:
                Whether it counts among the first failures, which end a study if they are alike.

        Raises:
            Exception: The error, if probably no trial of the study can be trained.
        """
        self.source.end([running])
        try:
            self._fail_trial(running, error)
        except UpdateFinishedTrialError:
            self.record_ended_elsewhere(running)
        else:
            if counts and not self.source.any_evaluated():
                self._raise_if_first_trials_fail_alike(error)
        self.run_callbacks([running])

    def _fail_trial(self, running: RunningTrial, error: Exception) -> None:
        trial, line = running.trial, error_line(error)
        record_error(trial, error)
        if is_out_of_memory(error):
            needed = self.problem.memory(running.member)
            trial.set_user_attr("needed_bytes", needed)
            line = f"it needs about {needed / 2**20:,.0f} MiB, and there is no room: {line}"
        running.fail(self.source.tell, self.problem, outcome_of_error(error))
        _logger.warning(f"Trial {trial.number} failed: {line}")

    def _raise_if_first_trials_fail_alike(self, error: Exception) -> None:
        line = error_line(error)
        self.first_errors.append(line)
        if self.first_errors[-MAX_SAME_ERROR:] == [line] * MAX_SAME_ERROR:
            error.add_note(f"The study ends: its first {MAX_SAME_ERROR} trials failed alike.")
            raise error

    def fail_unstarted(self, trials: Sequence[RunningTrial], outcome: TrialOutcome) -> None:
        """Fail trials that were asked for but did not start in time."""
        self._fail_each(trials, outcome)
        self.source.end(trials, counts=False)
        self.run_callbacks(trials)

    def fail_all(self) -> None:
        """Fail all running trials, without callbacks, because an error is being raised."""
        self._fail_each(list(self.source.running.values()), TrialOutcome.ERROR)

    def _fail_each(self, trials: Sequence[RunningTrial], outcome: TrialOutcome) -> None:
        with self.storage.batch() as rejections:
            for running in trials:
                try:
                    running.fail(self.source.tell, self.problem, outcome)
                except UpdateFinishedTrialError:
                    self.record_ended_elsewhere(running)
        self._mark_rejected(trials, rejections)

    def release_all(self, worker: str) -> None:
        """Release all running trials, so that other workers can take them over."""
        with self.storage.batch():
            for running in self.source.running.values():
                trial = running.trial
                if running.is_finished:
                    continue
                try:
                    running.report()
                    trial.set_user_attr(REQUEUED_BY, worker)
                    self.storage.set_trial_state_values(id_of(trial), TrialState.WAITING)
                except UpdateFinishedTrialError:
                    self.record_ended_elsewhere(running)
        count = sum(not running.is_finished for running in self.source.running.values())
        _logger.warning(
            f"{count} trials are left as they are; repeat the same call to resume them."
        )
        self.source.end(list(self.source.running.values()), counts=False)

    def record_ended_elsewhere(self, trial: RunningTrial) -> None:
        """Mark a trial as ended by another process, whose state and value stay."""
        trial.is_finished = trial.ended_elsewhere = True
        _logger.warning(f"Trial {trial.member.number} was ended by another process.")

    def _mark_rejected(
        self, trials: Sequence[RunningTrial], rejections: Mapping[Any, Exception]
    ) -> None:
        """Mark the trials whose end the storage has rejected."""
        for running in trials:
            if id_of(running.trial) in rejections and not running.ended_elsewhere:
                self.record_ended_elsewhere(running)

    def run_callbacks(self, told: Sequence[RunningTrial]) -> None:
        """Call the callbacks for trials that have ended, and whose end the storage has accepted.

        A worker that was taken for dead may learn only now that another one trains the trial.
        """
        if not self.callbacks:
            return
        trials = self.study.get_trials(deepcopy=False)
        for running in told:
            trial = trials[running.member.number]
            if running.ended_elsewhere or not trial.state.is_finished():
                continue
            for callback in self.callbacks:
                callback(self.study, trial)


class BestTrials:
    """Rank the best COMPLETE trials, and keep the weights of those that were trained here.

    Args:
        maximize:
            Whether a greater value is better.
        weights:
            Where the weights are stored.
        size:
            How many trials are ranked.

    Attributes:
        ranking: Values, the smaller the better, and numbers of the ranked trials.
        best: The best value.

    Example:
        >>> best_trials = BestTrials(True, BestWeights(None))
        >>> [best_trials.add(value, number) for value, number in ((0.5, 3), (0.5, 4), (0.7, 5))]
        [True, False, True]
        >>> best_trials.best
        0.7
    """

    def __init__(self, maximize: bool, weights: BestWeights, size: int = 1) -> None:
        self.maximize, self.weights, self.size = maximize, weights, size
        self.ranking: Ranking = []
        self.best: float | None = None

    def add(self, value: float, number: int) -> bool:
        """Add a trial and return whether it is ranked; of equal trials the first one is."""
        self.ranking = self._ranking_with(value, number)
        if self.ranking[0][1] == number:
            self.best = value
        return any(number == entry[1] for entry in self.ranking)

    def would_rank(self, value: float, number: int) -> bool:
        """Return whether a trial would be ranked."""
        return any(number == entry[1] for entry in self._ranking_with(value, number))

    def _ranking_with(self, value: float, number: int) -> Ranking:
        entry = (-value if self.maximize else value, number)
        return sorted({*self.ranking, entry})[: self.size]

    def is_better(self, value: Any, than: Any) -> bool:
        """Return whether a value is better than another one; any value is better than None."""
        if value is None or than is None:
            return value is not None
        return bool(value > than if self.maximize else value < than)

    def keep_weights(self, cohort: Cohort, index: int) -> None:
        """Store the best weights of a member."""
        number = cohort.members[index].number
        try:
            self.weights.save(number, cohort.best_network(index))
        except OSError as error:  # for example a full disk; the result can retrain the trial
            _logger.warning(f"The weights of trial {number} could not be stored: {error}")

    def delete_others(self, before: Ranking) -> None:
        """Delete the weights of trials that are no longer ranked.

        Args:
            before:
                The ranking before the trials that have ended since.
        """
        if self.ranking != before:
            self.weights.delete_others([number for _, number in self.ranking])


class StudyHistory:
    """Hold the values of all trials of a study, those of other workers included.

    Args:
        study:
            The study.
        best_trials:
            Its best trials.

    Attributes:
        values: The best value so far of every trial, by round and trial number.
        last_sync: Clock of the last call of `sync`, seconds.
    """

    def __init__(self, study: Study, best_trials: BestTrials) -> None:
        self.study, self.best_trials = study, best_trials
        self.values: dict[int, dict[int, float]] = defaultdict(dict)
        self.last_sync = -math.inf
        self._ended = set[int]()  # numbers of trials that have been read completely

    def sync(self, running: dict[int, RunningTrial]) -> None:
        """Read what other workers have found.

        Args:
            running:
                Trials of this worker, which `record_scores` knows better.
        """
        self.last_sync = time.monotonic()
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in self._ended or trial.number in running:
                continue
            best: float | None = None
            for step, value in sorted(trial.intermediate_values.items()):
                if best is None or self.best_trials.is_better(value, best):
                    best = value
                self.values[step][trial.number] = best
            if trial.state.is_finished():
                self._ended.add(trial.number)
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                self.best_trials.add(trial.value, trial.number)

    def record_scores(self, running: RunningTrial) -> None:
        """Add the last evaluation of a trial that trains here."""
        if (value := running.best_so_far) is not None:
            self.values[running.last_round][running.member.number] = value
