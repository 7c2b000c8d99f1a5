"""Training and judging a member again, alone, as it was among its mates."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import math

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.engine.threads import limited_threads
from optuna_nnhp.networks.load_member import load_member
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.numerics_context import DIFFERENT_STEPS
from optuna_nnhp.training.numerics_context import SINGLE
from optuna_nnhp.training.numerics_context import NumericsContext
from optuna_nnhp.training.run_to_end import run_to_end
from optuna_nnhp.training.segments import Segment
from optuna_nnhp.training.segments import resume_from


@dataclass
class RetrainResult:
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


def retrain(
    make: Callable[[Sequence[Member]], Cohort],
    segments: Sequence[Segment],
    rounds: int,
    best: int,
    numerics_context: NumericsContext = (),
    evaluation_rounds: Iterable[int] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> RetrainResult:
    """Train a member along its course, in its company.

    Args:
        make:
            Makes a new cohort of some members.
        segments:
            All its stages, the first of which begins at 0.
        rounds:
            Rounds to train.
        best:
            The round whose network is wanted, 0 for none.
        numerics_context:
            What it had, see `extend_numerics_context`; alone if there is none.
        evaluation_rounds:
            Rounds after which it was evaluated on all data, as in lockstep; if None those after
            which a trial always is.
        out_of_time:
            Asked before every step; once it says yes, training stops, and what is returned has
            trained for less than it should.
    """
    result = RetrainResult(make([segments[0].member]))
    by_begin = {segment.begin: segment for segment in segments}
    stops = {*by_begin, *(begin for begin, _ in numerics_context), best, rounds}
    planned = (
        None
        if evaluation_rounds is None
        else sorted({*evaluation_rounds, *by_begin, best, rounds})
    )
    context_now = SINGLE
    trainer = run_to_end([result.cohort], out_of_time, ended=lambda _: ())
    while (done := result.cohort.rounds_done[0]) < rounds:
        segment, kind = by_begin.get(done), _context_of_round(numerics_context, done)
        if segment is not None and (done or segment.from_scratch):
            result.cohort.select([0])
            context_now = SINGLE
            resume_from(
                result.cohort, [0], [segment.member], fresh=[0] if segment.from_scratch else []
            )
        if kind != context_now:
            _pad_with_copy(result.cohort, kind)
            context_now = kind
        if planned is not None:
            result.cohort.set_next_evaluation(next(end for end in planned if end > done))
        if not _train_on(result, trainer, min(stop for stop in stops if stop > done)):
            break
        if result.cohort.rounds_done[0] == best:
            result.network = result.cohort.network.member(0)
            result.value = evaluate_member(result.cohort, 0, result.cohort.network.state_dict())
    return result


def _context_of_round(numerics_context: NumericsContext, done: int) -> int:
    """A member's company in its next round."""
    return next((kind for begin, kind in reversed(numerics_context) if begin <= done), SINGLE)


def _pad_with_copy(cohort: Cohort, kind: int) -> None:
    """Put a member in some company: that of its own copy, which may be of another age."""
    cohort.select([0] if kind == SINGLE else [0, 0])
    if kind == DIFFERENT_STEPS:
        cohort.rounds_done[1] += 1


def _train_on(result: RetrainResult, trainer: Iterator[tuple[Cohort, Scores]], stop: int) -> bool:
    """Train to the member's next evaluation, or to a round where something changes.

    Returns:
        Whether there was time for it.
    """
    cohort = result.cohort
    if len(cohort.members) > 1:
        cohort.next_evaluations[1] = (
            min(cohort.next_evaluations[0], stop) + cohort.rounds_done[1] - cohort.rounds_done[0]
        )
    _, scores = next(trainer, (cohort, None))
    if scores is not None and 0 in scores.indices:
        result.values[cohort.rounds_done[0]] = scores.value[scores.indices.index(0)]
    return scores is not None


def evaluate_alone(cohort: Cohort) -> float:
    """The metric of a cohort of one, on all of the validation part.

    It depends on the weights only, not on the number of threads: torch's are not used.
    """
    with limited_threads(0.0), torch.no_grad():
        _, value, _ = cohort.task.evaluate(cohort.apply(torch.tensor([0])), cohort.members, True)
    return float(value.double()[0])


def evaluate_network(
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
    load_member(cohort.network, 0, network)
    return evaluate_alone(cohort)


def evaluate_member(cohort: Cohort, index: int, weights: Mapping[str, Tensor]) -> float:
    """The metric of a member's weights, alone: where torch computes, mates round it otherwise.

    Args:
        cohort:
            The cohort.
        index:
            The member's.
        weights:
            A `state_dict` of the cohort's network.
    """
    alone = Cohort([cohort.members[index]], cohort.task)
    with torch.no_grad():
        for name, tensor in alone.network.state_dict().items():
            tensor[0].copy_(weights[name][index])
    return evaluate_alone(alone)


def evaluate_best(cohort: Cohort, index: int) -> float:
    """The metric of a member's best weights as `evaluate_network` will come to it.

    The compiled engines' is that of the evaluation; what torch computes is judged anew.

    Args:
        cohort:
            The cohort.
        index:
            The member's.
    """
    known = cohort.best_value(index)
    if cohort.compiled_mlp is not None or cohort.engine is not None or not math.isfinite(known):
        return known
    return evaluate_member(cohort, index, cohort.best_weights)
