"""nanoGPT's recipe for a CPU: the baseline of small language models.

    python -m tests.benchmarks.nanogpt --text FILE

Trains on the characters of a file, the first 90 % of them, with torch's default threads, and
prints the time of the training alone and the loss on the rest in nats per character. The recipe
is that of karpathy/nanoGPT's README for a CPU (4 layers of width 128, context 64, 2,000 steps of
12 windows, AdamW), written anew with torch.nn; on tiny Shakespeare it comes to about 1.90.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
import math
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from tests.benchmarks.common import write_json

LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12
ITERATIONS, SEED = 2000, 1337
PEAK, FLOOR, WARMUP = 1e-3, 1e-4, 100  # of the learning rate; steps
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.99), 0.1, 1.0
SPREAD = 0.02  # of the first weights
TRAIN_SHARE = 0.9
EVALUATED = 64  # windows at once
NOTHING = -100  # a target that cross_entropy passes over

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Baseline:
    """The result of one training.

    Args:
        seconds:
            Of the training alone, without evaluation and without `watch`.
        loss:
            Nats per token over the whole validation part; see `mean_loss`.
        seconds_per_step:
            Mean over the steps.
        parameters:
            Trained numbers.
        tokens_per_second:
            Of the training.
    """

    seconds: float
    loss: float
    seconds_per_step: float
    parameters: int
    tokens_per_second: float


class Block(nn.Module):
    """Attention to what was before, and two layers on each token, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH, bias=False)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.hidden_norm = nn.LayerNorm(WIDTH, bias=False)
        self.hidden = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.hidden_projection = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        three = self.queries_keys_values(self.attention_norm(x))
        q, k, v = three.view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_projection(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        hidden = functional.gelu(self.hidden(self.hidden_norm(x)))
        projected: Tensor = self.hidden_projection(hidden)
        return x + projected


class NanoGPT(nn.Module):
    """The network: logits of the next token at every position.

    Args:
        vocabulary:
            Number of different tokens.
        source:
            Of the first weights.

    Shape:
        - Input: ``(batch, length)``, the length at most `CONTEXT`.
        - Output: ``(batch, length, vocabulary)``.
    """

    def __init__(self, vocabulary: int, source: torch.Generator) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                # 2 * LAYERS sums follow each other: this keeps their spread (GPT-2).
                share = 1 / math.sqrt(2 * LAYERS) if "projection" in name else 1.0
                nn.init.normal_(weight, std=SPREAD * share, generator=source)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.tokens(x) + self.positions.weight[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(embedded)))
        return logits


def optimizer_of(network: nn.Module) -> torch.optim.AdamW:
    """AdamW as nanoGPT has it on a CPU, not fused; matrices decay, embeddings among them."""
    weights = list(network.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK, betas=BETAS)


def learning_rate(step: int, iterations: int) -> float:
    """The rate of a step, from 0: linear warm-up, then a half cosine down to the floor."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (iterations - WARMUP)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def windows(tokens: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step: windows from anywhere, drawn with replacement."""
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=source)
    drawn = tokens[starts + torch.arange(CONTEXT + 1)]
    return drawn[:, :-1], drawn[:, 1:]


def mean_loss(network: nn.Module, tokens: Tensor) -> float:
    """Nats per token of a text, in one pass and always the same.

    The windows of the context do not overlap, and the last may be shorter: every token but the
    first is predicted once, from the at most `CONTEXT` tokens before it in its window.
    """
    count = len(tokens) - 1
    missing = -count % CONTEXT
    inputs = functional.pad(tokens[:-1], (0, missing)).view(-1, CONTEXT)
    targets = functional.pad(tokens[1:], (0, missing), value=NOTHING).view(-1, CONTEXT)
    total = 0.0
    network.eval()
    with torch.inference_mode():
        for x, y in zip(inputs.split(EVALUATED), targets.split(EVALUATED), strict=True):
            total += float(cross_entropy(network(x), y, reduction="sum"))
    return total / count


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy over all positions."""
    flat = logits.flatten(0, 1), targets.flatten()
    return functional.cross_entropy(*flat, ignore_index=NOTHING, reduction=reduction)


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, rate: float
) -> float:
    """One step at one learning rate; the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = cross_entropy(network(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train_nanogpt(
    train: Tokens,
    valid: Tokens,
    vocabulary: int,
    *,
    iterations: int = ITERATIONS,
    seed: int = SEED,
    watch: Callable[[int, float], None] | None = None,
) -> Baseline:
    """Train the baseline and evaluate it.

    Args:
        train:
            Tokens to learn from, more than `CONTEXT`.
        valid:
            Tokens that judge, at least 2.
        vocabulary:
            Number of different tokens; they are the numbers below it.
        iterations:
            Steps; the learning rate falls over all of them.
        seed:
            Of first weights and windows.
        watch:
            Told after each step how many are done and the step's loss.

    Shape:
        - train, valid: ``(tokens,)``.

    Raises:
        ValueError: If the tokens are too few or not below ``vocabulary``, or there is no step.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, but got {iterations}.")
    text = as_tokens("train", train, CONTEXT + 1, vocabulary)
    judge = as_tokens("valid", valid, 2, vocabulary)
    source = torch.Generator().manual_seed(seed)
    network = NanoGPT(vocabulary, source)
    optimizer = optimizer_of(network)  # before the clock: the first one imports for seconds
    network.train()
    seconds = 0.0
    for step in range(iterations):
        start = time.perf_counter()
        rate = learning_rate(step, iterations)
        loss = train_step(network, optimizer, *windows(text, source), rate)
        seconds += time.perf_counter() - start
        if watch is not None:
            watch(step + 1, loss)
    return Baseline(
        seconds=seconds,
        loss=mean_loss(network, judge),
        seconds_per_step=seconds / iterations,
        parameters=sum(w.numel() for w in network.parameters()),
        tokens_per_second=iterations * BATCH * CONTEXT / seconds,
    )


def as_tokens(name: str, tokens: Tokens, least: int, vocabulary: int) -> Tensor:
    """Check tokens and return them as a tensor."""
    if len(tokens) < least:
        raise ValueError(f"`{name}` must have at least {least} tokens, but has {len(tokens)}.")
    low, high = int(tokens.min()), int(tokens.max())
    if not 0 <= low <= high < vocabulary:
        raise ValueError(
            f"`{name}` must hold numbers from 0 to {vocabulary - 1}, but got {low} to {high}."
        )
    return torch.from_numpy(tokens.astype(np.int64))


def read_characters(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The first 90 % of a file's characters as numbers, the rest, and how many differ."""
    text = path.read_text(encoding="utf-8")
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, numbers = np.unique(points, return_inverse=True)
    cut = int(TRAIN_SHARE * len(numbers))
    return numbers[:cut], numbers[cut:], len(known)


def main(argv: list[str] | None = None) -> int:
    """Train on a file, and print time and loss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what to learn")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    options = parser.parse_args(argv)
    train, valid, vocabulary = read_characters(options.text)
    settings = {"iterations": options.iterations, "seed": options.seed}
    baseline = train_nanogpt(train, valid, vocabulary, **settings)
    print(
        f"{baseline.parameters:,} parameters, {options.iterations:,} iterations: "
        f"{baseline.seconds:.1f} s ({1e3 * baseline.seconds_per_step:.1f} ms a step, "
        f"{baseline.tokens_per_second:,.0f} tokens a second), "
        f"loss {baseline.loss:.4f} nats per character"
    )
    write_json(options.json, {**settings, **asdict(baseline)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
