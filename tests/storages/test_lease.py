"""Who lives, who is dead, and who may be either."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
import pytest

from optuna_nnhp.storages import lease as module
from optuna_nnhp.storages.lease import LEASE_PREFIX
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import new_worker_name
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.open_storage import open_storage
from tests.tiny import ENVIRONMENT


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "_now", clock)
    return clock


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


def lease_of(study: optuna.Study, worker: str = "me", **options: Any) -> Lease:
    return Lease(study._storage, study._study_id, worker, **options)


def write(study: optuna.Study, worker: str, **lease: Any) -> None:
    lease = {"at": time.time(), "beat": 1, "machine_id": "another", "process_id": "1@1", **lease}
    study._storage.set_study_system_attr(study._study_id, LEASE_PREFIX + worker, lease)


def wait(lease: Lease, clock: Clock, seconds: float) -> None:
    """Let time pass, in which somebody looks at the leases every now and then."""
    while seconds > 0:
        clock.now += min(lease.renewal_interval, seconds)
        seconds -= lease.renewal_interval
        lease.read()


@contextmanager
def away(lease: Lease) -> Generator[None, None, None]:
    storage, lease.storage = lease.storage, None  # type: ignore[assignment]
    yield
    lease.storage = storage


def test_another_machine_s_worker_is_dead_once_its_lease_is_not_renewed(
    study: optuna.Study, clock: Clock
) -> None:
    lease = lease_of(study, duration=60.0, renewal_interval=15.0)
    write(study, "far", renewal_interval=1)
    assert not lease.is_dead("far")
    assert lease.is_doubtful("far")  # nobody has seen it renewed
    wait(lease, clock, 50)
    write(study, "far", renewal_interval=2)
    assert not lease.is_dead("far")
    assert not lease.is_doubtful("far")
    wait(lease, clock, 40)
    assert not lease.is_dead("far")
    assert lease.is_doubtful("far")  # two beats are missing
    wait(lease, clock, 21)
    assert lease.is_dead("far")
    assert not lease.is_doubtful("far")
    write(study, "far", renewal_interval=3)  # it slept
    assert not lease.is_dead("far")


def test_other_clocks_do_not_matter_except_by_hours(study: optuna.Study, clock: Clock) -> None:
    lease = lease_of(study)
    for minutes in (-50, 50):
        write(study, "far", at=time.time() + 60 * minutes)
        assert not lease.is_dead("far")
    write(study, "far", at=time.time() - 2 * 3600)
    assert not lease.is_dead("far")
    wait(lease, clock, 31)
    assert lease.is_dead("far")


@pytest.mark.parametrize("is_old", [False, True], ids=["minutes", "hours"])
def test_nobody_dies_of_an_outage(study: optuna.Study, clock: Clock, is_old: bool) -> None:
    lease = lease_of(study)
    write(study, "far", renewal_interval=1)
    assert not lease.is_dead("far")
    wait(lease, clock, 15)
    # The others' clock is not moved by hand: an outage of hours is a lease that looks so old.
    write(study, "far", renewal_interval=2, at=time.time() - 7200 * is_old)
    assert not lease.is_dead("far")
    assert not lease.is_doubtful("far")
    wait(lease, clock, 15)
    with away(lease):
        for _ in range(20):
            wait(lease, clock, 15)
            assert not lease.is_dead("far")
    assert not lease.is_dead("far")  # its next beat is still to come
    assert lease.is_doubtful("far")
    wait(lease, clock, 29)
    assert not lease.is_dead("far")
    write(study, "far", renewal_interval=3)
    assert not lease.is_dead("far")
    assert not lease.is_doubtful("far")
    wait(lease, clock, 61)
    assert lease.is_dead("far")


@pytest.mark.parametrize("is_old", [False, True], ids=["minutes", "hours"])
def test_who_died_in_an_outage_is_missed(study: optuna.Study, clock: Clock, is_old: bool) -> None:
    lease = lease_of(study)
    write(study, "far", at=time.time() - 7200 * is_old)
    with away(lease):
        wait(lease, clock, 300)
    for seconds, is_dead in ((0, False), (29, False), (2, is_old), (28, is_old), (2, True)):
        wait(lease, clock, seconds)
        assert lease.is_dead("far") == is_dead
        assert lease.is_doubtful("far") != is_dead


@pytest.mark.parametrize("is_away", [False, True])
def test_between_two_looks_renewals_tell_of_an_outage(
    study: optuna.Study, clock: Clock, is_away: bool
) -> None:
    lease = lease_of(study)
    write(study, "far")
    assert not lease.is_dead("far")
    storage: Any = lease.storage
    for beat in range(20):  # it trains for five minutes, while its thread goes on
        lease.storage = None if is_away and beat < 19 else storage  # type: ignore[assignment]
        clock.now += 15
        lease._renew()
    assert lease.is_dead("far") != is_away


def test_who_is_gone_from_this_machine_is_dead_in_an_outage_too(
    study: optuna.Study, clock: Clock
) -> None:
    lease = lease_of(study)
    write(study, "gone", machine_id=machine_id(), process_id=process_id())
    lease.read()
    with away(lease):
        assert lease.is_dead("gone")
    assert lease.is_dead("gone")


class Locked(InMemoryStorage):
    """Stands for a database that many workers write to at once."""

    left = 3  # attempts at a lease that fail

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        if key.startswith(LEASE_PREFIX) and self.left:
            self.left -= 1
            raise StorageInternalError("database is locked")
        super().set_study_system_attr(study_id, key, value)


def test_the_first_writing_is_tried_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.02)
    storage = Locked()
    lease = lease_of(optuna.create_study(storage=storage))
    for _ in range(2):
        until = time.monotonic() + 10
        storage.left = 3
        with lease:
            assert "beat" not in lease.read().get("me", {})
            while "beat" not in lease.read().get("me", {}):
                assert time.monotonic() < until  # sooner than the next beat
                time.sleep(0.01)
            beats = lease._beats
            time.sleep(0.1)
            assert lease._beats == beats  # from then on a beat is one


def test_who_has_ended_is_dead_at_once(study: optuna.Study) -> None:
    worker = new_worker_name()
    with lease_of(study, worker):
        assert not lease_of(study).is_dead(worker)
    assert lease_of(study).is_dead(worker)
    assert set(lease_of(study).read()) == {worker}


def test_this_process_s_other_work_lives(study: optuna.Study) -> None:
    with lease_of(study, "one") as one, lease_of(study, "two") as two:
        assert not one.is_dead("two")
        assert not two.is_dead("one")
        assert not two.is_doubtful("one")
    write(study, "gone", machine_id=machine_id(), process_id=process_id())
    assert lease_of(study).is_dead("gone")


SCRIPT = """
import sys, time
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.open_storage import open_storage
storage = open_storage("s.journal")
with Lease(storage, 0, sys.argv[1], renewal_interval=0.1):
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_of_this_machine_is_dead_at_once(folder: Path) -> None:
    optuna.create_study(storage=open_storage("s.journal"), study_name="s")
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "child"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    study = optuna.load_study(study_name="s", storage=open_storage("s.journal"))
    lease = lease_of(study)
    first = study._storage.get_study_system_attrs(study._study_id)[LEASE_PREFIX + "child"]
    assert not lease.is_dead("child")
    until = time.monotonic() + 10
    while study._storage.get_study_system_attrs(study._study_id)[LEASE_PREFIX + "child"] == first:
        assert time.monotonic() < until  # its thread renews it
    child.kill()
    deadline = time.monotonic() + 10
    while not lease.is_dead("child"):  # also before its parent has asked for its end
        assert time.monotonic() < deadline
    child.communicate()
    assert lease.is_dead("child")


