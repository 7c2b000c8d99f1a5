"""Retrain a member outside its cohort, so that it gets exactly the same weights."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math

from torch import nn

from optuna_nnhp.networks.load_member import load_member
from optuna_nnhp.training.cohort import DIFFERENT_STEPS
from optuna_nnhp.training.cohort import SINGLE
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import NumericsContext
from optuna_nnhp.training.cohort import run_to_end


@dataclass(frozen=True)
class Segment:
    """A part of a member's training with constant hyperparameters."""

    begin: int  # rounds that the member has finished before
    member: Member  # with the hyperparameters of this segment
    from_scratch: bool = False  # whether it begins with new initial weights


@dataclass
class RetrainResult:
    """The result of retraining a member."""

    cohort: Cohort  # the member is its first one
    values: dict[int, float] = field(default_factory=dict)  # by evaluated round
    network: nn.Module | None = None  # after the requested round, if that was reached
    value: float = math.nan  # of that network, evaluated in a cohort of one


def retrain(
    make: Callable[[Sequence[Member]], Cohort],
    segments: Sequence[Segment],
    rounds: int,
    best: int,
    numerics_context: NumericsContext = (),
    evaluation_rounds: Iterable[int] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> RetrainResult:
    """Train a member along its segments, in its numerics context.

    ``make`` makes a new cohort. The first segment begins at 0. The network after round ``best`` is
    returned, none if that is 0. The numerics context is empty for a member that trained in a
    cohort of one or on a compiled engine. After ``evaluation_rounds`` the member was evaluated on
    all data; None stands for the rounds of `next_evaluation`. Training stops after fewer rounds if
    ``out_of_time``, called before every step, returns True.
    """
    result = RetrainResult(make([segments[0].member]))
    cohort, by_begin = result.cohort, {segment.begin: segment for segment in segments}
    stops = {*by_begin, *(begin for begin, _ in numerics_context), best, rounds}
    planned = sorted({*(evaluation_rounds or ()), *by_begin, best, rounds})
    context_now = SINGLE
    while (done := cohort.rounds_done[0]) < rounds:
        segment, context = by_begin.get(done), _numerics_context_of_round(numerics_context, done)
        if segment is not None and (done or segment.from_scratch):
            cohort.select([0])
            context_now = SINGLE
            cohort.resume_from([0], [segment.member], fresh=[0] if segment.from_scratch else [])
        if context != context_now:
            _pad_with_copy(cohort, context)
            context_now = context
        if evaluation_rounds is not None:
            cohort.set_next_evaluation(next(end for end in planned if end > done))
        if not _train_to_next_evaluation(
            result, min(stop for stop in stops if stop > done), out_of_time
        ):
            break
        if cohort.rounds_done[0] == best:
            result.network = cohort.network.member(0)
            result.value = cohort.evaluate_weights(0, cohort.network.state_dict())
    return result


def _numerics_context_of_round(numerics_context: NumericsContext, done: int) -> int:
    """Return the numerics context of the round that follows ``done`` finished rounds."""
    return next((kind for begin, kind in reversed(numerics_context) if begin <= done), SINGLE)


def _pad_with_copy(cohort: Cohort, context: int) -> None:
    """Put a copy of the member beside it as its numerics context requires."""
    cohort.select([0] if context == SINGLE else [0, 0])
    if context == DIFFERENT_STEPS:
        cohort.rounds_done[1] += 1


def _train_to_next_evaluation(
    result: RetrainResult, stop: int, out_of_time: Callable[[], bool]
) -> bool:
    """Train to the next evaluation, at most to round ``stop``; return False if time ran out."""
    cohort = result.cohort
    if len(cohort.members) > 1:  # evaluate the copy at the same time
        ahead = cohort.rounds_done[1] - cohort.rounds_done[0]
        cohort.next_evaluations[1] = cohort.next_evaluations[0] + ahead
    evaluations = run_to_end([cohort], lambda: cohort.rounds_done[0] >= stop or out_of_time())
    _, scores = next(evaluations, (cohort, None))
    if scores is not None and 0 in scores.indices:
        result.values[cohort.rounds_done[0]] = scores.value[scores.indices.index(0)]
    return scores is not None or cohort.rounds_done[0] >= stop


def evaluate_network(
    make: Callable[[Sequence[Member]], Cohort], member: Member, network: nn.Module
) -> float:
    """Return the metric of a member's plain network, as an evaluation in a cohort computes it."""
    cohort = make([member])
    load_member(cohort.network, 0, network)
    return cohort.evaluate_single()
