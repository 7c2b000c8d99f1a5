"""Starting trials in many processes: none twice, none too many, the dead's by one worker each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Generator
from concurrent.futures import Executor
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor
import functools
from multiprocessing import active_children
from multiprocessing import get_context
from pathlib import Path
import threading
import time
from typing import Any

import optuna
from optuna import Study
from optuna import Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.storages import write_buffer
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.generic_adapter import GenericAdapter
from optuna_nnhp.storages.generic_adapter import excess_trials
from optuna_nnhp.storages.operations import TrialLimitReached
from optuna_nnhp.storages.operations import TrialTakenOver
from tests.storages.test_buffered import SPACE
from tests.storages.test_buffered import Data

FILES = ("journal", "sqlite", "postgresql")  # for several processes
KINDS = ("memory", "lines", "calls", *FILES)


class Lines(BaseJournalBackend):
    """A journal that is no file, so that there is nothing to lock."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        yield from self.lines[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._lock:
            self.lines += logs


class Calls(InMemoryStorage):
    """Stands for one behind a network, of which nobody knows who else uses it."""


@pytest.fixture(params=KINDS)
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], BaseStorage]:
    """Opens the same storage again and again."""
    kind = request.param
    if kind == "lines":
        lines = Lines()
        return lambda: JournalStorage(lines)
    if kind == "calls":
        monkeypatch.setattr("optuna_nnhp.storages.generic_adapter.SETTLING_TIME", 0.02)
        calls = Calls()
        return lambda: calls
    url = request.getfixturevalue("postgresql").url if kind == "postgresql" else ""
    return Data(kind, tmp_path, url=url).open


def worker(backend: BaseStorage, name: str, flush_every: float = 100.0) -> Study:
    storage = BufferedStorage(backend, flush_every, trial_attrs={"worker": name})
    adapter = storage._buffer.adapter
    if isinstance(backend, Calls):
        assert isinstance(adapter, GenericAdapter)
        adapter._is_exclusive = False
    return optuna.create_study(
        storage=storage,
        study_name="s",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )


def deferred(study: Study) -> BufferedStorage:
    assert isinstance(study._storage, BufferedStorage)
    return study._storage


def owners(backend: BaseStorage) -> list[str]:
    study = optuna.load_study(storage=backend, study_name="s")
    return [trial.user_attrs["worker"] for trial in study.get_trials()]


@pytest.fixture(scope="module")
def pool() -> Generator[Executor, None, None]:
    """Four processes: importing takes each a while."""
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        yield pool
        for process in active_children():  # else each of them tidies up for two seconds
            process.kill()


def meet(folder: Path, name: str, count: int) -> None:
    """Wait until all are there."""
    (folder / f"ready-{name}").touch()
    while len(list(folder.glob("ready-*"))) < count:
        time.sleep(0.002)


# --- Taking over ---


def test_a_dead_workers_trial_can_be_continued(opened: Callable[[], BaseStorage]) -> None:
    dead = worker(opened(), "dead")
    with deferred(dead).prefetch_trials(3):
        trials = [dead.ask(SPACE) for _ in range(3)]
    trials[0].report(0.5, 1)
    dead.tell(trials[2], 1.0)
    deferred(dead).flush()

    study = worker(opened(), "here")
    assert len(study.get_trials()) == 3  # read before
    wanted = {trial._trial_id: "dead" for trial in trials}
    ids = deferred(study).take_over(wanted)
    assert ids == [trial._trial_id for trial in trials[:2]]
    assert deferred(study).take_over(wanted) == ids  # once more is no harm
    assert owners(opened()) == ["here", "here", "dead"]
    taken = study.get_trials()[0]
    assert (taken.number, taken.state, taken.params) == (0, TrialState.RUNNING, trials[0].params)
    assert (taken.intermediate_values, taken.user_attrs) == ({1: 0.5}, {"worker": "here"})
    again = Trial(study, ids[0])
    again.report(0.25, 2)
    assert owners(opened())[0] == "here"
    study.tell(again, 0.25)
    read = optuna.load_study(storage=opened(), study_name="s").get_trials()[0]
    assert (read.value, read.intermediate_values) == (0.25, {1: 0.5, 2: 0.25})


def test_only_trials_of_the_named_worker_are_taken_over(opened: Callable[[], BaseStorage]) -> None:
    first, second, third = (worker(opened(), name) for name in ("a", "b", "c"))
    ids = [first.ask()._trial_id for _ in range(2)]
    first.enqueue_trial({"x": 1})
    waiting = first.get_trials()[2]._trial_id
    assert deferred(second).get_all_trials(second._study_id)
    assert deferred(second).take_over({ids[0]: "a", ids[1]: "nobody", waiting: "a"}) == [ids[0]]
    third.get_trials()
    assert deferred(third).take_over({ids[0]: "a", 10**6: "a"}) == []
    assert deferred(third).take_over({}) == []
    assert deferred(third).take_over({ids[0]: "b"}) == [ids[0]]
    states = optuna.load_study(storage=opened(), study_name="s").get_trials()
    assert [t.user_attrs.get("worker") for t in states] == ["c", "a", None]
    with pytest.raises(ValueError, match="`trial_attrs` must have the attribute 'worker'"):
        BufferedStorage(opened()).take_over({ids[0]: "c"})


