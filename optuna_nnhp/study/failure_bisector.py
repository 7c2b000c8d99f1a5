"""Cohorts that raise: halved until it is found out who is at fault, or until memory has room."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence

import optuna

from optuna_nnhp.study.checkpoints import Checkpoint
from optuna_nnhp.study.cohort_runs import CohortRun
from optuna_nnhp.study.failures import error_line
from optuna_nnhp.study.failures import free_frames
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.training.device import is_out_of_memory

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

UNLIMITED = 10**6  # trials in a cohort, where memory has not said anything


class FailureBisector:
    """Divide cohorts that have raised an error, until the trials at fault are alone.

    Args:
        newest_checkpoint:
            Returns this worker's newest checkpoint.
        restore:
            Makes a cohort of some trials as a checkpoint has them.
        fail:
            Ends a trial that raises alone.

    Attributes:
        memory_limits: By signature, how many trials memory has room for, if too many were tried.
    """

    def __init__(
        self,
        newest_checkpoint: Callable[[], Checkpoint | None],
        restore: Callable[[Sequence[RunningTrial], Checkpoint | None], CohortRun],
        fail: Callable[[RunningTrial, Exception], None],
    ) -> None:
        self.newest_checkpoint, self.restore, self.fail = newest_checkpoint, restore, fail
        self.memory_limits: dict[Hashable, int] = {}

    def bisect(self, group: list[RunningTrial], error: Exception) -> list[CohortRun]:
        """Cohorts of all trials of a group that can be trained, at their last checkpoint.

        Args:
            group:
                Trials whose cohort has raised, while it was built or trained.
            error:
                What it raised.

        Raises:
            Exception: The error, if no trial of the study can be trained, it seems.
        """
        return self.again(group, error, self.newest_checkpoint())

    def again(
        self, group: list[RunningTrial], error: Exception, checkpoint: Checkpoint | None
    ) -> list[CohortRun]:
        """The same, given the checkpoint."""
        runs, queue = list[CohortRun](), [(group, error)]
        reached = {trial.member.number: trial.last_round for trial in group}
        while queue:
            part, error = queue.pop()
            free_frames(error)
            if len(part) == 1:
                self.fail(part[0], error)
                continue
            pieces = _pieces(part, checkpoint)
            self._say(part, pieces, error)
            for some in reversed(pieces):
                try:
                    run = self.restore(some, checkpoint)
                except Exception as other:  # whatever it is, it becomes an outcome
                    queue.append((some, other))
                else:
                    run.quarantined_until = 1 + max(reached[t.member.number] for t in some)
                    runs.append(run)
        return runs

    def most(self, signature: Hashable) -> int:
        """How many trials with a signature may be tried together."""
        return self.memory_limits.get(signature, UNLIMITED)

    def _say(
        self, part: list[RunningTrial], pieces: list[list[RunningTrial]], error: Exception
    ) -> None:
        what = "raised an error"
        if is_out_of_memory(error):
            most = (len(part) + 1) // 2
            what, self.memory_limits[part[0].signature] = "do not fit into memory", most
        sizes = " and ".join(str(len(piece)) for piece in pieces)
        _logger.warning(
            f"{len(part)} trials {what} together; they go on as {sizes}: {error_line(error)}"
        )


def _pieces(part: list[RunningTrial], checkpoint: Checkpoint | None) -> list[list[RunningTrial]]:
    """Halves; or those that a checkpoint has together, and the others, which would begin anew."""
    for kept in checkpoint.cohorts if checkpoint else ():
        numbers = set(kept.numbers)
        there = [trial for trial in part if trial.member.number in numbers]
        if 0 < len(there) < len(part):
            return [there, [trial for trial in part if trial.member.number not in numbers]]
    half = (len(part) + 1) // 2
    return [part[:half], part[half:]]
