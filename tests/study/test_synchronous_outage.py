"""Populations and groups along a gradient while a storage, or their worker, goes away."""

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
from tests.study.test_outage import Away
from tests.tiny import SHAPE
from tests.tiny import causes
from tests.tiny import courses
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
METHODS: dict[str, dict[str, Any]] = {
    "population": {"method_options": {"size": 4, "generations": 2}, "n_trials": 16},
    "gradient": {"method_options": {"starts": 2}, "n_trials": 4},
}
FEW = 100  # times that a study of so few trials asks for some, if it does not ask in vain


def run(method: str, storage: str | None, **wishes: Any) -> Result:
    usual = {**METHODS[method], "fixed": SHAPE | {"epochs": 6}, "cohort_size": None}
    return tune(X, Y, method=method, storage=storage, **{**usual, **wishes})


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks again and again without waiting fails."""
    original, asked = TrialSource.ask, list[int]()

    def ask(source: TrialSource, *arguments: Any, **more: Any) -> Any:
        asked.append(len(asked))
        assert len(asked) <= FEW
        return original(source, *arguments, **more)

    monkeypatch.setattr(TrialSource, "ask", ask)


class Killed(BaseException):
    """What ends a worker at once."""


@dataclass
class Moments:
    """What happens instead of a stretch of training, the second one of each call of `run`."""

    then: Callable[[], None] = lambda: None
    seen: int = 0

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be asked before every stretch."""
        original = Tuner._train

        def train(tuner: Tuner, run: CohortRun) -> None:
            self.seen += 1
            if self.seen == 2:
                self.then()
            original(tuner, run)

        monkeypatch.setattr(Tuner, "_train", train)

    def of(self, then: Callable[[], None]) -> None:
        """What happens in the next call."""
        self.then, self.seen = then, 0


class AwayAt(Away):
    """Locks the database at the end of a trial with this number, the last of them that ends."""

    def __init__(self, number: int, seconds: float | None) -> None:
        super().__init__(seconds)
        self.number = number

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == self.number:
            super().__call__(study, trial)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("method", "last"), [("population", 3), ("population", 7), ("gradient", 1)]
)
def test_an_outage_between_two_groups_or_generations_changes_nothing(
    method: str, last: int, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    wanted = run(method, None)
    result = run(method, STORAGE, callbacks=[AwayAt(last, 0.8)])
    assert "The storage is unavailable" in log.text
    assert states(result) == [TrialState.COMPLETE] * METHODS[method]["n_trials"]
    assert courses(result) == courses(wanted)
    for ours, theirs in zip(trials(result), trials(wanted), strict=True):
        for name in ("generation", "slot", "parent", "root", "schedule"):
            assert ours.user_attrs.get(name) == theirs.user_attrs.get(name)
    assert not list(folder.rglob("outbox-*"))


@pytest.mark.usefixtures("patient")
def test_a_group_waits_for_its_followers(
    folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, away = run("gradient", None), Away(0.8)
    original = SynchronousPolicy._ask_followers

    def follow(self: SynchronousPolicy, *arguments: Any) -> Any:
        if not away.is_used:
            away.lock()
        return original(self, *arguments)

    monkeypatch.setattr(SynchronousPolicy, "_ask_followers", follow)
    result = run("gradient", STORAGE)
    assert away.is_used
    assert " of 2 trials;" in log.text
    assert " of 1 trials;" not in log.text
    assert courses(result) == courses(wanted)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("method", "first"), [("population", 4), ("gradient", 2)])
def test_what_a_storage_that_stays_away_has_not_got_is_kept(
    method: str, first: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "MAX_STORAGE_WAIT", 0.5)
    wanted, moments, away = run(method, None), Moments(), Away(None)
    moments.patch(monkeypatch)
    moments.of(away.lock)  # the ends of those in training are not written
    with pytest.raises(StorageUnavailable, match="the same call goes on") as error:
        run(method, STORAGE)
    (kept,) = folder.rglob("outbox-*.json")
    assert kept.name in str(error.value)
    away.back()
    result = run(method, STORAGE)
    assert causes(result) == ["finished"] * METHODS[method]["n_trials"]
    assert courses(result)[:first] == courses(wanted)[:first]
    assert not list(folder.rglob("outbox-*"))


def die() -> None:
    raise Killed


def two_dead_workers(method: str, moments: Moments) -> None:
    """A study whose groups, of two workers at once, were both left in the middle."""

    def second() -> None:
        moments.of(die)
        with pytest.raises(Killed):
            run(method, "s.journal")
        die()

    moments.of(second)
    with pytest.raises(Killed):
        run(method, "s.journal")
    moments.of(lambda: None)


def at_work(storage: str) -> dict[str, list[int]]:
    """Trials that have not ended, by the worker whose checkpoint has them."""
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    found = defaultdict(list)
    for trial in optuna.load_study(study_name=None, storage=backend).trials:
        if not trial.state.is_finished():
            found[trial.user_attrs[CHECKPOINT]].append(trial.number)
    return found


def sizes_of_checkpoints(folder: Path) -> set[int]:
    """How many cohorts the checkpoints in a folder have."""
    paths = folder.rglob(f"checkpoints/*/*{JSON_SUFFIX}")
    return {len(json.loads(path.read_text())["metadata"]["cohorts"]) for path in paths}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("are_killed", [True, False], ids=["killed", "released"])
def test_sigterm_while_two_groups_are_resumed_leaves_both(
    method: str, are_killed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = Moments()
    moments.patch(monkeypatch)
    with monkeypatch.context() as patch:
        if are_killed:  # their trials stay RUNNING, under leases that are over
            patch.setattr(TrialFinisher, "release_all", lambda *_: None)
        two_dead_workers(method, moments)
    shutil.copy("s.journal", "t.journal")
    shutil.copytree("s.models", "t.models")
    wanted = run(method, "t.journal")

    moments.of(lambda: os.kill(os.getpid(), signal.SIGTERM))
    cut = run(method, "s.journal")
    left = at_work("s.journal")
    assert len(left) == 2  # one group has begun and has been cut short, one has not begun
    assert {t.state for t in trials(cut)} >= {TrialState.RUNNING, TrialState.WAITING}
    assert sizes_of_checkpoints(folder) == {1}

    moments.of(lambda: None)
    last = run(method, "s.journal")
    assert causes(last) == ["finished"] * METHODS[method]["n_trials"]
    assert found(last) == found(wanted)


def found(result: Result) -> list[str]:
    """Results whatever their trials' numbers: which group goes on first is nobody's wish."""
    return sorted(json.dumps([t.params, t.value, t.intermediate_values]) for t in trials(result))


@pytest.mark.parametrize("method", METHODS)
def test_who_had_hardly_begun_is_no_part_of_the_group_before(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, led = SynchronousPolicy._ask_followers, list[int]()

    def follow(self: SynchronousPolicy, leader: RunningTrial, count: int) -> Any:
        led.append(leader.member.number)
        if len(led) == 2:  # the checkpoint is still the first group's
            die()
        return original(self, leader, count)

    monkeypatch.setattr(SynchronousPolicy, "_ask_followers", follow)
    with pytest.raises(Killed):
        run(method, "s.journal")
    result = run(method, "s.journal")
    wanted = ["finished"] * METHODS[method]["n_trials"]
    wanted.insert(led[1], "killed")
    assert [t.user_attrs.get("cause") for t in trials(result)] == wanted
