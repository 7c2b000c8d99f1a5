"""Journals survive killed processes: torn lines, locks of the dead, full disks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import errno
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
import pytest

from optuna_nnhp.storages import journal_file
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.journal_file import JournalFile
from optuna_nnhp.storages.journal_file import KernelReleasedLock
from optuna_nnhp.storages.journal_file import append_lines
from optuna_nnhp.storages.journal_file import encode_logs
from optuna_nnhp.storages.journal_file import open_journal
from optuna_nnhp.storages.journal_file import remove_unfinished_line
from optuna_nnhp.storages.open_storage import open_storage
from tests.tiny import ENVIRONMENT

resource = pytest.importorskip("resource", reason="Windows has no such limits")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="there are no symbolic links")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with two studies."""
    path = tmp_path / "study.journal"
    for name in "ab":
        optuna.create_study(storage=open_journal(path), study_name=name)
    return path


def names(path: Path) -> list[str]:
    """What a plain Optuna process reads."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    return [study.study_name for study in storage.get_all_studies()]


def add(path: Path, name: str) -> None:
    """What a plain Optuna process writes."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    optuna.create_study(storage=storage, study_name=name)


# --- The last line ---


@pytest.mark.parametrize("torn", [b"{", b'{"op_code":0,"wor', b'{"op_code":0}', b"\0" * 70_000])
def test_a_torn_last_line_is_removed(
    torn: bytes, path: Path, log: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    assert not remove_unfinished_line(path)
    assert log.text.count("unfinished") == 0
    path.write_bytes(whole + torn)
    study = optuna.load_study(storage=open_journal(path), study_name="a")
    assert study.trials == []
    text = f"Removed the unfinished last line of study.journal ({len(torn)} bytes)."
    assert text in log.text
    assert path.read_bytes() == whole
    add(path, "c")
    assert names(path) == ["a", "b", "c"]


def test_a_journal_of_one_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(b'{"op_code":0')
    assert open_journal(path).get_all_studies() == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n3,4", b"no journal", b'{"options": 3}\n{"op', b"x"]
)
def test_a_file_that_is_no_journal_is_not_changed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.csv cannot: table\.csv must be a journal"):
        open_storage(path)
    assert path.read_bytes() == content


def test_the_next_append_removes_a_torn_line(path: Path) -> None:
    storage = BufferedStorage(open_journal(path))
    study = optuna.load_study(storage=storage, study_name="a")
    study.ask()
    with path.open("ab") as file:  # another process was killed
        file.write(b'{"op_code":4,"wo')
    study.tell(0, 1.0)
    study.set_user_attr("note", 1)
    assert optuna.load_study(storage=str_storage(path), study_name="a").best_value == 1.0
    assert names(path) == ["a", "b"]
    assert not any(line.startswith(b" ") for line in path.read_bytes().splitlines())


def str_storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


@pytest.mark.parametrize("behind, is_running", [(1, False), (2, False), (2, True)])
def test_entries_after_a_torn_line_are_kept(
    behind: int, is_running: bool, path: Path, log: pytest.LogCaptureFixture
) -> None:
    with path.open("ab") as file:
        file.write(b'{"op_code":0,"worker_id":"x","study_name":"lo')
    lines = path.read_bytes().count(b"\n")
    reader = open_journal(path) if is_running else None
    if is_running:  # opening has mended it
        with path.open("ab") as file:
            file.write(b'{"op_code":0,"worker_id":"x","study_name":"lo')
    for name in "cde"[:behind]:  # by a plain Optuna process that was running already
        record = {"worker_id": "y", "study_name": name, "directions": [1]}
        with path.open("ab") as file:
            file.write(encode_logs([{"op_code": 0, **record}]))
    size, expected = path.stat().st_size, list("abcde"[: 2 + behind])
    if behind > 1:
        with pytest.raises(ValueError):
            names(path)
    reader = reader or open_journal(path)
    assert [study.study_name for study in reader.get_all_studies()] == expected
    assert names(path) == expected
    assert f"Removed a torn line at the start of line {lines + 1} of study.journal." in log.text
    assert path.stat().st_size == size  # so that who has read a part of it reads on


def test_the_error_of_a_damaged_journal_names_the_file(path: Path) -> None:
    damaged = path.read_bytes() + path.read_bytes().replace(b'"op_code"', b'"op_c')
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"study\.journal must hold one JSON object a line"):
        open_journal(path)
    assert path.read_bytes() == damaged