def test_a_number_that_is_used_again(study: optuna.Study) -> None:
    number, _, started = process_id().partition("@")
    write(study, "old", machine_id=machine_id(), process_id=f"{number}@{int(started or 0) - 5}")
    assert lease_of(study).is_dead("old") == bool(started)


def test_workers_that_were_killed_before_their_first_writing_have_no_lease(
    study: optuna.Study,
) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    name = new_worker_name()
    host = name.split(":")[0]
    lease = lease_of(study)
    assert lease.is_dead(f"{host}:{child.pid}:0123abcd")
    assert not lease.is_dead(f"{host}:{os.getppid()}:0123abcd")
    assert not lease.is_dead(f"elsewhere:{child.pid}:0123abcd")
    assert lease.is_dead(name)  # an earlier process with this one's number
    locked = optuna.create_study(storage=Locked())
    with lease_of(locked, name):  # it lives, and its lease is still to come
        assert not lease_of(locked).read()
        assert not lease_of(locked).is_dead(name)


def test_workers_of_older_versions_have_no_lease(study: optuna.Study) -> None:
    host = new_worker_name().split(":")[0]
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lease = lease_of(study)
    assert lease.is_dead(f"{host}:{child.pid}")
    assert not lease.is_dead(f"{host}:{os.getppid()}")
    assert not lease.is_dead("elsewhere:1")
    assert not lease.is_doubtful("elsewhere:1")


def test_a_storage_that_is_away_is_no_reason_to_end(study: optuna.Study) -> None:
    lease = lease_of(study, renewal_interval=0.02)
    write(study, "far")
    with lease:
        assert not lease.is_dead("far")
        storage: Any = lease.storage
        lease.storage = None  # type: ignore[assignment]
        time.sleep(0.1)
        assert not lease.is_dead("far")
        assert set(lease.read()) == {"far", "me"}
        lease.storage = storage
    assert lease.is_dead("me")
