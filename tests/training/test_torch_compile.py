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
from optuna_nnhp.engine.library import ENGINE_VARIABLE
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.training import torch_compile
from tests.tiny import SHAPE
from tests.tiny import classes
from tests.tolerance import FLOAT32
from tests.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of itself


def network(params: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Dropout(params["dropout"]), nn.Linear(8, 2)
    )


class Odd(nn.Module):
    """Takes a number out of a tensor, which no stack can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1.0 if float(x.detach().sum()) < 1e9 else 0.5)


def odd(params: Mapping[str, Any]) -> nn.Module:
    return Odd()


def losses(compile: bool) -> list[list[float]]:
    problem = CustomNetworkTemplate(network, *classes(), fixed={"epochs": 3}, compile=compile)
    rates = (0.0, 0.3, 0.6)
    members = [problem.member(i, problem.defaults() | {"dropout": p}) for i, p in enumerate(rates)]
    cohort = problem.cohort(members)
    first = cohort.train_round()
    cohort.select([0, 2])
    second = cohort.train_round()
    assert first is not None and second is not None
    return [first.train_loss, second.train_loss]


def test_compiled_steps_are_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, make = [0], torch.compile

    def noted(function: Any) -> Any:
        made = make(function)

        def call(*arguments: Any) -> Any:
            calls[0] += 1
            return made(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", noted)
    plain = losses(compile=False)
    assert not calls[0]
    for ours, theirs in zip(losses(compile=True), plain, strict=True):
        assert_close(torch.tensor(ours), torch.tensor(theirs), FLOAT32)
    assert calls[0] >= 2  # a round each


@pytest.mark.parametrize("template", ["gpt", "dnn", "alone"])
def test_all_kinds_of_stacks_can_be_compiled(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    values = []
    for compile in (True, False):
        settings: dict[str, Any] = {"storage": None, "n_trials": 3, "compile": compile}
        if template == "gpt":
            fixed = {"iterations": 9, "layers": 1, "heads": 2, "context": 16, "batch_tokens": 64}
            result = optimize("gpt", "to be or not to be\n" * 99, fixed=fixed, **settings)
        elif template == "dnn":
            result = optimize("dnn", *classes(), fixed={"epochs": 2}, **settings)
        else:
            one = {"network": odd, "fixed": {"epochs": 2}}
            result = optimize(X=classes()[0], y=classes()[1], **one, **settings)
        values.append([list(t.intermediate_values.values()) for t in result.study.trials])
    assert all(len(v) for v in values[0])
    for ours, theirs in zip(*values, strict=True):
        assert ours == pytest.approx(theirs, rel=FLOAT32["rtol"])


def test_code_is_made_for_every_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def backend(module: Any, inputs: Any) -> Any:
        made.append(len(inputs))
        return module

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    problem = DNNTemplate(*classes(), fixed={"epochs": 20} | SHAPE, compile=True)
    cohort = problem.cohort([problem.member(i, problem.defaults()) for i in range(12)])
    counts = []
    for left in range(11, 0, -1):
        before = len(made)
        assert cohort.train_round() is not None
        counts.append(len(made) - before)
        cohort.select(list(range(left)))
    assert min(counts) > 0  # torch itself stops after 8


def test_a_study_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings: dict[str, Any] = {"n_trials": 3, "storage": None, "fixed": {"epochs": 2}}
    X, y = classes()
    values = [
        [t.value for t in optimize(network=network, X=X, y=y, compile=c, **settings).study.trials]
        for c in (True, False)
    ]
    assert values[0] == values[1]


def test_traced_noise_is_the_same_noise() -> None:
    noise = DropoutNoise([7, 2**64 - 3], torch.tensor([0, 1, 1]), step=5)
    for_torch_compile = noise.for_torch_compile()
    for width in (4, 9, 2):
        assert torch.equal(noise(3, width), for_torch_compile(3, width))


def test_without_a_compiler_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"`compile` must be False without a C\+\+ compiler"):
        optimize("dnn", *classes(), n_trials=1, storage=None, compile=True, device="cpu")
    cpu = torch.device("cpu")
    assert torch_compile.check_compile(False, cpu) is False
    with pytest.raises(ValueError, match="`compile` must be True or False, but got 'max'"):
        torch_compile.check_compile("max", cpu)
