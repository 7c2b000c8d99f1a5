from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import subprocess
import sys

import pytest
import torch

from optuna_nnhp.training import device as device_module
from optuna_nnhp.training.device import claim_device
from tests.tiny import ENVIRONMENT

TWO = ["GPU-a", "GPU-b"]
FIRST, SECOND, CPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
# Another process that has taken a lock, and keeps it until it is killed.
HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """A process that holds nothing, before and after."""
    give_back()
    yield
    give_back()


def give_back() -> None:
    while device_module._claimed:
        os.close(device_module._claimed.popitem()[1])


def taken(
    study: str, known: list[str], folder: Path
) -> tuple[torch.device, subprocess.Popen[str]]:
    """The GPU that another process would get, which it has from then on."""
    before = dict(device_module._claimed)
    device = claim_device(study, known, folder)
    (key,) = device_module._claimed.keys() - before.keys()
    file = device_module._claimed.pop(key)
    path = os.readlink(f"/proc/self/fd/{file}")
    os.close(file)
    command = [sys.executable, "-S", "-E", "-c", HOLD, path]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return device, process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_workers_of_one_study_never_share_one(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    device, other = taken("one", TWO, tmp_path)
    assert device == FIRST
    assert claim_device("one", TWO, tmp_path) == SECOND
    assert claim_device("one", TWO, tmp_path) == SECOND  # the same process again
    assert not log.messages
    kill(other)  # then the next one may have it
    assert claim_device("one", TWO, tmp_path) == SECOND
    device, again = taken("one", TWO[:1], tmp_path)
    assert device == FIRST
    kill(again)


def test_another_study_may(tmp_path: Path) -> None:
    assert claim_device("first", TWO, tmp_path) == FIRST
    assert claim_device("second", TWO, tmp_path) == FIRST


def test_by_what_it_is_and_not_by_its_number(tmp_path: Path) -> None:
    _, other = taken("hidden", TWO, tmp_path)
    # As with CUDA_VISIBLE_DEVICES=1,0 in another worker.
    assert claim_device("hidden", ["GPU-b", "GPU-a"], tmp_path) == FIRST
    give_back()
    assert claim_device("hidden", ["GPU-a"], tmp_path) == CPU
    kill(other)


def test_the_cpu_with_a_warning_if_none_is_free(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    _, other = taken("busy", TWO[:1], tmp_path)
    assert claim_device("busy", TWO[:1], tmp_path) == CPU
    assert [record.levelname for record in log.records] == ["WARNING"]
    assert "the 1 GPUs of this machine" in log.messages[0]
    kill(other)
    assert claim_device("busy", TWO[:1], tmp_path) == FIRST


def test_no_warning_without_gpus(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert claim_device("none", [], tmp_path) == CPU
    assert not log.messages


def test_a_link_in_the_folder_is_not_followed(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    claim_device("linked", TWO[:1], tmp_path)
    (file,) = tmp_path.iterdir()
    give_back()
    file.unlink()
    target = tmp_path / "target"
    file.symlink_to(target)
    assert claim_device("linked", TWO[:1], tmp_path) == CPU
    assert not target.exists()
    assert "its lock file cannot be opened" in log.messages[0]


def test_a_real_worker_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys
from optuna_nnhp.training.device import claim_device
print(claim_device("real", {TWO}, pathlib.Path({str(tmp_path)!r})), flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    environment = os.environ | ENVIRONMENT
    other = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=pipe, stdout=pipe, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "cuda:0\n"
    assert claim_device("real", TWO, tmp_path) == SECOND
    give_back()
    kill(other)
    assert claim_device("real", TWO, tmp_path) == FIRST
