"""The state of a cohort in training: read, saved to files, restored."""

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

LISTS = (
    "total_steps",
    "rounds_done",
    "iterations",
    "next_evaluations",
    "numerics_context",
)  # of a cohort: one entry for each member
FLAT = ("weights", "exp_avg", "exp_avg_sq", "steps")
SUMS = ("loss_sum", "examples_seen")


class CohortState(NamedTuple):
    """The state that a cohort's further training depends on.

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


def get_cohort_state(cohort: Cohort) -> CohortState:
    """Return the state of a cohort between two steps; its tensors are not copied.

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
        "steps_into_round": cohort.steps_into_round,
        "evaluates_all_data": cohort.evaluates_all_data,
        **{name: list(getattr(cohort, name)) for name in LISTS},
    }
    return CohortState(tensors, facts)


def members_from_state(facts: Mapping[str, Any]) -> list[Member]:
    """Return the members of a cohort from the facts of its state.

    Example:
        >>> members_from_state({"members": [[3, 3, {"epochs": 5}]]})
        [Member(number=3, seed=3, params={'epochs': 5})]
    """
    return [Member(number, seed, params) for number, seed, params in facts["members"]]


def select_state(snapshot: CohortState, indices: Sequence[int]) -> CohortState:
    """Return the state of some members only.

    Args:
        snapshot:
            Of a cohort.
        indices:
            The members' places in it.
    """
    facts, index = dict(snapshot.facts), torch.tensor(indices, dtype=torch.long)
    for name in ("members", *LISTS):
        facts[name] = [facts[name][index] for index in indices]
    tensors = {name: tensor.cpu()[index] for name, tensor in snapshot.tensors.items()}
    return CohortState(tensors, facts)


@torch.no_grad()
def restore_cohort(make: Callable[[Sequence[Member]], Cohort], snapshot: CohortState) -> Cohort:
    """Make a cohort that continues from a state; bit for bit on the same engine.

    Args:
        make:
            Makes a new cohort of some members.
        snapshot:
            Of the old one.

    Raises:
        ValueError: If the snapshot is not of such a cohort; nothing has been filled then.
    """
    facts, members = snapshot.facts, members_from_state(snapshot.facts)
    cohort = make(members)
    into = get_cohort_state(cohort)
    _check(into.tensors, snapshot.tensors)
    for name, tensor in into.tensors.items():
        tensor.copy_(snapshot.tensors[name])
    cohort.members = members  # a budget in seconds may be another number of steps elsewhere
    for name in LISTS:
        setattr(cohort, name, list(facts[name]))
    cohort.steps_into_round, cohort.evaluates_all_data = (
        int(facts["steps_into_round"]),
        bool(facts["evaluates_all_data"]),
    )
    return cohort


def _check(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise unless names, shapes and dtypes are equal."""
    if other := sorted(wanted.keys() ^ given.keys()):
        raise ValueError(f"A snapshot must have the cohort's tensors, but differs in {other[0]}.")
    for name, tensor in wanted.items():
        one, two = (f"{t.dtype} {list(t.shape)}" for t in (tensor, given[name]))
        if one != two:
            raise ValueError(f"A snapshot's {name} must be {one}, but is {two}.")
