"""`torch.compile` for the steps of a cohort, if a user wants it."""

from __future__ import annotations

from collections.abc import Callable
import os
import shutil

import torch
from torch import Tensor

from optuna_nnhp.training.noise import Noise


def check_compile(wanted: bool) -> bool:
    """Whether to use `torch.compile`, where that can work.

    Raises:
        ValueError: If it is wanted, and neither a C++ compiler nor CUDA is there.

    Example:
        >>> check_compile(False)
        False
    """
    if wanted and not torch.cuda.is_available():
        compilers = os.environ.get("CXX", "c++"), "g++", "clang++", "cl"
        if not any(shutil.which(name) for name in compilers):
            raise ValueError("`compile` must be False without a C++ compiler, but got True.")
    return bool(wanted)


def compiled(forward: Callable[[Tensor, Noise], Tensor]) -> Callable[[Tensor, Noise], Tensor]:
    """A stack's forward pass, and so its backward pass, as `torch.compile` makes them.

    The code is made at the first call with each shape.
    """
    made = torch.compile(forward)
    return lambda x, noise: made(x, noise.traced())
