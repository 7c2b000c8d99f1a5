"""What a cohort is in the middle of its training: taken out, kept in files, put back."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import fields
from typing import Any
from typing import NamedTuple

import torch
from torch import Tensor

from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member

LISTS = ("total", "done", "iterations", "due", "company")  # of a cohort: one entry for each member
FLAT = ("weights", "first", "second", "steps")
SUMS = ("loss_sum", "seen")


class Snapshot(NamedTuple):
    """All that a cohort's further training depends on.

    Random numbers follow from seeds and counters, so counters are all there is of them.

    Args:
        tensors:
            Weights, running statistics, optimizer states, the best weights, sums of losses and the
            state of early stopping; the first axis is the member.
        facts:
            Members and counters, as JSON can keep them.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def snapshot_of(cohort: Cohort) -> Snapshot:
    """A cohort as it is between two steps. The tensors are its own, not copies.

    Args:
        cohort:
            Not one whose engine was stopped in the middle of a round (see `Cohort.train_round`).
    """
    flat, network, stopping = cohort.flat, cohort.network, cohort.stopping
    tensors = {
        **{f"flat.{name}": getattr(flat, name) for name in FLAT},
        **{f"buffer.{name}": buffer for name, buffer in network.named_buffers()},
        **{f"best.{name}": weights for name, weights in cohort.best_weights.items()},
        **{f"sum.{name}": getattr(cohort, name) for name in SUMS},
        **{f"stopping.{f.name}": getattr(stopping, f.name) for f in fields(stopping)},
    }
    facts = {
        "members": [[m.number, m.seed, m.params] for m in cohort.members],
        "stepped": cohort.stepped,
        "judges_all": cohort.judges_all,
        **{name: list(getattr(cohort, name)) for name in LISTS},
    }
    return Snapshot(tensors, facts)


def members_of(facts: Mapping[str, Any]) -> list[Member]:
    """The members of a cohort, from the facts of its snapshot.

    Example:
        >>> members_of({"members": [[3, 3, {"epochs": 5}]]})
        [Member(number=3, seed=3, params={'epochs': 5})]
    """
    return [Member(number, seed, params) for number, seed, params in facts["members"]]


def part_of(snapshot: Snapshot, places: Sequence[int]) -> Snapshot:
    """A snapshot of some members only.

    Args:
        snapshot:
            Of a cohort.
        places:
            The members' places in it.
    """
    facts, index = dict(snapshot.facts), torch.tensor(places, dtype=torch.long)
    for name in ("members", *LISTS):
        facts[name] = [facts[name][place] for place in places]
    tensors = {name: tensor.cpu()[index] for name, tensor in snapshot.tensors.items()}
    return Snapshot(tensors, facts)


@torch.no_grad()
def restored(make: Callable[[Sequence[Member]], Cohort], snapshot: Snapshot) -> Cohort:
    """A cohort that goes on where one was: with the same steps, on the same engine bit for bit.

    Args:
        make:
            Makes a new cohort of some members.
        snapshot:
            Of the old one.

    Raises:
        ValueError: If the snapshot is not of such a cohort; nothing has been filled then.
    """
    facts, members = snapshot.facts, members_of(snapshot.facts)
    cohort = make(members)
    into = snapshot_of(cohort)
    _check(into.tensors, snapshot.tensors)
    for name, tensor in into.tensors.items():
        tensor.copy_(snapshot.tensors[name])
    cohort.members = members  # a budget in seconds may be another number of steps elsewhere
    for name in LISTS:
        setattr(cohort, name, list(facts[name]))
    cohort.stepped, cohort.judges_all = int(facts["stepped"]), bool(facts["judges_all"])
    return cohort


def _check(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise unless names, shapes and types are the same."""
    if other := sorted(wanted.keys() ^ given.keys()):
        raise ValueError(f"A snapshot must have the cohort's tensors, but differs in {other[0]}.")
    for name, tensor in wanted.items():
        one, two = (f"{t.dtype} {list(t.shape)}" for t in (tensor, given[name]))
        if one != two:
            raise ValueError(f"A snapshot's {name} must be {one}, but is {two}.")
