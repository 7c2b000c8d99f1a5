"""Batches and noise: what a trial sees at each step, whoever trains beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optuna_nnhp import rng
from optuna_nnhp.data.splits import batch_order
from optuna_nnhp.hyperparameters.epochs import iterations_per_epoch
from optuna_nnhp.networks.noise import DropoutNoise


class RoundKeyedNoise:
    """Noise that depends on the study's seed and a member's own rounds."""

    _seed: int
    _device: torch.device

    def noise(self, done: Sequence[int], step: int) -> DropoutNoise:
        """The noise of a step of the next round."""
        distinct_rounds, index = _group_by_rounds(done)
        return DropoutNoise(
            [self.noise_key(rounds_done) for rounds_done in distinct_rounds],
            index.to(self._device),
            step,
        )

    def noise_key(self, rounds_done: int) -> int:
        """Where the noise of a member's next round comes from; by the rounds that it has done."""
        return rng.mix_keys(self._seed, rng.NOISE, rounds_done)


class Batches(RoundKeyedNoise):
    """The rows and the noise of every round of every trial with one batch size.

    Each epoch has a new order of the rows and is cut into rounds of equal length, so that members
    of different ages come to the end of a round together. Where a round is a part of an epoch, up
    to ``rounds - 1`` rows of the epoch's order are left out, others in each epoch.

    Args:
        examples:
            Rows of the training part.
        size:
            Examples in a batch; the last one of a round may be smaller.
        rounds:
            Rounds in an epoch.
        seed:
            The study's seed.
        device:
            Where the rows' numbers and the noise are wanted.

    Attributes:
        size: Examples in a batch, at most a round's.
        per_round: Steps of a round.

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
        self.per_round = iterations_per_epoch(self._length, self.size)
        self._epoch_orders: dict[int, Tensor] = {}

    def rows(self, done: Sequence[int]) -> list[Tensor]:
        """Rows of each step of the next round.

        Args:
            done:
                Rounds that each member has done.

        Shape:
            - Output: for each step ``(batch,)`` if all members are of one age, else
              ``(k, batch)``.
        """
        distinct_rounds, index = self._distinct_rounds(done)
        rounds = [
            self._rows_of_round(rounds_done).split(self.size) for rounds_done in distinct_rounds
        ]
        if len(distinct_rounds) == 1:
            return list(rounds[0])
        return [torch.stack(step)[index] for step in zip(*rounds, strict=True)]

    def orders(self, done: Sequence[int]) -> list[Tensor]:
        """Rows of the whole next round, for each member ``(examples,)``; shared by equal ages."""
        distinct_rounds, index = self._distinct_rounds(done)
        orders = [self._rows_of_round(rounds_done) for rounds_done in distinct_rounds]
        return [orders[i] for i in index.tolist()]

    def _distinct_rounds(self, done: Sequence[int]) -> tuple[list[int], Tensor]:
        """The ages that there are, and whose each is; orders of other epochs are forgotten."""
        distinct_rounds, index = _group_by_rounds(done)
        epochs = {rounds_done // self._rounds for rounds_done in distinct_rounds}
        self._epoch_orders = {e: order for e, order in self._epoch_orders.items() if e in epochs}
        return distinct_rounds, index

    def _rows_of_round(self, done: int) -> Tensor:
        epoch, part = divmod(done, self._rounds)
        if epoch not in self._epoch_orders:
            order = batch_order(self._examples, self._seed, epoch)
            self._epoch_orders[epoch] = torch.from_numpy(order).to(self._device)
        return self._epoch_orders[epoch][part * self._length : (part + 1) * self._length]


def _group_by_rounds(done: Sequence[int]) -> tuple[list[int], Tensor]:
    """The ages there are, and the place of each member's own among them."""
    distinct_rounds = sorted(set(done))
    return distinct_rounds, torch.tensor(
        [distinct_rounds.index(rounds_done) for rounds_done in done]
    )
