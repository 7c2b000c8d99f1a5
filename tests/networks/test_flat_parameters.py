from __future__ import annotations

import pytest
import torch

from optuna_nnhp.networks.flat_parameters import FlatParameters
from tests.members import task
from tests.members import varied


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_gradients_land_in_the_rows(normalization: str) -> None:
    members, chosen = varied(4, normalization=normalization), task()
    x, plain, stack = chosen.arrays.valid_x, chosen.build(members), chosen.build(members)
    plain(x).square().sum().backward()
    expected = sorted(plain.parameters(), key=lambda p: p.dim() != 3)
    flat = FlatParameters(stack)
    flat.allocate_grads()
    for _ in range(2):  # the second time over the first, not added to it
        flat.backward(stack(x).square().sum())
    torch.testing.assert_close(
        flat.grads, torch.cat([p.grad.flatten(1) for p in expected if p.grad is not None], dim=1)
    )
    matrices = sum(p[0].numel() for p in expected if p.dim() == 3)
    assert (flat.num_decayed, flat.weights.shape[0]) == (matrices, 4)


def test_the_network_sees_what_is_done_to_a_row() -> None:
    stack = task().build(varied(3))
    flat = FlatParameters(stack)
    flat.allocate_grads()
    state = flat.optimizer_states[1]
    state.weight.fill_(8.0)
    state.weight[: flat.num_decayed].fill_(7.0)
    for parameter in stack.parameters():
        assert bool((parameter[1] == (7.0 if parameter.dim() == 3 else 8.0)).all())
        assert not bool((parameter[0] == 7.0).any() or (parameter[2] == 8.0).any())


def test_members_that_stay_keep_weights_and_state() -> None:
    stack = task().build(varied(3))
    flat = FlatParameters(stack)
    flat.allocate_grads()
    for i, state in enumerate(flat.optimizer_states):
        state.exp_avg.fill_(float(i))
        state.exp_avg_sq.fill_(10.0 + i)
        flat.steps[i] = 20.0 + i
    before = flat.weights.clone()
    index = torch.tensor([2, 0])
    stack.select(index)
    flat.select(index, stack)
    flat.allocate_grads()
    assert bool((flat.weights == before[index]).all())
    assert [float(state.exp_avg[0]) for state in flat.optimizer_states] == [2.0, 0.0]
    assert [float(state.exp_avg_sq[-1]) for state in flat.optimizer_states] == [12.0, 10.0]
    assert [float(state.lists[-1][0]) for state in flat.optimizer_states] == [22.0, 20.0]
    flat.optimizer_states[0].weight.fill_(5.0)
    assert bool((stack.linears[0].weight[0] == 5.0).all())


def test_members_that_join_bring_weights_and_state() -> None:
    first, second = task().build(varied(2)), task().build(varied(1, seed=1))
    flat, other = FlatParameters(first), FlatParameters(second)
    flat.allocate_grads()
    other.allocate_grads()
    flat.optimizer_states[1].exp_avg.fill_(1.0)
    other.optimizer_states[0].exp_avg.fill_(2.0)
    other.steps.fill_(3.0)
    expected = torch.cat([flat.weights, other.weights])
    first.append(second)
    flat.append(other, first)
    flat.allocate_grads()
    assert bool((flat.weights == expected).all())
    assert [float(state.exp_avg[0]) for state in flat.optimizer_states] == [0.0, 1.0, 2.0]
    assert flat.steps.tolist() == [0.0, 0.0, 3.0]
    flat.optimizer_states[2].weight.fill_(5.0)
    assert bool((first.linears[0].weight[2] == 5.0).all())
