"""Train cohorts until all their members have ended, without a study."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator

from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.task import Scores


def ended_members(scores: Scores) -> list[int]:
    """Return the indices of the members that have ended with an evaluation."""
    return [i for i, end in zip(scores.indices, scores.ended, strict=True) if end is not None]


def run_to_end(
    cohorts: Iterable[Cohort],
    out_of_time: Callable[[], bool] = lambda: False,
    *,
    ended: Callable[[Scores], Collection[int]] = ended_members,
) -> Iterator[tuple[Cohort, Scores]]:
    """Train cohorts one after the other, and yield the scores of every evaluation.

    A member that has ended leaves its cohort after its scores were yielded. The caller may stop
    iterating at any time.

    Args:
        cohorts:
            The cohorts. A generator creates each cohort when the one before has ended.
        out_of_time:
            Called before every step; if it returns True, training stops.
        ended:
            Returns the indices of the members that leave after an evaluation.

    Yields:
        The cohort, and the scores of the members that were evaluated.
    """
    for cohort in cohorts:
        while True:
            scores = cohort.train_round(out_of_time)
            if scores is None:
                return
            yield cohort, scores
            leaving = set(ended(scores))
            remaining = [i for i in range(len(cohort.members)) if i not in leaving]
            if not remaining:
                break
            if leaving:
                cohort.select(remaining)
