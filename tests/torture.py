"""Kill a study at random moments again and again, and count what was lost.

From the project's folder, for the figures: ``python -m tests.torture --kills 50``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.storages.open_storage import open_storage
from tests.tiny import ENVIRONMENT

LONGEST = 2.5  # seconds that a process lives at most after it has opened the study
EVERY = 0.5  # seconds between checkpoints
# A process that notes every round that it trains, member by member.
SCRIPT = """
import os, sys
import optuna
from sklearn.datasets import load_digits
from optuna_nnhp import optimize
from optuna_nnhp.training.cohort import Cohort

storage, n_trials, every, notes = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
original = Cohort.train_round


def train_round(cohort, *args):
    before = sum(cohort.rounds_done)
    scores = original(cohort, *args)
    os.write(file, f"{sum(cohort.rounds_done) - before}\\n".encode())
    return scores


Cohort.train_round = train_round
optuna.logging.set_verbosity(optuna.logging.ERROR)
X, y = load_digits(return_X_y=True)
print("open", flush=True)
optimize(
    "dnn", X, y, storage=storage, n_trials=n_trials, checkpoint_every=every, cohort_size=8,
    fixed={"epochs": 40}, space={"width": optuna.distributions.IntDistribution(16, 64, log=True)},
)
print("end", flush=True)
"""


@dataclass
class Torture:
    """The state of a study that is killed again and again.

    Args:
        storage:
            Its storage.
        n_trials:
            Its trials.
        kills:
            How often its process was killed.
        seen:
            Trials that had ended, by number, as they were when they were first seen.
        faults:
            What must not be.
        trained:
            Rounds of members that were trained.
        recorded:
            Of these, those that the trials tell of.
        seconds:
            How long it all took.
    """

    storage: str
    n_trials: int
    kills: int = 0
    seen: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    trained: int = 0
    recorded: int = 0
    seconds: float = 0.0

    def look(self) -> list[FrozenTrial]:
        """Compare the trials in the storage with those seen before."""
        storage = open_storage(self.storage)
        names = [study.study_name for study in storage.get_all_studies()]
        if not names:
            return []  # it was killed before it had made one
        study = optuna.load_study(study_name=names[0], storage=storage)
        trials = study.get_trials(deepcopy=False)
        if [trial.number for trial in trials] != list(range(len(trials))):
            self.faults.append(f"numbers {[trial.number for trial in trials]}")
        ended = {t.number: _said(t) for t in trials if t.state.is_finished()}
        for number, said in self.seen.items():
            if ended.get(number) != said:
                self.faults.append(f"trial {number} was {said} and is {ended.get(number)}")
        self.seen |= ended
        return trials

    def end(self, notes: Path) -> None:
        """Check the finished study."""
        trials = self.look()
        counted = [trial for trial in trials if trial.user_attrs.get("cause") != "killed"]
        if len(counted) != self.n_trials:
            self.faults.append(f"{len(counted)} trials instead of {self.n_trials}")
        self.faults += [f"trial {t.number}: {_said(t)}" for t in trials if not _is_over(t)]
        self.trained = sum(map(int, notes.read_text().split()))
        self.recorded = sum(len(t.user_attrs.get("train_loss", ())) for t in trials)

    def __str__(self) -> str:
        repeated = self.trained / max(1, self.recorded) - 1
        return (
            f"{self.kills} kills, {len(self.seen)} trials, {len(self.faults)} faults, "
            f"{self.trained} rounds trained for {self.recorded} of the study: {repeated:.1%} "
            f"repeated; {self.seconds:.0f} s."
        )


def _said(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.state, trial.value, trial.params, trial.user_attrs.get("cause")


def _is_over(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def torture(
    storage: str, n_trials: int, kills: int, seed: int = 0, longest: float = LONGEST
) -> Torture:
    """Run a study, kill it at random moments, and let the last run finish.

    Args:
        storage:
            Where it is kept.
        n_trials:
            Its trials; it must not end before it was killed often enough.
        kills:
            How often.
        seed:
            Of the moments.
        longest:
            Seconds that a process lives at most after it has opened the study.
    """
    found, draw, started = Torture(storage, n_trials), random.Random(seed), time.monotonic()
    notes = Path(tempfile.mkstemp(suffix=".txt")[1])
    command = [sys.executable, "-c", SCRIPT, storage, str(n_trials), str(EVERY), str(notes)]
    while True:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        if found.kills == kills:
            output, _ = process.communicate(timeout=600)
            if output != "end\n":
                found.faults.append(f"the last one said {output!r}")
            break
        try:
            process.wait(draw.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            found.kills += 1
            process.communicate()
            if found.kills % 5 == 0 or kills < 10:
                found.look()
        else:
            found.faults.append(f"it ended after {found.kills} kills")
            break
    found.end(notes)
    notes.unlink()
    found.seconds = time.monotonic() - started
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of one torture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--storage", help="a path or URL; a new journal file if not given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        storage = options.storage or str(Path(folder) / "study.journal")
        found = torture(storage, options.trials, options.kills, options.seed)
    print(found)
    for fault in found.faults:
        print("  fault:", fault)
    return len(found.faults)


if __name__ == "__main__":
    sys.exit(main())
