"""Write a worker's running trials to disk while they train, and read them to continue."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math
from pathlib import Path
import re
import shutil
import time
from typing import Any
from typing import NamedTuple

import optuna
from torch import Tensor

from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.training.cohort_state import CohortState
from optuna_nnhp.training.cohort_state import get_cohort_state
from optuna_nnhp.training.weight_files import JSON_SUFFIX
from optuna_nnhp.training.weight_files import TENSORS_SUFFIX
from optuna_nnhp.training.weight_files import load_with_checksum
from optuna_nnhp.training.weight_files import save_with_checksum

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

CHECKPOINT_INTERVAL = 30.0  # seconds
MAX_TIME_SHARE = 0.02  # a checkpoint may take this share of the time since the last one
N_KEPT_CHECKPOINTS = 2
SUFFIXES = (JSON_SUFFIX, TENSORS_SUFFIX)
VERSION = 1  # of the files' format


class CohortCheckpoint(NamedTuple):
    """A cohort in a checkpoint.

    Args:
        snapshot:
            The state of its networks.
        facts:
            The state of its trials (``"running"``) and of its run (``"leader"``, ``"slots"``,
            ``"rounds"``).
    """

    snapshot: CohortState
    facts: dict[str, Any]

    @property
    def trial_numbers(self) -> list[int]:
        """The numbers of its running trials."""
        return [int(trial["number"]) for trial in self.facts["running"]]

    @property
    def steps_done(self) -> dict[int, int]:
        """The steps that each member has done, by its number."""
        metadata = self.snapshot.metadata
        numbers = [number for number, _, _ in metadata["members"]]
        return dict(zip(numbers, metadata["iterations"], strict=True))


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Args:
        cohorts:
            All cohorts that its worker trained.
        loop:
            The state of the policy.
    """

    cohorts: list[CohortCheckpoint]
    loop: dict[str, Any]


@dataclass
class Checkpoints:
    """Write the checkpoints of one worker.

    A checkpoint is due when the last one is ``interval`` seconds old, or when a trial has ended
    since. It waits until the last one has taken at most a fiftieth of the time since then.

    Args:
        folder:
            The study's folder of checkpoints; None for a study in memory, which cannot be
            continued.
        worker:
            The worker's name.
        interval:
            Seconds between checkpoints; None to write none.

    Attributes:
        written: Number of written checkpoints.
        seconds: Seconds that writing them took.

    Example:
        >>> Checkpoints(None, "me").is_due()
        False
    """

    folder: Path | None
    worker: str
    interval: float | None = CHECKPOINT_INTERVAL
    written: int = 0
    seconds: float = 0.0
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0
    _has_ends: bool = True  # so that the first one is written soon

    @property
    def is_enabled(self) -> bool:
        """Whether checkpoints are written."""
        return self.folder is not None and self.interval is not None

    def mark_trial_ended(self) -> None:
        """Note that a trial has ended, so that the next checkpoint is written sooner."""
        self._has_ends = True

    def is_due(self) -> bool:
        """Return whether the next checkpoint is due."""
        if not self.is_enabled:
            return False
        since = time.monotonic() - self._last
        wanted = self._has_ends or since >= (self.interval or math.inf)
        return wanted and self._cost <= MAX_TIME_SHARE * since

    def write(self, runs: Sequence[CohortRun], loop: Mapping[str, Any] | None = None) -> bool:
        """Write a checkpoint and return whether it was written; log an error of the disk.

        Args:
            runs:
                The cohorts in training, each between two steps.
            loop:
                The state of the policy, as JSON.
        """
        if self.folder is None or self.interval is None:
            return False
        started, folder = time.monotonic(), checkpoint_folder(self.folder, self.worker)
        tensors, facts = _collect_state(runs)
        stem = folder / f"{_next_number(folder):06d}"
        try:
            save_with_checksum(stem, tensors, {**facts, "loop": dict(loop or {})})
            for old in _checkpoint_stems(folder)[N_KEPT_CHECKPOINTS:]:
                _remove_checkpoint(old)
        except OSError as error:
            _logger.warning(f"The checkpoint could not be written: {error}")
            written = False
        else:
            written, self.written = True, self.written + 1
        self._last, self._has_ends = time.monotonic(), False
        self._cost = self._last - started
        self.seconds += self._cost
        return written

    def clear(self) -> None:
        """Remove all checkpoints of this worker."""
        if self.folder is not None:
            remove_checkpoints(self.folder, self.worker)


def load_newest_checkpoint(folder: Path | None, worker: str) -> Checkpoint | None:
    """Return a worker's newest checkpoint; skip a damaged one with a warning.

    Args:
        folder:
            The study's folder of checkpoints.
        worker:
            The name of the worker that wrote it.
    """
    if folder is None:
        return None
    for stem in _checkpoint_stems(checkpoint_folder(folder, worker)):
        try:
            tensors, facts = load_with_checksum(stem)
            return Checkpoint(_parse_cohorts(tensors, facts), facts["loop"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.warning(f"Skipped a checkpoint that cannot be used: {error}")
    return None


def remove_checkpoints(folder: Path, worker: str) -> None:
    """Remove a worker's checkpoints."""
    shutil.rmtree(checkpoint_folder(folder, worker), ignore_errors=True)


def checkpoint_folder(folder: Path, worker: str) -> Path:
    """Return the folder of a worker's checkpoints.

    Example:
        >>> checkpoint_folder(Path("checkpoints"), "../host:12:ab").name
        '.._host_12_ab'
    """
    return folder / re.sub(r"[^\w.-]+", "_", f"{worker}")


def _collect_state(runs: Sequence[CohortRun]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all cohorts' tensors, by cohort index and name, and all other state."""
    tensors, cohorts = dict[str, Tensor](), list[dict[str, Any]]()
    for place, run in enumerate(runs):
        snapshot, leader = get_cohort_state(run.cohort), run.leader
        tensors |= {f"{place}.{name}": tensor for name, tensor in snapshot.tensors.items()}
        cohorts.append(
            {
                "cohort": snapshot.metadata,
                "running": [trial.state_dict() for trial in run.running.values()],
                "leader": [leader.number, leader.seed, leader.params],
                "slots": run.slots,
                "rounds": run.rounds,
            }
        )
    return tensors, {"version": VERSION, "cohorts": cohorts}


def _parse_cohorts(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> list[CohortCheckpoint]:
    if facts["version"] != VERSION:
        raise ValueError(f"A checkpoint's version must be {VERSION}, but is {facts['version']}.")
    kept = []
    for place, others in enumerate(facts["cohorts"]):
        mark = f"{place}."
        own = {n.removeprefix(mark): t for n, t in tensors.items() if n.startswith(mark)}
        kept.append(CohortCheckpoint(CohortState(own, others["cohort"]), others))
    return kept


def _checkpoint_stems(folder: Path) -> list[Path]:
    """Return the paths of a folder's checkpoints without suffix, the newest first."""
    found = {path.with_suffix("") for path in folder.glob("*[0-9].*") if path.suffix in SUFFIXES}
    return sorted(found, reverse=True)


def _next_number(folder: Path) -> int:
    return 1 + max((int(stem.name) for stem in _checkpoint_stems(folder)), default=-1)


def _remove_checkpoint(stem: Path) -> None:
    for suffix in SUFFIXES:  # tensors without their JSON file are not read
        stem.with_suffix(suffix).unlink(missing_ok=True)
