"""The benchmarks run, and their plain side trains what ours does; never how fast."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
import pandas as pd
import pytest
import torch

from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import RegressionLoss
from tests.benchmarks import steps
from tests.benchmarks import study
from tests.benchmarks.plain import Step
from tests.benchmarks.plain import build
from tests.benchmarks.plain import loss_of
from tests.benchmarks.sides import Side
from tests.benchmarks.sides import Watch
from tests.members import PLAIN


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert {"threads", "cpus", "date"} <= set(record["machine"])
    return record


@pytest.fixture
def table(tmp_path: Path) -> Path:
    X = np.random.default_rng(0).normal(size=(120, 3))
    path = tmp_path / "table.csv"
    label = np.where(X[:, 0] > 0, "up", "down")
    pd.DataFrame(X, columns=list("abc")).assign(label=label).to_csv(path, index=False)
    return path


def test_steps_are_measured_on_all_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.json"
    asked = ["--shapes", "16x1/8:2", "32x2/8:3", "--steps", "3", "--repeats", "2"]
    assert steps.main([*asked, "--json", str(path)]) == 0
    first, second = read(path)["rows"]
    assert (first["shape"], second["k"]) == ("16 x 1, batch 8, k 2", 3)
    assert first["flops"] == 6 * 8 * (6 * 16 + 16 * 3)
    for key in ("loader", "loop", "bare", "varied", "gemm", "bmm", "loop/bare", "loader/varied"):
        assert first[key] > 0
    assert 0 < second["varied share of peak"] < 1
    assert "16 x 1, batch 8, k 2" in capsys.readouterr().out


def test_invalid_shape_is_rejected() -> None:
    with pytest.raises(SystemExit):
        steps.main(["--shapes", "64"])


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_studies_are_compared(
    table: Path, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.json"
    asked = ["--data", str(table), "--target", "label", "--trials", "6", "--epochs", "3"]
    asked += ["--storage", storage, "--one-process", "--json", str(path)]
    assert study.main(asked) == 0
    record = read(path)
    (data,) = record["data"].values()
    (run,) = data["runs"]
    for name in ("plain", "ours"):
        side = run[name]
        assert side["metric"] == "accuracy"
        assert side["complete"] > 0 and side["complete"] + side["pruned"] == 6
        assert 6 <= side["epochs"] <= 18
        assert side["told"][-1][1] == side["seen"][-1][1] == side["best"]
        assert side["seen"][0][0] <= side["told"][0][0]
    assert data["medians"]["rate.ratio"] > 0
    assert 0 < data["medians"]["share.training"] < 1
    assert 0 < data["medians"]["occupancy"] <= 1
    assert record["geometric mean of told ratios"] > 0
    assert "model-epochs per second" in capsys.readouterr().out


def test_pruning_saves_epochs(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "pruning.json"
    asked = ["--data", str(table), "--target", "label", "--trials", "10", "--epochs", "9"]
    asked += ["--pruning-effect", "--one-process", "--json", str(path)]
    assert study.main(asked) == 0
    (data,) = read(path)["data"].values()
    (run,) = data["runs"]
    assert run["unpruned"]["pruned"] == 0 < run["pruned"]["pruned"]
    assert 0 < data["share of epochs"] < 1


def test_csv_file_requires_a_target(table: Path) -> None:
    with pytest.raises(SystemExit):
        study.main(["--data", str(table)])


@pytest.mark.parametrize(
    "params",
    [
        {"loss": "cross_entropy", "label_smoothing": 0.0},
        {"loss": "cross_entropy", "label_smoothing": 0.2},
        {"loss": "focal", "label_smoothing": 0.0},
        {"loss": "focal", "label_smoothing": 0.2, "focal_gamma": 0.5},
        {"loss": "mse"},
        {"loss": "mae"},
        {"loss": "huber", "huber_delta": 0.5},
    ],
)
def test_plain_loss_equals_the_stacked_loss(params: Mapping[str, Any]) -> None:
    values = PLAIN | dict(params)
    source = torch.Generator().manual_seed(0)

    def one(number: float) -> torch.Tensor:
        return torch.tensor([float(number)])

    if values["loss"] in ("mse", "mae", "huber"):
        out, y = torch.randn(9, 1, generator=source), torch.randn(9, generator=source)
        is_mse, is_mae = (torch.tensor([values["loss"] == name]) for name in ("mse", "mae"))
        ours: Any = RegressionLoss(one(values["huber_delta"]), is_mse, is_mae)
        plain = loss_of("regression", values)
    else:
        out = torch.randn(9, 4, generator=source)
        y = torch.randint(4, (9,), generator=source)
        gamma = values["focal_gamma"] if values["loss"] == "focal" else 0.0
        ours = ClassificationLoss(one(gamma), one(values["label_smoothing"]))
        plain = loss_of("multiclass", values)
    torch.testing.assert_close(plain(out, y), ours(out[None], y)[0])


@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("more", [{}, {"l1": 1e-4, "clip_norm": 1.0, "dropout": 0.1}])
def test_plain_loop_learns(optimizer: str, normalization: str, more: Mapping[str, Any]) -> None:
    params = PLAIN | {"optimizer": optimizer, "normalization": normalization} | dict(more)
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = (x[:, 0] > 0).long()
    network, loss = build(params, 5, 2), loss_of("binary", params)
    step = Step(network, params, loss)
    before = float(loss(network(x), y).detach())
    for _ in range(30):
        step(x, y, 0.02)
    assert float(loss(network.eval()(x), y).detach()) < 0.5 * before


def test_only_complete_trials_count_for_the_best_value() -> None:
    study_ = optuna.create_study(direction="maximize")
    watch = Watch()
    for values, state in [
        ([0.1, 0.5], TrialState.COMPLETE),
        ([0.9], TrialState.PRUNED),
        ([0.4, 0.7], TrialState.COMPLETE),
    ]:
        trial = study_.ask()
        for value in values:
            watch.saw(trial.number, value)
        final = max(values) if state == TrialState.COMPLETE else None
        watch(study_, study_.tell(trial, final, state))
    side = Side("accuracy", maximize=True)
    watch.write(side, study_.trials)
    side.count(study_.trials, {2})
    assert [value for _, value in side.told] == [0.5, 0.7]
    assert [value for _, value in side.seen] == [0.1, 0.5, 0.7]
    assert side.reached(side.seen, 0.4) == side.seen[1][0]
    assert side.reached(side.told, 0.8) is None
    assert (side.complete, side.pruned, side.cut_short) == (1, 1, 1)
