"""In what company a member trains: what its numbers depend on where torch computes."""

from __future__ import annotations

from collections.abc import Sequence

# Torch's products and convolutions of one network are rounded otherwise than those of a stack of
# two; of two as of any other number (measured: multilayer perceptrons, convolutions, attention).
# Whether all see the same examples matters too. So a member that had mates is trained beside a
# copy of itself. The compiled engines round alike in any company.
SINGLE, SAME_STEP, DIFFERENT_STEPS = 0, 1, 2

NUMERICS_CONTEXT_KEY = (
    "numerics_context"  # attribute of a trial that had mates where torch computes
)

NumericsContext = Sequence[Sequence[int]]  # from which round on a member was in which of these


def extend_numerics_context(
    numerics_context: NumericsContext, done: int, rounds_done: Sequence[int]
) -> list[list[int]]:
    """A member's company, with that of its next round.

    Args:
        numerics_context:
            So far.
        done:
            Rounds that it has done.
        rounds_done:
            Those that everybody in its cohort has done, itself included.

    Example:
        >>> numerics_context = extend_numerics_context([], 0, rounds_done=[0, 0])
        >>> numerics_context = extend_numerics_context(numerics_context, 1, rounds_done=[1, 1])
        >>> extend_numerics_context(numerics_context, 2, rounds_done=[2])
        [[0, 1], [2, 0]]
    """
    kind = (
        SINGLE
        if len(rounds_done) == 1
        else SAME_STEP
        if len(set(rounds_done)) == 1
        else DIFFERENT_STEPS
    )
    known = [list(entry) for entry in numerics_context]
    return known if known and known[-1][1] == kind else [*known, [done, kind]]
