"""A member of a cohort trained again alone, and judged alone, has the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from optuna_nnhp.engine.mlp import load_library
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import extend_numerics_context
from optuna_nnhp.training.retrain import Segment
from optuna_nnhp.training.retrain import evaluate_network
from optuna_nnhp.training.retrain import retrain
from optuna_nnhp.training.task import Task
from tests.members import task
from tests.members import varied
from tests.networks.test_vmap_stack import LIFTED
from tests.networks.test_vmap_stack import own_task
from tests.tiny import SHAPE
from tests.tiny import numbers

ROUNDS = 6
EACH = {"epochs": ROUNDS, "width": 32, "width_shape": "constant"}
NETWORKS: list[Any] = [
    pytest.param(lambda: task(regression=True), id="numbers"),
    pytest.param(task, id="classes"),
    *(
        pytest.param(lambda make=p.values[0], data=p.values[1]: own_task(make, data), id=p.id)
        for p in LIFTED
    ),
]


def make(chosen: Task) -> Callable[[Sequence[Member]], Cohort]:
    return lambda members: Cohort(members, chosen)


def members_from_state(chosen: Task, k: int = 4) -> list[Member]:
    is_regression = not chosen.maximize
    found = varied(k, regression=is_regression, **EACH)
    return [replace(m, params={**m.params, "activation": "relu"}) for m in found]


class Course:
    """What a cohort's members go through: values by round, and the company of each."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.values: dict[int, dict[int, float]] = {}
        self.numerics_context: dict[int, list[list[int]]] = {}

    def train(self) -> None:
        cohort = self.cohort
        for member, done in zip(cohort.members, cohort.rounds_done, strict=True):
            known = self.numerics_context.get(member.number, [])
            self.numerics_context[member.number] = extend_numerics_context(
                known, done, cohort.rounds_done
            )
        scores = cohort.train_round()
        assert scores is not None
        for i, place in enumerate(scores.indices):
            number = cohort.members[place].number
            self.values.setdefault(number, {})[scores.rounds[i]] = scores.value[i]


@pytest.mark.parametrize("chosen", NETWORKS)
def test_retraining_in_the_numerics_context_is_exact(
    chosen: Callable[[], Task], engine: str
) -> None:
    course = Course(Cohort(members_from_state(chosen()), chosen()))
    for _ in range(ROUNDS):
        course.train()
    for member in members_from_state(chosen()):
        numerics_context = course.numerics_context[member.number]
        assert numerics_context == [[0, 1]]
        again = retrain(make(chosen()), [Segment(0, member)], ROUNDS, 0, numerics_context)
        assert again.values == course.values[member.number]


@pytest.mark.parametrize("chosen", NETWORKS)
def test_retraining_is_exact_when_other_members_come_and_go(
    chosen: Callable[[], Task], engine: str
) -> None:
    first, second, *others = members_from_state(chosen())
    course = Course(Cohort([first], chosen()))
    course.train()
    course.cohort.append([second])
    course.train()
    course.cohort.select([0])
    course.train()
    course.cohort.append(others)
    course.train()
    places = [m.number for m in course.cohort.members]
    course.cohort.select([places.index(m.number) for m in others])
    course.train()
    assert course.numerics_context[first.number] == [[0, 0], [1, 2], [2, 0], [3, 2]]
    assert course.numerics_context[others[0].number] == [[0, 2], [1, 1]]
    for member in (first, *others):
        values, numerics_context = (
            course.values[member.number],
            course.numerics_context[member.number],
        )
        again = retrain(make(chosen()), [Segment(0, member)], max(values), 0, numerics_context)
        assert again.values == values