def test_a_worker_after_a_long_pause_cannot_change_a_trial_that_was_taken_over(
    opened: Callable[[], BaseStorage],
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    first, second = worker(opened(), "a"), worker(opened(), "b")
    with deferred(first).prefetch_trials(2):
        trial, other = first.ask(SPACE), first.ask(SPACE)
    deferred(first).flush()
    second.get_trials()
    assert deferred(second).take_over({trial._trial_id: "a"}) == [trial._trial_id]
    monkeypatch.setattr(write_buffer, "MAX_SILENCE", -1.0)
    trial.report(0.5, 1)
    other.report(0.5, 1)
    deferred(first).flush()
    assert "Discarded the changes to trial 0: The trial with the id" in log.text
    for write in (
        lambda: trial.report(0.5, 2),
        lambda: trial.set_user_attr("note", 1),
        lambda: first.tell(trial, 1.0),
    ):
        with pytest.raises(TrialTakenOver, match="taken over by b"):
            write()
    assert issubclass(TrialTakenOver, UpdateFinishedTrialError)  # which callers know already
    first.tell(other, 1.0)
    read = optuna.load_study(storage=opened(), study_name="s").get_trials()
    assert [t.state.name for t in read] == ["RUNNING", "COMPLETE"]
    assert (read[0].intermediate_values, read[1].intermediate_values) == ({}, {1: 0.5})
    assert deferred(first).take_over({trial._trial_id: "b"}) == [trial._trial_id]
    first.tell(trial, 2.0)


def take_all(data: Data, name: str, count: int) -> list[int]:
    study = worker(data.open(), name)
    trials = study.get_trials()
    if name.startswith("w"):
        meet(data.folder, name, count)
    taken = list[int]()
    for start in range(0, len(trials), 4):
        some = {trial._trial_id: "dead" for trial in trials[start : start + 4]}
        taken += deferred(study).take_over(some)
        time.sleep(0.002)  # so that both have their turns
    states = study.get_trials()
    assert all(t.user_attrs["worker"] == name for t in states if t._trial_id in taken)
    return taken


@pytest.mark.parametrize("kind", FILES)
def test_two_processes_never_take_over_the_same_trial(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, pool: Executor
) -> None:
    url = request.getfixturevalue("postgresql").url if kind == "postgresql" else ""
    data = Data(kind, tmp_path, url=url)
    dead = worker(data.open(), "dead")
    with deferred(dead).prefetch_trials(100):
        ids = {dead.ask()._trial_id for _ in range(100)}
    deferred(dead).backend.remove_session()
    where = Data(kind, tmp_path, memory=None, url=url)  # type: ignore[arg-type]
    first, second = [pool.submit(take_all, where, f"w{n}", 2) for n in range(2)]
    assert set(first.result()) | set(second.result()) == ids
    assert not set(first.result()) & set(second.result())
    said = {"w0": len(first.result()), "w1": len(second.result())}
    assert Counter(owners(data.open())) == Counter(said)


@pytest.mark.parametrize("kind", ["memory", "lines", "calls"])
def test_many_threads_never_take_over_the_same_trial(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna_nnhp.storages.generic_adapter.SETTLING_TIME", 0.1)
    shared: BaseStorage | Lines = {"memory": InMemoryStorage, "lines": Lines, "calls": Calls}[
        kind
    ]()
    opened = (lambda: JournalStorage(shared)) if isinstance(shared, Lines) else (lambda: shared)
    dead = worker(opened(), "dead")
    with deferred(dead).prefetch_trials(40):
        wanted = {dead.ask()._trial_id: "dead" for _ in range(40)}
    studies = [worker(opened(), f"w{n}") for n in range(4)]
    barrier = threading.Barrier(4)

    def take(study: Study) -> list[int]:
        study.get_trials()
        barrier.wait()
        return deferred(study).take_over(wanted)

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take, studies))
    assert sorted(i for ids in taken for i in ids) == sorted(wanted)
    counts = {f"w{n}": len(ids) for n, ids in enumerate(taken) if ids}
    assert Counter(owners(opened())) == counts


# --- No more than a study shall have ---


