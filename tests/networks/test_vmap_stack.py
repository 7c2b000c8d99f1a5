"""Lifted networks are torch's own: k at once equal k one by one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import replace
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.networks.stackability import StackabilityProbe
from optuna_nnhp.networks.vmap_stack import ModuleStack
from optuna_nnhp.networks.vmap_stack import SingleNetworkStack
from optuna_nnhp.networks.vmap_stack import VmapStack
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Task
from optuna_nnhp.training.metrics import accuracy
from tests.members import CLASSES
from tests.members import ROWS
from tests.members import task
from tests.members import varied
from tests.test_equivalence import Curves
from tests.test_equivalence import plain_run
from tests.test_equivalence import run
from tests.tolerance import EXACT
from tests.tolerance import FLOAT64
from tests.tolerance import assert_close

K = 4


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Float64, so that a wrong formula cannot hide behind rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Attention(nn.Module):
    """A small transformer over tokens, with a learnt scale and a table that is not trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("places", torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(dropout)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) * self.scale + self.places
        h = self.norm(h + self.drop(self.attention(h, h, h, need_weights=False)[0]))
        return self.out(h.mean(1))  # type: ignore[no-any-return]


class ScaledDotProduct(nn.Module):
    """Attention by the function, its weights tied to the tokens'."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.read = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.read.weight = self.tokens.weight
        self.drop, self.out = nn.Dropout(dropout), nn.Linear(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)
        return self.out(self.drop(self.read(h)).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """What cannot be lifted: torch keeps a list of an LSTM's weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(11, 4), nn.LSTM(4, 4, batch_first=True)
        self.drop, self.out = nn.Dropout(dropout), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.lstm(self.tokens(x))[0][:, -1]))  # type: ignore[no-any-return]


def convolutional(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout2d(dropout), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)),
    )


def perceptron(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Tanh()),
        *(nn.Dropout(dropout), nn.Linear(8, CLASSES)),
    )


def images(rows: int) -> Tensor:
    return torch.randn(rows, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(1))


Make = Callable[[float], nn.Module]
LIFTED: list[Any] = [
    pytest.param(convolutional, images, id="convolution"),
    pytest.param(perceptron, images, id="perceptron"),
    pytest.param(Attention, tokens, id="MultiheadAttention"),
    pytest.param(ScaledDotProduct, tokens, id="scaled_dot_product_attention"),
]
ALL = [*LIFTED, pytest.param(Recurrent, tokens, id="LSTM, alone")]


def own_task(make: Make, data: Callable[[int], Tensor]) -> Task:
    """The members' task with other inputs and networks."""
    usual, x = task(), data(ROWS + 40)
    arrays = Arrays(x[:ROWS], usual.arrays.train_y, x[ROWS:], usual.arrays.valid_y)
    examiner = StackabilityProbe(arrays.train_x)

    def build(members: Sequence[Member]) -> ModuleStack:
        networks = []
        for member in members:
            with rng.global_rng_from(rng.generator(0, rng.INITIALIZATION, member.seed)):
                networks.append(make(float(member.params["dropout"] or 0)))
        return examiner.stack(networks)

    def metric(outputs: Tensor) -> Tensor:
        return accuracy(outputs, arrays.valid_y)

    return replace(usual, arrays=arrays, build=build, metric=metric)


def half(batch: int, width: int) -> Tensor:
    """Noise that drops what is under a rate of more than 0.5, and nothing else."""
    return torch.full((batch, width), 0.5)


def networks_of(make: Make, k: int = K, dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make(dropout) for _ in range(k)]


