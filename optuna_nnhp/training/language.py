"""Training on text: random windows, a budget in steps, one pass over the validation part."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
import math

import torch
from torch import Tensor

from optuna_nnhp import seeds
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.batches import ByAge
from optuna_nnhp.training.cohort import Apply
from optuna_nnhp.training.cohort import Task
from optuna_nnhp.training.gpt_native import NativeApply
from optuna_nnhp.training.gpt_native import NativeGPT
from optuna_nnhp.training.groups import GroupedUpdate
from optuna_nnhp.training.knobs import Knobs
from optuna_nnhp.training.knobs import Member
from optuna_nnhp.training.parameters import FlatParameters

ROUNDS = 9  # of a trial's budget: evaluated after 1, 3 and all of them
JUDGED_EARLY = 2**15  # tokens of the validation part in evaluations before the last one
LOGITS_AT_ONCE = 2**22  # numbers, to bound memory


class Windows(ByAge):
    """The windows of text that a trial sees at each step, whoever trains beside it.

    Args:
        tokens:
            Of the training part.
        context:
            Tokens of a window.
        sequences:
            Windows of a step.
        iterations:
            Steps of a trial's budget.
        seed:
            The study's seed.
        device:
            Where the places are wanted.

    Attributes:
        size: Tokens of a step.
        per_round: Steps of a round.

    Example:
        >>> windows = Windows(100, 8, 2, iterations=18, seed=0, device=torch.device("cpu"))
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
        self._last, self._sequences, self._seed = tokens - context, sequences, seed
        self._places = torch.arange(context, device=device)
        self._device = device
        self.size = sequences * context
        self.per_round = math.ceil(iterations / ROUNDS)

    def rows(self, done: Sequence[int]) -> Iterator[Tensor]:
        """Places in the text of each step of the next round.

        Shape:
            - Output: for each step ``(sequences, context)`` if all members are of one age, else
              ``(k, sequences, context)``.
        """
        ages = sorted(set(done))
        starts = {age: self._starts(age) for age in ages}
        for step in range(self.per_round):
            if len(ages) == 1:
                first = starts[ages[0]][step]
            else:
                first = torch.stack([starts[age][step] for age in done])
            yield first[..., None] + self._places

    def _starts(self, age: int) -> Tensor:
        source = seeds.generator(self._seed, seeds.WINDOWS, age)
        shape = self.per_round, self._sequences
        return torch.randint(self._last, shape, generator=source).to(self._device)


@dataclass(frozen=True)
class Corpus:
    """Tokens on the device they are trained on, held once for all cohorts.

    Args:
        train:
            The training part.
        valid:
            The validation part.
        valid_bytes:
            Bytes of the validation part's text.

    Shape:
        - train: ``(n,)``; valid: ``(m,)``; int64.
    """

    train: Tensor
    valid: Tensor
    valid_bytes: int


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """A text, and what its members' steps and judgement are.

    Args:
        corpus:
            The text.
        context:
            Tokens of a window.
        sequences:
            Windows of a step.
        iterations:
            Steps of a trial.
    """

    corpus: Corpus
    context: int
    sequences: int
    iterations: int

    @property
    def joinable(self) -> bool:
        """No: only the last evaluation reads the whole validation part."""
        return False

    @property
    def rounds(self) -> int:
        """Rounds of a budget, which is what this task has for an epoch."""
        return ROUNDS

    def batches(self, members: Sequence[Member]) -> Windows:  # type: ignore[override]
        """The windows of all steps."""
        data = self.corpus.train
        return Windows(
            len(data), self.context, self.sequences, self.iterations, self.seed, data.device
        )

    def total(self, member: Member, per_round: int) -> int:
        """Steps of a trial's budget."""
        return self.iterations

    def updater(
        self, flat: FlatParameters, knobs: Knobs, network: StackedModule, members: Sequence[Member]
    ) -> GroupedUpdate:
        """Muon and AdamW, with a rate for each kind of parameter."""
        return GroupedUpdate(flat, network, members)

    def engine(self, network: StackedModule, flat: FlatParameters) -> NativeGPT | None:
        """The compiled engine, where there is one."""
        if not NativeGPT.can(network, flat.weights):
            return None
        assert isinstance(network, StackedGPT)
        arrays = self.arrays
        return NativeGPT(network, flat, arrays.train_x, arrays.train_y, self.sequences)

    def judge(
        self, apply: Apply, members: Sequence[Member], is_over: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """Nats for each token and bits for each byte of the validation part.

        One pass over non-overlapping windows: every token but the first is predicted once. Before
        the end only its first `JUDGED_EARLY` tokens are read.

        Shape:
            - Output: both ``(k,)``, and whether it was the whole.
        """
        valid = self.corpus.valid
        tokens = valid if is_over else valid[: JUDGED_EARLY + 1]
        if isinstance(apply, NativeApply):
            nats = apply.nats(tokens)
        else:
            nats = total_nats(apply, tokens, self.context, len(members))
        count, share = len(tokens) - 1, (len(tokens) - 1) / max(1, len(valid) - 1)
        bits = nats / math.log(2) / (self.corpus.valid_bytes * share)
        return nats / count, bits, is_over


@torch.no_grad()
def total_nats(
    network: Callable[[Tensor], Tensor], tokens: Tensor, context: int, members: int
) -> Tensor:
    """Sum over a text of minus the logarithm of each token's probability, given those before.

    Args:
        network:
            From ids ``(batch, length)`` to logits ``(k, batch * length, vocabulary)``.
        tokens:
            The text.
        context:
            Length of its windows, which do not overlap; the last one may be shorter.
        members:
            k.

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
            right = torch.log_softmax(logits, -1).gather(
                -1, targets[start : start + rows].reshape(1, -1, 1).expand(members, -1, 1)
            )
            total -= right.sum((1, 2), dtype=torch.float64).cpu()
            start += rows
            rows = max(1, LOGITS_AT_ONCE // (members * context * vocabulary))
    return total


def bits_per_token(outputs: Tensor, target: Tensor) -> Tensor:
    """Bits for each token, given logits; bits for each byte where a token is a byte.

    Shape:
        - outputs: ``(k, n, vocabulary)``; target: ``(n,)``; Output: ``(k,)``, float64.

    Example:
        >>> bits_per_token(torch.zeros(1, 3, 8), torch.tensor([0, 1, 7]))
        tensor([3.], dtype=torch.float64)
    """
    index = target.expand(outputs.shape[:2]).unsqueeze(-1)
    right = torch.log_softmax(outputs.double(), -1).gather(-1, index)
    return -right.mean((1, 2)) / math.log(2)


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of every token, for stacks of language models.

    Args:
        loss:
            That of classes.
    """

    loss: ClassificationLoss

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean loss of each member.

        Shape:
            - outputs: ``(k, batch * length, vocabulary)``; Output: ``(k,)``.
            - target: ``(batch, length)``, or ``(k, batch, length)``.
        """
        return self.loss(outputs, target.flatten(-2))
