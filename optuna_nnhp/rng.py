"""Random numbers: they follow from keys, never from a global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import threading

import numpy as np
import torch
from torch import Generator

# The second key: what the random numbers are used for.
INITIALIZATION, NOISE, WINDOWS, REPLICATES, WORKERS = 1, 2, 3, 4, 5
_global_state = threading.RLock()


def generator(*keys: int, device: torch.device | str = "cpu") -> Generator:
    """Return a random number generator that depends on its keys alone.

    Args:
        keys:
            Non-negative integers: the study's seed, what the numbers are for, then the trial
            or the epoch.
        device:
            The device of the generator.

    Example:
        >>> a, b = generator(0, NOISE, 3), generator(0, NOISE, 3)
        >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
        True

    Source:
        O'Neill's seed sequences as in `numpy.random.SeedSequence`: close keys give unrelated
        streams.
    """
    return torch.Generator(device).manual_seed(mix_keys(*keys) >> 1)  # torch takes 63 bits


def mix_keys(*keys: int) -> int:
    """Hash some keys to 64 bits; see `generator`.

    Example:
        >>> (
        ...     mix_keys(0, NOISE, 3) == mix_keys(0, NOISE, 3),
        ...     mix_keys(0, NOISE, 3) == mix_keys(0, NOISE, 4),
        ... )
        (True, False)
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def check_seed(seed: object) -> int:
    """Return a seed that NumPy, torch and Optuna accept, or raise a ValueError."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**32 - 1, but got {seed!r}.")
    return seed


@contextmanager
def global_rng_from(source: Generator) -> Iterator[None]:
    """Seed torch's global random numbers from a generator; restore them at exit.

    For code that draws global random numbers: a user's network, torch's own layers.
    One thread at a time, since there is only one global state.

    Args:
        source:
            The generator whose seed is used; nothing is drawn from it.

    Example:
        >>> numbers = []
        >>> for _ in range(2):
        ...     with global_rng_from(generator(0, INITIALIZATION, 3)):
        ...         numbers.append(float(torch.rand(1)))
        >>> numbers[0] == numbers[1]
        True
    """
    devices = list(range(torch.cuda.device_count()))
    with _global_state, torch.random.fork_rng(devices):
        torch.manual_seed(source.initial_seed())
        yield
