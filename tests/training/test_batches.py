"""What members see depends on their own age only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optuna_nnhp.training.batches import Batches
from optuna_nnhp.training.batches import batch_order
from optuna_nnhp.training.task import Member
from tests.members import task

CPU = torch.device("cpu")


def batches(examples: int = 100, size: int = 16, rounds: int = 1) -> Batches:
    return Batches(examples, size, rounds, seed=3, device=CPU)


def test_an_epoch_is_its_order_in_batches() -> None:
    for epoch in (0, 5):
        rows = torch.cat(batches().rows([epoch]))
        assert rows.tolist() == batch_order(100, 3, epoch).tolist()


@pytest.mark.parametrize(
    "examples, batch_size, expected",
    [(64, 64, 1), (65, 64, 2), (63, 64, 1), (1, 1024, 1), (1000, 16, 63), (1000, 1, 1000)],
)
def test_the_steps_of_an_epoch(examples: int, batch_size: int, expected: int) -> None:
    assert batches(examples, batch_size).per_round == expected
    assert len(range(0, examples, batch_size)) == expected


@pytest.mark.parametrize(
    "per_epoch, epochs, iterations, expected",
    [(7, 1, 0, 7), (7, 10, 0, 70), (1, 100, 0, 100), (7, 10, 1, 1), (7, 10, 500, 500)],
)
def test_the_steps_of_a_budget(
    per_epoch: int, epochs: int, iterations: int, expected: int
) -> None:
    member = Member(0, 0, {"epochs": epochs, "iterations": iterations})
    assert task().total_steps(member, per_epoch) == expected


@pytest.mark.parametrize("rounds", [3, 9])
def test_rounds_are_equal_parts_of_an_epoch(rounds: int) -> None:
    some = batches(rounds=rounds)
    parts = [torch.cat(some.rows([done])) for done in range(rounds)]
    assert {len(part) for part in parts} == {100 // rounds}
    order = batch_order(100, 3, 0).tolist()
    assert torch.cat(parts).tolist() == order[: rounds * (100 // rounds)]
    assert {len(some.rows([done])) for done in range(3 * rounds)} == {some.per_round}


def test_rows_do_not_depend_on_other_members() -> None:
    some, distinct_rounds = batches(rounds=3), [4, 0, 4, 11]
    together = some.rows(distinct_rounds)
    for i, rounds_done in enumerate(distinct_rounds):
        for step, rows in zip(together, batches(rounds=3).rows([rounds_done]), strict=True):
            assert step[i].tolist() == rows.tolist()


def test_noise_depends_on_finished_rounds_only() -> None:
    together = batches().noise([2, 0, 2], step=1)
    first, second = together(16, 8), together(16, 4)
    assert first.shape == (3, 16, 8)
    for i, rounds_done in enumerate([2, 0, 2]):
        alone = batches().noise([rounds_done], step=1)
        assert torch.equal(first[i], alone(16, 8))
        assert torch.equal(second[i], alone(16, 4))
    assert not torch.equal(first[0], first[1])


def test_orders_agree_with_rows() -> None:
    some, distinct_rounds = batches(rounds=3), [4, 0, 4]
    for rounds_done, order in zip(distinct_rounds, some.orders(distinct_rounds), strict=True):
        assert order.tolist() == torch.cat(batches(rounds=3).rows([rounds_done])).tolist()


def test_members_in_the_same_round_share_rows() -> None:
    assert batches().rows([7, 7])[0].shape == (16,)
    assert batches().noise([7, 7], step=0)(16, 8).shape == (16, 8)


def test_many_epochs_are_not_all_remembered() -> None:
    some = batches()
    for epoch in range(100):
        some.rows([epoch])
    assert len(some._epoch_orders) < 10


def test_batch_order_is_a_permutation() -> None:
    order = batch_order(1000, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert order.shape == (1000,)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, batch_order(1000, seed=1, epoch=2))
    orders = {batch_order(1000, s, e).tobytes() for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_batch_order_does_not_change_between_versions() -> None:
    # A resumed study depends on it; the numbers are NumPy 2.4's.
    assert batch_order(8, seed=7, epoch=3).tolist() == [3, 6, 7, 2, 5, 0, 1, 4]


@pytest.mark.parametrize(
    ("n", "seed", "epoch", "message"),
    [
        (0, 0, 0, "`n` must be at least 1, but got 0"),
        (5, -1, 0, "`seed` must be at least 0, but got -1"),
        (5, 0, -2, "`epoch` must be at least 0, but got -2"),
    ],
)
def test_invalid_batch_orders_are_rejected(n: int, seed: int, epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_order(n, seed, epoch)
