"""How a trial can end: the one table of causes, Optuna's states, and what counts."""

from __future__ import annotations

from enum import Enum
from typing import Self

from optuna.trial import FrozenTrial
from optuna.trial import TrialState

CAUSE = "cause"  # attribute of a trial: the value of its outcome


class TrialOutcome(Enum):
    """How a trial can end. The value is kept as the trial's attribute ``"cause"``.

    Attributes:
        state: Optuna's state of a trial that has a value.
        counts: Whether a failed trial counts towards ``n_trials``; all others do.
        cuts_short: Whether the trial ended before its time: `final_state` then depends on its
            value, and on a grid it does not count.
        retries_grid_point: Whether a grid point is tried again by the next call.
        meaning: A sentence for the documentation.

    Example:
        >>> TrialOutcome.PRUNED.state.name, TrialOutcome.KILLED.counts
        ('PRUNED', False)
    """

    state: TrialState
    counts: bool
    cuts_short: bool
    retries_grid_point: bool
    meaning: str

    def __new__(cls, cause: str, state: TrialState, meaning: str, flags: str = "counts") -> Self:
        """Make a member, given its flags as words."""
        outcome, words = object.__new__(cls), flags.split()
        outcome._value_ = cause
        outcome.state, outcome.meaning = state, meaning
        outcome.counts = "counts" in words
        outcome.cuts_short = "short" in words
        outcome.retries_grid_point = "retries" in words
        return outcome

    FINISHED = (
        "finished",
        TrialState.COMPLETE,
        "It trained for its whole budget; its value is that of its best epoch.",
    )
    EARLY_STOPPING = (
        "early stopping",
        TrialState.COMPLETE,
        "It did not improve for `patience` epochs; its value is that of its best epoch.",
    )
    PRUNED = (
        "pruned",
        TrialState.PRUNED,
        "The pruner ended it. The default pruner keeps, at steps 1, 2, 4, 8, ..., the better half "
        "of all trials that have reached the step; it never ends the baseline, and compares the "
        "trials of the portfolio with those of their shape.",
    )
    DIVERGED = (
        "diverged",
        TrialState.PRUNED,
        "Its loss or metric was no longer finite; its value is the last finite one.",
    )
    TRIAL_TIMEOUT = (
        "trial timeout",
        TrialState.PRUNED,
        "It trained for `trial_timeout` seconds, which the attribute `trial_timeout` repeats.",
        "counts short retries",
    )
    TIMEOUT = (
        "timeout",
        TrialState.PRUNED,
        "The study's time was over before the trial's budget was.",
        "short retries",
    )
    INTERRUPTED = (
        "interrupted",
        TrialState.PRUNED,
        "The study was interrupted by Ctrl-C, or stopped, before the trial's budget was over.",
        "short retries",
    )
    OUT_OF_MEMORY = (
        "out of memory",
        TrialState.FAIL,
        "It does not fit into memory alone; the attribute `needed_bytes` says what it needs.",
        "counts retries",
    )
    ERROR = (
        "error",
        TrialState.FAIL,
        "Training it raised an error; the attributes `error` and `traceback` say which.",
        "counts retries",
    )
    KILLED = (
        "killed",
        TrialState.FAIL,
        "Ten workers died while they trained it without progress, or its group had not begun "
        "when its worker died.",
        "retries",
    )
    DUPLICATE = (
        "duplicate",
        TrialState.FAIL,
        "Another worker had enqueued the same grid point before.",
        "retries",
    )
    ENDED_ELSEWHERE = (
        "ended elsewhere",
        TrialState.FAIL,
        "Another process ended it while it trained; the state and cause that it gave stay.",
        "counts retries",
    )

    def final_state(self, *, has_value: bool, is_best: bool) -> TrialState:
        """Return the state that Optuna is told.

        Args:
            has_value:
                Whether the trial has been evaluated.
            is_best:
                Whether its value is the best of the study so far.
        """
        if not self.cuts_short:
            return self.state
        # A trial that was cut short says little of its configuration, unless it is the best.
        if not has_value:
            return TrialState.FAIL
        return TrialState.COMPLETE if is_best else self.state

    @classmethod
    def from_cause(cls, cause: object) -> TrialOutcome | None:
        """Return the outcome that a cause names, None if it names none."""
        return next((outcome for outcome in cls if outcome.value == cause), None)


def outcome_of(trial: FrozenTrial) -> TrialOutcome | None:
    """Return how a trial ended; None if it runs, or another program has ended it."""
    return TrialOutcome.from_cause(trial.user_attrs.get(CAUSE))


def counts_towards_n_trials(trial: FrozenTrial, *, on_grid: bool = False) -> bool:
    """Return whether a trial that has ended counts towards ``n_trials``.

    Example:
        >>> from optuna.trial import create_trial
        >>> failed = create_trial(state=TrialState.FAIL, user_attrs={"cause": "timeout"})
        >>> (
        ...     counts_towards_n_trials(failed),
        ...     counts_towards_n_trials(create_trial(state=TrialState.FAIL)),
        ... )
        (False, True)
    """
    outcome = outcome_of(trial)
    if outcome is None or trial.state == TrialState.COMPLETE:
        return True
    if on_grid and outcome.cuts_short:
        return False
    return outcome.counts or trial.state != TrialState.FAIL


def retries_grid_point(trial: FrozenTrial) -> bool:
    """Return whether the grid point of a trial is to be tried again."""
    outcome = outcome_of(trial)
    is_retried = outcome is not None and outcome.retries_grid_point
    return trial.state == TrialState.FAIL or (trial.state == TrialState.PRUNED and is_retried)


def outcome_table() -> list[str]:
    """Return the table of outcomes as lines of Markdown, for the documentation.

    Example:
        >>> print(*outcome_table()[:3], sep="\\n")
        | cause | state | counts towards `n_trials` | grid point tried again | meaning |
        |---|---|---|---|---|
        | finished | COMPLETE | yes | no | It trained for its whole budget; its value is that ...
    """
    lines = [
        "| cause | state | counts towards `n_trials` | grid point tried again | meaning |",
        "|---|---|---|---|---|",
    ]
    for outcome in TrialOutcome:
        state, counted = outcome.state.name, "yes" if outcome.counts else "no"
        if outcome.cuts_short:
            state = "PRUNED; COMPLETE if it is the best trial; FAIL without a value"
            counted = counted if outcome.counts else "unless it failed"
            counted += "; not on a grid"
        tried = "yes" if outcome.retries_grid_point else "no"
        row = (outcome.value, state, counted, tried, outcome.meaning)
        lines.append(f"| {' | '.join(row)} |")
    return lines