@pytest.mark.parametrize("make_task", NETWORKS)
def test_retraining_is_exact_when_members_come_between_evaluations(
    make_task: Callable[[], Task], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    chosen = make_task()
    rows = len(chosen.arrays.train_y)
    monkeypatch.setattr("optuna_nnhp.training.batches.MAX_EXAMPLES_PER_ROUND", rows // 9 + 1)
    first, second, *_ = members_from_state(chosen)
    cohort = Cohort([first], chosen)
    while cohort.rounds_done[0] < 4:
        cohort.train_round(lambda: cohort.rounds_done[0] == 4)
    cohort.append([second])
    place = cohort.members.index(first)
    while cohort.rounds_done[place] < 9:
        cohort.train_round()
    numerics_context = cohort.numerics_context[place]
    assert numerics_context == ([] if cohort.compiled_mlp else [[0, 0], [4, 2]])
    again = retrain(make(chosen), [Segment(0, first)], 9, 9, numerics_context)
    assert again.network is not None
    assert list(again.values) == [1, 3, 9]
    expected = cohort.network.member(place).state_dict()
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("chosen", NETWORKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_best_weights_are_evaluated_alone(
    chosen: Callable[[], Task], threads: int, engine: str
) -> None:
    cohort, before = Cohort(members_from_state(chosen()), chosen()), torch.get_num_threads()
    for _ in range(3):
        cohort.train_round()
    try:
        torch.set_num_threads(threads)
        values = [cohort.evaluate_best(place) for place in range(4)]
    finally:
        torch.set_num_threads(before)
    for place, member in enumerate(cohort.members):
        found = evaluate_network(make(chosen()), member, cohort.best_network(place))
        assert found == values[place]
        assert found == pytest.approx(cohort.best_value(place), rel=1e-5)
        if cohort.compiled_mlp is not None:
            assert found == cohort.best_value(place)


def test_the_network_of_the_best_round() -> None:
    (member,), chosen = members_from_state(task(), 1), task()
    again = retrain(make(chosen), [Segment(0, member)], ROUNDS, 3)
    until = retrain(make(chosen), [Segment(0, member)], 3, 3)
    assert again.value == until.value == again.values[3] == until.cohort.evaluate_single()
    assert again.network is not None
    assert evaluate_network(make(chosen), member, again.network) == again.value
    assert list(again.values) == [1, 2, 3, 4, 5, 6]
    assert retrain(make(chosen), [Segment(0, member)], 2, 0).network is None


@pytest.mark.parametrize("from_scratch", [False, True])
def test_retraining_follows_the_segments(from_scratch: bool, engine: str) -> None:
    (member,), chosen = members_from_state(task(regression=True), 1), task(regression=True)
    later = replace(member, params={**member.params, "learning_rate": 0.02, "dropout": 0.2})
    course = [Segment(0, member), Segment(2, later, from_scratch), Segment(5, member)]
    by_hand = Cohort([member], chosen)
    for stage, end in zip(course, (2, 5, ROUNDS), strict=True):
        if stage.begin:
            by_hand.resume_from([0], [stage.member], fresh=[0] if stage.from_scratch else [])
        while by_hand.rounds_done[0] < end:
            by_hand.set_next_evaluation(end)
            scores = by_hand.train_round()
    again = retrain(make(chosen), course, ROUNDS, ROUNDS, evaluation_rounds=[1, 4])
    assert scores is not None
    assert again.value == again.values[ROUNDS] == scores.value[0]
    assert sorted(again.values) == [1, 2, 4, 5, 6]


def test_threads_decide_nothing_where_the_engine_computes() -> None:
    # Its steps are long enough for torch to have threads too, which would sum the loss of many
    # rows in parts.
    if load_library() is None:
        pytest.skip("there was no C compiler")
    X, y = numbers(100_000)
    fixed = SHAPE | {"epochs": 3, "width": 256, "hidden_layers": 3, "batch_size": 512}
    problem = DNNTemplate(X, y, validation=0.95, fixed=fixed, device="cpu")
    scores, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cohort = problem.cohort([problem.member(0, problem.defaults())])
            scores.append([cohort.train_round() for _ in range(3)])
    finally:
        torch.set_num_threads(before)
    assert scores[0] == scores[1]
