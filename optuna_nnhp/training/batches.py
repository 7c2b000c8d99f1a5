"""Rounds, the batches of each round, and the keys of dropout noise.

A round is what Optuna calls a step. It is one epoch while an epoch has few examples. A longer
epoch is split into 3, 9, ... rounds. A trial is evaluated after 1, 3, 9, ... rounds of its first
epoch, so that a bad trial can be pruned after a fraction of an epoch; afterwards it is evaluated
after every epoch. A round has the same number of examples in every trial of a study.
"""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor

from optuna_nnhp import rng
from optuna_nnhp.networks.noise import DropoutNoise

REDUCTION_FACTOR = 3
MAX_EXAMPLES_PER_ROUND = 8192


def rounds_per_epoch(examples: int) -> int:
    """Return the smallest power of three that keeps rounds within `MAX_EXAMPLES_PER_ROUND`.

    Example:
        >>> [rounds_per_epoch(n) for n in (1_437, 8_192, 20_000, 39_073)]
        [1, 1, 3, 9]
    """
    rounds = 1
    while examples > rounds * MAX_EXAMPLES_PER_ROUND:
        rounds *= REDUCTION_FACTOR
    return rounds


def next_evaluation(done: int, rounds: int) -> int:
    """Return the round after which a trial with ``done`` finished rounds is evaluated next.

    Example:
        >>> done, evaluated_after = 0, []
        >>> for _ in range(5):
        ...     done = next_evaluation(done, rounds=9)
        ...     evaluated_after.append(done)
        >>> evaluated_after
        [1, 3, 9, 18, 27]
    """
    if done < rounds:
        return max(1, done * REDUCTION_FACTOR)
    return (done // rounds + 1) * rounds


def epochs(done: int, rounds: int) -> int | float:
    """Convert rounds to epochs; return an int if the number is whole.

    Example:
        >>> epochs(18, 9), epochs(3, 9)
        (2, 0.3333)
    """
    return done // rounds if done % rounds == 0 else round(done / rounds, 4)


def batch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch, counted from 0, visits the ``n`` training rows.

    It is a function of seed and epoch alone, so a resumed or replayed training visits the same
    rows. Source: NumPy's SeedSequence with the epoch as spawn key, and PCG64
    (https://numpy.org/doc/stable/reference/random/parallel.html).

    Raises:
        ValueError:
            If ``n`` is below 1, or seed or epoch is negative.

    Example:
        >>> sorted(batch_order(4, seed=0, epoch=1).tolist())
        [0, 1, 2, 3]
    """
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, but got {value}.")
    # A spawn key, not seed + epoch, so that seeds 1, 2, ... do not share orders.
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
    return np.random.Generator(np.random.PCG64(sequence)).permutation(n)


class RoundKeyedNoise:
    """Dropout noise that depends only on the study's seed and on a member's finished rounds."""

    _seed: int
    _device: torch.device

    def noise(self, done: Sequence[int], step: int) -> DropoutNoise:
        """Return the noise of one step of the next round, given each member's finished rounds."""
        distinct_rounds, index = _group_by_rounds(done)
        keys = [self.noise_key(rounds_done) for rounds_done in distinct_rounds]
        return DropoutNoise(keys, index.to(self._device), step)

    def noise_key(self, rounds_done: int) -> int:
        """Return the key of the next round's noise for members that have finished some rounds."""
        return rng.mix_keys(self._seed, rng.NOISE, rounds_done)


class Batches(RoundKeyedNoise):
    """Rows and noise of every round, for all trials that share a batch size.

    Each epoch has a new order of the rows and is cut into rounds of equal length, so that members
    that started at different times finish a round together. If an epoch has several rounds, up to
    ``rounds - 1`` rows are left out, different ones in each epoch.

    The last batch of a round may be smaller. Row indices and noise are on the device.

    Attributes:
        size: Examples per batch, at most those of a round.
        per_round: Steps per round.

    Example:
        >>> batches = Batches(10, size=4, rounds=1, seed=0, device=torch.device("cpu"))
        >>> [len(rows) for rows in batches.rows([0])]
        [4, 4, 2]
        >>> [rows.shape for rows in batches.rows([0, 7, 0])]
        [torch.Size([3, 4]), torch.Size([3, 4]), torch.Size([3, 2])]
    """

    def __init__(
        self, examples: int, size: int, rounds: int, seed: int, device: torch.device
    ) -> None:
        self._examples, self._rounds, self._seed, self._device = examples, rounds, seed, device
        self._length = examples // rounds
        self.size = min(size, self._length)
        self.per_round = math.ceil(self._length / self.size)
        self._epoch_orders: dict[int, Tensor] = {}

    def rows(self, done: Sequence[int]) -> list[Tensor]:
        """Return the row indices of each step of the next round, given each one's finished rounds.

        Shape:
            - Output: for each step ``(batch,)`` if all members have finished equally many rounds,
              else ``(k, batch)``.
        """
        distinct_rounds, index = self._distinct_rounds(done)
        rounds = [self._rows_of_round(n).split(self.size) for n in distinct_rounds]
        if len(distinct_rounds) == 1:
            return list(rounds[0])
        return [torch.stack(step)[index] for step in zip(*rounds, strict=True)]

    def orders(self, done: Sequence[int]) -> list[Tensor]:
        """Return the row indices of each member's whole next round, ``(examples,)``.

        Members that have finished equally many rounds share one tensor.
        """
        distinct_rounds, index = self._distinct_rounds(done)
        orders = [self._rows_of_round(n) for n in distinct_rounds]
        return [orders[i] for i in index.tolist()]

    def _distinct_rounds(self, done: Sequence[int]) -> tuple[list[int], Tensor]:
        """Group members by finished rounds, and drop the cached orders of other epochs."""
        distinct_rounds, index = _group_by_rounds(done)
        current = {rounds_done // self._rounds for rounds_done in distinct_rounds}
        self._epoch_orders = {e: order for e, order in self._epoch_orders.items() if e in current}
        return distinct_rounds, index

    def _rows_of_round(self, done: int) -> Tensor:
        epoch, part = divmod(done, self._rounds)
        if epoch not in self._epoch_orders:
            order = batch_order(self._examples, self._seed, epoch)
            self._epoch_orders[epoch] = torch.from_numpy(order).to(self._device)
        return self._epoch_orders[epoch][part * self._length : (part + 1) * self._length]


def _group_by_rounds(done: Sequence[int]) -> tuple[list[int], Tensor]:
    """Return the distinct numbers of finished rounds, and each member's index in that list."""
    distinct_rounds = sorted(set(done))
    return distinct_rounds, torch.tensor([distinct_rounds.index(n) for n in done])
