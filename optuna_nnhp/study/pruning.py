"""What trials have come to: learning from it, reporting it, pruning by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math
import time

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.study.cohort_runs import CohortRun
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.training.cohort import Scores

REPORT_INTERVAL = 2.0  # seconds between reports of running trials, unless a pruner reads them


@dataclass
class PruningPolicy:
    """Knows the values of all trials of a study, and says who ends.

    Args:
        ends:
            Ends trials, and knows the study and its best ones.

    Attributes:
        history: Best value so far of every trial, by round and trial number, of the whole study.
        learnt_at: Clock of the last look at what others have found.
    """

    ends: TrialFinisher
    history: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    last_sync: float = -math.inf
    _learnt: set[int] = field(default_factory=set)  # numbers of trials that have ended

    def __post_init__(self) -> None:
        self.source, self.best_trials = self.ends.source, self.ends.best_trials
        self.study, self.problem = self.source.study, self.source.problem

    def sync(self) -> None:
        """Take in what other workers have found."""
        self.last_sync = time.monotonic()
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in self._learnt or trial.number in self.source.running:
                continue
            best: float | None = None
            for step, value in sorted(trial.intermediate_values.items()):
                if best is None or self.best_trials.is_better(value, best):
                    best = value
                self.history[step][trial.number] = best
            if trial.state.is_finished():
                self._learnt.add(trial.number)
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                self.best_trials.add(trial.value, trial.number)
        self.source.failures.any_trained |= bool(self.history)

    def judge(self, run: CohortRun, scores: Scores) -> dict[int, str]:
        """Note one evaluation's scores; the places of those who end, and why."""
        self.source.failures.any_trained = True
        evaluated = [run.running[run.cohort.members[place].number] for place in scores.indices]
        before = [trial.last_round for trial in evaluated]
        for i, trial in enumerate(evaluated):
            trial.add_scores(scores, i)
            if (standing := trial.best_so_far) is not None:
                self.history[scores.rounds[i]][trial.member.number] = standing
        self.report(run, evaluated)
        ends = {
            place: "ended elsewhere"
            for place, member in enumerate(run.cohort.members)
            if run.running[member.number].is_finished
        }
        kept: dict[tuple[int, bool], set[int]] = {}  # by round, of the openers or of all
        for place, trial, previous, ended in zip(
            scores.indices, evaluated, before, scores.ended, strict=True
        ):
            if trial.is_finished:
                continue
            if ended is not None:
                ends[place] = ended
            elif self.ends.exceeds_timeout(trial):
                ends[place] = "timeout"
            elif self._is_pruned(trial, previous, kept):
                ends[place] = "pruned"
        return ends

    def report(self, run: CohortRun, evaluated: Sequence[RunningTrial]) -> None:
        """Hand new values to the storage, now and then; at once if a pruner reads them."""
        now = time.monotonic()
        by_rule = isinstance(self.study.pruner, CohortHalvingPruner)
        if by_rule and now - run.last_report < REPORT_INTERVAL:
            return
        run.last_report = now
        for trial in run.running.values() if by_rule else evaluated:
            try:
                trial.report()
            except UpdateFinishedTrialError:
                self.ends.mark_lost(trial)

    def _is_pruned(
        self, trial: RunningTrial, previous: int, kept: dict[tuple[int, bool], set[int]]
    ) -> bool:
        """Whether the pruner ends a trial after this evaluation."""
        pruner, done = self.study.pruner, trial.last_round
        if not isinstance(pruner, CohortHalvingPruner):
            return bool(trial.trial.should_prune())
        if trial.is_baseline or not pruner.is_rung(done, previous):
            return False
        key = done, trial.is_portfolio
        if key not in kept:
            values = self.history[done]
            if trial.is_portfolio:  # one of each shape comes to its end: shapes differ late
                running, shape = self.source.running, trial.signature
                rivals = {n for n, t in running.items() if t.is_portfolio and t.signature == shape}
                values = {n: value for n, value in values.items() if n in rivals}
            kept[key] = pruner.select_survivors(values, maximize=self.problem.maximize)
        return trial.member.number not in kept[key]
