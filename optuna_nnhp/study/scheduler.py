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

from optuna_nnhp.storages.deferred import DeferredStorage
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.reach import Unreachable
from optuna_nnhp.study.admission import Admission
from optuna_nnhp.study.asking import Asker
from optuna_nnhp.study.breakage import Breakage
from optuna_nnhp.study.checkpoints import EVERY
from optuna_nnhp.study.checkpoints import Checkpoints
from optuna_nnhp.study.ends import Callback as Callback
from optuna_nnhp.study.ends import Ends
from optuna_nnhp.study.environment import note_environment
from optuna_nnhp.study.judging import REPORT_EVERY
from optuna_nnhp.study.judging import Judge
from optuna_nnhp.study.loop import Budget
from optuna_nnhp.study.loop import Progress
from optuna_nnhp.study.loop import inside_optimize
from optuna_nnhp.study.loop import tidy_interrupts
from optuna_nnhp.study.opening import worker_of
from optuna_nnhp.study.outcomes import CohortError
from optuna_nnhp.study.podium import Podium
from optuna_nnhp.study.pool import Live
from optuna_nnhp.study.pool import Pool
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.study.recovery import Recovery
from optuna_nnhp.study.timing import Timing
from optuna_nnhp.training.checkpoint import BestWeights
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.machine import single_blas

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

GIVE_UP = 300.0  # seconds without a storage, after which what it has not got is kept in a file
POLL = 0.5  # seconds between two looks at others, when there is nothing else to do


