from __future__ import annotations

import pytest

from optuna_nnhp.hyperparameters.epochs import iterations_per_epoch
from optuna_nnhp.hyperparameters.epochs import total_iterations


@pytest.mark.parametrize(
    "examples, batch_size, expected",
    [(64, 64, 1), (65, 64, 2), (63, 64, 1), (1, 1024, 1), (1000, 16, 63), (1000, 1, 1000)],
)
def test_iterations_per_epoch(examples: int, batch_size: int, expected: int) -> None:
    assert iterations_per_epoch(examples, batch_size) == expected
    batches = range(0, examples, batch_size)
    assert len(batches) == expected


@pytest.mark.parametrize(
    "per_epoch, epochs, iterations, expected",
    [(7, 1, 0, 7), (7, 10, 0, 70), (1, 100, 0, 100), (7, 10, 1, 1), (7, 10, 500, 500)],
)
def test_total_iterations(per_epoch: int, epochs: int, iterations: int, expected: int) -> None:
    params = {"epochs": epochs, "iterations": iterations}
    assert total_iterations(params, per_epoch) == expected
