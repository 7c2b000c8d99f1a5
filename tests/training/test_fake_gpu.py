"""Every template trains on a GPU without mixing devices."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.tiny import ENVIRONMENT


def test_training_and_evaluation_mix_no_devices() -> None:
    # A process of its own: a device that is registered once stays registered.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_gpu"],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
