"""Where every random number comes from: keys, never a global state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator

INITIALIZATION, NOISE = 1, 2  # what the numbers are for: the second key


def generator(*keys: int, device: torch.device | str = "cpu") -> Generator:
    """A source of random numbers that depends on its keys alone.

    Args:
        keys:
            Non-negative integers: the study's seed, what the numbers are for, then the trial
            or the epoch.
        device:
            Where the numbers are drawn.

    Example:
        >>> a, b = generator(0, NOISE, 3), generator(0, NOISE, 3)
        >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
        True

    Source:
        O'Neill's seed sequences as in `numpy.random.SeedSequence`: close keys give unrelated
        streams.
    """
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)  # torch takes 63 bits


def check_seed(seed: object) -> int:
    """A seed that NumPy, torch and Optuna all take, or a ValueError."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**32 - 1, but got {seed!r}.")
    return seed
