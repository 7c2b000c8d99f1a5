"""How trials end: what Optuna is told, which weights are kept, who is called back."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.batches import RELEASED
from optuna_nnhp.study.asking import CUT_SHORT
from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.podium import Podium
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.trials import TOO_LONG
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.again import judge_best
from optuna_nnhp.training.cohort import Cohort

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

Callback = Callable[[Study, FrozenTrial], None]


@dataclass
class Ends:
    """Ends trials.

    Args:
        asker:
            Knows those that run here.
        podium:
            The best ones.
        callbacks:
            Called after every trial with the study and the trial, as by Optuna.
        trial_timeout:
            Seconds of training that each trial may take; None for no bound.
    """

    asker: Asker
    podium: Podium
    callbacks: Sequence[Callback] = ()
    trial_timeout: float | None = None

    def __post_init__(self) -> None:
        self.study, self.problem = self.asker.study, self.asker.problem
        self.storage = self.asker.storage

    def end(self, live: Live, causes: Mapping[int, str]) -> None:
        """End trials of a cohort, by their numbers; the cohort stays as it is."""
        places = {member.number: place for place, member in enumerate(live.cohort.members)}
        told, before = [live.running[number] for number in causes], self.podium.places
        with self.storage.batch():
            for running, cause in zip(told, causes.values(), strict=True):
                if not running.told:
                    self._end(running, cause, live.cohort, places[running.member.number])
        for number in causes:
            del live.running[number], self.asker.running[number]
        self.podium.drop_others(before)
        self.asker.finished += len(told)
        self.call_back(told)

    def takes_long(self, running: RunningTrial, more: float = 0.0) -> bool:
        """Whether a trial, trained for some seconds more, has taken longer than each may."""
        return self.trial_timeout is not None and running.trained + more > self.trial_timeout

    def _end(self, running: RunningTrial, cause: str, cohort: Cohort, place: int) -> None:
        """Tell Optuna of one trial's end, its best weights kept first if it leads."""
        try:
            if cause == "timeout" and self.takes_long(running):
                running.trial.set_user_attr(TOO_LONG, self.trial_timeout)
            state, number = self._state(running, cause), running.member.number
            is_complete = state == TrialState.COMPLETE and running.best is not None
            if is_complete and self.podium.would_enter(running.best or 0.0, number):
                self._settle(running, cohort, place)
            running.company = cohort.company[place]
            running.describe(self.problem, cohort.iterations[place], cause)
        except UpdateFinishedTrialError:
            self.lose(running)
            return
        if is_complete and self.podium.enters(running.best or 0.0, number):
            self.podium.keep_weights(cohort, place)
        running.tell(self.study, state)

    def _settle(self, running: RunningTrial, cohort: Cohort, place: int) -> None:
        """Give a trial the value that its weights have alone, as whoever loads them finds it."""
        try:
            running.settled = judge_best(cohort, place)
        except Exception as error:  # no room for one more network, or a user's function
            _logger.warning(
                f"Trial {running.member.number} could not be judged alone, and keeps the value "
                f"that it has among its mates: {error}"
            )

    def _state(self, running: RunningTrial, cause: str) -> TrialState:
        """What an end means to Optuna."""
        if cause in ("finished", "early stopping"):
            return TrialState.COMPLETE
        if cause in CUT_SHORT:
            # Cut short it says little of its configuration, unless it is the best already.
            if running.standing is None:
                return TrialState.FAIL
            if self.podium.is_better(running.best, self.podium.best):
                return TrialState.COMPLETE
        return TrialState.PRUNED

    def fail(self, running: RunningTrial, error: Exception, *, counts: bool = True) -> None:
        """End a trial that raises alone.

        Args:
            running:
                The trial.
            error:
                What it raises.
            counts:
                Whether it is one of those that end a study if the first of them fail alike.

        Raises:
            Exception: The error, if no trial of the study can be trained, it seems.
        """
        del self.asker.running[running.member.number]
        try:
            self.asker.outcomes.fail(running, error, counts=counts)
        except UpdateFinishedTrialError:
            self.lose(running)
            return
        self.asker.finished += 1
        self.call_back([running])

    def refuse(self, trials: Sequence[RunningTrial], cause: str) -> None:
        """Fail trials that were asked for and had no time to begin."""
        with self.storage.batch():
            for running in trials:
                try:
                    running.fail(self.study, self.problem, cause)
                except UpdateFinishedTrialError:
                    self.lose(running)
                del self.asker.running[running.member.number]
        self.call_back(trials)

    def fail_all(self) -> None:
        """Fail all that run, whatever they have; an error on its way is not for callbacks."""
        with self.storage.batch():
            for running in self.asker.running.values():
                try:
                    running.fail(self.study, self.problem, "error")
                except UpdateFinishedTrialError:
                    self.lose(running)

    def release_all(self, worker: str) -> None:
        """Leave all that runs here to whoever goes on with the study."""
        with self.storage.batch():
            for running in self.asker.running.values():
                trial = running.trial
                if running.told:
                    continue
                try:
                    running.report()
                    trial.set_user_attr(RELEASED, worker)
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                except UpdateFinishedTrialError:
                    self.lose(running)
        count = sum(not running.told for running in self.asker.running.values())
        _logger.warning(f"{count} trials are left as they are: the same call goes on with them.")
        self.asker.running.clear()

    def lose(self, trial: RunningTrial) -> None:
        """Note that somebody else has ended a trial; what they said of it stays."""
        trial.told = trial.is_lost = True
        _logger.warning(f"Trial {trial.member.number} was ended by another process.")

    def call_back(self, told: Sequence[RunningTrial]) -> None:
        """Call the callbacks for trials that have ended."""
        if not self.callbacks:
            return
        trials = self.study.get_trials(deepcopy=False)
        for running in told:
            for callback in self.callbacks if not running.is_lost else ():
                callback(self.study, trials[running.member.number])