@pytest.mark.parametrize(("make", "data"), LIFTED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_outputs_gradients_and_buffers_are_those_of_separate_networks(
    make: Make, data: Callable[[int], Tensor], training: bool, shared: bool
) -> None:
    networks = networks_of(make)
    x = data(16) if shared else data(16 * K).unflatten(0, (K, 16))
    stack = VmapStack(networks, x.dim() if shared else x.dim() - 1).train(training)
    outputs = stack(x)
    outputs.square().sum().backward()
    for i, plain in enumerate(networks):
        expected = plain.train(training)(x if shared else x[i])
        expected.square().sum().backward()
        assert_close(outputs[i], expected, FLOAT64)
        for key, name in stack.names.items():
            ours = getattr(stack, key)
            if name.endswith(".p"):
                continue
            theirs = dict(plain.named_parameters()).get(name)
            if theirs is None:
                assert_close(ours[i], plain.get_buffer(name), FLOAT64)
            else:
                assert_close(ours.grad[i], theirs.grad, FLOAT64)


@pytest.mark.parametrize(("make", "data"), LIFTED)
def test_what_torch_can_stack_is_stacked(make: Make, data: Callable[[int], Tensor]) -> None:
    stack = own_task(make, data).build(varied(K))
    assert isinstance(stack, VmapStack)


@pytest.mark.parametrize(("make", "data"), ALL)
def test_a_whole_run_is_that_of_plain_torch(make: Make, data: Callable[[int], Tensor]) -> None:
    chosen = own_task(make, data)
    # Five optimizers. Without dropout, whose noise torch draws from its own global state.
    members = varied(5, dropout=0.0, epochs=2)
    for group in [members] if make is not Recurrent else [[m] for m in members]:
        cohort = Cohort(group, chosen)
        run(cohort, 2)
        for i, member in enumerate(cohort.members):
            expected = plain_run(member, chosen)
            outputs = cohort.network.member(i)(chosen.arrays.valid_x)
            assert_close(outputs, expected(chosen.arrays.valid_x), FLOAT64)


@pytest.mark.parametrize(("make", "data"), LIFTED)
def test_a_trial_does_not_depend_on_other_members(
    make: Make, data: Callable[[int], Tensor]
) -> None:
    chosen, members = own_task(make, data), varied(K, seed=3)
    assert {m.params["dropout"] for m in members} == {0.0, 0.3}
    together = run(Cohort(members, chosen), 2)
    for member in members:
        alone = run(Cohort([member], chosen), 2)
        assert_close(together[member.number], alone[member.number], FLOAT64)


@pytest.mark.parametrize(("make", "data"), LIFTED)
@pytest.mark.parametrize("rounds_in_an_epoch", [1, 3])
def test_a_trial_that_joins_later_is_as_it_is_alone(
    make: Make,
    data: Callable[[int], Tensor],
    rounds_in_an_epoch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "optuna_nnhp.training.batches.MAX_EXAMPLES_PER_ROUND", ROWS // rounds_in_an_epoch + 1
    )
    chosen, members = own_task(make, data), varied(6, patience=1000, epochs=9)
    cohort, curves = Cohort(members[:3], chosen), Curves()
    curves.take(cohort)
    cohort.append(members[3:5])
    curves.take(cohort)
    cohort.select([place for place, m in enumerate(cohort.members) if m.number != 2])
    cohort.append(members[5:])
    for _ in range(3):
        curves.take(cohort)
    for member in members:
        alone, expected = Cohort([member], chosen), Curves()
        while len(expected[member.number]) < len(curves[member.number]):
            expected.take(alone)
        assert_close(curves[member.number], expected[member.number], FLOAT64)


@pytest.mark.parametrize(("make", "data"), LIFTED)
def test_members_leave_and_join(make: Make, data: Callable[[int], Tensor]) -> None:
    networks, x = networks_of(make), data(8)
    stack, late = VmapStack(networks[:3], x.dim()), VmapStack(networks[3:], x.dim())
    stack.select(torch.tensor([2, 0]))
    stack.append(late)
    outputs = stack.eval()(x)
    assert stack.train().training
    for i, plain in enumerate((networks[2], networks[0], networks[3])):
        assert_close(outputs[i], plain.eval()(x), FLOAT64)
        assert_close(stack.member(i)(x), plain(x), EXACT)
        assert not stack.member(i).training


@pytest.mark.parametrize(("make", "data"), ALL)
def test_the_best_weights_are_a_plain_network(make: Make, data: Callable[[int], Tensor]) -> None:
    chosen = own_task(make, data)
    cohort = Cohort(varied(1, dropout=0.3), chosen)
    run(cohort, 3)
    network = cohort.best_network(0)
    assert type(network) is type(make(0.0)) and not network.training
    value = chosen.metric(network(chosen.arrays.valid_x)[None])
    assert_close(value[0], cohort.best_value(0), EXACT)
    rates = {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)}
    assert rates == {0.3}


