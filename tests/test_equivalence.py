"""Stacked training is torch's training: k networks at once equal k networks one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from optuna_nnhp.hyperparameters import width
from optuna_nnhp.hyperparameters.learning_rate import learning_rates
from optuna_nnhp.networks import mlp
from optuna_nnhp.training.batches import batch_order
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Scores
from optuna_nnhp.training.cohort import Task
from tests.members import task
from tests.members import varied
from tests.tolerance import EXACT
from tests.tolerance import FLOAT32
from tests.tolerance import FLOAT64
from tests.tolerance import assert_close

NORMALIZATIONS = ("none", "batch", "layer")
K = 9  # every activation occurs


pytestmark = pytest.mark.usefixtures("engine")  # everything holds for both engines


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Float64, so that a wrong formula cannot hide behind rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Curves(defaultdict[int, list[tuple[float, float, float]]]):
    """What each member's evaluations brought, by trial number."""

    def __init__(self) -> None:
        super().__init__(list)

    def take(self, cohort: Cohort) -> Scores:
        """Train up to the next evaluation."""
        scores = cohort.train_round()
        assert isinstance(scores, Scores)
        rows = zip(scores.train_loss, scores.validation_loss, scores.value, strict=True)
        for place, row in zip(scores.indices, rows, strict=True):
            self[cohort.members[place].number].append(row)
        return scores


def run(cohort: Cohort, epochs: int) -> Curves:
    """Curves of some epochs."""
    curves = Curves()
    for _ in range(epochs):
        curves.take(cohort)
    return curves


