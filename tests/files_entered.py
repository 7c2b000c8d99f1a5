"""List the files of the package that a study of one trial enters.

    python -m tests.files_entered

A file is entered when one of its functions is called; importing it does not count.
"""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import sys
import tempfile
import threading
from types import FrameType
from typing import Any
from unittest.mock import patch

import optuna
from sklearn.datasets import load_iris

import optuna_nnhp
from optuna_nnhp.study.tuner import Tuner

PACKAGE = Path(optuna_nnhp.__file__).parent
MAX_IN_LOOP, MAX_IN_ALL = 46, 69  # lower them when fewer files are entered; the aim is 36 and 60


def trace_files(call: Callable[[], object]) -> tuple[set[str], set[str]]:
    """Return the files that a call enters inside the tuning loop, and in all.

    Args:
        call:
            Runs a study; calls of all its threads count.
    """
    in_loop, in_all, loops = set[str](), set[str](), list[bool]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_name == "<module>":
            return
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            name = str(path.relative_to(PACKAGE))
            in_all.add(name)
            if loops:
                in_loop.add(name)

    run = Tuner.run

    def run_and_note(tuner: Tuner, *arguments: Any) -> None:
        loops.append(True)
        try:
            run(tuner, *arguments)
        finally:
            loops.pop()

    with patch.object(Tuner, "run", run_and_note):
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return in_loop, in_all


def trace_study() -> tuple[set[str], set[str]]:
    """Return the files that ``optimize("dnn", X, y, n_trials=1)`` enters."""
    X, y = load_iris(return_X_y=True)
    # Without a cache, the study measures the size of its cohorts first.
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, XDG_CACHE_HOME=folder),
    ):
        storage = str(Path(folder) / "study.journal")
        return trace_files(lambda: optuna_nnhp.optimize("dnn", X, y, n_trials=1, storage=storage))


def main() -> int:
    """Print the files, those inside the loop with a star, and how many they are."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    in_loop, in_all = trace_study()
    for name in sorted(in_all):
        print("*" if name in in_loop else " ", name)
    print(f"{len(in_loop)} inside the loop (at most {MAX_IN_LOOP}), ", end="")
    print(f"{len(in_all)} in all (at most {MAX_IN_ALL})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
