"""Populations and hypergradients continue after an outage or the death of a worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
import json
import os
from pathlib import Path
import shutil
import signal
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp import Result
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.study import tuner
from optuna_nnhp.study.policies.synchronous import SynchronousPolicy
from optuna_nnhp.study.recovery import CHECKPOINT
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.study.trial_source import TrialSource
from optuna_nnhp.study.tuner import Tuner
from optuna_nnhp.training.weight_files import JSON_SUFFIX
from tests.study.test_outage import STORAGE
from tests.study.test_outage import DatabaseLock
from tests.tiny import SHAPE
from tests.tiny import causes
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
METHODS: dict[str, dict[str, Any]] = {
    "population": {"method_options": {"size": 4, "generations": 2}, "n_trials": 16},
    "gradient": {"method_options": {"starts": 2}, "n_trials": 4},
}
MAX_ASKS = 100  # calls of `ask` that studies of so few trials need at most


def run(method: str, storage: str | None, **settings: Any) -> Result:
    usual = {**METHODS[method], "fixed": SHAPE | {"epochs": 6}, "cohort_size": None}
    return tune(X, Y, method=method, storage=storage, **{**usual, **settings})


@pytest.fixture
def limited_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if trials are asked for again and again without waiting."""
    original, asked = TrialSource.ask, list[int]()

    def ask(source: TrialSource, *arguments: Any, **more: Any) -> Any:
        asked.append(len(asked))
        assert len(asked) <= MAX_ASKS
        return original(source, *arguments, **more)

    monkeypatch.setattr(TrialSource, "ask", ask)


class Killed(BaseException):
    """Ends a worker at once."""


