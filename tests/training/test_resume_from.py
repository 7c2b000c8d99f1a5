"""Copies of members, and values that change while they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from optuna_nnhp.networks.vmap_stack import VmapStack
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.retrain import Segment
from optuna_nnhp.training.retrain import retrain
from tests.members import PLAIN
from tests.members import task
from tests.members import varied

ROUNDS = 4
OTHER: dict[str, Any] = {
    "learning_rate": 0.02,
    "momentum": 0.7,
    "beta2": 0.95,
    "dropout": 0.25,
    "weight_decay": 0.1,
    "l1": 0.002,
    "label_smoothing": 0.2,
    "clip_norm": 0.7,
}


def weights(cohort: Cohort) -> dict[int, torch.Tensor]:
    return {m.number: cohort.flat.weights[i].clone() for i, m in enumerate(cohort.members)}


def train(cohort: Cohort, rounds: int) -> None:
    for _ in range(rounds):
        cohort.set_next_evaluation(cohort.rounds_done[0] + 1)
        assert cohort.train_round() is not None


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_a_copy_goes_on_exactly_as_its_source(normalization: str) -> None:
    members = varied(6, normalization=normalization, epochs=ROUNDS)
    alone, cohort = Cohort(members, task()), Cohort(members, task())
    train(alone, ROUNDS)
    train(cohort, 2)
    source = cohort.members[3]
    twin = replace(source, number=99)
    cohort.resume_from([*range(6), 3], [*cohort.members, twin])
    train(cohort, ROUNDS - 2)
    found = weights(cohort)
    assert torch.equal(found[99], found[source.number])
    for number, row in weights(alone).items():
        assert torch.equal(found[number], row)


def test_what_may_change_changes_as_if_the_cohort_were_new() -> None:
    members = varied(4, epochs=ROUNDS)
    cohort = Cohort(members, task())
    train(cohort, 1)
    before = weights(cohort)
    changed = [replace(m, params={**m.params, **OTHER}) for m in cohort.members]
    cohort.resume_from(range(4), changed)
    new = Cohort(
        changed, task()
    )  # the same state, put into a cohort that was made with the values
    with torch.no_grad():
        new.flat.weights.copy_(torch.stack([before[m.number] for m in new.members]))
        for name in ("exp_avg", "exp_avg_sq", "steps"):
            getattr(new.flat, name).copy_(getattr(cohort.flat, name))
    new.rounds_done, new.iterations = list(cohort.rounds_done), list(cohort.iterations)
    for one in (cohort, new):
        train(one, 1)
    for number, row in weights(new).items():
        assert torch.equal(weights(cohort)[number], row)
        assert not torch.equal(before[number], row)


@pytest.mark.parametrize("name, value", sorted(OTHER.items()))
def test_each_of_them_has_an_effect_at_once(name: str, value: float) -> None:
    member = Member(0, 0, {**PLAIN, "clip_norm": 5.0, "dropout": 0.1, "epochs": ROUNDS})
    ends = []
    for params in (member.params, {**member.params, name: value}):
        cohort = Cohort([member], task())
        train(cohort, 1)
        cohort.resume_from([0], [replace(member, params=params)])
        train(cohort, 1)
        ends.append(cohort.flat.weights.clone())
    assert not torch.equal(*ends)


def test_a_fresh_place_has_its_first_weights_and_its_sources_counters() -> None:
    members = varied(3, epochs=ROUNDS)
    cohort, first = Cohort(members, task()), Cohort(members, task())
    train(cohort, 2)
    cohort.resume_from(range(3), list(cohort.members), fresh=[1])
    number = first.members[1].number
    assert torch.equal(weights(cohort)[number], weights(first)[number])
    assert cohort.rounds_done == [2, 2, 2] and float(cohort.flat.steps[1]) == 0
    assert float(cohort.flat.exp_avg[1].abs().max()) == 0
    assert not torch.equal(cohort.flat.weights[0], first.flat.weights[0])


def test_retraining_segments_repeats_the_training() -> None:
    member = Member(0, 5, {**PLAIN, "epochs": ROUNDS})
    changed = replace(member, params={**member.params, **OTHER})
    mates = varied(3, epochs=ROUNDS)
    cohort = Cohort([member, *(replace(m, number=m.number + 1) for m in mates)], task())
    train(cohort, 2)
    place = next(i for i, m in enumerate(cohort.members) if m.number == 0)
    cohort.resume_from([place], [changed])
    train(cohort, 1)
    course = [Segment(0, member), Segment(2, changed)]
    again = retrain(lambda members: Cohort(members, task()), course, 3, 0, evaluation_rounds=())
    assert torch.equal(again.cohort.flat.weights, cohort.flat.weights)
    alone = Cohort([member], task())
    alone.flat.weights.copy_(again.cohort.flat.weights)
    outputs = alone.apply(torch.tensor([0]))(alone.task.arrays.valid_x)
    assert alone.task.metric is not None and again.values[3] == float(
        alone.task.metric(outputs)[0]
    )
    assert again.cohort.rounds_done == [3]


def test_following_stops_when_time_is_out() -> None:
    member = Member(0, 0, {**PLAIN, "epochs": ROUNDS})
    again = retrain(
        *(lambda members: Cohort(members, task()), [Segment(0, member)], 2, 2, ()),
        out_of_time=lambda: True,
    )
    assert again.values == {} and again.network is None and again.cohort.rounds_done == [0]


@pytest.mark.parametrize("name, value", [("activation", "tanh"), ("optimizer", "sgd")])
def test_structure_cannot_change(name: str, value: str) -> None:
    member = Member(0, 0, PLAIN)
    cohort = Cohort([member], task())
    with pytest.raises(ValueError, match=f"`{name}` must stay .*but got {value!r}"):
        cohort.resume_from([0], [replace(member, params={**PLAIN, name: value})])


def test_a_vmap_stack_sets_new_dropout_rates_and_keeps_its_weights() -> None:
    def stack(rates: Sequence[float]) -> VmapStack:
        return VmapStack(
            [nn.Sequential(nn.Linear(3, 2), nn.Dropout(rate)) for rate in rates], dims=2
        )

    one = stack([0.1, 0.2])
    before = {name: w.clone() for name, w in one.named_parameters()}
    one.set_hyperparameters([{}, {}], lambda: stack([0.5, 0.6]))
    assert [round(one.member(i)[1].p, 6) for i in range(2)] == [0.5, 0.6]  # type: ignore[index]
    assert all(torch.equal(w, before[name]) for name, w in one.named_parameters())
