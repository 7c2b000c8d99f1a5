"""The compiled engine computes what torch's operations compute."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import pytest
import torch

from optuna_nnhp.engine import mlp
from optuna_nnhp.engine.gpt import CompiledGPTSubset
from optuna_nnhp.engine.library import ENGINE_VARIABLE
from optuna_nnhp.engine.mlp import CompiledMLP
from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Task
from tests.members import PLAIN
from tests.members import ROWS
from tests.members import task
from tests.members import varied
from tests.tolerance import EXACT
from tests.tolerance import FLOAT32
from tests.tolerance import FLOAT64
from tests.tolerance import ROUNDING
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(
    mlp.load_library() is None and "CI" not in os.environ, reason="there was no C compiler"
)

Curve = list[tuple[float, ...]]


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def curves(cohort: Cohort, rounds: int) -> dict[int, Curve]:
    """Losses and values of each member, by trial number."""
    found: dict[int, Curve] = {m.number: [] for m in cohort.members}
    for _ in range(rounds):
        scores = cohort.train_round()
        assert scores is not None
        rows = zip(scores.train_loss, scores.validation_loss, scores.value, strict=True)
        for place, row in zip(scores.indices, rows, strict=True):
            found[cohort.members[place].number].append(row)
    return found


def evaluate(cohort: Cohort, indices: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """Outputs of some members by the engine that the cohort uses."""
    apply = cohort.apply(torch.tensor(list(indices)))
    assert not isinstance(apply, CompiledGPTSubset)
    with torch.no_grad():
        return apply(x)


def with_and_without_engine(
    members: list[Member], chosen: Task, monkeypatch: pytest.MonkeyPatch
) -> list[Cohort]:
    """The same cohort with the engine and without."""
    cohorts = [Cohort(members, chosen)]
    assert cohorts[0].compiled_mlp is not None
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    cohorts.append(Cohort(members, chosen))
    assert cohorts[1].compiled_mlp is None
    return cohorts


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_everything_varied_with_dropout_is_torchs(
    normalization: str,
    regression: bool,
    layers: int,
    float64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    static = {"normalization": normalization, "hidden_layers": layers, "epochs": 3}
    members = varied(45, regression=regression, **static)  # every activation with every optimizer
    with_engine, without = with_and_without_engine(
        members, task(regression=regression), monkeypatch
    )
    expected = curves(without, 3)
    for number, curve in curves(with_engine, 3).items():
        assert_close(curve, expected[number], FLOAT64)
    assert_close(with_engine.flat.weights, without.flat.weights, FLOAT64)


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
def test_in_the_precision_of_studies(normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = varied(45, normalization=normalization, learning_rate=1e-3)
    with_engine, without = with_and_without_engine(members, task(), monkeypatch)
    expected = curves(without, 3)
    for number, curve in curves(with_engine, 3).items():
        assert_close([row[:2] for row in curve], [row[:2] for row in expected[number]], FLOAT32)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 99, "normalization": "batch"},  # the last batch is a single row
        {"batch_size": 1000},
        {"hidden_layers": 64, "width": 2},
        {"width": 1, "normalization": "layer"},
        {"width": 33, "width_shape": "funnel", "hidden_layers": 4, "dropout": 0.5},
        {"iterations": 5},
        {"focal_gamma": 0.0, "loss": "focal", "label_smoothing": 0.3},
        {"momentum": 0.0, "optimizer": "nesterov"},
        {"momentum": 0.0, "beta2": 0.0, "optimizer": "rmsprop"},
        {"weight_decay": 0.5, "optimizer": "adam", "clip_norm": 1e-3, "l1": 0.1},
    ],
    ids=str,
)
def test_the_edges(
    changes: dict[str, Any], float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [Member(i, i, PLAIN | {"epochs": 2, "dropout": 0.2} | changes) for i in range(2)]
    with_engine, without = with_and_without_engine(members, task(), monkeypatch)
    rounds = 1 if "iterations" in changes else 2
    expected = curves(without, rounds)
    for number, curve in curves(with_engine, rounds).items():
        assert_close(curve, expected[number], FLOAT64)
    assert with_engine.iterations == without.iterations


def test_buffers_of_batch_norm_follow_too(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Member(i, i, PLAIN | {"normalization": "batch"}) for i in range(2)]
    cohorts = with_and_without_engine(members, task(), monkeypatch)
    for cohort in cohorts:
        curves(cohort, 2)
    fast, slow = (cohort.network.norms[1] for cohort in cohorts)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(fast, name)[:, :20], getattr(slow, name)[:, :20], FLOAT64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_exact_to_rounding(name: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -100, 0, 100, 1e4])])
    arrays = Arrays(x[:, None], torch.zeros(len(x)), x[:, None], torch.zeros(len(x)))
    plain = task(regression=True)
    params = PLAIN | {"width": 1, "hidden_layers": 1, "activation": name, "loss": "mse"}

    def build(members: Any) -> Any:
        network = plain.build(members)
        for linear in network.linears:
            linear.weight.data = torch.ones(1, 1, 1)
            linear.bias.data.zero_()
        network.inputs = 1
        return network

    chosen = Task(arrays, build, plain.loss, lambda out: out.mean((1, 2)), False, 0)
    cohort = Cohort([Member(0, 0, params)], chosen)
    assert cohort.compiled_mlp is not None
    out = evaluate(cohort, [0], x[:, None])[0, :, 0]
    assert_close(out, ACTIVATIONS[name].module()(x), ROUNDING)


def test_threads_and_mates_change_no_bit() -> None:
    members, before = varied(9), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [curves(Cohort([member], task()), 3) for member in members]
        torch.set_num_threads(3)
        together = curves(Cohort(members, task()), 3)
    finally:
        torch.set_num_threads(before)
    for curve in alone:
        for number, rows in curve.items():
            assert_close(together[number], rows, EXACT)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("batch_size", [1, 16, 33])
def test_two_threads_that_share_a_members_steps(
    regression: bool, batch_size: int, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, before = task(regression=regression), torch.get_num_threads()
    members = varied(10, regression=regression, batch_size=batch_size, epochs=2)
    teams: list[bool] = []
    is_team = CompiledMLP._is_team

    def noted(self: CompiledMLP, *arguments: Any) -> bool:
        teams.append(is_team(self, *arguments))
        return teams[-1]

    try:
        torch.set_num_threads(1)
        expected = curves(Cohort(members, chosen), 2)
        torch.set_num_threads(2)
        monkeypatch.setattr(mlp, "MIN_TEAM_FLOPS", 0.0)
        monkeypatch.setattr(CompiledMLP, "_is_team", noted)
        for member in members:
            found = curves(Cohort([member], chosen), 2)
            assert_close(found[member.number], expected[member.number], FLOAT64)
    finally:
        torch.set_num_threads(before)
    assert any(teams)


@pytest.mark.parametrize(
    "width", [1, 53, 64, 700]
)  # 700: more inputs than a product packs at once
def test_sharing_steps_changes_no_bit_of_the_weights(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = varied(9, batch_size=32, width=width, hidden_layers=3)
    before = torch.get_num_threads()
    weights = []
    monkeypatch.setattr(mlp, "MIN_TEAM_FLOPS", 0.0)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            alone = [Cohort([member], task()) for member in members]
            for cohort in alone:
                curves(cohort, 2)
            weights.append([cohort.flat.weights for cohort in alone])
    finally:
        torch.set_num_threads(before)
    for solo, team in zip(*weights, strict=True):
        assert_close(team, solo, EXACT)


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_networks_with_normalization_are_not_shared(
    normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "MIN_TEAM_FLOPS", 0.0)
    cohort = Cohort(varied(1, normalization=normalization), task())
    assert cohort.compiled_mlp is not None
    assert not cohort.compiled_mlp._is_team(cohort.compiled_mlp._network, 1)


def test_training_stops_when_time_is_out(engine: str) -> None:
    asked: list[int] = []

    def out_of_time() -> bool:
        asked.append(1)
        return len(asked) > 2

    cohort = Cohort([Member(0, 0, PLAIN | {"batch_size": 1, "width": 512})], task(rows=8000))
    assert cohort.train_round(out_of_time) is None
    assert 0 < cohort.iterations[0] < 8000


def test_some_members_are_evaluated_as_all_are(engine: str) -> None:
    cohort = Cohort(varied(5), task())
    x = cohort.task.arrays.valid_x
    everyone, some = evaluate(cohort, range(5), x), evaluate(cohort, [3, 1], x)
    assert_close(some, everyone[[3, 1]], EXACT if engine == "c" else FLOAT32)


def test_an_evaluation_longer_than_a_slice_of_training_is_complete(engine: str) -> None:
    cohort = Cohort([Member(i, i, PLAIN | {"width": 256}) for i in range(8)], task())
    x = torch.randn(20_000, 6)
    outputs = evaluate(cohort, range(8), x)
    assert_close(outputs[5], cohort.network.member(5)(x), FLOAT32)


def test_the_slices_of_a_round_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = curves(Cohort(varied(9), task()), 2)
    monkeypatch.setattr(mlp, "TIME_SLICES", (2e-5, 2e-5))
    assert curves(Cohort(varied(9), task()), 2) == whole


def test_what_it_cannot_do_is_left_to_torch() -> None:
    network = task().build(varied(2))
    x, y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)
    assert CompiledMLP.supports(network, x, y)
    assert not CompiledMLP.supports(network, x.double(), y)
    assert not CompiledMLP.supports(network, x.to("meta"), y)
    assert not CompiledMLP.supports(torch.nn.Linear(6, 3), x, y)  # type: ignore[arg-type]


def test_wrong_labels_and_row_numbers_do_not_reach_the_c_code() -> None:
    chosen = task()
    arrays = chosen.arrays
    for wrong in (-1, 3):
        labels = arrays.train_y.clone()
        labels[5] = wrong
        broken = dataclasses.replace(arrays, train_y=labels)
        cohort = Cohort(varied(2), dataclasses.replace(chosen, arrays=broken))
        with pytest.raises(ValueError, match=f"All labels must be from 0 to 2, but got {wrong}."):
            cohort.train_round()
    cohort = Cohort(varied(2), chosen)
    engine, size = cohort.compiled_mlp, cohort.batches.size
    assert engine is not None
    order, rates = torch.arange(ROWS), torch.zeros(-(-ROWS // size), 2, dtype=torch.float64)

    def train(x: torch.Tensor, y: torch.Tensor, rows: list[torch.Tensor]) -> None:
        engine.train(x, y, rows, size, [1, 2], rates, lambda: False)

    for row in (-1, ROWS):
        wrong_order = torch.cat([order[:-1], torch.tensor([row])])
        with pytest.raises(IndexError, match=f"row numbers must be from 0 to 99, but got {row}"):
            train(arrays.train_x, arrays.train_y, [order, wrong_order])
    with pytest.raises(ValueError, match=r"`x` must be torch.float32 of shape \(100, 6\)"):
        train(arrays.train_x[:, :5], arrays.train_y, [order, order])
    with pytest.raises(ValueError, match="must have the same number of examples"):
        train(arrays.train_x, arrays.train_y[:-1], [order, order])
    with pytest.raises(ValueError, match=r"`rates` must be float64 of shape \(6, 2\)"):
        train(arrays.train_x, arrays.train_y, [order[:90], order[:90]])
    with pytest.raises(ValueError, match=r"`x` must be torch\.float32"):
        engine.evaluate(arrays.valid_x.double(), [0])
    train(arrays.train_x, arrays.train_y, [order, order])


def test_targets_of_a_regression_must_be_floating_point_numbers() -> None:
    chosen = task(regression=True)
    arrays = dataclasses.replace(chosen.arrays, train_y=chosen.arrays.train_y.long())
    cohort = Cohort(varied(2, regression=True), dataclasses.replace(chosen, arrays=arrays))
    with pytest.raises(ValueError, match=r"Targets must be torch\.float32, but got torch\.int64"):
        cohort.train_round()


def test_noise_is_uniform_and_unrelated() -> None:
    which = torch.zeros(1, dtype=torch.long)
    noise = DropoutNoise([5], which, step=3)
    first, second = noise(500, 200), noise(500, 200)
    for drawn in (first, second):
        assert float(drawn.min()) > 0 and float(drawn.max()) < 1
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.005)
        assert float(drawn.var()) == pytest.approx(1 / 12, abs=0.001)
        counts = torch.histc(drawn, 100, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 160  # chi squared of 99: p = 1e-4
    others = [second, first.roll(1, 0), first.roll(1, 1), DropoutNoise([5], which, 4)(500, 200)]
    others.append(DropoutNoise([6], which, 3)(500, 200))
    for other in others:
        pair = torch.stack([first.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.013  # four standard deviations
