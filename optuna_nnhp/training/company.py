"""In what company a member trains: what its numbers depend on where torch computes."""

from __future__ import annotations

from collections.abc import Sequence

# Torch's products and convolutions of one network are rounded otherwise than those of a stack of
# two; of two as of any other number (measured: multilayer perceptrons, convolutions, attention).
# Whether all see the same examples matters too. So a member that had mates is trained beside a
# copy of itself. The compiled engines round alike in any company.
ALONE, OF_ONE_AGE, OF_MANY_AGES = 0, 1, 2

COMPANY = "company"  # attribute of a trial that had mates where torch computes

Company = Sequence[Sequence[int]]  # from which round on a member was in which of these


def in_company(company: Company, done: int, ages: Sequence[int]) -> list[list[int]]:
    """A member's company, with that of its next round.

    Args:
        company:
            So far.
        done:
            Rounds that it has done.
        ages:
            Those that everybody in its cohort has done, itself included.

    Example:
        >>> company = in_company([], 0, ages=[0, 0])
        >>> company = in_company(company, 1, ages=[1, 1])
        >>> in_company(company, 2, ages=[2])
        [[0, 1], [2, 0]]
    """
    kind = ALONE if len(ages) == 1 else OF_ONE_AGE if len(set(ages)) == 1 else OF_MANY_AGES
    known = [list(entry) for entry in company]
    return known if known and known[-1][1] == kind else [*known, [done, kind]]