def test_no_more_trials_begin_than_the_limit(opened: Callable[[], BaseStorage]) -> None:
    study = worker(opened(), "a")
    study.add_trial(create_trial(value=1.0))
    study.enqueue_trial({"layers": 3})
    study.enqueue_trial({"layers": 5})
    deferred(study).set_trial_limit(study._study_id, 3)
    with deferred(study).prefetch_trials(4):
        assert [study.ask(SPACE).params["layers"] for _ in range(2)] == [3, 5]
        with pytest.raises(TrialLimitReached, match="reached its limit of 3 trials"):
            study.ask(SPACE)
    study.enqueue_trial({"layers": 7})  # it may wait
    with pytest.raises(TrialLimitReached):
        study.ask(SPACE)
    waiting = study.get_trials()[3]
    assert not deferred(study).set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    other = worker(opened(), "b")  # says nothing, so for it there is no limit
    assert other.ask(SPACE).params["layers"] == 7
    deferred(study).set_trial_limit(study._study_id, 6)
    with deferred(study).prefetch_trials(4):
        assert [study.ask(SPACE).number for _ in range(2)] == [4, 5]
        with pytest.raises(TrialLimitReached):
            study.ask(SPACE)
    deferred(study).set_trial_limit(study._study_id, None)
    assert study.ask().number == 6
    states = [t.state for t in optuna.load_study(storage=opened(), study_name="s").get_trials()]
    assert states.count(TrialState.WAITING) == 0
    with pytest.raises(ValueError, match="`limit` must be at least 0, but got -1"):
        deferred(study).set_trial_limit(0, -1)


def run(study: Study, most: int) -> list[int]:
    """Train until there is nothing left."""
    numbers = list[int]()
    deferred(study).set_trial_limit(study._study_id, most)
    while True:
        trials = list[Trial]()
        try:
            with deferred(study).prefetch_trials(4):
                trials += (study.ask(SPACE) for _ in range(3))  # and one goes back
        except TrialLimitReached:
            if not trials:
                return numbers
        with deferred(study).batch():
            for trial in trials:
                study.tell(trial, 1.0)
        numbers += [trial.number for trial in trials]


def run_process(data: Data, name: str, most: int, count: int) -> list[int]:
    study = worker(data.open(), name)
    study.get_trials()
    meet(data.folder, name, count)
    return run(study, most)


def check(backend: BaseStorage, numbers: list[int], most: int) -> None:
    """Every trial has run once, and there are as many as there should be."""
    trials = optuna.load_study(storage=backend, study_name="s").get_trials()
    begun = [trial.number for trial in trials if trial.state != TrialState.WAITING]
    assert sorted(numbers) == begun
    assert len(begun) == most
    assert [trial.number for trial in trials] == list(range(len(trials)))


@pytest.mark.parametrize("kind", FILES)
def test_four_processes_run_exactly_the_limit(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, pool: Executor
) -> None:
    url = request.getfixturevalue("postgresql").url if kind == "postgresql" else ""
    data = Data(kind, tmp_path, url=url)
    study = worker(data.open(), "first")
    for layers in range(1, 6):
        study.enqueue_trial({"layers": layers})
    deferred(study).backend.remove_session()
    where = Data(kind, tmp_path, memory=None, url=url)  # type: ignore[arg-type]
    runs = [pool.submit(run_process, where, f"w{n}", 25, 4) for n in range(4)]
    check(data.open(), [number for run in runs for number in run.result()], 25)


@pytest.mark.parametrize("kind", ["memory", "lines"])
def test_many_threads_run_exactly_the_limit(kind: str) -> None:
    shared = InMemoryStorage() if kind == "memory" else Lines()
    opened = (lambda: JournalStorage(shared)) if isinstance(shared, Lines) else (lambda: shared)
    studies = [worker(opened(), f"w{n}") for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(functools.partial(run, most=25), studies))
    check(opened(), [number for numbers in runs for number in numbers], 25)


@pytest.mark.parametrize("kind", ["lines", "calls"])
def test_trials_over_the_limit_are_requeued(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process starts trials between this one's look and its writing."""
    shared = Lines() if kind == "lines" else Calls()
    opened = (lambda: JournalStorage(shared)) if isinstance(shared, Lines) else (lambda: shared)
    study, other = worker(opened(), "a"), worker(opened(), "b")
    study.enqueue_trial({"layers": 3})
    for one in (study, other):
        deferred(one).set_trial_limit(study._study_id, 3)
    original, faster = GenericAdapter._count_begun_trials, list[Trial]()

    def late(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if self is deferred(study)._buffer.adapter and not faster:
            faster.append(Trial.__new__(Trial))
            faster[:] = [other.ask() for _ in range(2)]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(GenericAdapter, "_count_begun_trials", late)
        with deferred(study).prefetch_trials(3), pytest.raises(TrialLimitReached):
            for _ in range(3):
                study.ask()
    trials = optuna.load_study(storage=opened(), study_name="s").get_trials()
    begun = [t for t in trials if t.state != TrialState.WAITING]
    assert len(begun) == 3
    assert {t.user_attrs["worker"] for t in trials if t.state == TrialState.WAITING} <= {None}


def test_created_trials_with_the_highest_numbers_are_requeued_first() -> None:
    trials = [create_trial(state=TrialState.RUNNING) for _ in range(5)]
    for number, trial in enumerate(trials):
        trial._number = trial._trial_id = number
    trials[1].state = TrialState.WAITING
    assert excess_trials(trials, [2, 4], [], 3) == [4]
    assert excess_trials(trials, [2], [], 3) == []
    assert excess_trials(trials, [], [0, 3], 3) == [3]
    assert excess_trials(trials, [4], [0], 3) == [4]
    assert excess_trials(trials, [1], [], 0) == []  # it was added as WAITING