@dataclass
class BeforeSecondRound:
    """Calls a function before the second round of each call of `run`."""

    function: Callable[[], None] = lambda: None
    seen: int = 0

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count the rounds, and call the function before the second one."""
        original = Tuner._train_cohort

        def train(tuner: Tuner, run: CohortRun) -> None:
            self.seen += 1
            if self.seen == 2:
                self.function()
            original(tuner, run)

        monkeypatch.setattr(Tuner, "_train_cohort", train)

    def call(self, function: Callable[[], None]) -> None:
        """Set the function for the next call of `run`."""
        self.function, self.seen = function, 0


class DatabaseLockAt(DatabaseLock):
    """Locks the database when the trial with this number ends."""

    def __init__(self, number: int, seconds: float | None) -> None:
        super().__init__(seconds)
        self.number = number

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == self.number:
            super().__call__(study, trial)


@pytest.mark.usefixtures("limited_asks")
@pytest.mark.parametrize(
    ("method", "last"), [("population", 3), ("population", 7), ("gradient", 1)]
)
def test_an_outage_between_two_groups_or_generations_changes_nothing(
    method: str, last: int, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    expected = run(method, None)
    result = run(method, STORAGE, callbacks=[DatabaseLockAt(last, 0.8)])
    assert "The storage is unavailable" in log.text
    assert states(result) == [TrialState.COMPLETE] * METHODS[method]["n_trials"]
    assert learning_curves(result) == learning_curves(expected)
    for ours, theirs in zip(trials(result), trials(expected), strict=True):
        for name in ("generation", "slot", "parent", "root", "schedule"):
            assert ours.user_attrs.get(name) == theirs.user_attrs.get(name)
    assert not list(folder.rglob("outbox-*"))


@pytest.mark.usefixtures("limited_asks")
def test_a_group_waits_for_its_followers_during_an_outage(
    folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, database_lock = run("gradient", None), DatabaseLock(0.8)
    original = SynchronousPolicy._ask_followers

    def follow(self: SynchronousPolicy, *arguments: Any) -> Any:
        if not database_lock.is_used:
            database_lock.lock()
        return original(self, *arguments)

    monkeypatch.setattr(SynchronousPolicy, "_ask_followers", follow)
    result = run("gradient", STORAGE)
    assert database_lock.is_used
    assert " of 2 trials;" in log.text
    assert " of 1 trials;" not in log.text
    assert learning_curves(result) == learning_curves(expected)


@pytest.mark.usefixtures("limited_asks")
@pytest.mark.parametrize(("method", "first"), [("population", 4), ("gradient", 2)])
def test_unwritten_results_are_kept_if_the_storage_stays_unavailable(
    method: str, first: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "MAX_STORAGE_WAIT", 0.5)
    expected, before_second_round, database_lock = (
        run(method, None),
        BeforeSecondRound(),
        DatabaseLock(None),
    )
    before_second_round.patch(monkeypatch)
    before_second_round.call(database_lock.lock)  # the ends of those in training are not written
    with pytest.raises(StorageUnavailable, match="Repeat the same call") as error:
        run(method, STORAGE)
    (outbox,) = folder.rglob("outbox-*.json")
    assert outbox.name in str(error.value)
    database_lock.unlock()
    result = run(method, STORAGE)
    assert causes(result) == ["finished"] * METHODS[method]["n_trials"]
    assert learning_curves(result)[:first] == learning_curves(expected)[:first]
    assert not list(folder.rglob("outbox-*"))


def kill_worker() -> None:
    raise Killed


def two_dead_workers(method: str, before_second_round: BeforeSecondRound) -> None:
    """Start a study with two workers that are both killed while they train a group."""

    def second() -> None:
        before_second_round.call(kill_worker)
        with pytest.raises(Killed):
            run(method, "s.journal")
        kill_worker()

    before_second_round.call(second)
    with pytest.raises(Killed):
        run(method, "s.journal")
    before_second_round.call(lambda: None)


def unfinished_trials(storage: str) -> dict[str, list[int]]:
    """Return the trials that have not ended, by the worker whose checkpoint has them."""
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    unfinished = defaultdict(list)
    for trial in optuna.load_study(study_name=None, storage=backend).trials:
        if not trial.state.is_finished():
            unfinished[trial.user_attrs[CHECKPOINT]].append(trial.number)
    return unfinished


def sizes_of_checkpoints(folder: Path) -> set[int]:
    """Return the numbers of cohorts of the checkpoints in a folder."""
    paths = folder.rglob(f"checkpoints/*/*{JSON_SUFFIX}")
    return {len(json.loads(path.read_text())["metadata"]["cohorts"]) for path in paths}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("are_killed", [True, False], ids=["killed", "released"])
def test_sigterm_while_two_groups_are_resumed_leaves_both_to_the_next_call(
    method: str, are_killed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_second_round = BeforeSecondRound()
    before_second_round.patch(monkeypatch)
    with monkeypatch.context() as patch:
        if are_killed:  # their trials stay RUNNING, under leases that are over
            patch.setattr(TrialFinisher, "release_all", lambda *_: None)
        two_dead_workers(method, before_second_round)
    shutil.copy("s.journal", "t.journal")
    shutil.copytree("s.models", "t.models")
    expected = run(method, "t.journal")

    before_second_round.call(lambda: os.kill(os.getpid(), signal.SIGTERM))
    cut = run(method, "s.journal")
    left = unfinished_trials("s.journal")
    assert len(left) == 2  # one group has begun and has been cut short, one has not begun
    assert {t.state for t in trials(cut)} >= {TrialState.RUNNING, TrialState.WAITING}
    assert sizes_of_checkpoints(folder) == {1}

    before_second_round.call(lambda: None)
    last = run(method, "s.journal")
    assert causes(last) == ["finished"] * METHODS[method]["n_trials"]
    assert sorted_results(last) == sorted_results(expected)


def sorted_results(result: Result) -> list[str]:
    """Return the sorted results without their numbers, since either group may continue first."""
    return sorted(json.dumps([t.params, t.value, t.intermediate_values]) for t in trials(result))


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_that_had_not_begun_does_not_join_the_group_of_the_checkpoint(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, led = SynchronousPolicy._ask_followers, list[int]()

    def follow(self: SynchronousPolicy, leader: RunningTrial, count: int) -> Any:
        led.append(leader.member.number)
        if len(led) == 2:  # the checkpoint is still the first group's
            kill_worker()
        return original(self, leader, count)

    monkeypatch.setattr(SynchronousPolicy, "_ask_followers", follow)
    with pytest.raises(Killed):
        run(method, "s.journal")
    result = run(method, "s.journal")
    expected = ["finished"] * METHODS[method]["n_trials"]
    expected.insert(led[1], "killed")
    assert [t.user_attrs.get("cause") for t in trials(result)] == expected
