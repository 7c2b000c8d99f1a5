from __future__ import annotations

import itertools

import pytest
import torch

from optuna_nnhp import rng


def draw(*keys: int) -> list[float]:
    return torch.rand(4, generator=rng.generator(*keys)).tolist()


def test_numbers_depend_only_on_the_keys() -> None:
    torch.manual_seed(0)
    first = draw(0, rng.NOISE, 3)
    torch.manual_seed(1)
    torch.rand(5)
    assert draw(0, rng.NOISE, 3) == first


def test_global_generator_is_not_used() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    draw(0, rng.INITIALIZATION, 1)
    assert torch.rand(3).tolist() == expected


def test_numbers_depend_on_every_key_and_on_their_order() -> None:
    keys = list(itertools.product(range(4), (rng.INITIALIZATION, rng.NOISE), range(20)))
    streams = {tuple(draw(*key)) for key in keys}
    assert len(streams) == len(keys)


def test_close_keys_give_unrelated_numbers() -> None:
    rows = torch.stack([torch.rand(400, generator=rng.generator(0, 1, n)) for n in range(30)])
    correlation = torch.corrcoef(rows) - torch.eye(30)
    assert float(correlation.abs().max()) < 6 / 400**0.5


def test_numbers_differ_by_purpose() -> None:
    assert rng.INITIALIZATION != rng.NOISE


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**100])
def test_large_seeds_are_accepted(seed: int) -> None:
    assert draw(seed, rng.NOISE, 0) == draw(seed, rng.NOISE, 0)


def test_negative_seed_is_rejected() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        rng.generator(-1)
