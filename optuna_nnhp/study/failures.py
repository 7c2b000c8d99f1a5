"""Record errors of training, and divide cohorts that raise one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
import traceback

import optuna
from optuna import Trial
import torch

from optuna_nnhp.errors import exception_chain
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.study.checkpoints import Checkpoint
from optuna_nnhp.study.outcomes import CAUSE
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.study.problem import TrialTooLarge
from optuna_nnhp.study.running import CohortRun
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.training.device import is_out_of_memory

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

ERROR, TRACEBACK = "error", "traceback"  # attributes: the last line, and all of it
MAX_TRACEBACK_LENGTH = 4000  # characters of a traceback, those at its end


class CohortError(Exception):
    """The training of a cohort raised an error, which is the cause of this one."""


def record_error(trial: Trial, error: BaseException) -> None:
    """Store an error as attributes of a trial."""
    text = "".join(traceback.format_exception(error)).strip()
    trial.set_user_attr(CAUSE, outcome_of_error(error).value)
    trial.set_user_attr(ERROR, hide_passwords(error_line(error)))
    trial.set_user_attr(TRACEBACK, hide_passwords(text[-MAX_TRACEBACK_LENGTH:]))


def error_line(error: BaseException) -> str:
    """Return the first line of an error, with its type unless it is a `TrialError`.

    Example:
        >>> error_line(ZeroDivisionError("by zero")), error_line(TrialError("no room"))
        ('ZeroDivisionError: by zero', 'no room')
    """
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, TrialError) else f"{type(error).__name__}: {text}"


def free_frames(error: BaseException) -> None:
    """Clear an error's stack frames, which keep a cohort's tensors in memory."""
    for one in exception_chain(error):
        traceback.clear_frames(one.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def outcome_of_error(error: BaseException) -> TrialOutcome:
    """Return how a trial ends that raises an error."""
    too_large = isinstance(error, TrialTooLarge) or is_out_of_memory(error)
    return TrialOutcome.OUT_OF_MEMORY if too_large else TrialOutcome.ERROR


UNLIMITED = 10**6  # trials in a cohort, as long as none was out of memory


class FailureBisector:
    """Divide cohorts that have raised an error, until the trials at fault are alone.

    Args:
        newest_checkpoint:
            Returns this worker's newest checkpoint.
        restore:
            Makes a cohort of some trials at a checkpoint.
        fail:
            Ends a trial that raises an error alone.

    Attributes:
        memory_limits: Largest number of trials to train together, by their signature, after a
            cohort was out of memory.
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
        """Divide a group into cohorts that can be trained, at the trials' last checkpoint.

        Args:
            group:
                Trials whose cohort has raised an error, while it was built or trained.
            error:
                The error.

        Raises:
            Exception: The error, if the study's first trials all raise it.
        """
        return self.divide(group, error, self.newest_checkpoint())

    def divide(
        self, group: list[RunningTrial], error: Exception, checkpoint: Checkpoint | None
    ) -> list[CohortRun]:
        """Divide a group of trials, given their last checkpoint."""
        runs, queue = list[CohortRun](), [(group, error)]
        reached = {trial.member.number: trial.last_round for trial in group}
        while queue:
            part, error = queue.pop()
            free_frames(error)
            if len(part) == 1:
                self.fail(part[0], error)
                continue
            pieces = _divide_group(part, checkpoint)
            self._log_division(part, pieces, error)
            for some in reversed(pieces):
                try:
                    run = self.restore(some, checkpoint)
                except Exception as other:  # whatever it is, it becomes an outcome
                    queue.append((some, other))
                else:
                    run.quarantined_until = 1 + max(reached[t.member.number] for t in some)
                    runs.append(run)
        return runs

    def _log_division(
        self, part: list[RunningTrial], pieces: list[list[RunningTrial]], error: Exception
    ) -> None:
        what = "raised an error"
        if is_out_of_memory(error):
            most = (len(part) + 1) // 2
            what, self.memory_limits[part[0].signature] = "do not fit into memory", most
        sizes = " and ".join(str(len(piece)) for piece in pieces)
        _logger.warning(
            f"{len(part)} trials {what} together; they continue as cohorts of {sizes}: "
            f"{error_line(error)}"
        )


def _divide_group(
    part: list[RunningTrial], checkpoint: Checkpoint | None
) -> list[list[RunningTrial]]:
    """Divide a group into halves, or into the trials with and without a checkpoint."""
    for kept in checkpoint.cohorts if checkpoint else ():
        numbers = set(kept.trial_numbers)
        there = [trial for trial in part if trial.member.number in numbers]
        if 0 < len(there) < len(part):
            return [there, [trial for trial in part if trial.member.number not in numbers]]
    half = (len(part) + 1) // 2
    return [part[:half], part[half:]]
