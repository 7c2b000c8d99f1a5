"""Continue trials that other workers have left, from a checkpoint or from the beginning."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

import optuna
from optuna import Study
from optuna import Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.operations import REQUEUED_BY
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.outbox import replay_outbox
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.study._optuna_internals import with_sampler
from optuna_nnhp.study.checkpoints import Checkpoint
from optuna_nnhp.study.checkpoints import CohortCheckpoint
from optuna_nnhp.study.checkpoints import checkpoint_folder
from optuna_nnhp.study.checkpoints import load_newest_checkpoint
from optuna_nnhp.study.checkpoints import remove_checkpoints
from optuna_nnhp.study.environment import record_earlier_environment
from optuna_nnhp.study.outcomes import CAUSE
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort_state import members_from_state
from optuna_nnhp.training.cohort_state import restore_cohort
from optuna_nnhp.training.cohort_state import select_state

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

CHECKPOINT = "checkpoint"  # attribute of a trial: the worker whose checkpoint had it last
# Attribute: takeovers without progress, and the steps done at the last one.
TAKEN_OVER = "taken_over"
Broken = Callable[[list[RunningTrial], Exception, Checkpoint | None], list[CohortRun]]
# A trial is trained alone after so many takeovers without progress, and ends after so many.
QUARANTINE_DEATHS, MAX_WORKER_DEATHS = 3, 10


@dataclass
class Recovery:
    """Find trials whose worker is dead or has released them, and continue them here.

    Args:
        study:
            The opened study.
        problem:
            What is tuned.
        storage:
            The study's storage.
        source:
            The trials that train here.
        lease:
            Tells which workers are alive.
        folder:
            The folder of the study's checkpoints; None if it has none.
    """

    study: Study
    problem: Problem
    storage: BufferedStorage
    source: TrialSource
    lease: Lease
    folder: Path | None

    def __post_init__(self) -> None:
        self._found: dict[str, Checkpoint | None] = {}
        # Trials by worker, while it is unknown whether this worker has taken them over.
        self._unsure: dict[str, list[FrozenTrial]] = {}
        # Trials are left to claim once a quarantined one has been trained.
        self.has_postponed = False

    def claim(self, *, separable: bool = True) -> dict[str, list[FrozenTrial]]:
        """Take over abandoned and released trials.

        The storage is told first which checkpoint has a trial, so that another worker finds it if
        this one is killed.

        Args:
            separable:
                Whether trials can be trained without those that they were trained with.

        Returns:
            The trials, by the worker whose checkpoint has them.
        """
        self._found.clear()
        claimed: dict[str, list[FrozenTrial]] = {}
        try:
            if abandoned := self._abandoned_trials():
                self.replay_outbox()  # some of them may have ended
                abandoned = self._abandoned_trials()
            for worker, trials in self._limit_to_one_suspect(abandoned, separable).items():
                sources = {id_of(trial): self._checkpoint_owner(trial, worker) for trial in trials}
                self._unsure[worker] = trials
                taken = self.storage.take_over(dict.fromkeys(sources, worker))
                del self._unsure[worker]
                for trial in trials:
                    if id_of(trial) in taken:
                        claimed.setdefault(sources[id_of(trial)], []).append(trial)
            if released := self.released_trials():
                self.source.reserve_places_for_released()
            for trial in released:
                source = self._checkpoint_owner(trial, str(trial.user_attrs[REQUEUED_BY]))
                if self._start_waiting_trial(trial):
                    claimed.setdefault(source, []).append(trial)
        except StorageUnavailable as error:  # the next call takes over the others
            _logger.debug(f"Not all abandoned trials could be taken over: {error}")
        for worker, trials in claimed.items():
            numbers = ", ".join(str(trial.number) for trial in trials)
            _logger.warning(f"Continuing trials that {worker} has left: {numbers}.")
        return claimed

    def replay_outbox(self) -> None:
        """Write the operations that earlier runs, or workers that died, saved in outboxes."""
        if self.folder is None:
            return
        try:
            replay_outbox(self.storage, self.folder.parent)
        except ValueError as error:  # damaged: it stays where it is
            _logger.error(f"What an earlier run could not write is lost: {error}")

    def released_trials(self) -> list[FrozenTrial]:
        """Return the trials that their workers have released."""
        return self.storage.requeued_trials(study_id(self.study))

    def checkpoint(self, worker: str) -> Checkpoint | None:
        """Return a worker's newest checkpoint, read once for each `claim`."""
        if worker not in self._found:
            self._found[worker] = load_newest_checkpoint(self.folder, worker)
        return self._found[worker]

    def _checkpoint_owner(self, trial: FrozenTrial, worker: str) -> str:
        """Return and store which worker's checkpoint has a trial."""
        own, earlier = self.checkpoint(worker), trial.user_attrs.get(CHECKPOINT)
        has_it = own is not None and any(
            trial.number in kept.trial_numbers for kept in own.cohorts
        )
        source = worker if has_it or earlier is None else str(earlier)
        if earlier != source and self.folder is not None:
            with suppress(UpdateFinishedTrialError):  # another worker has ended it
                self.storage.write_trial_user_attr(id_of(trial), CHECKPOINT, source)
        return source

    def has_possibly_dead_workers(self) -> bool:
        """Return whether the worker of a running trial is dead or may be dead."""
        if self._unsure or self.has_postponed:
            return True
        workers = {self._worker_of(trial) for trial in self._trials_in_state(TrialState.RUNNING)}
        leases = self.lease.read() if workers else {}
        return any(
            self.lease.is_dead(worker, leases) or self.lease.may_be_dead(worker, leases)
            for worker in workers
            if worker
        )

    def restore_cohorts(
        self, claimed: Mapping[str, Sequence[FrozenTrial]], broken: Broken
    ) -> list[CohortRun]:
        """Return cohorts of claimed trials, as their checkpoints have them.

        A trial without a checkpoint begins again, in a cohort of its own.

        Args:
            claimed:
                The result of `claim`.
            broken:
                Makes other cohorts of trials whose cohort raises an error while it is built,
                given the trials, the error and the checkpoint.
        """
        runs = list[CohortRun]()
        for worker, trials in claimed.items():
            waiting = {trial.number: trial for trial in trials}
            checkpoint = self.checkpoint(worker)
            for kept in checkpoint.cohorts if checkpoint else ():
                runs += self._restore_cohort(kept, waiting, broken)
            for trial in waiting.values():
                for running in self.resume_trial(trial, 0):
                    runs += self._restart_trials([running], broken)
        self._found.clear()
        self.storage.flush()  # how often they were taken over must be known if this ends badly
        return runs

    def restore_from_checkpoint(
        self, group: Sequence[RunningTrial], checkpoint: Checkpoint | None
    ) -> CohortRun:
        """Return a cohort of some trials of this worker, at their last checkpoint or new."""
        wanted = {trial.member.number: trial for trial in group}
        for kept in checkpoint.cohorts if checkpoint else ():
            if wanted.keys() <= set(kept.trial_numbers):
                cohort = self.cohort(kept, wanted.keys())
                for facts in kept.facts["running"]:
                    if facts["number"] in wanted:
                        wanted[facts["number"]].load_state_dict(facts)
                return _make_cohort_run(cohort, group)
        for trial in group:
            trial.load_state_dict(None)
        return _make_cohort_run(self.problem.cohort([trial.member for trial in group]), group)

    def remove_old_checkpoints(self) -> None:
        """Remove the checkpoints of dead workers that no unfinished trial needs."""
        if self.folder is None or not self.folder.is_dir():
            return
        trials = [*self._trials_in_state(TrialState.RUNNING), *self.released_trials()]
        attributes = [trial.user_attrs for trial in trials]
        owners = {
            str(a.get(name)) for a in attributes for name in (WORKER, REQUEUED_BY, CHECKPOINT)
        }
        leases = self.lease.read()
        for worker in leases.keys() - owners:
            if checkpoint_folder(self.folder, worker).exists() and self.lease.is_dead(
                worker, leases
            ):
                remove_checkpoints(self.folder, worker)

    def _abandoned_trials(self) -> dict[str, list[FrozenTrial]]:
        """Return the RUNNING trials of dead workers, by worker.

        They include the trials of `_unsure`, which this worker may own already.
        """
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials_in_state(TrialState.RUNNING):
            worker = self._worker_of(trial)
            if worker and trial.number not in self.source.running:
                found.setdefault(worker, []).append(trial)
        leases = self.lease.read() if found else {}
        dead = {worker: t for worker, t in found.items() if self.lease.is_dead(worker, leases)}
        for worker, trials in self._unsure.items():
            listed = {trial.number for trial in dead.get(worker, ())}
            others = [trial for trial in trials if trial.number not in listed]
            dead[worker] = [*dead.get(worker, ()), *others]
        return dead

    def _limit_to_one_suspect(
        self, abandoned: dict[str, list[FrozenTrial]], separable: bool
    ) -> dict[str, list[FrozenTrial]]:
        """Return one quarantined trial if there is any, else all abandoned trials.

        If this worker dies too, the cause can only be that trial.
        """
        suspects = [
            (trial.number, worker, trial)
            for worker, trials in abandoned.items()
            for trial in trials
            if separable and trial.user_attrs.get(TAKEN_OVER, (0, 0))[0] + 1 >= QUARANTINE_DEATHS
        ]
        self.has_postponed = bool(suspects) and sum(map(len, abandoned.values())) > 1
        if not suspects:
            return abandoned
        _, worker, trial = min(suspects)
        return {worker: [trial]}

    def _trials_in_state(self, state: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(state,))

    @staticmethod
    def _worker_of(trial: FrozenTrial) -> str:
        return str(trial.user_attrs.get(WORKER, ""))

    def _start_waiting_trial(self, trial: FrozenTrial) -> bool:
        """Start a WAITING trial, unless another worker is the first to do so."""
        try:
            return self.storage.set_trial_state_values(id_of(trial), TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _restore_cohort(
        self, kept: CohortCheckpoint, waiting: dict[int, FrozenTrial], broken: Broken
    ) -> list[CohortRun]:
        """Restore one cohort of a checkpoint; remove its trials from those that wait."""
        group = [
            running
            for number in kept.trial_numbers
            if number in waiting
            for running in self.resume_trial(waiting.pop(number), kept.steps_done[number])
        ]
        runs, checkpoint = list[CohortRun](), Checkpoint([kept], {})
        for part in self._isolate_quarantined_trials(group):
            try:
                run = self.restore_from_checkpoint(part, checkpoint)
            except ValueError as error:  # of another version of the template
                _logger.warning(
                    f"Trials begin again, because their checkpoint cannot be used: {error}"
                )
                runs += self._restart_trials(part, broken)
            except Exception as error:  # whatever it is, it becomes an outcome
                runs += broken(part, error, checkpoint)
            else:
                if len(part) == len(kept.trial_numbers):
                    run.slots = int(kept.facts["slots"])
                run.rounds, run.leader = kept.facts["rounds"], Member(*kept.facts["leader"])
                runs.append(_quarantine_if_suspect(run))
        return runs

    def _restart_trials(self, group: list[RunningTrial], broken: Broken) -> list[CohortRun]:
        """Return a cohort of some trials of this worker at their beginning."""
        try:
            return [_quarantine_if_suspect(self.restore_from_checkpoint(group, None))]
        except Exception as error:  # whatever it is, it becomes an outcome
            return broken(group, error, None)

    def _isolate_quarantined_trials(
        self, group: Sequence[RunningTrial]
    ) -> list[list[RunningTrial]]:
        """Divide trials into groups; each quarantined trial is alone."""
        alone = [
            [trial]
            for trial in group
            if _count_takeovers_without_progress(trial) >= QUARANTINE_DEATHS
        ]
        rest = [
            trial
            for trial in group
            if _count_takeovers_without_progress(trial) < QUARANTINE_DEATHS
        ]
        return [*([rest] if rest else []), *alone]

    def resume_trial(
        self, trial: FrozenTrial, done: int, sampler: BaseSampler | None = None
    ) -> list[RunningTrial]:
        """Return a claimed trial as a running trial; an empty list if it cannot be trained.

        Args:
            trial:
                The trial.
            done:
                Steps that its checkpoint has.
            sampler:
                Proposes the values that it lacks; None for the source's sampler.
        """
        sampler = sampler or self.source.sampler
        if self.problem.space.keys() <= trial.params.keys():
            sampler = RandomSampler()  # it has all values
        own = Trial(with_sampler(self.study, sampler), id_of(trial))
        record_earlier_environment(own, trial)
        times, last = trial.user_attrs.get(TAKEN_OVER, (0, 0))
        if trial.state == TrialState.RUNNING:  # a worker has died
            times = times + 1 if done <= last else 1
        own.set_user_attr(TAKEN_OVER, [times, done])
        if times > MAX_WORKER_DEATHS:
            _logger.warning(f"Trial {trial.number} failed: {times} workers died training it.")
            own.set_user_attr(CAUSE, TrialOutcome.KILLED.value)
            self.source.tell(own, None, TrialState.FAIL)
            return []
        begun = self.source.make_running_trial(own)
        self.source.start(begun)
        return begun

    def cohort(self, kept: CohortCheckpoint, numbers: Collection[int] | None = None) -> Cohort:
        """Return a cohort of a checkpoint, or some of its members.

        Raises:
            ValueError: If another version of the template has written it.
        """
        metadata = kept.snapshot.metadata
        numbers_there = [member.number for member in members_from_state(metadata)]
        total = dict(zip(numbers_there, metadata["total_steps"], strict=True))

        def make(members: Sequence[Member]) -> Cohort:
            # On this machine a budget in seconds may be another number of steps.
            if "budget_iterations" in self.problem.attributes(members[0]):
                members = [
                    replace(m, params={**m.params, "iterations": total[m.number]}) for m in members
                ]
            return self.problem.cohort(members)

        wanted = total.keys() if numbers is None else set(numbers)
        places = [place for place, number in enumerate(numbers_there) if number in wanted]
        if len(places) == len(numbers_there):
            return restore_cohort(make, kept.snapshot)
        return restore_cohort(
            make, select_state(kept.snapshot, places)
        )  # memory may have no room for all


def _count_takeovers_without_progress(running: RunningTrial) -> int:
    """Return how often a trial was taken over without progress."""
    return int(running.trial.user_attrs.get(TAKEN_OVER, (0, 0))[0])


def _quarantine_if_suspect(run: CohortRun) -> CohortRun:
    """Quarantine a cohort if workers have died while they trained its trials; return it."""
    if any(
        _count_takeovers_without_progress(trial) >= QUARANTINE_DEATHS
        for trial in run.running.values()
    ):
        run.quarantined_until = max(run.cohort.rounds_done) + 2
    return run


def _make_cohort_run(cohort: Cohort, group: Sequence[RunningTrial]) -> CohortRun:
    running = {trial.member.number: trial for trial in group}
    return CohortRun(cohort, group[0].signature, group[0].member, running, len(group))
