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
    "batch_size, epochs, iterations, expected",
    [
        (16, 1, 0, 7),
        (16, 10, 0, 70),
        (100, 10, 0, 10),
        (1024, 100, 0, 100),
        (16, 10, 1, 1),
        (16, 10, 500, 500),
    ],
)
def test_total_iterations(batch_size: int, epochs: int, iterations: int, expected: int) -> None:
    params = {"batch_size": batch_size, "epochs": epochs, "iterations": iterations}
    assert total_iterations(params, examples=100) == expected
