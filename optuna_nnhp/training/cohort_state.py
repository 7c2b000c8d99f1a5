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

from optuna_nnhp.networks.flat_parameters import PER_MEMBER_TENSORS
from optuna_nnhp.training.cohort import PER_MEMBER
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member

MEMBER_COUNTERS = tuple(name for name in PER_MEMBER if name != "members")
LOSS_SUMS = ("loss_sum", "examples_seen")


class CohortState(NamedTuple):
    """The state that a cohort's further training depends on.

    The first axis of all tensors is the member; JSON can store the metadata.

    It holds no state of random number generators: random numbers are derived from seeds and
    counters.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def get_cohort_state(cohort: Cohort) -> CohortState:
    """Return the state of a cohort between two steps; its tensors are not copied.

    If a compiled engine trains members in parallel, the cohort must be between two rounds.
    """
    flat, network, stopping = cohort.flat, cohort.network, cohort.stopping
    tensors = {
        **{f"flat.{name}": getattr(flat, name) for name in PER_MEMBER_TENSORS},
        **{f"buffer.{name}": buffer for name, buffer in network.named_buffers()},
        **{f"best.{name}": weights for name, weights in cohort.best_weights.items()},
        **{f"sum.{name}": getattr(cohort, name) for name in LOSS_SUMS},
        **{f"stopping.{f.name}": getattr(stopping, f.name) for f in fields(stopping)},
    }
    metadata = {
        "members": [[m.number, m.seed, m.params] for m in cohort.members],
        "steps_into_round": cohort.steps_into_round,
        "evaluates_all_data": cohort.evaluates_all_data,
        **{name: list(getattr(cohort, name)) for name in MEMBER_COUNTERS},
    }
    return CohortState(tensors, metadata)


def members_from_state(metadata: Mapping[str, Any]) -> list[Member]:
    """Return the members of a cohort from the metadata of its state.

    Example:
        >>> members_from_state({"members": [[3, 3, {"epochs": 5}]]})
        [Member(number=3, seed=3, params={'epochs': 5})]
    """
    return [Member(number, seed, params) for number, seed, params in metadata["members"]]


def select_state(state: CohortState, indices: Sequence[int]) -> CohortState:
    """Return the state of some members, given by their indices."""
    metadata, index = dict(state.metadata), torch.tensor(indices, dtype=torch.long)
    for name in PER_MEMBER:
        metadata[name] = [metadata[name][i] for i in indices]
    tensors = {name: tensor.cpu()[index] for name, tensor in state.tensors.items()}
    return CohortState(tensors, metadata)


@torch.no_grad()
def restore_cohort(make: Callable[[Sequence[Member]], Cohort], state: CohortState) -> Cohort:
    """Make a cohort that continues from a state; bit for bit on the same engine.

    Raises:
        ValueError: If the names, shapes or dtypes of the tensors differ from the new cohort's.
    """
    metadata, members = state.metadata, members_from_state(state.metadata)
    cohort = make(members)
    new_tensors = get_cohort_state(cohort).tensors
    _check_tensors(new_tensors, state.tensors)
    for name, tensor in new_tensors.items():
        tensor.copy_(state.tensors[name])
    # Restored, not recomputed: a budget in seconds may be another number of steps elsewhere.
    cohort.members = members
    for name in MEMBER_COUNTERS:
        setattr(cohort, name, list(metadata[name]))
    cohort.steps_into_round = int(metadata["steps_into_round"])
    cohort.evaluates_all_data = bool(metadata["evaluates_all_data"])
    return cohort


def _check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise unless names, shapes and dtypes are equal."""
    if different := sorted(expected.keys() ^ given.keys()):
        raise ValueError(
            f"A snapshot must have the cohort's tensors, but differs in {different[0]}."
        )
    for name, tensor in expected.items():
        wanted, found = (f"{t.dtype} {list(t.shape)}" for t in (tensor, given[name]))
        if wanted != found:
            raise ValueError(f"A snapshot's {name} must be {wanted}, but is {found}.")
