from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.optim import Optimizer

from optuna_nnhp.hyperparameters.optimizer import OPTIMIZER
from optuna_nnhp.hyperparameters.optimizer import UPDATE_RULES
from optuna_nnhp.hyperparameters.optimizer import OptimizerState
from optuna_nnhp.hyperparameters.optimizer import UpdateCoefficients
from optuna_nnhp.hyperparameters.optimizer import optimizer_step
from optuna_nnhp.hyperparameters.regularization import decay_weights

# rate, momentum, squared decay, weight decay
MEMBERS = [
    (0.1, 0.0, 0.9, 0.0),
    (0.01, 0.0, 0.999, 0.1),
    (0.01, 0.9, 0.99, 0.0),
    (0.1, 0.5, 0.0, 0.01),
    (0.0, 0.9, 0.99, 0.1),  # the rate after a trial's budget
]
ORACLES: dict[str, Callable[[list[nn.Parameter], Any], Optimizer]] = {
    "sgd": lambda p, c: torch.optim.SGD(p, c[0], c[1], weight_decay=c[3]),
    "nesterov": lambda p, c: torch.optim.SGD(
        p, c[0], c[1], weight_decay=c[3], nesterov=c[1] > 0
    ),  # torch refuses it without momentum
    "adam": lambda p, c: torch.optim.Adam(p, c[0], (c[1], c[2]), weight_decay=c[3]),
    "adamw": lambda p, c: torch.optim.AdamW(p, c[0], (c[1], c[2]), weight_decay=c[3]),
    "rmsprop": lambda p, c: torch.optim.RMSprop(
        p, c[0], alpha=c[2], momentum=c[1], weight_decay=c[3]
    ),
}


def stacks(k: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(k, size, generator=source, dtype=torch.float64).to(dtype)
    return {
        "weight": weight,
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
    }


def row_of(stack: dict[str, Tensor], i: int, grad: Tensor, step: int) -> OptimizerState:
    views = {field: tensor[i] for field, tensor in stack.items()}
    return OptimizerState(grad=grad.clone(), step=torch.tensor(float(step)), **views)


def step_as_the_loop_does(
    name: str, row: OptimizerState, c: tuple[float, float, float, float]
) -> None:
    rate, momentum, beta2, weight_decay = c
    numbers = torch.tensor([[rate], [weight_decay]], dtype=torch.float64).to(row.weight)
    is_adamw = torch.tensor([name == "adamw"])
    decay_weights(row.weight[None], row.grad[None], *numbers, is_adamw)
    optimizer_step(name, row, rate, UpdateCoefficients(momentum, beta2))


def test_every_choice_has_a_rule_and_an_oracle() -> None:
    assert set(OPTIMIZER.distribution.choices) == set(UPDATE_RULES) == set(ORACLES)  # type: ignore


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"]
)
def test_rows_of_a_stack_are_torchs_networks(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    size = 19
    stack = stacks(len(MEMBERS), size, dtype)
    networks = [nn.Parameter(row.clone()) for row in stack["weight"]]
    oracles = [ORACLES[name]([network], c) for network, c in zip(networks, MEMBERS, strict=True)]
    source = torch.Generator().manual_seed(1)
    for step in range(1, 7):
        grads = torch.randn(len(MEMBERS), size, generator=source, dtype=torch.float64).to(dtype)
        for i, c in enumerate(MEMBERS):
            networks[i].grad = grads[i].clone()
            oracles[i].step()
            row = row_of(stack, i, grads[i], step)
            step_as_the_loop_does(name, row, c)
            torch.testing.assert_close(
                row.weight, networks[i].detach(), rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("name", ORACLES)
def test_a_zero_weight_without_gradient_stays_zero(name: str) -> None:
    # Padded units rely on it.
    stack = stacks(1, 4, torch.float32)
    stack["weight"][0, 2:] = 0
    for step in range(1, 6):
        grad = torch.tensor([0.3, -0.2, 0.0, 0.0])
        step_as_the_loop_does(name, row_of(stack, 0, grad, step), (0.1, 0.9, 0.99, 0.1))
    assert stack["weight"][0, 2:].tolist() == [0.0, 0.0]
    assert bool((stack["weight"][0, :2] != 0).all())


@pytest.mark.parametrize("name", ORACLES)
def test_a_row_leaves_the_other_rows_alone(name: str) -> None:
    stack = stacks(3, 4, torch.float32)
    before = {field: tensor.clone() for field, tensor in stack.items()}
    step_as_the_loop_does(name, row_of(stack, 1, torch.ones(4), 1), (0.1, 0.9, 0.99, 0.1))
    for field, tensor in stack.items():
        assert torch.equal(tensor[[0, 2]], before[field][[0, 2]])
    assert not torch.equal(stack["weight"][1], before["weight"][1])
