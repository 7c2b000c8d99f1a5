"""`torch.compile` for the steps of a cohort, if a user wants it."""

from __future__ import annotations

from collections.abc import Callable
import os
import shutil

import torch
from torch import Tensor

from optuna_nnhp.errors import short_repr
from optuna_nnhp.networks.noise import DropoutNoise

# Codes of one function that torch keeps: one for each number of members, architecture and number
# of ages; after its own 8 it would go on without.
MAX_RECOMPILES = 256


def check_compile(wanted: object, device: torch.device) -> bool:
    """Whether to use `torch.compile`, where that can work.

    Raises:
        ValueError: If it is neither True nor False, or if it is wanted on the CPU and there is no
            C++ compiler.

    Example:
        >>> check_compile(False, torch.device("cpu"))
        False
    """
    if not isinstance(wanted, bool):
        raise ValueError(f"`compile` must be True or False, but got {short_repr(wanted)}.")
    if wanted and device.type == "cpu":
        compilers = os.environ.get("CXX", "c++"), "g++", "clang++", "cl"
        if not any(shutil.which(name) for name in compilers):
            raise ValueError("`compile` must be False without a C++ compiler, but got True.")
    return wanted


def compile_forward(
    forward: Callable[[Tensor, DropoutNoise], Tensor],
) -> Callable[[Tensor, DropoutNoise], Tensor]:
    """A stack's forward pass, and so its backward pass, as `torch.compile` makes them.

    The code is made at the first call with each shape.
    """
    compiled = torch.compile(forward)

    def call(x: Tensor, noise: DropoutNoise) -> Tensor:
        limits = {"recompile_limit": MAX_RECOMPILES, "accumulated_recompile_limit": MAX_RECOMPILES}
        with torch._dynamo.config.patch(limits):
            out: Tensor = compiled(x, noise.for_torch_compile())
            return out

    return call