def optimizer(network: nn.Module, params: dict[str, Any]) -> torch.optim.Optimizer:
    """torch.optim's own for these hyperparameters; weights are decayed, the rest is not."""
    weights = [p for p in network.parameters() if p.dim() >= 2]
    others = [p for p in network.parameters() if p.dim() < 2]
    groups = [
        {"params": weights, "weight_decay": params["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    rate, momentum, squared = (params[name] for name in ("learning_rate", "momentum", "beta2"))
    match params["optimizer"]:
        case "sgd":
            return torch.optim.SGD(groups, rate, momentum)
        case "nesterov":
            return torch.optim.SGD(groups, rate, momentum, nesterov=momentum > 0)
        case "adam":
            return torch.optim.Adam(groups, rate, (momentum, squared))
        case "adamw":
            return torch.optim.AdamW(groups, rate, (momentum, squared))
        case _:
            return torch.optim.RMSprop(groups, rate, alpha=squared, momentum=momentum)


def plain_run(member: Member, chosen: Task) -> nn.Module:
    """A trial's whole training with torch alone, from the same first weights."""
    params = member.params
    network = chosen.build([member]).member(0).train()
    arrays, loss = chosen.arrays, chosen.loss([member])
    stepper = optimizer(network, params)
    rows, batch = len(arrays.train_y), int(params["batch_size"])
    total = -(-rows // batch) * int(params["epochs"])
    rates = learning_rates(
        *(torch.tensor([params["learning_rate"]]), [params["learning_rate_decay"]]),
        *(torch.tensor([params["warmup"]]), torch.tensor([params["min_lr_ratio"]])),
        *(torch.arange(total)[None], torch.tensor([total])),
    )[0].tolist()
    for epoch in range(int(params["epochs"])):
        for index in torch.from_numpy(batch_order(rows, chosen.seed, epoch)).split(batch):
            rate = rates.pop(0)
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.zero_grad()
            value = loss(network(arrays.train_x[index])[None], arrays.train_y[index]).sum()
            penalty = sum(p.abs().sum() for p in network.parameters() if p.dim() >= 2)
            (value + params["l1"] * penalty).backward()
            nn.utils.clip_grad_norm_(network.parameters(), float(params["clip_norm"]))
            stepper.step()
    return network.eval()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_stacked_outputs_and_gradients_equal_those_of_separate_networks(
    normalization: str, training: bool
) -> None:
    members = varied(K, normalization=normalization, hidden_layers=3)
    stack = task().build(members).train(training)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    outputs = stack(x)
    outputs.square().sum().backward()
    for i in range(K):
        plain = stack.member(i).train(training)
        for layer in plain:
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        expected = plain(x)
        expected.square().sum().backward()
        assert_close(outputs[i], expected, FLOAT64)
        linears = [layer for layer in plain if isinstance(layer, nn.Linear)]
        for stacked, linear in zip(stack.linears, linears, strict=True):
            rows, columns = linear.weight.shape[1], linear.weight.shape[0]
            gradient = stacked.weight.grad[i]
            assert_close(gradient[:rows, :columns], linear.weight.grad.T, FLOAT64)
            assert float(gradient[rows:].abs().sum() + gradient[:, columns:].abs().sum()) == 0
        norms = [m for m in plain if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)]
        for stacked, norm in zip(stack.norms, norms, strict=True):
            units = len(norm.weight)
            assert_close(stacked.weight.grad[i, :units], norm.weight.grad, FLOAT64)
            assert_close(stacked.bias.grad[i, :units], norm.bias.grad, FLOAT64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("regression", [False, True])
def test_whole_training_equals_plain_torch(normalization: str, regression: bool) -> None:
    # Without dropout, whose noise torch draws from its own global state.
    members = varied(10, regression=regression, normalization=normalization, dropout=0.0, epochs=3)
    chosen = task(regression=regression)
    cohort = Cohort(members, chosen)
    run(cohort, 3)
    for i, member in enumerate(cohort.members):
        expected = plain_run(member, chosen)
        outputs = cohort.network.member(i)(chosen.arrays.valid_x)
        assert_close(outputs, expected(chosen.arrays.valid_x), FLOAT64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("regression", [False, True])
def test_trial_does_not_depend_on_its_cohort(normalization: str, regression: bool) -> None:
    members = varied(K, regression=regression, normalization=normalization)
    together = run(Cohort(members, task(regression=regression)), 3)
    for member in members:
        alone = run(Cohort([member], task(regression=regression)), 3)
        assert_close(together[member.number], alone[member.number], FLOAT64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_trial_does_not_depend_on_its_cohort_in_float32(
    normalization: str,
) -> None:
    torch.set_default_dtype(torch.float32)
    members = varied(K, regression=True, normalization=normalization)
    together = run(Cohort(members, task(regression=True)), 3)
    for member in members:
        alone = run(Cohort([member], task(regression=True)), 3)
        assert_close(together[member.number], alone[member.number], FLOAT32)


def test_trial_is_unchanged_when_others_leave_the_cohort() -> None:
    members = varied(K)
    cohort, alone = Cohort(members, task()), Cohort([members[4]], task())
    run(cohort, 1)
    place = [m.number for m in cohort.members].index(4)
    cohort.select([place, (place + 1) % K])
    run(alone, 1)
    assert cohort.members[0].number == 4
    assert_close(run(cohort, 2)[4], run(alone, 2)[4], FLOAT64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rounds_in_an_epoch", [1, 3])
def test_trial_that_joins_later_equals_the_trial_alone(
    normalization: str, rounds_in_an_epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "optuna_nnhp.training.batches.MAX_EXAMPLES_PER_ROUND", 100 // rounds_in_an_epoch + 1
    )
    members = varied(K, normalization=normalization, patience=1000, epochs=9)
    first, second, third = members[:4], members[4:6], members[6:]
    cohort, curves = Cohort(first, task()), Curves()
    curves.take(cohort)
    cohort.append(second)
    curves.take(cohort)
    cohort.select([place for place, m in enumerate(cohort.members) if m.number != 2])
    cohort.append(third)
    for _ in range(3):
        curves.take(cohort)
    for member in members:
        alone, expected = Cohort([member], task()), Curves()
        while len(expected[member.number]) < len(curves[member.number]):
            expected.take(alone)
        assert_close(curves[member.number], expected[member.number], FLOAT64)
        if member in cohort.members:
            place = cohort.members.index(member)
            assert cohort.best_value(place) == pytest.approx(alone.best_value(0))
            if [
                cohort.rounds_done[place]
            ] == alone.rounds_done:  # else it is between two evaluations
                assert_close(cohort.flat.weights[place], alone.flat.weights[0], FLOAT64)
                assert [cohort.iterations[place]] == alone.iterations


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_padding_does_not_change_outputs(
    normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = varied(1, normalization=normalization, width=21, dropout=0.0, activation="sigmoid")
    padded = run(Cohort([member], task()), 3)
    assert width.padded_width(21) == 32
    monkeypatch.setattr(mlp, "padded_width", lambda width: width)
    assert_close(padded[0], run(Cohort([member], task()), 3)[0], FLOAT64)


@pytest.mark.parametrize("optimizer_name", ["sgd", "nesterov", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_padded_units_stay_at_zero(optimizer_name: str, normalization: str) -> None:
    members = varied(
        K, normalization=normalization, width=20, width_shape="constant", optimizer=optimizer_name
    )
    cohort = Cohort(members, task())
    run(cohort, 2)
    weights = cohort.network.state_dict()
    assert float(weights["linears.0.weight"][:, :, 20:].abs().max()) == 0
    if normalization != "batch":
        assert float(weights["linears.0.bias"][:, 20:].abs().max()) == 0
    else:
        assert float(weights["norms.0.bias"][:, 20:].abs().max()) == 0
    assert float(weights["linears.1.weight"][:, 20:].abs().max()) == 0


def test_diverging_member_does_not_change_the_others() -> None:
    members = varied(K, optimizer="sgd", clip_norm=float("inf"))
    wild = Member(99, 99, members[0].params | {"learning_rate": 1e12})
    calm_wild = Member(99, 99, members[0].params)
    disturbed = run(Cohort([*members, wild], task()), 3)
    calm = run(Cohort([*members, calm_wild], task()), 3)
    assert not torch.isfinite(torch.tensor(disturbed.pop(99))).all()
    calm.pop(99)
    for number, curve in calm.items():
        assert_close(disturbed[number], curve, EXACT)


def test_diverged_member_is_reported_as_ended() -> None:
    members = varied(3, optimizer="sgd", clip_norm=float("inf"))
    wild = Member(99, 99, members[0].params | {"learning_rate": 1e20})
    cohort = Cohort([*members, wild], task())
    ended: dict[int, str | None] = {}
    for _ in range(2):
        scores = cohort.train_round()
        assert scores is not None
        ended = {m.number: e for m, e in zip(cohort.members, scores.ended, strict=True)}
    assert ended == {0: None, 1: None, 2: None, 99: "diverged"}


def test_same_seed_gives_the_same_bits() -> None:
    assert run(Cohort(varied(K), task()), 2) == run(Cohort(varied(K), task()), 2)