@contextmanager
def full_disk(path: Path, free: int) -> Iterator[None]:
    """No file of this process can be longer than this one and some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines(path: Path) -> None:
    before = path.read_bytes()
    lines = encode_logs([{"op_code": 2, "study_id": 9}, {"op_code": 2, "study_id": 10}])
    with full_disk(path, 40), pytest.raises(OSError):
        append_lines(path, lines)
    assert path.read_bytes() == before + lines[: lines.index(b"\n") + 1]
    append_lines(path, lines)
    assert path.read_bytes() == before + lines[: lines.index(b"\n") + 1] + lines
    with full_disk(path, 3), pytest.raises(OSError):
        JournalFile(path).append_logs([{"op_code": 2}])
    assert path.read_bytes().endswith(b"\n")


def test_appending_does_not_recreate_a_moved_journal(path: Path) -> None:
    backend = JournalFile(path)
    path.rename(path.with_suffix(".moved"))
    with pytest.raises(FileNotFoundError):
        backend.append_logs([{"op_code": 2}])
    assert not path.exists()


# --- The lock ---

HOLDER = """
import sys
from optuna.storages.journal import JournalFileSymlinkLock
from optuna_nnhp.storages.journal_file import KernelReleasedLock
kind, path = sys.argv[1:]
lock = KernelReleasedLock(path) if kind == "ours" else JournalFileSymlinkLock(path)
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path, kind: str = "ours") -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("is_reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_process_does_not_keep_the_lock(
    is_reaped: bool, path: Path, log: pytest.LogCaptureFixture
) -> None:
    with holder(path) as process:
        lock = KernelReleasedLock(str(path), timeout=0.3)
        with pytest.raises(TimeoutError, match=r"study\.journal\.lock has been kept for 0 s"):
            lock.acquire()
        process.send_signal(signal.SIGKILL)
        if is_reaped:
            process.wait()
        lock.timeout = 5.0  # where plain Optuna waits for 30 s
        assert lock.acquire()
        lock.release()
    assert "of a process that is gone" in log.text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_one_waiter_at_a_time_gets_the_lock_of_a_dead_process(path: Path) -> None:
    with holder(path) as process:
        with pytest.raises(TimeoutError):  # a lock of a living process stays
            KernelReleasedLock(str(path), timeout=0.0).acquire()
        assert path.with_name("study.journal.lock").is_symlink()
        process.kill()
    inside, most = [], []

    def work(_: int) -> None:
        with get_lock_file(KernelReleasedLock(str(path))):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most == [1] * 16


def test_our_lock_and_optunas_exclude_each_other(path: Path) -> None:
    with holder(path, "plain"), pytest.raises(TimeoutError):
        KernelReleasedLock(str(path), timeout=0.2).acquire()
    path.with_name("study.journal.lock").unlink()
    held = threading.Event()

    def plain() -> None:
        with get_lock_file(JournalFileSymlinkLock(str(path))):
            held.set()

    lock = KernelReleasedLock(str(path))
    with ThreadPoolExecutor(1) as pool, get_lock_file(lock):
        pool.submit(plain)
        assert not held.wait(0.2)
    assert held.is_set()


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_a_lock_unchanged_for_the_grace_period_is_removed(kind: str, path: Path) -> None:
    with holder(path, kind):  # its process is alive, but does nothing
        lock = KernelReleasedLock(str(path), timeout=0.2)
        lock.grace_period = 0.3  # type: ignore[assignment]
        with pytest.raises(
            TimeoutError
        ):  # one call waits 0.2 s; the next one continues the grace period
            lock.acquire()
        assert lock.acquire()
        with pytest.raises(TimeoutError):
            KernelReleasedLock(str(path), timeout=0.0).acquire()
        lock.release()


def test_releasing_a_lost_lock_keeps_the_link_of_the_new_owner(
    path: Path, log: pytest.LogCaptureFixture
) -> None:
    lock, link = KernelReleasedLock(str(path)), path.with_name("study.journal.lock")
    lock.acquire()
    link.unlink()
    link.symlink_to(path)  # a plain process took it
    lock.release()
    assert link.is_symlink()
    assert "Another process has taken the lock of study.journal away" in log.text


def test_a_lock_works_from_any_working_directory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent.parent)
    relative = path.relative_to(path.parent.parent)
    with get_lock_file(KernelReleasedLock(str(relative))):
        link = path.with_name("study.journal.lock")
        assert link.resolve() == path.resolve()  # plain Optuna looks at the journal through it


@pytest.mark.parametrize("is_here", [True, False])
def test_a_link_of_another_machine_is_kept(
    is_here: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_here:
        monkeypatch.setattr(journal_file, "boot_id", lambda: "another machine")
    other = KernelReleasedLock(str(path))
    other.acquire()
    os.close(other._file)  # as if its process had died, or were on another machine
    monkeypatch.undo()
    lock = KernelReleasedLock(str(path), timeout=0.1)
    if is_here:
        assert lock.acquire()
        lock.release()
    else:
        with pytest.raises(TimeoutError):
            lock.acquire()


def test_without_flock_only_optunas_lock_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with get_lock_file(KernelReleasedLock(str(path))), pytest.raises(TimeoutError):
        KernelReleasedLock(str(path), timeout=0.1).acquire()
    assert KernelReleasedLock(str(path), timeout=0.1).acquire()


WRITER = """
import sys
import optuna
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.journal_file import open_journal
backend, attrs = open_journal(sys.argv[1]), {"worker": sys.argv[2]}
storage = BufferedStorage(backend, 0.0, trial_attrs=attrs)
study = optuna.load_study(storage=storage, study_name="a")
print("ready", flush=True)
while True:
    with storage.prefetch_trials(5):
        trials = [study.ask() for _ in range(5)]
    with storage.batch():
        for trial in trials:
            trial.set_user_attr("filler", "x" * 5000)
            study.tell(trial, float(trial.number))
"""


def test_writers_that_are_killed_at_any_moment_leave_a_readable_journal(path: Path) -> None:
    options = {"stdout": subprocess.PIPE, "env": {**os.environ, **ENVIRONMENT}}
    command = [sys.executable, "-c", WRITER, str(path)]
    for number in range(3):
        with subprocess.Popen([*command, f"w{number}"], **options) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.037 * number)
            process.kill()
        open_journal(path)
        trials = optuna.load_study(storage=str_storage(path), study_name="a").get_trials()
        assert [trial.number for trial in trials] == list(range(len(trials)))
        ended = [trial for trial in trials if trial.state.is_finished()]
        assert all(t.value == t.number and len(t.user_attrs["filler"]) == 5000 for t in ended)
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.touch()
    lock = KernelReleasedLock(str(path), timeout=1.0)
    lock.acquire()
    child = os.fork()
    if child == 0:  # as a data loader's worker that is forked while another thread writes
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        assert lock.acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
