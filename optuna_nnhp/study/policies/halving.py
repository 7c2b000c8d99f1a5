"""Pruning by a rule for whole cohorts, or by an Optuna pruner; freed slots take new trials."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.study.admission import Admission
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.policies import PolicyContext
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.training.cohort import Scores


class HalvingPolicy:
    """Prune trials by successive halving, or by the study's own pruner, and refill cohorts.

    Args:
        context:
            What it works with.
    """

    separable = True

    def __init__(self, context: PolicyContext) -> None:
        self.source, self.finisher = context.source, context.finisher
        self.history, self.recovery = context.history, context.recovery
        self.bisector = context.bisector
        self.pruner, self.maximize = context.study.pruner, context.problem.maximize
        self.admission = Admission(
            *(self.source, context.queue, self.bisector, context.problem, context.budget),
            context.cohort_size,
        )

    def admit(self) -> None:
        """Start trials, if there is room for them."""
        self.admission.admit()

    def ask_ahead(self, is_over: Callable[[], bool]) -> None:
        """Ask for followers while a cohort trains in the engine."""
        self.admission.ask_followers_ahead(is_over)

    def has_more_trials(self) -> bool:
        """Return whether more trials can start although no cohort is in training."""
        return self.admission.has_more_trials()

    def unstarted_trials(self) -> Sequence[RunningTrial]:
        """Return the trials that were asked for and have not started to train."""
        return [*self.admission.waiting, *self.admission.deferred]

    def before_round(self, run: CohortRun) -> None:
        """Do nothing: members are evaluated when `training.batches` says so."""

    def decide(self, run: CohortRun, scores: Scores) -> dict[int, TrialOutcome]:
        """Return which trials of a cohort end after an evaluation, by their numbers."""
        self.admission.record_first_round_seconds(run)
        before = {number: trial.last_round for number, trial in run.running.items()}
        evaluated = run.add_scores(scores)
        for trial in evaluated:
            self.history.record_scores(trial)
        self.finisher.report(run, evaluated)
        outcomes = {
            number: TrialOutcome.ENDED_ELSEWHERE
            for number in (member.number for member in run.cohort.members)
            if run.running[number].is_finished
        }
        survivors: dict[tuple[int, bool], set[int]] = {}  # by round, of the portfolio or of all
        for trial, ended in zip(evaluated, scores.ended, strict=True):
            if trial.is_finished:
                continue
            number = trial.member.number
            if (outcome := TrialOutcome.from_cause(ended)) is not None:
                outcomes[number] = outcome
            elif self.finisher.exceeds_timeout(trial):
                outcomes[number] = TrialOutcome.TRIAL_TIMEOUT
            elif self._is_pruned(trial, before[number], survivors):
                outcomes[number] = TrialOutcome.PRUNED
        return outcomes

    def _is_pruned(
        self, trial: RunningTrial, previous: int, survivors: dict[tuple[int, bool], set[int]]
    ) -> bool:
        """Return whether the pruner ends a trial after this evaluation."""
        pruner, done = self.pruner, trial.last_round
        if not isinstance(pruner, CohortHalvingPruner):
            return bool(trial.trial.should_prune())
        if trial.is_baseline or not pruner.is_rung(done, previous):
            return False
        key = done, trial.is_portfolio
        if key not in survivors:
            values = self.history.values[done]
            if trial.is_portfolio:  # one of each shape comes to its end: shapes differ late
                running, shape = self.source.running, trial.signature
                rivals = {n for n, t in running.items() if t.is_portfolio and t.signature == shape}
                values = {n: value for n, value in values.items() if n in rivals}
            survivors[key] = pruner.select_survivors(values, maximize=self.maximize)
        return trial.member.number not in survivors[key]

    def after_round(self, run: CohortRun) -> None:
        """Do nothing: `admit` refills the cohort."""

    def on_error(self, run: CohortRun, trials: Sequence[RunningTrial], error: Exception) -> None:
        """Divide a cohort whose training raised an error, until the trials at fault are alone."""
        self.admission.replace_cohort(run, self.bisector.bisect(list(trials), error))

    def restore(self, claimed: Mapping[str, Sequence[FrozenTrial]]) -> None:
        """Continue trials that were taken over, all at once."""
        for run in self.recovery.restore_cohorts(claimed, self.bisector.divide):
            self.admission.add_recovered_cohort(run)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: all that is to be kept is the trials'."""
        return {}
