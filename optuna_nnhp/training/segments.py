"""Courses: hyperparameters that change while a network trains, and members that copy others."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member


@dataclass(frozen=True)
class Segment:
    """From when on a member has which values.

    Args:
        begin:
            Rounds that it has trained then.
        member:
            It, with these values.
        from_scratch:
            Whether it begins anew with its first weights.
    """

    begin: int
    member: Member
    from_scratch: bool = False


@torch.no_grad()
def resume_from(
    cohort: Cohort, sources: Sequence[int], members: Sequence[Member], fresh: Collection[int] = ()
) -> None:
    """Let each place of a cohort go on from the state of another one, with other values.

    A copy is an index: weights, the optimizer's state, running statistics, counters and best
    values of the sources become those of the places.

    Args:
        cohort:
            The cohort, between two rounds.
        sources:
            Whose state each place takes; as many places as are wanted.
        members:
            Who is in each place from now on. Structure and activation must be the source's.
        fresh:
            Places that begin with their member's first weights and a new optimizer; their
            counters, which the learning rate's decay follows, are the source's all the same.

    Raises:
        ValueError: If a member's activation, optimizer or batch size is not that of its source;
            that shapes are equal is up to the caller.
    """
    for source, member in zip(sources, members, strict=True):
        old, new = cohort.members[source].params, member.params
        for name in ("activation", "optimizer", "batch_size"):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"`{name}` must stay {old.get(name)!r} when a network goes on, but "
                    f"got {new.get(name)!r}."
                )
    order = sorted(
        range(len(sources)), key=lambda place: str(members[place].params.get("activation"))
    )
    members = [members[place] for place in order]
    cohort.select([sources[place] for place in order])
    cohort.members = members
    cohort.network.set_hyperparameters(
        [m.params for m in members], lambda: cohort.task.build(members)
    )
    for place, member in enumerate(members):
        if order[place] in fresh:
            _restart(cohort, place, member)
    cohort.refresh()


def _restart(cohort: Cohort, place: int, member: Member) -> None:
    """Put a member's first weights in its place, and forget its optimizer's state."""
    first = cohort.task.build([member]).state_dict()
    for name, tensor in cohort.network.state_dict().items():
        tensor[place].copy_(first[name][0])
    for state in (cohort.flat.exp_avg, cohort.flat.exp_avg_sq, cohort.flat.steps):
        state[place] = 0
