"""The scheduler: ask for trials, train them as cohorts, report, prune, tell, refill."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import field
import math
from pathlib import Path
from threading import Event
import time
from typing import Any
from typing import ClassVar

import optuna
from optuna import Study

from optuna_nnhp.engine.threads import single_threaded_blas
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.study.admission import Admission
from optuna_nnhp.study.best_trials import BestTrials
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import ProgressBar
from optuna_nnhp.study.budget import allow_study_stop
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.study.checkpoints import CHECKPOINT_INTERVAL
from optuna_nnhp.study.checkpoints import Checkpoints
from optuna_nnhp.study.cohort_runs import CohortRun
from optuna_nnhp.study.cohort_runs import FairQueue
from optuna_nnhp.study.environment import record_environment
from optuna_nnhp.study.failure_bisector import FailureBisector
from optuna_nnhp.study.failures import CohortError
from optuna_nnhp.study.open_study import worker_name
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.pruning import REPORT_INTERVAL
from optuna_nnhp.study.pruning import PruningPolicy
from optuna_nnhp.study.recovery import Recovery
from optuna_nnhp.study.timing import Timing
from optuna_nnhp.study.trial_finisher import Callback as Callback
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Scores

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

MAX_STORAGE_WAIT = (
    300.0  # seconds without a storage, after which what it has not got is kept in a file
)
POLL_INTERVAL = 0.5  # seconds between two looks at others, when there is nothing else to do


@dataclass
class Tuner:
    """Runs a study.

    Args:
        study:
            The opened study; its storage is a `BufferedStorage`.
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
        checkpoint_every:
            Seconds between checkpoints; None for none.
        trial_timeout:
            Seconds of training that each trial may take; None for no bound.

    Attributes:
        podium: The best trials, whose weights are kept.
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
    checkpoint_every: float | None = CHECKPOINT_INTERVAL
    trial_timeout: float | None = None
    queue: FairQueue = field(default_factory=FairQueue)
    timing: Timing = field(default_factory=Timing)
    uses_portfolio: ClassVar[bool] = True
    separable: ClassVar[bool] = True  # trials may be trained without those they began with

    def __post_init__(self) -> None:
        storage = self.study._storage
        if not isinstance(storage, BufferedStorage):
            raise TypeError(f"The study's storage must be a BufferedStorage, but is {storage}.")
        self.storage = storage
        record_environment(self.study, self.problem)  # on the device where it is trained
        self.source = TrialSource(self.study, self.problem, self.budget, storage)
        self.best_trials = BestTrials(self.problem.maximize, self.weights, self.kept)
        self.ends = TrialFinisher(
            self.source, self.best_trials, self.callbacks, self.trial_timeout
        )
        folder = self.weights.folder and self.weights.folder / "checkpoints"
        worker = worker_name(storage)
        self.lease = Lease(storage.backend, self.study._study_id, worker)
        self.judge = PruningPolicy(self.ends)
        self.checkpoints = Checkpoints(folder, worker, self.checkpoint_every)
        self.recovery = Recovery(self.source, self.lease, folder, self.separable)
        self.bisector = FailureBisector(self.recovery, self.checkpoints, self.ends)
        self.admission = Admission(self.source, self.queue, self.bisector, self.cohort_size)
        self._looked = -math.inf
        self.trainer = ThreadPoolExecutor(1, "optuna_nnhp-trainer")

    def run(self) -> None:
        """Train cohorts until the budget is spent, or somebody stops the study."""
        sampler = self.study.sampler
        with self.lease, allow_study_stop(self.study), single_threaded_blas, self._interrupts():
            try:
                self._recall()
                left, done = self.source.left(), self.source.finished
                if left == 0 and done >= (self.budget.n_trials or 0):
                    _logger.info(f"The study has its {done} trials already: nothing to do.")
                with ProgressBar(
                    self.show_progress_bar, self.budget, self.source.finished
                ) as self.progress:
                    self._train_all()
                self._wind_up()
                self._send_everything()
                if not self.budget.released:
                    self.checkpoints.clear()
                    self.recovery.forget()
            except StorageUnavailable:  # what is unwritten is kept, and goes on another time
                raise
            except BaseException:
                if self.checkpoints.is_on:
                    self.ends.release_all(self.lease.worker)
                else:  # nobody can go on with them
                    self.ends.fail_all()
                raise
            finally:
                self.study.sampler = sampler  # a grid's points were asked through another one
                self.trainer.shutdown()
                self._note_timing()
                self.storage.flush()
                self._save_outbox()

    def _interrupts(self) -> AbstractContextManager[None]:
        """Tidy ends by signals; what is in memory only nobody can go on with."""
        return graceful_shutdown(self.budget, releases=self.weights.folder is not None)

    def _save_outbox(self) -> Path | None:
        """Keep what the storage has not got in a file, if there is any."""
        if self.storage.is_available:
            return None
        kept = self.storage.save_outbox(self.weights.folder or Path())
        if kept is not None:
            _logger.warning(f"What the storage has not got is kept in {kept}.")
        return kept

    def _send_everything(self) -> None:
        """Have the storage written, or what it has not got in a file for the next run.

        Raises:
            StorageUnavailable: If it does not answer for long.
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
        what = "" if kept is None else f"What it has not got is kept in {kept}: "
        raise StorageUnavailable(f"The storage does not answer. {what}the same call goes on.")

    def _train_all(self) -> None:
        """Ask for trials and train them, until there are no more."""
        self._look_after_others()
        self._admit()
        while not self.budget.released:
            if run := self.queue.next():
                self._train(run)
            elif not self.storage.is_available:
                if not self.storage.wait_until_available(MAX_STORAGE_WAIT, self.budget.is_over):
                    break
            elif not self.admission.has_more():
                if self.budget.is_over() or not self.recovery.is_doubtful():
                    break
                time.sleep(POLL_INTERVAL)
                self._looked = -math.inf
            self._save_if_due()
            self._look_after_others()
            self._admit()

    def _save_if_due(self) -> None:
        if self.checkpoints.is_due():
            with self.timing("checkpoints"):
                self._save()

    def _save(self) -> bool:
        """Write a checkpoint; whether it is written.

        Before that the storage: whoever goes on must find the values that the members have.
        """
        self.storage.flush()
        try:  # what has ended since is in no checkpoint
            if not self.storage.is_available:
                self.storage.save_outbox(self.weights.folder or Path())
        except OSError as error:
            _logger.warning(f"No checkpoint is written, nor what the storage has not got: {error}")
            return False
        return self.checkpoints.write(self.queue.training, self._loop_facts())

    def _loop_facts(self) -> dict[str, Any]:
        """What this loop has to know to go on with its cohorts, as JSON."""
        return {}

    def _look_after_others(self) -> None:
        """Learn from what others have found, and go on with what dead workers have left."""
        if time.monotonic() - self.judge.last_sync > REPORT_INTERVAL:
            with self.timing("bookkeeping"):
                self.judge.sync()
        is_due = time.monotonic() - self._looked > self.lease.renewal_interval
        if self.recovery.has_postponed:
            is_due = not any(run.is_quarantined for run in self.queue.training)
        is_due = is_due or bool(self.recovery.released())
        if not is_due or self.budget.is_over():
            return
        self._looked = time.monotonic()
        if claimed := self.recovery.claim():
            for run in self.recovery.revive(claimed, self.bisector.again):
                self.admission.take_in_again(run)
            self._save()

    def _note_timing(self) -> None:
        """Note on the study where this call's time went."""
        wall = self.budget.seconds
        if not self.queue.offered:
            return
        shares = {name: round(s / wall, 4) for name, s in self.timing.seconds.items()}
        note = {"seconds": round(wall, 2), "occupancy": round(self.queue.occupancy, 4), **shares}
        self.study.set_user_attr("timing", note)

    def _recall(self) -> None:
        """Take in what the study holds already; begin a new one with the defaults."""
        self.recovery.replay_outbox()
        self.source.begin(with_portfolio=self.uses_portfolio)
        self.judge.sync()

    def _admit(self) -> None:
        with self.timing("asking"):
            self.admission.admit()

    # --- Training ---

    def _train(self, run: CohortRun) -> None:
        """Train one cohort to its next evaluation, judge, and end who has ended."""
        members = len(run.running)
        before, work = run.cohort.iterations[0], run.cohort.step_flops
        try:
            scores, seconds = self._train_round(run)
        except CohortError as error:
            self._break(run, error.__cause__)
            return
        run.seconds += seconds
        if scores is not None and not run.is_scored:
            self.admission.first_round, run.is_scored = run.seconds, True
        for running in run.running.values():
            running.trained += seconds
        self.queue.note(run, members, seconds, work * (run.cohort.iterations[0] - before))
        with self.timing("bookkeeping"):
            self._end_some(run, self._overtime(run) if scores is None else {})
            if scores is not None:
                self._end_some(run, self.judge.judge(run, scores))
            self.storage.flush_if_due()
        self.progress.show(self.source.finished, self.queue.alive, self.best_trials.best)

    def _overtime(self, run: CohortRun) -> dict[int, str]:
        """Of a cohort that was stopped within a round, who ends and why; the others go on."""
        if self.budget.out_of_time():
            cause = "interrupted" if self.budget.interrupted else "timeout"
            return dict.fromkeys(range(len(run.cohort.members)), cause)
        return {
            place: "timeout"
            for place, member in enumerate(run.cohort.members)
            if self.ends.exceeds_timeout(run.running[member.number])
        }

    def _train_round(self, run: CohortRun) -> tuple[Scores | None, float]:
        """A cohort's scores, and how many seconds it trained for them.

        The engine leaves Python to others while it computes: then followers are asked for. Others
        can be stopped between two steps, and go on later.
        """
        cohort, started = run.cohort, time.monotonic()
        if cohort.compiled_mlp is None:
            oldest = max(run.running.values(), key=lambda running: running.trained)

            def pauses() -> bool:
                if self.budget.is_over() or self.checkpoints.is_due():
                    return True
                return self.ends.exceeds_timeout(oldest, time.monotonic() - started)

            with self.timing("training"):
                scores = _trained(cohort, pauses)
            return scores, time.monotonic() - started
        ended, given_up = list[float](), Event()

        def train() -> Scores | None:
            try:
                return _trained(cohort, lambda: given_up.is_set() or self.budget.out_of_time())
            finally:
                ended.append(time.monotonic())

        with self.timing("training"):
            future = self.trainer.submit(train)
            try:
                self.admission.prepare(future.done)
                late = time.monotonic()
                wait([future])
            except BaseException:  # nobody will ask what it has come to
                given_up.set()
                wait([future])
                raise
        self.timing.move("training", "asking", max(0.0, late - ended[0]))
        return future.result(), ended[0] - started

    def _break(self, run: CohortRun, error: BaseException | None) -> None:
        """A cohort has raised: its trials go on in smaller ones, see `FailureBisector`."""
        assert isinstance(error, Exception)
        group, run.running = list(run.running.values()), {}
        vars(run.cohort).clear()  # what had no room must go before its halves come
        self.admission.replace(run, self.bisector.bisect(group, error))

    # --- Ends ---

    def _end_some(self, run: CohortRun, ends: dict[int, str]) -> None:
        """End some members, by their places, and shrink the cohort to the others."""
        if not ends:
            return
        cohort = run.cohort
        stay = [place for place in range(len(cohort.members)) if place not in ends]
        self._end_trials(run, {cohort.members[place].number: c for place, c in ends.items()})
        if stay:
            cohort.select(stay)

    def _end_trials(self, run: CohortRun, causes: Mapping[int, str]) -> None:
        """End trials, by their numbers; the cohort stays as it is."""
        self.ends.end(run, causes)
        self.checkpoints.mark_trial_ended()

    def _wind_up(self) -> None:
        """End what has not begun; or leave all to others, with a checkpoint."""
        if self.budget.released and self.source.running:
            self._save()
            self.ends.release_all(self.lease.worker)
            return
        is_stopped = self.budget.interrupted or self.study._stop_flag
        asked = [*self.admission.waiting, *self.admission.deferred]
        self.ends.fail_unstarted(asked, "interrupted" if is_stopped else "timeout")


def _trained(cohort: Cohort, stop: Callable[[], bool]) -> Scores | None:
    """Train a cohort to its next evaluation.

    Raises:
        CohortError: Whatever it raises, as its cause.
    """
    try:
        return cohort.train_round(stop)
    except Exception as error:
        raise CohortError from error
