"""Dropout noise: a hash of step, layer, row and unit, so that all engines have the same noise."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

# engine/csrc/instruction_sets.h has the same constants, and elementwise.h the same hash, because
# the compiled engines compute the noise themselves.
ROW_KEY, UNIT_KEY = 0x9E3779B1, 0x85EBCA77
STEP_KEY, DRAW_KEY = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
UNIFORM_BITS = 23  # random bits of a number, so that it is exact in float32
MAX_COMPILED_DRAWS = 256  # the number of dropout layers that `torch.compile` supports


class DropoutNoise:
    """Uniform random numbers for the dropout layers of one step.

    Members that have finished equally many rounds share the numbers.

    Args:
        keys:
            A 64-bit key for each distinct number of finished rounds.
        key_index:
            The index in ``keys`` of each member's key.
        step:
            The index of the step in the round.

    Shape:
        - key_index: ``(k,)``.

    Example:
        >>> noise = DropoutNoise([7], torch.zeros(3, dtype=torch.long), step=0)
        >>> noise(4, 2).shape
        torch.Size([4, 2])

    Source:
        Steele, Lea and Flood 2014 (splitmix64, doi:10.1145/2714064.2660195) for the keys; Wellons'
        hash for 32 bits (github.com/skeeto/hash-prospector) for the numbers.
    """

    def __init__(self, keys: Sequence[int], key_index: Tensor, step: int) -> None:
        self._keys = [(key + step * STEP_KEY) & (2**64 - 1) for key in keys]
        self._key_index, self._draw = key_index, 0

    def __call__(self, batch: int, width: int) -> Tensor:
        """Draw numbers in (0, 1): ``(batch, width)``, or ``(k, batch, width)``."""
        positions = _hash_positions(batch, width, self._key_index.device)
        keys = [_draw_key(key, self._draw) for key in self._keys]
        return self._draw_uniform(positions, keys)

    def _draw_uniform(self, positions: Tensor, keys: Sequence[int | Tensor]) -> Tensor:
        drawn = [_uniform(positions, key) for key in keys]
        self._draw += 1
        return drawn[0] if len(drawn) == 1 else torch.stack(drawn)[self._key_index]

    def draw_keys(self, draws: int) -> tuple[Tensor, list[int]]:
        """Return the keys of the first draws for the compiled engines, and each member's row.

        Shape:
            - Output: ``(len(keys), draws)``, 32 bits each.
        """
        keys = [[_draw_key(key, draw) for draw in range(draws)] for key in self._keys]
        return torch.from_numpy(np.array(keys, dtype=np.uint32)), self._key_index.tolist()

    def for_torch_compile(self) -> DropoutNoise:
        """Return the same noise in a form that `torch.compile` can trace."""
        return _NoiseWithTensorKeys(self)


class _NoiseWithTensorKeys(DropoutNoise):
    """Holds the keys in a tensor, since compiled code treats Python numbers as constants."""

    def __init__(self, noise: DropoutNoise) -> None:
        self._key_index, self._draw = noise._key_index, 0
        draws = np.arange(MAX_COMPILED_DRAWS, dtype=np.uint64)
        keys = [_draw_key(np.uint64(key), draws).astype(np.int64) for key in noise._keys]
        self._key_table = torch.from_numpy(np.stack(keys)).to(self._key_index.device)

    def __call__(self, batch: int, width: int) -> Tensor:
        positions = _hash_positions.__wrapped__(batch, width, self._key_index.device)
        return self._draw_uniform(positions, [key[self._draw] for key in self._key_table])


def _draw_key(key: Any, draw: Any) -> Any:
    """Return a 32-bit key: splitmix64's finalizer without its last shift; accepts arrays."""
    z = (key + draw * DRAW_KEY) & (2**64 - 1)
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & (2**64 - 1)
    return z >> 32


@functools.lru_cache(maxsize=8)
def _hash_positions(batch: int, width: int, device: torch.device) -> Tensor:
    """Return the hash input of each row and unit, ``(batch, width)``."""
    rows = torch.arange(batch, device=device)[:, None] * ROW_KEY
    return (rows + torch.arange(width, device=device) * UNIT_KEY) & (2**32 - 1)


def _uniform(positions: Tensor, key: int | Tensor) -> Tensor:
    """Return uniform numbers in (0, 1): a hash of positions and a key."""
    h = positions ^ key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(2**32 - 1)
    h = h.bitwise_xor_(h >> 16) >> (32 - UNIFORM_BITS)
    return h.to(torch.get_default_dtype()).add_(0.5).mul_(2.0**-UNIFORM_BITS)
