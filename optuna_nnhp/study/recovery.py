"""Going on with trials that others have left: from their checkpoints, or from the beginning."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

import optuna
from optuna import Study
from optuna import Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.checkpoints import Checkpoint
from optuna_nnhp.study.checkpoints import Kept
from optuna_nnhp.study.checkpoints import forget
from optuna_nnhp.study.checkpoints import newest
from optuna_nnhp.study.environment import note_move
from optuna_nnhp.study.lease import Lease
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.storage import WORKER
from optuna_nnhp.study.trials import RunningTrial
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.snapshots import members_of
from optuna_nnhp.training.snapshots import restored

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

RELEASED = "released"  # attribute of a WAITING trial that has been trained in part
TAKEN_OVER = "taken_over"  # attribute: how often, since when without progress, and the round
SUSPECT, POISONOUS = 3, 10  # times without progress: trained alone; ended


@dataclass
class Recovery:
    """Finds trials whose worker is dead, or has released them, and goes on with them here.

    Args:
        asker:
            Asks for this worker's trials.
        lease:
            Who lives.
        folder:
            The study's checkpoints; None if there are none.
    """

    asker: Asker
    lease: Lease
    folder: Path | None

    def __post_init__(self) -> None:
        self.study: Study = self.asker.study
        self.problem, self.storage = self.asker.problem, self.asker.storage

    def claim(self) -> dict[str, list[FrozenTrial]]:
        """Make abandoned trials this worker's own: by the worker that had them."""
        claimed: dict[str, list[FrozenTrial]] = {}
        for worker, trials in self._abandoned().items():
            ids = self.storage.take_over({trial._trial_id: worker for trial in trials})
            claimed[worker] = [trial for trial in trials if trial._trial_id in ids]
        for trial in self._listed(TrialState.WAITING):
            if RELEASED in trial.user_attrs and self._start(trial):
                claimed.setdefault(str(trial.user_attrs[RELEASED]), []).append(trial)
        found = {worker: trials for worker, trials in claimed.items() if trials}
        for worker, trials in found.items():
            numbers = ", ".join(str(trial.number) for trial in trials)
            _logger.warning(f"Going on with trials that {worker} has left: {numbers}.")
        return found

    def is_doubtful(self) -> bool:
        """Whether a trial's worker may be dead, which only waiting would tell."""
        workers = {self._owner(trial) for trial in self._listed(TrialState.RUNNING)}
        return any(self.lease.is_doubtful(worker) for worker in workers if worker)

    def revive(self, claimed: Mapping[str, Sequence[FrozenTrial]]) -> list[Live]:
        """Cohorts of claimed trials that have a checkpoint, as they were.

        All others are there too, each in a cohort of its own, at their beginning.
        """
        lives = list[Live]()
        for worker, trials in claimed.items():
            waiting = {trial.number: trial for trial in trials}
            checkpoint = newest(self.folder, worker)
            for kept in checkpoint.cohorts if checkpoint else ():
                lives += self._revived(kept, waiting)
            for trial in waiting.values():
                lives += self._anew(trial)
        self.storage.flush()  # how often they were taken over must be known if this ends badly
        return lives

    def again(self, group: Sequence[RunningTrial], checkpoint: Checkpoint | None) -> Live:
        """A cohort of some of this worker's trials as they were at their last checkpoint.

        Where there is none it is a new one.
        """
        wanted = {trial.member.number: trial for trial in group}
        for kept in checkpoint.cohorts if checkpoint else ():
            if wanted.keys() <= set(kept.numbers):
                cohort = self.cohort(kept, wanted.keys())
                for facts in kept.facts["running"]:
                    if facts["number"] in wanted:
                        wanted[facts["number"]].go_on_from(facts)
                return _live(cohort, group)
        for trial in group:
            trial.go_on_from(None)
        return _live(self.problem.cohort([trial.member for trial in group]), group)

    def forget(self) -> None:
        """Remove the checkpoints of dead workers that have left no trials."""
        owners = {self._owner(trial) for trial in self._listed(TrialState.RUNNING)}
        owners |= {str(t.user_attrs.get(RELEASED, "")) for t in self._listed(TrialState.WAITING)}
        for worker in self.lease.workers() - owners:
            if self.folder is not None and self.lease.is_dead(worker):
                forget(self.folder, worker)

    def _abandoned(self) -> dict[str, list[FrozenTrial]]:
        """RUNNING trials of dead workers, by worker."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._listed(TrialState.RUNNING):
            worker = self._owner(trial)
            if worker and trial.number not in self.asker.running:
                found.setdefault(worker, []).append(trial)
        return {worker: t for worker, t in found.items() if self.lease.is_dead(worker)}

    def _listed(self, state: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(state,))

    @staticmethod
    def _owner(trial: FrozenTrial) -> str:
        return str(trial.user_attrs.get(WORKER, ""))

    def _start(self, trial: FrozenTrial) -> bool:
        """Start a WAITING trial, unless another worker is the first to do so."""
        try:
            return self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _revived(self, kept: Kept, waiting: dict[int, FrozenTrial]) -> list[Live]:
        """One cohort of a checkpoint, with those of its trials that wait for it."""
        facts = {t["number"]: t for t in kept.facts["running"] if t["number"] in waiting}
        group = list[RunningTrial]()
        places = {number: place for place, number in enumerate(_numbers(kept))}
        for number, known in facts.items():
            done = kept.snapshot.facts["done"][places[number]]
            for running in self.begun(waiting.pop(number), done):
                running.go_on_from(known)
                group.append(running)
        if not group:
            return []
        try:
            lives = [self._live(kept, part) for part in self._parts(group)]
        except ValueError as error:  # of another version of the template
            _logger.warning(f"Trials begin anew, their checkpoint is of no use: {error}")
            return [self.again([trial], None) for trial in group]
        for live in lives:
            live.slots = max(live.slots, int(kept.facts["slots"]) if len(lives) == 1 else 1)
            live.rounds, live.leader = kept.facts["rounds"], Member(*kept.facts["leader"])
        return lives

    def _parts(self, group: Sequence[RunningTrial]) -> list[list[RunningTrial]]:
        """Who is trained together: those under whom workers died again and again are alone."""
        alone = [[trial] for trial in group if _times(trial) >= SUSPECT]
        rest = [trial for trial in group if _times(trial) < SUSPECT]
        return [*([rest] if rest else []), *alone]

    def _anew(self, trial: FrozenTrial) -> list[Live]:
        """A trial without a checkpoint, from its beginning."""
        return [_live(self.problem.cohort([t.member]), [t]) for t in self.begun(trial, 0)]

    def begun(self, trial: FrozenTrial, done: int) -> list[RunningTrial]:
        """A claimed trial as this worker's own; none if it cannot be trained.

        Args:
            trial:
                The trial.
            done:
                Rounds that it has done, by its checkpoint.
        """
        sampler = self.study.sampler
        if self.problem.space.keys() <= trial.params.keys():
            self.study.sampler = RandomSampler()  # all is decided: nobody is to be asked
        try:
            own = Trial(self.study, trial._trial_id)
            note_move(own, trial)
            times, last = trial.user_attrs.get(TAKEN_OVER, (0, 0))
            times = times + 1 if done <= last else 1
            own.set_user_attr(TAKEN_OVER, [times, done])
            if times > POISONOUS:
                _logger.warning(f"Trial {trial.number} failed: {times} workers died training it.")
                own.set_user_attr("cause", "killed")
                self.study.tell(own, state=TrialState.FAIL)
                return []
            begun = self.asker.begin_trial(own)
        finally:
            self.study.sampler = sampler
        self.asker.running |= {running.member.number: running for running in begun}
        return begun

    def _live(self, kept: Kept, group: Sequence[RunningTrial]) -> Live:
        return _live(self.cohort(kept, [trial.member.number for trial in group]), group)

    def cohort(self, kept: Kept, numbers: Collection[int] | None = None) -> Cohort:
        """A kept cohort, or some of its members.

        Raises:
            ValueError: If it is of another version of the template.
        """
        total = dict(zip(_numbers(kept), kept.snapshot.facts["total"], strict=True))

        def make(members: Sequence[Member]) -> Cohort:
            # A budget in seconds may be another number of steps here.
            if "budget_iterations" in self.problem.attributes(members[0]):
                members = [
                    replace(m, params={**m.params, "iterations": total[m.number]}) for m in members
                ]
            return self.problem.cohort(members)

        cohort = restored(make, kept.snapshot)
        wanted = total.keys() if numbers is None else set(numbers)
        places = [place for place, m in enumerate(cohort.members) if m.number in wanted]
        if len(places) < len(cohort.members):
            cohort.keep(places)
        return cohort


def _numbers(kept: Kept) -> list[int]:
    return [member.number for member in members_of(kept.snapshot.facts)]


def _times(running: RunningTrial) -> int:
    """How often a trial was taken over without progress."""
    return int(running.trial.user_attrs.get(TAKEN_OVER, (0, 0))[0])


def _live(cohort: Cohort, group: Sequence[RunningTrial]) -> Live:
    running = {trial.member.number: trial for trial in group}
    return Live(cohort, group[0].signature, group[0].member, running, len(group))
