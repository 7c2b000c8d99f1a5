"""Who lives, who is dead, and who may be either."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import optuna
import pytest

from optuna_nnhp.storages import lease as module
from optuna_nnhp.storages.lease import LEASE
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.lease import machine
from optuna_nnhp.storages.lease import new_worker_name
from optuna_nnhp.storages.lease import process
from optuna_nnhp.storages.opening import open_storage
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
    lease = {"at": time.time(), "beat": 1, "machine": "another", "process": "1@1", **lease}
    study._storage.set_study_system_attr(study._study_id, LEASE + worker, lease)


def test_another_machine_s_worker_is_dead_once_its_lease_is_not_renewed(
    study: optuna.Study, clock: Clock
) -> None:
    lease = lease_of(study, lasts=60.0, beat=15.0)
    write(study, "far", beat=1)
    assert not lease.is_dead("far")
    assert lease.is_doubtful("far")  # nobody has seen it renewed
    clock.now += 50
    write(study, "far", beat=2)
    assert not lease.is_dead("far")
    assert not lease.is_doubtful("far")
    clock.now += 40
    assert not lease.is_dead("far")
    assert lease.is_doubtful("far")  # two beats are missing
    clock.now += 21
    assert lease.is_dead("far")
    assert not lease.is_doubtful("far")
    write(study, "far", beat=3)  # it slept
    assert not lease.is_dead("far")


def test_other_clocks_do_not_matter_except_by_hours(study: optuna.Study, clock: Clock) -> None:
    lease = lease_of(study)
    for minutes in (-50, 50):
        write(study, "far", at=time.time() + 60 * minutes)
        assert not lease.is_dead("far")
    write(study, "far", at=time.time() - 2 * 3600)
    assert lease.is_dead("far")


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
    write(study, "gone", machine=machine(), process=process())
    assert lease_of(study).is_dead("gone")


SCRIPT = """
import sys, time
from optuna_nnhp.storages.lease import Lease
from optuna_nnhp.storages.opening import open_storage
storage = open_storage("s.journal")
with Lease(storage, 0, sys.argv[1], beat=0.1):
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
    first = study._storage.get_study_system_attrs(study._study_id)[LEASE + "child"]
    assert not lease.is_dead("child")
    until = time.monotonic() + 10
    while study._storage.get_study_system_attrs(study._study_id)[LEASE + "child"] == first:
        assert time.monotonic() < until  # its thread renews it
    child.kill()
    deadline = time.monotonic() + 10
    while not lease.is_dead("child"):  # also before its parent has asked for its end
        assert time.monotonic() < deadline
    child.communicate()
    assert lease.is_dead("child")


def test_a_number_that_is_used_again(study: optuna.Study) -> None:
    number, _, started = process().partition("@")
    write(study, "old", machine=machine(), process=f"{number}@{int(started or 0) - 5}")
    assert lease_of(study).is_dead("old") == bool(started)


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
    lease = lease_of(study, beat=0.02)
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