@pytest.mark.parametrize(
    ("layer", "shape", "drawn"),
    [
        (nn.Dropout, (5, 4), (5, 4)),
        (nn.Dropout, (5, 4, 3), (5, 12)),
        (nn.Dropout1d, (5, 4, 3), (5, 4)),
        (nn.Dropout2d, (5, 4, 3, 2), (5, 4)),
        (nn.Dropout3d, (5, 4, 3, 2, 2), (5, 4)),
    ],
)
def test_each_member_drops_by_its_own_rate(
    layer: type, shape: tuple[int, ...], drawn: tuple[int, ...]
) -> None:
    calls = []

    def noise(batch: int, width: int) -> Tensor:
        calls.append((batch, width))
        return torch.rand(batch, width, generator=torch.Generator().manual_seed(len(calls)))

    rates = [0.0, 0.25, 0.5, 0.75]
    # Twice, so that the second takes a draw of its own.
    stack = VmapStack([nn.Sequential(layer(p), layer(p)) for p in rates], len(shape))
    out = stack(torch.ones(shape), noise)
    assert calls == [drawn, drawn]
    calls.clear()
    first, second = noise(*drawn), noise(*drawn)
    for i, p in enumerate(rates):
        expected = ((first >= p) & (second >= p)).to(out) / (1 - p) ** 2
        expected = expected.repeat_interleave(math.prod(shape) // math.prod(drawn), dim=1)
        assert_close(out[i].flatten(1), expected, FLOAT64)
    assert_close(stack(torch.ones(shape)), torch.ones(4, *shape), EXACT)
    assert_close(stack.eval()(torch.ones(shape), noise), torch.ones(4, *shape), EXACT)


class OwnForward(nn.Module):
    """A linear layer and whatever is done with its output."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(6, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))


class HiddenWeight(nn.Module):
    """Keeps a weight where `named_parameters` does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.kept = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].T


class Counter(nn.Module):
    """Replaces a buffer instead of changing it, and has a weight that it does not use."""

    steps: Tensor

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.unused, self.then = nn.Linear(6, 4), nn.Linear(3, 3), then
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
        return self.then(self.linear(x))


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Any]) -> Tensor:
        return pair[0].mean(1)


def branching(h: Tensor) -> Tensor:
    return h if h.sum() > 0 else -h


def random_drop(h: Tensor) -> Tensor:
    return nn.functional.dropout(h, 0.5)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(branching), "data-dependent control flow"),
        (lambda: OwnForward(lambda h: h * h.max().item()), "item()"),
        (lambda: OwnForward(random_drop), "random operation"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.AlphaDropout(0.1)), "random operation"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1, inplace=True)), "random oper"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout1d(0.1)), "takes 3 dimensions"),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.LSTM(3, 4), First()), "LSTM holds"),
        (HiddenWeight, "`kept` of HiddenWeight holds weights that are not registered"),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), encoder()), "random operation"),
    ],
)
def test_what_cannot_be_stacked_says_why(
    make: Callable[[], nn.Module], reason: str, log: pytest.LogCaptureFixture
) -> None:
    network = make()
    examiner = StackabilityProbe(torch.randn(8, 6))
    with log.at_level("INFO", logger="optuna"):
        for _ in range(2):
            found = examiner(network)
            assert found.obstacle is not None and reason in found.obstacle
    (line,) = log.messages
    assert "cannot be stacked and trains alone" in line and reason in line
    assert isinstance(examiner.stack([network]), SingleNetworkStack)
    with pytest.raises(ValueError, match="must share a structure"):
        examiner.stack([make(), make()])


