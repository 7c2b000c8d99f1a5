"""Training and judging a member again, alone, as it was among its mates."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.networks.filling import fill_member
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.company import ALONE
from optuna_nnhp.training.company import OF_MANY_AGES
from optuna_nnhp.training.company import Company
from optuna_nnhp.training.course import Stage
from optuna_nnhp.training.course import go_on
from optuna_nnhp.training.machine import threads_for


@dataclass
class Again:
    """A member that has been trained again.

    Args:
        cohort:
            It is the first there.
        values:
            Its metric, by round, as it is among mates if it had any.
        network:
            Its plain network as it was at the round that was asked for, None before.
        value:
            That network's metric, judged alone.
    """

    cohort: Cohort
    values: dict[int, float] = field(default_factory=dict)
    network: nn.Module | None = None
    value: float = math.nan


def train_again(
    make: Callable[[Sequence[Member]], Cohort],
    course: Sequence[Stage],
    until: int,
    best: int,
    company: Company = (),
    ends: Iterable[int] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Again:
    """Train a member along its course, in its company.

    Args:
        make:
            Makes a new cohort of some members.
        course:
            All its stages, the first of which begins at 0.
        until:
            Rounds to train.
        best:
            The round whose network is wanted, 0 for none.
        company:
            What it had, see `in_company`; alone if there is none.
        ends:
            Rounds after which it was evaluated on all data, as in lockstep; if None those after
            which a trial always is.
        out_of_time:
            Asked before every step; once it says yes, training stops, and what is returned has
            trained for less than it should.
    """
    again = Again(make([course[0].member]))
    stages = {stage.begin: stage for stage in course}
    stops = {*stages, *(begin for begin, _ in company), best, until}
    judged = None if ends is None else sorted({*ends, *stages, best, until})
    joined = ALONE
    while (done := again.cohort.done[0]) < until:
        stage, kind = stages.get(done), _kind(company, done)
        if stage is not None and (done or stage.is_fresh):
            again.cohort.keep([0])
            joined = ALONE
            go_on(again.cohort, [0], [stage.member], fresh=[0] if stage.is_fresh else [])
        if kind != joined:
            _be_joined(again.cohort, kind)
            joined = kind
        if judged is not None:
            again.cohort.evaluate_at(next(end for end in judged if end > done))
        if not _train_on(again, min(stop for stop in stops if stop > done), out_of_time):
            break
        if again.cohort.done[0] == best:
            again.network = again.cohort.network.member(0)
            again.value = judge_member(again.cohort, 0, again.cohort.network.state_dict())
    return again


def _kind(company: Company, done: int) -> int:
    """A member's company in its next round."""
    return next((kind for begin, kind in reversed(company) if begin <= done), ALONE)


def _be_joined(cohort: Cohort, kind: int) -> None:
    """Put a member in some company: that of its own copy, which may be of another age."""
    cohort.keep([0] if kind == ALONE else [0, 0])
    if kind == OF_MANY_AGES:
        cohort.done[1] += 1


def _train_on(again: Again, stop: int, out_of_time: Callable[[], bool]) -> bool:
    """Train to the member's next evaluation, or to a round where something changes.

    Returns:
        Whether there was time for it.
    """
    cohort = again.cohort
    if len(cohort.members) > 1:
        cohort.due[1] = min(cohort.due[0], stop) + cohort.done[1] - cohort.done[0]
    scores = cohort.train_round(out_of_time)
    if scores is not None and 0 in scores.places:
        again.values[cohort.done[0]] = scores.value[scores.places.index(0)]
    return scores is not None


def judge_alone(cohort: Cohort) -> float:
    """The metric of a cohort of one, on all of the validation part.

    It depends on the weights only, not on the number of threads: torch's are not used.
    """
    with threads_for(0.0), torch.no_grad():
        _, value, _ = cohort.task.judge(cohort.apply(torch.tensor([0])), cohort.members, True)
    return float(value.double()[0])


def judge_network(
    make: Callable[[Sequence[Member]], Cohort], member: Member, network: nn.Module
) -> float:
    """The metric of a plain network, as if it were that of a member at an evaluation.

    Args:
        make:
            Makes a new cohort of some members.
        member:
            Whose network it is.
        network:
            The network.
    """
    cohort = make([member])
    fill_member(cohort.network, 0, network)
    return judge_alone(cohort)


def judge_member(cohort: Cohort, place: int, weights: Mapping[str, Tensor]) -> float:
    """The metric of a member's weights, alone: where torch computes, mates round it otherwise.

    Args:
        cohort:
            The cohort.
        place:
            The member's.
        weights:
            A `state_dict` of the cohort's network.
    """
    alone = Cohort([cohort.members[place]], cohort.task)
    with torch.no_grad():
        for name, tensor in alone.network.state_dict().items():
            tensor[0].copy_(weights[name][place])
    return judge_alone(alone)


def judge_best(cohort: Cohort, place: int) -> float:
    """The metric of a member's best weights as `judge_network` will come to it.

    The compiled engines' is that of the evaluation; what torch computes is judged anew.

    Args:
        cohort:
            The cohort.
        place:
            The member's.
    """
    known = cohort.best_value(place)
    if cohort.native is not None or cohort.engine is not None or not math.isfinite(known):
        return known
    return judge_member(cohort, place, cohort.best_weights)
