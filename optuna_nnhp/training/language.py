"""Train language models: random windows, a budget in steps, one pass over the validation part."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
import math

import torch
from torch import Tensor

from optuna_nnhp import rng
from optuna_nnhp.engine.gpt import CompiledGPT
from optuna_nnhp.engine.gpt import CompiledGPTSubset
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.flat_parameters import StepParams
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.batches import RoundKeyedNoise
from optuna_nnhp.training.cohort import Apply
from optuna_nnhp.training.cohort import Task
from optuna_nnhp.training.param_groups import ParamGroupUpdate
from optuna_nnhp.training.task import Member

ROUNDS_PER_BUDGET = 9  # a trial is evaluated after 1, 3 and 9 rounds
EARLY_VALIDATION_TOKENS = 2**15  # read by each evaluation before the last one
MAX_LOGITS = 2**22  # computed at once, to bound the memory of an evaluation


class TextWindows(RoundKeyedNoise):
    """The windows of text that members train on at each step.

    Attributes:
        size: Tokens per step.
        per_round: Steps per round.

    Example:
        >>> windows = TextWindows(100, 8, 2, iterations=18, seed=0, device=torch.device("cpu"))
        >>> [rows.shape for rows in windows.rows([0])]
        [torch.Size([2, 8]), torch.Size([2, 8])]
    """

    def __init__(
        self,
        tokens: int,
        context: int,
        sequences: int,
        iterations: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._num_starts, self._sequences, self._seed = tokens - context, sequences, seed
        self._offsets = torch.arange(context, device=device)
        self._device = device
        self.size = sequences * context
        self.per_round = math.ceil(iterations / ROUNDS_PER_BUDGET)

    def rows(self, done: Sequence[int]) -> Iterator[Tensor]:
        """Yield the token positions of each step of the next round.

        Shape:
            - Output: for each step ``(sequences, context)`` if all members have finished equally
              many rounds, else ``(k, sequences, context)``.
        """
        distinct_rounds = sorted(set(done))
        starts = {rounds_done: self._window_starts(rounds_done) for rounds_done in distinct_rounds}
        for step in range(self.per_round):
            if len(distinct_rounds) == 1:
                first = starts[distinct_rounds[0]][step]
            else:
                first = torch.stack([starts[rounds_done][step] for rounds_done in done])
            yield first[..., None] + self._offsets

    def _window_starts(self, rounds_done: int) -> Tensor:
        generator = rng.generator(self._seed, rng.WINDOWS, rounds_done)
        shape = self.per_round, self._sequences
        return torch.randint(self._num_starts, shape, generator=generator).to(self._device)


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text on the device of training; all cohorts share them.

    Shape:
        - train: ``(n,)``; valid: ``(m,)``; int64.
    """

    train: Tensor
    valid: Tensor
    valid_bytes: int


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """Training and evaluation on a text."""

    corpus: Corpus
    context: int  # tokens per window
    sequences: int  # windows per step
    iterations: int  # steps of a trial's budget

    @property
    def can_append(self) -> bool:
        """False, because only the last evaluation reads the whole validation part."""
        return False

    @property
    def rounds(self) -> int:
        """Rounds of a trial's budget; this task has no epochs."""
        return ROUNDS_PER_BUDGET

    def make_batches(self, members: Sequence[Member]) -> TextWindows:  # type: ignore[override]
        """Return the windows of all steps."""
        data = self.corpus.train
        return TextWindows(
            len(data), self.context, self.sequences, self.iterations, self.seed, data.device
        )

    def total_steps(self, member: Member, per_round: int) -> int:
        """Return the steps of a trial's budget."""
        return self.iterations

    def make_updater(
        self,
        flat: FlatParameters,
        step_params: StepParams,
        network: StackedModule,
        members: Sequence[Member],
    ) -> ParamGroupUpdate:
        """Return the update by Muon and AdamW, with a learning rate for each parameter group."""
        return ParamGroupUpdate(flat, network, members)

    def engine(self, network: StackedModule, flat: FlatParameters) -> CompiledGPT | None:
        """Return the compiled engine if it supports the network, else None."""
        if not CompiledGPT.supports(network, flat.weights):
            return None
        assert isinstance(network, StackedGPT)
        arrays = self.arrays
        return CompiledGPT(network, flat, arrays.train_x, arrays.train_y, self.sequences)

    def evaluate(
        self, apply: Apply, members: Sequence[Member], is_over: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Compute nats per token and bits per byte on the validation part.

        The text is read once in non-overlapping windows, so every token but the first is predicted
        once. Evaluations before the last one read only the first `EARLY_VALIDATION_TOKENS` tokens.

        Returns:
            Nats per token ``(k,)``, bits per byte ``(k,)``, and whether the whole validation part
            was read.
        """
        valid = self.corpus.valid
        tokens = valid if is_over else valid[: EARLY_VALIDATION_TOKENS + 1]
        if isinstance(apply, CompiledGPTSubset):
            nats = apply.total_nats(tokens)
        else:
            nats = total_nats(apply, tokens, self.context, len(members))
        count, share = len(tokens) - 1, (len(tokens) - 1) / max(1, len(valid) - 1)
        bits = nats / math.log(2) / (self.corpus.valid_bytes * share)
        return nats / count, bits, is_over


@torch.no_grad()
def total_nats(
    network: Callable[[Tensor], Tensor], tokens: Tensor, context: int, members: int
) -> Tensor:
    """Sum the negative log-likelihoods of a text's tokens, each given the tokens before it.

    The network maps token ids ``(batch, length)`` to logits ``(k, batch * length, vocabulary)``.
    It reads windows of ``context`` tokens that do not overlap; the last one may be shorter.

    Shape:
        - tokens: ``(m,)``; Output: ``(k,)``, float64.
    """
    count = len(tokens) - 1
    whole = count // context * context
    total = torch.zeros(members, dtype=torch.float64)
    pieces = [(tokens[:whole].view(-1, context), tokens[1 : whole + 1].view(-1, context))]
    if count > whole:
        pieces.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    for inputs, targets in pieces:
        rows, vocabulary = 1, 0
        start = 0
        while start < len(inputs):
            logits = network(inputs[start : start + rows])
            vocabulary = logits.shape[-1]
            log_likelihood = torch.log_softmax(logits, -1).gather(
                -1, targets[start : start + rows].reshape(1, -1, 1).expand(members, -1, 1)
            )
            total -= log_likelihood.sum((1, 2), dtype=torch.float64).cpu()
            start += rows
            rows = max(1, MAX_LOGITS // (members * context * vocabulary))
    return total


def bits_per_token(outputs: Tensor, target: Tensor) -> Tensor:
    """Compute bits per token from logits.

    This equals bits per byte if each token is one byte.

    Shape:
        - outputs: ``(k, n, vocabulary)``; target: ``(n,)``; Output: ``(k,)``, float64.

    Example:
        >>> bits_per_token(torch.zeros(1, 3, 8), torch.tensor([0, 1, 7]))
        tensor([3.], dtype=torch.float64)
    """
    index = target.expand(outputs.shape[:2]).unsqueeze(-1)
    log_likelihood = torch.log_softmax(outputs.double(), -1).gather(-1, index)
    return -log_likelihood.mean((1, 2)) / math.log(2)


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of every token, for stacks of language models."""

    loss: ClassificationLoss

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of each member.

        Shape:
            - outputs: ``(k, batch * length, vocabulary)``; Output: ``(k,)``.
            - target: ``(batch, length)``, or ``(k, batch, length)``.
        """
        return self.loss(outputs, target.flatten(-2))