@dataclass
class Scheduler:
    """Runs a study.

    Args:
        study:
            The opened study; its storage is a `DeferredStorage`.
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
    checkpoint_every: float | None = EVERY
    trial_timeout: float | None = None
    pool: Pool = field(default_factory=Pool)
    timing: Timing = field(default_factory=Timing)
    has_portfolio: ClassVar[bool] = True
    separates: ClassVar[bool] = True  # trials may be trained without those they began with

    def __post_init__(self) -> None:
        storage = self.study._storage
        if not isinstance(storage, DeferredStorage):
            raise TypeError(f"The study's storage must be a DeferredStorage, but is {storage}.")
        self.storage = storage
        note_environment(self.study, self.problem)  # on the device where it is trained
        self.asker = Asker(self.study, self.problem, self.budget, storage)
        self.podium = Podium(self.problem.maximize, self.weights, self.kept)
        self.ends = Ends(self.asker, self.podium, self.callbacks, self.trial_timeout)
        folder = self.weights.folder and self.weights.folder / "checkpoints"
        worker = worker_of(storage)
        self.lease = Lease(storage.backend, self.study._study_id, worker)
        self.judge = Judge(self.ends)
        self.checkpoints = Checkpoints(folder, worker, self.checkpoint_every)
        self.recovery = Recovery(self.asker, self.lease, folder, self.separates)
        self.breakage = Breakage(self.recovery, self.checkpoints, self.ends)
        self.admission = Admission(self.asker, self.pool, self.breakage, self.cohort_size)
        self._looked = -math.inf
        self.trainer = ThreadPoolExecutor(1, "optuna_nnhp-trainer")

    def run(self) -> None:
        """Train cohorts until the budget is spent, or somebody stops the study."""
        sampler = self.study.sampler
        with self.lease, inside_optimize(self.study), single_blas, self._interrupts():
            try:
                self._recall()
                left, done = self.asker.left(), self.asker.finished
                if left == 0 and done >= (self.budget.n_trials or 0):
                    _logger.info(f"The study has its {done} trials already: nothing to do.")
                with Progress(
                    self.show_progress_bar, self.budget, self.asker.finished
                ) as self.progress:
                    self._train_all()
                self._wind_up()
                self._send_everything()
                if not self.budget.released:
                    self.checkpoints.clear()
                    self.recovery.forget()
            except Unreachable:  # what is unwritten is kept, and goes on another time
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
                self._keep_unsent()

    def _interrupts(self) -> AbstractContextManager[None]:
        """Tidy ends by signals; what is in memory only nobody can go on with."""
        return tidy_interrupts(self.budget, releases=self.weights.folder is not None)

    def _keep_unsent(self) -> Path | None:
        """Keep what the storage has not got in a file, if there is any."""
        if self.storage.is_reachable:
            return None
        kept = self.storage.keep_unsent(self.weights.folder or Path())
        if kept is not None:
            _logger.warning(f"What the storage has not got is kept in {kept}.")
        return kept

    def _send_everything(self) -> None:
        """Have the storage written, or what it has not got in a file for the next run.

        Raises:
            Unreachable: If it does not answer for long.
        """
        self.storage.flush()
        patience = GIVE_UP if self.budget.timeout is None else min(GIVE_UP, self.budget.timeout)
        if self.storage.wait_until_reachable(
            patience, lambda: self.budget.interrupted or self.budget.released
        ):
            self.storage.flush()
        if self.storage.is_reachable:
            return
        kept = self._keep_unsent()
        what = "" if kept is None else f"What it has not got is kept in {kept}: "
        raise Unreachable(f"The storage does not answer. {what}the same call goes on.")

    def _train_all(self) -> None:
        """Ask for trials and train them, until there are no more."""
        self._look_after_others()
        self._admit()
        while not self.budget.released:
            if live := self.pool.next():
                self._train(live)
            elif not self.storage.is_reachable:
                if not self.storage.wait_until_reachable(GIVE_UP, self.budget.is_over):
                    break
            elif not self.admission.has_more():
                if self.budget.is_over() or not self.recovery.is_doubtful():
                    break
                time.sleep(POLL)
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
            if not self.storage.is_reachable:
                self.storage.keep_unsent(self.weights.folder or Path())
        except OSError as error:
            _logger.warning(f"No checkpoint is written, nor what the storage has not got: {error}")
            return False
        return self.checkpoints.write(self.pool.training, self._loop_facts())

    def _loop_facts(self) -> dict[str, Any]:
        """What this loop has to know to go on with its cohorts, as JSON."""
        return {}

    def _look_after_others(self) -> None:
        """Learn from what others have found, and go on with what dead workers have left."""
        if time.monotonic() - self.judge.learnt_at > REPORT_EVERY:
            with self.timing("bookkeeping"):
                self.judge.learn()
        is_due = time.monotonic() - self._looked > self.lease.beat
        if self.recovery.is_postponed:
            is_due = not any(live.is_suspect for live in self.pool.training)
        is_due = is_due or bool(self.recovery.released())
        if not is_due or self.budget.is_over():
            return
        self._looked = time.monotonic()
        if claimed := self.recovery.claim():
            for live in self.recovery.revive(claimed, self.breakage.again):
                self.admission.take_in_again(live)
            self._save()

    def _note_timing(self) -> None:
        """Note on the study where this call's time went."""
        wall = self.budget.seconds
        if not self.pool.offered:
            return
        shares = {name: round(s / wall, 4) for name, s in self.timing.seconds.items()}
        note = {"seconds": round(wall, 2), "occupancy": round(self.pool.occupancy, 4), **shares}
        self.study.set_user_attr("timing", note)

    def _recall(self) -> None:
        """Take in what the study holds already; begin a new one with the defaults."""
        self.recovery.replay_unsent()
        self.asker.begin(with_portfolio=self.has_portfolio)
        self.judge.learn()

    def _admit(self) -> None:
        with self.timing("asking"):
            self.admission.admit()

    # --- Training ---

    def _train(self, live: Live) -> None:
        """Train one cohort to its next evaluation, judge, and end who has ended."""
        members = len(live.running)
        before, work = live.cohort.iterations[0], live.cohort.work_of_step
        try:
            scores, seconds = self._train_round(live)
        except CohortError as error:
            self._break(live, error.__cause__)
            return
        live.seconds += seconds
        if scores is not None and not live.is_scored:
            self.admission.first_round, live.is_scored = live.seconds, True
        for running in live.running.values():
            running.trained += seconds
        self.pool.note(live, members, seconds, work * (live.cohort.iterations[0] - before))
        with self.timing("bookkeeping"):
            self._end_some(live, self._overtime(live) if scores is None else {})
            if scores is not None:
                self._end_some(live, self.judge.judge(live, scores))
            self.storage.flush_if_due()
        self.progress.show(self.asker.finished, self.pool.alive, self.podium.best)

    def _overtime(self, live: Live) -> dict[int, str]:
        """Of a cohort that was stopped within a round, who ends and why; the others go on."""
        if self.budget.out_of_time():
            cause = "interrupted" if self.budget.interrupted else "timeout"
            return dict.fromkeys(range(len(live.cohort.members)), cause)
        return {
            place: "timeout"
            for place, member in enumerate(live.cohort.members)
            if self.ends.takes_long(live.running[member.number])
        }

    def _train_round(self, live: Live) -> tuple[Scores | None, float]:
        """A cohort's scores, and how many seconds it trained for them.

        The engine leaves Python to others while it computes: then followers are asked for. Others
        can be stopped between two steps, and go on later.
        """
        cohort, started = live.cohort, time.monotonic()
        if cohort.native is None:
            oldest = max(live.running.values(), key=lambda running: running.trained)

            def pauses() -> bool:
                if self.budget.is_over() or self.checkpoints.is_due():
                    return True
                return self.ends.takes_long(oldest, time.monotonic() - started)

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

    def _break(self, live: Live, error: BaseException | None) -> None:
        """A cohort has raised: its trials go on in smaller ones, see `Breakage`."""
        assert isinstance(error, Exception)
        group, live.running = list(live.running.values()), {}
        vars(live.cohort).clear()  # what had no room must go before its halves come
        self.admission.replace(live, self.breakage.halve(group, error))

    # --- Ends ---

    def _end_some(self, live: Live, ends: dict[int, str]) -> None:
        """End some members, by their places, and shrink the cohort to the others."""
        if not ends:
            return
        cohort = live.cohort
        stay = [place for place in range(len(cohort.members)) if place not in ends]
        self._end_trials(live, {cohort.members[place].number: c for place, c in ends.items()})
        if stay:
            cohort.keep(stay)

    def _end_trials(self, live: Live, causes: Mapping[int, str]) -> None:
        """End trials, by their numbers; the cohort stays as it is."""
        self.ends.end(live, causes)
        self.checkpoints.note_end()

    def _wind_up(self) -> None:
        """End what has not begun; or leave all to others, with a checkpoint."""
        if self.budget.released and self.asker.running:
            self._save()
            self.ends.release_all(self.lease.worker)
            return
        is_stopped = self.budget.interrupted or self.study._stop_flag
        asked = [*self.admission.waiting, *self.admission.parked]
        self.ends.refuse(asked, "interrupted" if is_stopped else "timeout")


def _trained(cohort: Cohort, stop: Callable[[], bool]) -> Scores | None:
    """Train a cohort to its next evaluation.

    Raises:
        CohortError: Whatever it raises, as its cause.
    """
    try:
        return cohort.train_round(stop)
    except Exception as error:
        raise CohortError from error
