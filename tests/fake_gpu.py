"""Train and evaluate every template on a GPU that does not exist: ``python -m tests.fake_gpu``.

Under torch's `FakeTensorMode` tensors have a device, a dtype and a shape, but no values; an
operation that mixes devices raises. With a CUDA build of torch the device is ``cuda``. A CPU build
has no autograd for ``cuda``, so there it is a device that torch lets Python register.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from optuna_nnhp.hyperparameters.optimizer import UPDATE_RULES
from optuna_nnhp.templates.problem_spec import make_problem
from tests.tiny import Array
from tests.tiny import classes
from tests.tiny import numbers

TABLE: dict[str, Any] = {"epochs": 2, "batch_size": 32, "width": 20, "hidden_layers": 2}
TABLE |= {"dropout": 0.2, "weight_decay": 0.01, "l1": 0.001, "clip_norm": 1.0}
TEXT: dict[str, Any] = {"iterations": 9, "context": 32, "batch_tokens": 64, "layers": 1}
TEXT |= {"heads": 2, "dropout": 0.1, "weight_decay": 0.01, "clip_norm": 1.0}


def register_device() -> str:
    """Return the name of a device that fake tensors may have, and make torch accept it."""
    if torch.backends.cuda.is_built():
        return "cuda"
    backend_registration._setup_privateuseone_for_python_backend("fakegpu")
    return "fakegpu"


def move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` as one operation: torch's own initializes the device first."""
    kwargs.pop("copy", None)
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or tensor.device, dtype or tensor.dtype
    if (device, dtype) == (tensor.device, tensor.dtype):
        return tensor
    copy: Tensor = torch.ops.aten._to_copy.default(tensor, device=device, dtype=dtype)
    return copy


def move_module(module: nn.Module, device: Any) -> nn.Module:
    """`Module.to` with new parameters: torch's own swaps fake tensors, which it cannot."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            moved = move(parameter.detach(), device)
            setattr(part, name, nn.Parameter(moved, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, move(buffer, device))
    return module


def fused(*lists: list[Tensor], **options: Any) -> None:
    """Torch's fused update rules, which know no fake tensors: their tensors share a device."""
    devices = {tensor.device for tensors in lists for tensor in tensors}
    assert len(devices) == 1, devices


def allclose(one: Tensor, other: Tensor, **options: Any) -> bool:
    """`torch.allclose` without values: the tensors share a device."""
    assert one.device == other.device
    return True


def images() -> tuple[Array, Array]:
    """Two classes of pictures."""
    X = np.random.default_rng(0).normal(size=(80, 1, 4, 4)).astype(np.float32)
    return X, np.where(X[:, 0, 0, 0] > 0, "bright", "dark")


def convolutional(params: Mapping[str, Any]) -> nn.Module:
    """A user's own network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Dropout(params["dropout"]), nn.Flatten(), nn.Linear(64, 2)),
    )


def problems(device: str) -> Iterator[Any]:
    """Problems of all templates, which together have every update rule and normalization."""
    for optimizer, normalization in zip(
        UPDATE_RULES, ["none", "batch", "layer", "none", "batch"], strict=True
    ):
        fixed = {**TABLE, "optimizer": optimizer, "normalization": normalization}
        for X, y in (classes(), numbers()):
            yield make_problem("dnn", None, X, y=y, fixed=fixed, device=device)
    fixed = {"epochs": 2, "batch_size": 32, "dropout": 0.2}
    X, y = images()
    yield make_problem("dnn", convolutional, X, y=y, fixed=fixed, device=device)
    for optimizer in ("muon", "adamw"):
        fixed = {**TEXT, "optimizer": optimizer}
        text = "To be or not to be. " * 200
        yield make_problem("gpt", None, text, fixed=fixed, device=device)


def train(problem: Any, device: str) -> None:
    """Train and evaluate three members, let one leave, one be copied and restarted."""
    cohort = problem.cohort([problem.member(n, problem.defaults()) for n in range(3)])
    assert {p.device.type for p in cohort.network.parameters()} == {device}
    for _ in range(2):
        scores = cohort.train_round()
        assert len(scores.value) == 3
    cohort.select([2, 0])
    cohort.resume_from([0, 0], cohort.members, fresh=[1])
    if cohort.can_append:
        cohort.append([problem.member(3, problem.defaults())])
    cohort.train_round()
    cohort.best_network(0)


def main() -> None:
    """Run all; where Python asks for values it reads lists of 1, else 0."""
    device = register_device()
    reads: dict[str, Any] = {
        "tolist": lambda self: np.ones(self.shape, int).tolist(),
        "item": lambda self: 0,
        "__bool__": lambda self: False,
        "__int__": lambda self: 0,
        "__float__": lambda self: 0.0,
    }
    for name, read in reads.items():
        setattr(FakeTensor, name, read)
    close = mock.patch.object(torch, "allclose", allclose)
    count = mock.patch("optuna_nnhp.templates.gpt.count_predicted_bytes", return_value=99)
    free = mock.patch("optuna_nnhp.templates.supervised.free_memory", return_value=2**34)
    to = mock.patch.object(Tensor, "to", move)
    module_to = mock.patch.object(nn.Module, "to", move_module)
    with FakeTensorMode(allow_non_fake_inputs=True), free, to, module_to, close, count:
        # Let `torch.tensor(values, device=...)` make a CPU tensor and move it.
        torch._C._set_only_lift_cpu_tensors(True)
        fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # no tensor has a known value
        for name in ("_fused_sgd_", "_fused_adamw_", "_fused_adagrad_"):
            setattr(torch, name, fused)
        for problem in problems(device):
            train(problem, device)


if __name__ == "__main__":
    main()
