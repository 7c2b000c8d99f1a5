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
from optuna_nnhp.study.ends import Ends
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.cohort import Scores

REPORT_EVERY = 2.0  # seconds between reports of running trials, unless a pruner reads them


@dataclass
class Judge:
    """Knows the values of all trials of a study, and says who ends.

    Args:
        ends:
            Ends trials, and knows the study and its best ones.

    Attributes:
        history: Best value so far of every trial, by round and trial number, of the whole study.
        learnt_at: Clock of the last look at what others have found.
    """

    ends: Ends
    history: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    learnt_at: float = -math.inf
    _learnt: set[int] = field(default_factory=set)  # numbers of trials that have ended

    def __post_init__(self) -> None:
        self.asker, self.podium = self.ends.asker, self.ends.podium
        self.study, self.problem = self.asker.study, self.asker.problem

    def learn(self) -> None:
        """Take in what other workers have found."""
        self.learnt_at = time.monotonic()
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in self._learnt or trial.number in self.asker.running:
                continue
            best: float | None = None
            for step, value in sorted(trial.intermediate_values.items()):
                if best is None or self.podium.is_better(value, best):
                    best = value
                self.history[step][trial.number] = best
            if trial.state.is_finished():
                self._learnt.add(trial.number)
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                self.podium.enters(trial.value, trial.number)
        self.asker.outcomes.has_worked |= bool(self.history)

    def judge(self, live: Live, scores: Scores) -> dict[int, str]:
        """Note one evaluation's scores; the places of those who end, and why."""
        self.asker.outcomes.has_worked = True
        evaluated = [live.running[live.cohort.members[place].number] for place in scores.places]
        before = [trial.last_round for trial in evaluated]
        for i, trial in enumerate(evaluated):
            trial.take(scores, i)
            if (standing := trial.standing) is not None:
                self.history[scores.rounds[i]][trial.member.number] = standing
        self.report(live, evaluated)
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
            elif self.ends.takes_long(trial):
                ends[place] = "timeout"
            elif self._is_pruned(trial, previous, kept):
                ends[place] = "pruned"
        return ends

    def report(self, live: Live, evaluated: Sequence[RunningTrial]) -> None:
        """Hand new values to the storage, now and then; at once if a pruner reads them."""
        now = time.monotonic()
        by_rule = isinstance(self.study.pruner, CohortHalvingPruner)
        if by_rule and now - live.reported_at < REPORT_EVERY:
            return
        live.reported_at = now
        for trial in live.running.values() if by_rule else evaluated:
            try:
                trial.report()
            except UpdateFinishedTrialError:
                self.ends.lose(trial)

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
