"""Rounds: how often trials are evaluated and judged where an epoch is long.

A round is what Optuna calls a step. While an epoch has few examples it is the epoch. Where it has
many, it is a third of it, or a ninth, and so on; a trial is then evaluated after 1, 3, 9, ...
rounds of its first epoch, so that a bad one costs a fraction of an epoch, and later after every
epoch. A step means the same share of the data in every trial of a study.
"""

from __future__ import annotations

REDUCTION_FACTOR = 3
MAX_EXAMPLES_PER_ROUND = 8192  # at most


def rounds_per_epoch(examples: int) -> int:
    """The smallest power of three that makes a round at most `MAX_EXAMPLES_PER_ROUND` examples.

    Example:
        >>> [rounds_per_epoch(n) for n in (1_437, 8_192, 20_000, 39_073)]
        [1, 1, 3, 9]
    """
    rounds = 1
    while examples > rounds * MAX_EXAMPLES_PER_ROUND:
        rounds *= REDUCTION_FACTOR
    return rounds


def next_evaluation(done: int, rounds: int) -> int:
    """The round after which a trial is evaluated next.

    Args:
        done:
            Rounds done.
        rounds:
            Rounds in an epoch.

    Example:
        >>> done, course = 0, []
        >>> for _ in range(5):
        ...     done = next_evaluation(done, rounds=9)
        ...     course.append(done)
        >>> course
        [1, 3, 9, 18, 27]
    """
    if done < rounds:
        return max(1, done * REDUCTION_FACTOR)
    return (done // rounds + 1) * rounds


def epochs(done: int, rounds: int) -> int | float:
    """Rounds as epochs: whole numbers where they are.

    Example:
        >>> epochs(18, 9), epochs(3, 9)
        (2, 0.3333)
    """
    return done // rounds if done % rounds == 0 else round(done / rounds, 4)
