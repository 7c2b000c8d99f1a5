"""Who lives, who is dead, and who may be either."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
import os
from pathlib import Path
import signal
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
from optuna_nnhp.storages.lease import is_worker_alive
from optuna_nnhp.storages.lease import lock_worker
from optuna_nnhp.storages.lease import machine_id
from optuna_nnhp.storages.lease import new_worker_name
from optuna_nnhp.storages.lease import process_id
from optuna_nnhp.storages.lease import unlock_worker
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
    lease = {"at": time.time(), "renewals": 1, "machine_id": "another", **lease}
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
    write(study, "far", renewals=1)
    assert not lease.is_dead("far")
    assert lease.may_be_dead("far")  # nobody has seen it renewed
    wait(lease, clock, 50)
    write(study, "far", renewals=2)
    assert not lease.is_dead("far")
    assert not lease.may_be_dead("far")
    wait(lease, clock, 40)
    assert not lease.is_dead("far")
    assert lease.may_be_dead("far")  # two renewals are missing
    wait(lease, clock, 21)
    assert lease.is_dead("far")
    assert not lease.may_be_dead("far")
    write(study, "far", renewals=3)  # it slept
    assert not lease.is_dead("far")


def test_clock_differences_below_an_hour_do_not_matter(study: optuna.Study, clock: Clock) -> None:
    lease = lease_of(study)
    for minutes in (-50, 50):
        write(study, "far", at=time.time() + 60 * minutes)
        assert not lease.is_dead("far")
    write(study, "far", at=time.time() - 2 * 3600)
    assert not lease.is_dead("far")
    wait(lease, clock, 31)
    assert lease.is_dead("far")


@pytest.mark.parametrize("is_old", [False, True], ids=["minutes", "hours"])
def test_no_worker_is_dead_because_of_an_outage(
    study: optuna.Study, clock: Clock, is_old: bool
) -> None:
    lease = lease_of(study)
    write(study, "far", renewals=1)
    assert not lease.is_dead("far")
    wait(lease, clock, 15)
    # The others' clock is not moved by hand: an outage of hours is a lease that looks so old.
    write(study, "far", renewals=2, at=time.time() - 7200 * is_old)
    assert not lease.is_dead("far")
    assert not lease.may_be_dead("far")
    wait(lease, clock, 15)
    with away(lease):
        for _ in range(20):
            wait(lease, clock, 15)
            assert not lease.is_dead("far")
    assert not lease.is_dead("far")  # its next renewal is still to come
    assert lease.may_be_dead("far")
    wait(lease, clock, 29)
    assert not lease.is_dead("far")
    write(study, "far", renewals=3)
    assert not lease.is_dead("far")
    assert not lease.may_be_dead("far")
    wait(lease, clock, 61)
    assert lease.is_dead("far")


@pytest.mark.parametrize("is_old", [False, True], ids=["minutes", "hours"])
def test_a_worker_that_died_in_an_outage_is_dead_after_it(
    study: optuna.Study, clock: Clock, is_old: bool
) -> None:
    lease = lease_of(study)
    write(study, "far", at=time.time() - 7200 * is_old)
    with away(lease):
        wait(lease, clock, 300)
    for seconds, is_dead in ((0, False), (29, False), (2, is_old), (28, is_old), (2, True)):
        wait(lease, clock, seconds)
        assert lease.is_dead("far") == is_dead
        assert lease.may_be_dead("far") != is_dead


@pytest.mark.parametrize("is_away", [False, True])
def test_renewals_notice_an_outage_between_two_readings(
    study: optuna.Study, clock: Clock, is_away: bool
) -> None:
    lease = lease_of(study)
    write(study, "far")
    assert not lease.is_dead("far")
    storage: Any = lease.storage
    for renewal in range(20):  # it trains for five minutes, while its thread goes on
        lease.storage = None if is_away and renewal < 19 else storage  # type: ignore[assignment]
        clock.now += 15
        lease._renew()
    assert lease.is_dead("far") != is_away


def test_a_killed_worker_of_this_machine_is_dead_in_an_outage_too(
    study: optuna.Study, clock: Clock
) -> None:
    lease = lease_of(study)
    write(study, "gone", machine_id=machine_id())
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


def test_a_failed_first_lease_is_written_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_INTERVAL", 0.02)
    storage = Locked()
    lease = lease_of(optuna.create_study(storage=storage))
    for _ in range(2):
        until = time.monotonic() + 10
        storage.left = 3
        with lease:
            assert "renewals" not in lease.read().get("me", {})
            while "renewals" not in lease.read().get("me", {}):
                assert time.monotonic() < until  # sooner than the next renewal
                time.sleep(0.01)
            renewals = lease._renewals
            time.sleep(0.1)
            assert lease._renewals == renewals  # from then on after the usual interval


def test_a_worker_that_has_ended_is_dead_at_once(study: optuna.Study) -> None:
    worker = new_worker_name()
    with lease_of(study, worker):
        assert not lease_of(study).is_dead(worker)
    assert lease_of(study).is_dead(worker)
    assert set(lease_of(study).read()) == {worker}


def test_other_workers_of_this_process_are_alive(study: optuna.Study) -> None:
    with lease_of(study, "one") as one, lease_of(study, "two") as two:
        assert not one.is_dead("two")
        assert not two.is_dead("one")
        assert not two.may_be_dead("one")
    write(study, "gone", machine_id=machine_id())
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


STARTING = """
import sys, time
from optuna_nnhp.storages.lease import lock_worker
assert lock_worker(sys.argv[1])
print("here", flush=True)
time.sleep(60)
"""


def test_a_worker_that_was_killed_before_it_wrote_its_lease_is_dead_at_once(
    study: optuna.Study,
) -> None:
    name, lease = new_worker_name(), lease_of(study)
    child = subprocess.Popen(
        [sys.executable, "-c", STARTING, name], stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        assert not lease.is_dead(name)
        assert not lease.may_be_dead(name)
        child.kill()
    assert lease.is_dead(name)
    locked = optuna.create_study(storage=Locked())
    with lease_of(locked, name):  # it lives, and its lease is still to come
        assert not lease_of(locked).read()
        assert not lease_of(locked).is_dead(name)


def test_a_worker_without_lease_is_dead_after_the_duration_of_one(
    study: optuna.Study, clock: Clock
) -> None:
    lease = lease_of(study)
    assert not lease.is_dead("elsewhere:1")
    assert lease.may_be_dead("elsewhere:1")
    wait(lease, clock, 60)
    assert not lease.is_dead("elsewhere:1")
    wait(lease, clock, 1)
    assert lease.is_dead("elsewhere:1")


def test_a_forked_process_does_not_keep_its_parents_worker_alive() -> None:
    name = new_worker_name()
    child = subprocess.Popen(
        [sys.executable, "-c", FORKING, name], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert is_worker_alive(name)
    child.kill()
    child.wait()
    assert is_worker_alive(name) is False
    os.kill(grandchild, signal.SIGKILL)
    child.stdout.close()


FORKING = """
import os, sys, time
from optuna_nnhp.storages.lease import lock_worker
assert lock_worker(sys.argv[1])
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_leases_are_used_if_no_file_can_be_locked(
    study: optuna.Study, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_lock_folder", lambda: None)
    assert not lock_worker("me")
    unlock_worker("me")
    with lease_of(study, "me"):
        other = lease_of(study)
        assert not other.is_dead("me")
        assert other.may_be_dead("me")
        clock.now += 100
        assert not other.is_dead("me")  # the storage was not asked meanwhile
        wait(other, clock, 61)
        assert other.is_dead("me")


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"optuna_nnhp-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert not lock_worker("me")
    assert machine_id() == process_id()


def test_a_lease_ends_without_error_in_an_outage(study: optuna.Study) -> None:
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


def test_a_worker_whose_file_was_deleted_makes_it_again(study: optuna.Study) -> None:
    with lease_of(study) as own:
        folder = module._lock_folder()
        assert folder is not None
        path = module._lock_file_path(folder, own.worker)
        path.unlink()
        module.touch_worker(own.worker)
        assert path.exists()
