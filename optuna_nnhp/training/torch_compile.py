"""Optional `torch.compile` for the forward and backward pass of a cohort."""

from __future__ import annotations

from collections.abc import Callable
import os
import shutil

import torch
from torch import Tensor

from optuna_nnhp.errors import short_repr
from optuna_nnhp.networks.noise import DropoutNoise

# Torch compiles a function anew for each number of members, architecture and number of distinct
# rounds. After its default of 8 compilations it would run the function without compiling it.
MAX_RECOMPILES = 256


def check_compile(compile: object, device: torch.device) -> bool:
    """Check the argument `compile`, and return it.

    Raises:
        ValueError: If `compile` is not a bool, or if it is True, the device is the CPU and there
            is no C++ compiler.

    Example:
        >>> check_compile(False, torch.device("cpu"))
        False
    """
    if not isinstance(compile, bool):
        raise ValueError(f"`compile` must be True or False, but got {short_repr(compile)}.")
    if compile and device.type == "cpu":
        compilers = os.environ.get("CXX", "c++"), "g++", "clang++", "cl"
        if not any(shutil.which(name) for name in compilers):
            raise ValueError("`compile` must be False without a C++ compiler, but got True.")
    return compile


def compile_forward(
    forward: Callable[[Tensor, DropoutNoise], Tensor],
) -> Callable[[Tensor, DropoutNoise], Tensor]:
    """Compile a stack's forward pass, and with it the backward pass, by `torch.compile`.

    The code is compiled at the first call with each shape.
    """
    compiled = torch.compile(forward)

    def call(x: Tensor, noise: DropoutNoise) -> Tensor:
        limits = {"recompile_limit": MAX_RECOMPILES, "accumulated_recompile_limit": MAX_RECOMPILES}
        with torch._dynamo.config.patch(limits):
            out: Tensor = compiled(x, noise.for_torch_compile())
            return out

    return call
