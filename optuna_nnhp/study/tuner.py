"""The scheduler: ask for trials, train them as cohorts, report, prune, tell, refill."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from contextlib import AbstractContextManager
import math
from pathlib import Path
from threading import Event
import time

import optuna
from optuna import Study

from optuna_nnhp.engine.library import single_threaded_blas
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.study._optuna_internals import allow_study_stop
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import ProgressBar
from optuna_nnhp.study.budget import Timing
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.study.checkpoints import CHECKPOINT_INTERVAL
from optuna_nnhp.study.checkpoints import Checkpoints
from optuna_nnhp.study.checkpoints import load_newest_checkpoint
from optuna_nnhp.study.environment import record_environment
from optuna_nnhp.study.failures import CohortError
from optuna_nnhp.study.failures import FailureBisector
from optuna_nnhp.study.open_study import worker_name
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.policies import MakePolicy
from optuna_nnhp.study.policies import PolicyContext
from optuna_nnhp.study.policies.halving import HalvingPolicy
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.recovery import Recovery
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import FairQueue
from optuna_nnhp.study.trial_finisher import REPORT_INTERVAL
from optuna_nnhp.study.trial_finisher import BestTrials
from optuna_nnhp.study.trial_finisher import Callback
from optuna_nnhp.study.trial_finisher import StudyHistory
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.weight_files import BestWeights

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# Seconds to wait for an unavailable storage before unwritten operations go to the outbox.
MAX_STORAGE_WAIT = 300.0
# Seconds between two checks of other workers' trials while nothing trains here.
POLL_INTERVAL = 0.5


class Tuner:
    """Run a study: ask for trials, train a round, decide, end trials, and again.

    Args:
        study:
            The opened study; its storage is a `BufferedStorage`.
        problem:
            What is tuned.
        budget:
            How long.
        weights:
            Where the best trials' weights are stored.
        callbacks:
            Called after every trial with the study and the trial, as by Optuna.
        make_policy:
            Makes what decides which trials start and which go on.
        uses_portfolio:
            Whether the template's portfolio is tried beside the default configuration.
        cohort_size:
            Trials in a cohort; None to choose it by memory and measurement.
        show_progress_bar:
            Whether to draw a progress bar.
        kept:
            Of how many of the best trials the weights are kept.
        checkpoint_every:
            Seconds between checkpoints; None for none.
        trial_timeout:
            Seconds of training that each trial may take; None for no bound.

    Attributes:
        queue: The cohorts in training.
        timing: Where the time went.
        policy: Decides which trials start and which go on.
    """

    def __init__(
        self,
        study: Study,
        problem: Problem,
        budget: Budget,
        weights: BestWeights,
        callbacks: Sequence[Callback] = (),
        *,
        make_policy: MakePolicy = HalvingPolicy,
        uses_portfolio: bool = True,
        cohort_size: int | None = None,
        show_progress_bar: bool = False,
        kept: int = 1,
        checkpoint_every: float | None = CHECKPOINT_INTERVAL,
        trial_timeout: float | None = None,
    ) -> None:
        storage = storage_of(study)
        if not isinstance(storage, BufferedStorage):
            raise TypeError(f"The study's storage must be a BufferedStorage, but is {storage}.")
        self.study, self.problem, self.budget, self.storage = study, problem, budget, storage
        self.uses_portfolio, self.show_progress_bar = uses_portfolio, show_progress_bar
        record_environment(study, problem)  # after the problem has its device
        self.folder, worker = weights.folder, worker_name(storage)
        checkpoints = self.folder and self.folder / "checkpoints"
        self.queue, self.timing = FairQueue(), Timing()
        self.source = TrialSource(study, problem, budget, storage)
        self.best_trials = BestTrials(problem.maximize, weights, kept)
        self.history = StudyHistory(study, self.best_trials)
        self.finisher = TrialFinisher(
            *(study, problem, storage, self.source, self.best_trials),
            *(callbacks, trial_timeout),
        )
        self.lease = Lease(storage.backend, study_id(study), worker)
        self.checkpoints = Checkpoints(checkpoints, worker, checkpoint_every)
        self.recovery = Recovery(study, problem, storage, self.source, self.lease, checkpoints)
        self.policy = make_policy(
            PolicyContext(
                study,
                problem,
                budget,
                self.source,
                self.finisher,
                self.history,
                self.queue,
                self.recovery,
                FailureBisector(
                    lambda: load_newest_checkpoint(checkpoints, worker),
                    self.recovery.restore_from_checkpoint,
                    self.finisher.fail,
                ),
                cohort_size,
                worker,
                self._wait_for_storage,
                self._write_checkpoint,
            )
        )
        self._last_recovery = -math.inf  # clock, seconds
        self._storage_lost = False  # whether the last wait for it failed
        self._trainer = ThreadPoolExecutor(1, "optuna_nnhp-trainer")

    def run(self) -> None:
        """Train cohorts until the budget is spent, or somebody stops the study."""
        with (
            self.lease,
            allow_study_stop(self.study),
            single_threaded_blas,
            self._signal_handlers(),
        ):
            try:
                self._load_earlier_trials()
                left, done = self.source.n_trials_left(), self.source.finished
                if left == 0 and done >= (self.budget.n_trials or 0):
                    _logger.info(f"The study has its {done} trials already: nothing to do.")
                with ProgressBar(self.show_progress_bar, self.budget, done) as progress:
                    self._train_all(progress)
                self._release_or_end_rest()
                self._flush_or_save_outbox()
                if not self.budget.released:
                    self.checkpoints.clear()
                    self.recovery.remove_old_checkpoints()
            except (
                StorageUnavailable
            ):  # unwritten operations are in the outbox; a later call continues
                raise
            except BaseException:
                if self.checkpoints.is_enabled:
                    self.finisher.release_all(self.lease.worker)
                else:  # without checkpoints no later call can resume them
                    self.finisher.fail_all()
                raise
            finally:
                self._trainer.shutdown()
                self._store_timing()
                self.storage.flush()
                self._save_outbox()

    def _signal_handlers(self) -> AbstractContextManager[None]:
        """Handle SIGINT and SIGTERM; release trials only if the storage outlives the process."""
        return graceful_shutdown(self.budget, releases=self.folder is not None)

    def _save_outbox(self) -> Path | None:
        """Save unwritten operations to the outbox file and return its path, if there are any."""
        if self.storage.is_available:
            return None
        kept = self.storage.save_outbox(self.folder or Path())
        if kept is not None:
            _logger.warning(f"Saved the unwritten changes in {kept}.")
        return kept

    def _flush_or_save_outbox(self) -> None:
        """Flush the storage, or save the pending operations for the next run.

        Raises:
            StorageUnavailable: If it is unavailable for too long.
        """
        self.storage.flush()
        patience = (
            MAX_STORAGE_WAIT
            if self.budget.timeout is None
            else min(MAX_STORAGE_WAIT, self.budget.timeout)
        )
        if self.storage.wait_until_available(
            patience, lambda: self.budget.interrupted or self.budget.released
        ):
            self.storage.flush()
        if self.storage.is_available:
            return
        kept = self._save_outbox()
        saved = "" if kept is None else f" The unwritten changes are in {kept}."
        raise StorageUnavailable(
            f"The storage does not answer.{saved} Repeat the same call to continue the study."
        )

    def _train_all(self, progress: ProgressBar) -> None:
        """Ask for trials and train them until there are no more."""
        self._recover()
        self._admit()
        while not self.budget.released:
            if run := self.queue.next():
                self._train_cohort(run)
                progress.show(
                    self.source.finished, self.queue.n_training_trials, self.best_trials.best
                )
            elif not self.storage.is_available:
                if not self._wait_for_storage():
                    break
            elif not self.policy.has_more_trials():
                if self.budget.is_over() or not self.recovery.has_possibly_dead_workers():
                    break
                time.sleep(POLL_INTERVAL)
                self._last_recovery = -math.inf
            self._write_checkpoint_if_due()
            self._recover()
            self._admit()

    def _wait_for_storage(self) -> bool:
        """Wait once while the storage is unavailable; return whether it is available."""
        if self.storage.is_available:
            self._storage_lost = False
        elif not self._storage_lost:
            self._storage_lost = not self.storage.wait_until_available(
                MAX_STORAGE_WAIT, self.budget.is_over
            )
        return not self._storage_lost

    def _write_checkpoint_if_due(self) -> None:
        if self.checkpoints.is_due():
            with self.timing("checkpoints"):
                self._write_checkpoint()

    def _write_checkpoint(self) -> bool:
        """Write a checkpoint and return whether it was written.

        The storage is flushed first, so that a worker that resumes finds the members' values.
        """
        self.storage.flush()
        try:  # trials that have ended since are in no checkpoint
            if not self.storage.is_available:
                self.storage.save_outbox(self.folder or Path())
        except OSError as error:
            _logger.warning(
                f"Neither a checkpoint nor the unwritten changes could be saved: {error}"
            )
            return False
        return self.checkpoints.write(self.queue.training, self.policy.state_dict())

    def _recover(self) -> None:
        """Read the results of other workers, and take over the trials of dead ones."""
        if time.monotonic() - self.history.last_sync > REPORT_INTERVAL:
            with self.timing("bookkeeping"):
                self.history.sync(self.source.running)
        if self.queue.training and not self.policy.separable:
            return
        is_due = time.monotonic() - self._last_recovery > self.lease.renewal_interval
        if self.recovery.has_postponed:
            is_due = not any(run.is_quarantined for run in self.queue.training)
        is_due = is_due or bool(self.recovery.released_trials())
        if not is_due or self.budget.is_over():
            return
        self._last_recovery = time.monotonic()
        if claimed := self.recovery.claim(separable=self.policy.separable):
            self.policy.restore(claimed)
            if self.queue.training:
                self._write_checkpoint()

    def _store_timing(self) -> None:
        """Store the time used by each section of this call as an attribute of the study."""
        wall = self.budget.seconds
        if not self.queue.offered:
            return
        shares = {name: round(s / wall, 4) for name, s in self.timing.seconds.items()}
        note = {"seconds": round(wall, 2), "occupancy": round(self.queue.occupancy, 4), **shares}
        self.study.set_user_attr("timing", note)

    def _load_earlier_trials(self) -> None:
        """Load the study's earlier trials; enqueue the defaults in a new study."""
        self.recovery.replay_outbox()
        self.source.enqueue_first_trials(with_portfolio=self.uses_portfolio)
        self.history.sync(self.source.running)

    def _admit(self) -> None:
        with self.timing("asking"):
            self.policy.admit()

    # --- Training ---

    def _train_cohort(self, run: CohortRun) -> None:
        """Train one cohort to its next evaluation, and end the trials that the policy ends."""
        members = len(run.cohort.members)
        self.policy.before_round(run)
        before, work = run.cohort.iterations[0], run.cohort.step_flops
        try:
            scores, seconds = self._train_round(run)
        except CohortError as error:
            assert isinstance(error.__cause__, Exception)
            self.policy.on_error(run, run.dissolve(), error.__cause__)
            return
        run.seconds += seconds
        for running in run.running.values():
            running.trained += seconds
        self.queue.record_turn(run, members, seconds, work * (run.cohort.iterations[0] - before))
        with self.timing("bookkeeping"):
            decided = (
                self._outcomes_of_stop(run) if scores is None else self.policy.decide(run, scores)
            )
            if decided:
                self._end_trials(run, decided)
            self.storage.flush_if_due()
        if decided:
            with self.timing("asking"):
                self.policy.after_round(run)

    def _outcomes_of_stop(self, run: CohortRun) -> dict[int, TrialOutcome]:
        """Return which trials of a cohort end that was stopped within a round."""
        numbers = [m.number for m in run.cohort.members if m.number in run.running]
        if self.budget.out_of_time():
            return dict.fromkeys(numbers, self._outcome_of_stop())
        return {
            number: TrialOutcome.TRIAL_TIMEOUT
            for number in numbers
            if self.finisher.exceeds_timeout(run.running[number])
        }

    def _outcome_of_stop(self) -> TrialOutcome:
        """Return the outcome of trials that a study's end cuts short."""
        return TrialOutcome.INTERRUPTED if self.budget.interrupted else TrialOutcome.TIMEOUT

    def _train_round(self, run: CohortRun) -> tuple[Scores | None, float]:
        """Return a cohort's scores and its seconds of training.

        The compiled engine releases the interpreter lock, so followers are asked for meanwhile.
        A cohort that torch trains can be stopped between two steps and resumed later.
        """
        cohort, started = run.cohort, time.monotonic()
        if cohort.compiled_mlp is None:
            oldest = max(run.running.values(), key=lambda running: running.trained)

            def must_pause() -> bool:
                if self.budget.is_over() or self.checkpoints.is_due():
                    return True
                return self.finisher.exceeds_timeout(oldest, time.monotonic() - started)

            with self.timing("training"):
                scores = _train_to_evaluation(cohort, must_pause)
            return scores, time.monotonic() - started
        ended, given_up = list[float](), Event()

        def train() -> Scores | None:
            try:
                return _train_to_evaluation(
                    cohort, lambda: given_up.is_set() or self.budget.out_of_time()
                )
            finally:
                ended.append(time.monotonic())

        with self.timing("training"):
            future = self._trainer.submit(train)
            try:
                self.policy.ask_ahead(future.done)
                late = time.monotonic()
                wait([future])
            except BaseException:  # its result is no longer needed
                given_up.set()
                wait([future])
                raise
        self.timing.move_seconds("training", "asking", max(0.0, late - ended[0]))
        return future.result(), ended[0] - started

    def _end_trials(self, run: CohortRun, outcomes: Mapping[int, TrialOutcome]) -> None:
        """End trials of a cohort, by their numbers, and shrink it to the others."""
        cohort = run.cohort
        self.finisher.end(run, outcomes)
        self.checkpoints.mark_trial_ended()
        stay = [i for i, member in enumerate(cohort.members) if member.number not in outcomes]
        if run.running:
            cohort.select(stay)

    def _release_or_end_rest(self) -> None:
        """Fail the trials that have not started, or release all with a checkpoint."""
        if self.budget.released and self.source.running:
            self._write_checkpoint()
            self.finisher.release_all(self.lease.worker)
            return
        is_stopped = self.budget.interrupted or self.source.is_stopped
        outcome = TrialOutcome.INTERRUPTED if is_stopped else TrialOutcome.TIMEOUT
        self.finisher.fail_unstarted(self.policy.unstarted_trials(), outcome)


def _train_to_evaluation(cohort: Cohort, stop: Callable[[], bool]) -> Scores | None:
    """Train a cohort to its next evaluation.

    Raises:
        CohortError: If training raises; the error is its cause.
    """
    try:
        return cohort.train_round(stop)
    except Exception as error:
        raise CohortError from error