def test_other_structures_cannot_share_a_stack() -> None:
    examiner = StackabilityProbe(torch.randn(8, 6))
    with pytest.raises(ValueError, match="their structures differ"):
        examiner.stack([nn.Linear(6, 4), nn.Linear(6, 3)])


@pytest.mark.parametrize("then", [nn.Identity(), branching])
def test_buffers_that_are_replaced_and_weights_that_are_not_used(then: Any) -> None:
    x = torch.randn(8, 6)
    examiner = StackabilityProbe(x)
    stack = examiner.stack([Counter(then)])
    for _ in range(3):
        stack(x).sum().backward()
    stack.eval()(x)
    assert float(stack.member(0).get_buffer("steps")) == 3.0
    assert float(stack.state_dict()["of/steps"]) == 3.0
    if isinstance(stack, VmapStack):
        assert examiner(Counter(then)).weights == 28
        assert sum(p.numel() for p in stack.parameters()) == 28


@pytest.mark.parametrize("alone", [False, True])
def test_a_batch_of_one_uses_the_running_estimates(alone: bool) -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    stack = SingleNetworkStack(plain, 2) if alone else VmapStack([plain], 2)
    plain = stack.member(0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain.train()(torch.ones(1, 6))
    before = stack.member(0).state_dict()
    assert_close(stack(torch.ones(1, 6))[0], plain.eval()(torch.ones(1, 6)), FLOAT64)
    for name, tensor in stack.member(0).state_dict().items():
        assert_close(tensor, before[name], EXACT)
    stack(torch.randn(8, 6))  # and learns again from a batch that has a spread
    assert int(stack.member(0).get_buffer("1.num_batches_tracked")) == 1


def test_what_trains_alone_takes_its_chance_from_the_noise() -> None:
    def noise_of(seed: int) -> Callable[[int, int], Tensor]:
        source = torch.Generator().manual_seed(seed)
        return lambda batch, width: torch.rand(batch, width, generator=source)

    stack = StackabilityProbe(torch.randn(8, 6)).stack([OwnForward(random_drop)])
    assert isinstance(stack, SingleNetworkStack)
    x, state = torch.randn(8, 6), torch.random.get_rng_state()
    first, noise = stack(x, noise_of(0)), noise_of(0)
    assert_close(stack(x, noise), first, EXACT)
    assert not torch.equal(stack(x, noise), first)  # the next step has its own
    assert not torch.equal(stack(x, noise_of(1)), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="must train alone"):
        stack.append(stack)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(5, 4), "shapes cannot be multiplied"),
        (lambda: OwnForward(lambda h: h.sum()), r"a row for each example.*gave \(\)"),
        (lambda: OwnForward(lambda h: (h, h)), "a row for each example.*tuple"),
        (lambda: nn.Flatten(), "must have weights to train"),
        (lambda: OwnForward(Uncopyable()), "`copy.deepcopy` can copy"),
    ],
)
def test_a_network_that_makes_no_sense(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        StackabilityProbe(torch.randn(8, 6))(make())


class Uncopyable:
    def __call__(self, h: Tensor) -> Tensor:
        return h

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("one of its kind")


def test_sizes() -> None:
    found = StackabilityProbe(torch.randn(8, 1, 6, 6))(convolutional())
    assert found.obstacle is None and found.outputs == (CLASSES,)
    # Two operations per weight and place: 36 places of the first layer, 16 of the second.
    assert found.flops == 2 * (36 * 36 + 216 * 16 + 24 * CLASSES)
    assert found.activations_per_example == 4 * 4 * 36 + 4 * 6 * 16 + 24 + 24 + CLASSES
    assert found.weights == sum(p.numel() for p in convolutional().parameters())
