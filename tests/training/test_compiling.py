"""`compile=True`: the same training by code that torch makes."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from optuna_nnhp import optimize
from optuna_nnhp.templates import OwnNetwork
from optuna_nnhp.training import compiling
from optuna_nnhp.training.noise import Noise
from tests.tiny import classes
from tests.tolerance import FLOAT32
from tests.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of itself


def network(params: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Dropout(params["dropout"]), nn.Linear(8, 2)
    )


def losses(compile: bool) -> list[list[float]]:
    problem = OwnNetwork(network, *classes(), fixed={"epochs": 3}, compile=compile)
    rates = (0.0, 0.3, 0.6)
    members = [problem.member(i, problem.defaults() | {"dropout": p}) for i, p in enumerate(rates)]
    cohort = problem.cohort(members)
    first = cohort.train_round()
    cohort.keep([0, 2])
    second = cohort.train_round()
    assert first is not None and second is not None
    return [first.train_loss, second.train_loss]


def test_compiled_steps_are_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, make = [], torch.compile

    def noted(function: Any) -> Any:
        calls.append(function)
        return make(function)

    monkeypatch.setattr(torch, "compile", noted)
    plain = losses(compile=False)
    assert not calls
    for ours, theirs in zip(losses(compile=True), plain, strict=True):
        assert_close(torch.tensor(ours), torch.tensor(theirs), FLOAT32)
    assert calls


def test_a_study_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    wishes: dict[str, Any] = {"n_trials": 3, "storage": None, "fixed": {"epochs": 2}}
    X, y = classes()
    values = [
        [t.value for t in optimize(network=network, X=X, y=y, compile=c, **wishes).study.trials]
        for c in (True, False)
    ]
    assert values[0] == values[1]


def test_traced_noise_is_the_same_noise() -> None:
    noise = Noise([7, 2**64 - 3], torch.tensor([0, 1, 1]), step=5)
    traced = noise.traced()
    for width in (4, 9, 2):
        assert torch.equal(noise(3, width), traced(3, width))


def test_without_a_compiler_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`compile` must be False without a C\+\+ compiler"):
        optimize("dnn", *classes(), n_trials=1, storage=None, compile=True)
    assert compiling.check_compile(False) is False
