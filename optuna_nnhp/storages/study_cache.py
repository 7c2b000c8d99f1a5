"""One study's trials as this process sees them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from dataclasses import field
import math

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.operations import REQUEUED_BY


@dataclass
class StudyCache:
    """The trials of a study, with the changes that are not written yet.

    Args:
        study_id:
            The study.
        trials:
            By number.
        sources:
            The same trials as the storage has returned them, by id.
        waiting:
            Numbers of the WAITING trials.
        unfinished:
            Ids of the trials that have not ended.
        prefetched:
            RUNNING trials of this process that nobody has asked for yet.
        distributions:
            Of each parameter, as first used.
        last_trial_id:
            All trials with ids up to this one are in the cache.
        synced_at:
            Clock of the last reading, in seconds.

    Example:
        >>> cache = StudyCache(study_id=0)
        >>> cache.listed(states=None)
        []
    """

    study_id: int
    trials: list[FrozenTrial] = field(default_factory=list)
    sources: dict[int, FrozenTrial] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    unfinished: set[int] = field(default_factory=set)
    prefetched: list[FrozenTrial] = field(default_factory=list)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    last_trial_id: int = -1
    synced_at: float = -math.inf

    def put(self, trial: FrozenTrial) -> None:
        """Add or replace a trial; numbers have no gaps."""
        if trial._number == len(self.trials):
            self.trials.append(trial)
        else:
            self.trials[trial._number] = trial
        if trial.state.is_finished():
            self.unfinished.discard(trial._trial_id)
        else:
            self.unfinished.add(trial._trial_id)
        if trial.state == TrialState.WAITING:
            self.waiting.add(trial._number)
        else:
            self.waiting.discard(trial._number)
        for name, distribution in trial._distributions.items():
            self.distributions.setdefault(name, distribution)

    def expire(self) -> None:
        """Let the next access read what other processes have written."""
        self.synced_at = -math.inf

    def queued(self, *, requeued: bool) -> list[FrozenTrial]:
        """Return WAITING trials by number: new ones, or those that were trained in part."""
        trials = [self.trials[number] for number in sorted(self.waiting)]
        return [trial for trial in trials if (REQUEUED_BY in trial._user_attrs) == requeued]

    def listed(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """Return trials in some states by number, as `BaseStorage.get_all_trials` does.

        Prefetched trials at the end do not exist for callers. The query for WAITING trials alone
        is the one of `Study.ask`, which does not start requeued trials.
        """
        if states == (TrialState.WAITING,):
            return self.queued(requeued=False)
        end = len(self.trials)
        for trial in reversed(self.prefetched):
            if trial._number != end - 1:
                break
            end -= 1
        trials = self.trials[:end]
        return trials if states is None else [t for t in trials if t.state in states]
