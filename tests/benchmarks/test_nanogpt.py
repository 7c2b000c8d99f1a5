"""The language models' baseline is nanoGPT's recipe, and is judged on every token once."""

from __future__ import annotations

import json
import math
from pathlib import Path
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optuna_nnhp.templates.presets import preset
from tests.benchmarks import nanogpt
from tests.benchmarks.nanogpt import BATCH
from tests.benchmarks.nanogpt import CONTEXT
from tests.benchmarks.nanogpt import LAYERS
from tests.benchmarks.nanogpt import NanoGPT
from tests.benchmarks.nanogpt import cross_entropy
from tests.benchmarks.nanogpt import learning_rate
from tests.benchmarks.nanogpt import mean_loss
from tests.benchmarks.nanogpt import optimizer_of
from tests.benchmarks.nanogpt import train_nanogpt
from tests.tolerance import FLOAT32
from tests.tolerance import assert_close

VOCABULARY = 7
PRESET = preset("nanogpt-cpu")


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sentence(length: int) -> NDArray[np.int64]:
    """0 to 6 again and again."""
    return np.arange(length) % VOCABULARY


@pytest.fixture
def network() -> NanoGPT:
    """Larger weights than at the start, so that what comes before a token matters."""
    made = NanoGPT(VOCABULARY, source())
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return made


@pytest.mark.parametrize("length", [2, 10, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT + 7])
def test_loss_counts_every_token_but_the_first_once(
    network: NanoGPT, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanogpt, "EVALUATED", 2)
    tokens = torch.randint(VOCABULARY, (length,), generator=source())
    losses = []
    for place in range(1, length):  # one token after the other, from what is before it alone
        start = (place - 1) // CONTEXT * CONTEXT
        with torch.no_grad():
            logits = network(tokens[None, start:place])[0, -1].double()
        losses.append(float(-logits.log_softmax(0)[tokens[place]]))
    assert np.std(losses) > 0.1 or length == 2
    assert_close(mean_loss(network, tokens), np.mean(losses), FLOAT32)


def test_training_lowers_the_loss_and_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanogpt, "WARMUP", 5)
    told: list[tuple[int, float]] = []

    def watch(step: int, loss: float) -> None:
        told.append((step, loss))

    text, rest = sentence(500), sentence(100)
    one = train_nanogpt(text, rest, VOCABULARY, iterations=25, watch=watch)
    assert [step for step, _ in told] == list(range(1, 26))
    assert told[0][1] > 0.9 * math.log(VOCABULARY)  # a tied head favours the token itself
    assert one.loss < 0.8 * told[0][1]
    assert one.parameters == preset("nanogpt-cpu", vocabulary=VOCABULARY).parameters
    assert one.seconds_per_step == pytest.approx(one.seconds / 25)
    assert one.tokens_per_second == pytest.approx(25 * 768 / one.seconds)


def test_same_seed_gives_the_same_loss() -> None:
    text = sentence(300)
    settings: dict[str, Any] = {"iterations": 2}
    losses = [train_nanogpt(text, text, 7, **settings, seed=seed).loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_only_training_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0  # a step takes a second
        return now

    def watch(step: int, loss: float) -> None:
        nonlocal now
        now += 100.0

    monkeypatch.setattr(time, "perf_counter", clock)
    text = sentence(200)
    assert train_nanogpt(text, text, 7, iterations=3, watch=watch).seconds == 3


def test_learning_rate_warms_up_and_decays() -> None:
    assert learning_rate(0, 2000) == pytest.approx(1e-3 / 101)
    assert learning_rate(99, 2000) == pytest.approx(1e-3 * 100 / 101)
    assert learning_rate(100, 2000) == pytest.approx(1e-3)
    assert learning_rate(1050, 2000) == pytest.approx(5.5e-4)
    assert learning_rate(1999, 2000) == pytest.approx(1e-4, rel=1e-3)
    assert learning_rate(4, 5) == pytest.approx(5e-3 / 101)


def test_first_weights_and_decay_are_nanogpts() -> None:
    made = NanoGPT(65, source())
    assert made.head.weight is made.tokens.weight
    for name, weight in made.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        projects = name.endswith("projection.weight")
        std = 0.02 / math.sqrt(2 * LAYERS) if projects else 0.02
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05), name
    decayed, kept = optimizer_of(made).param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert len(decayed["params"]) == 2 + 4 * LAYERS and len(kept["params"]) == 1 + 2 * LAYERS
    assert decayed["betas"] == (0.9, 0.99)


def test_the_preset_is_the_baseline() -> None:
    """Parameters, operations and kept numbers, counted by torch."""
    made = NanoGPT(65, source())
    weights = {w.untyped_storage().data_ptr() for w in made.parameters()}
    assert sum(w.numel() for w in made.parameters()) == PRESET.parameters
    x = torch.randint(65, (BATCH, CONTEXT), generator=source())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cross_entropy(made(x), x).backward()
    per_token = counter.get_total_flops() / x.numel()
    assert per_token == pytest.approx(PRESET.flops_per_token, rel=0.005)

    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if tensor.is_floating_point() and memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy(made(x), x)  # alive, or its memory would be counted anew
    logits = 2 * 4 * 65 * x.numel()  # they and their gradient are there, if not kept
    measured = 16 * PRESET.parameters + sum(kept.values()) + logits
    assert measured == pytest.approx(PRESET.memory, rel=0.05)
    assert loss.requires_grad


def test_command_line_trains_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, path = tmp_path / "text.txt", tmp_path / "nanogpt.json"
    text.write_text("Hello wörld\n" * 20, encoding="utf-8")
    asked = ["--text", str(text), "--iterations", "2", "--json", str(path)]
    assert nanogpt.main(asked) == 0
    printed, record = capsys.readouterr().out, json.loads(path.read_text())
    assert record["parameters"] == preset("nanogpt-cpu", vocabulary=10).parameters
    assert f"loss {record['loss']:.4f} nats per character" in printed
    train, valid, vocabulary = nanogpt.read_characters(text)
    assert (len(train), len(valid), vocabulary) == (216, 24, 10)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"iterations": 0}, "`iterations` must be at least 1, but got 0."),
        ({"train": sentence(64)}, "`train` must have at least 65 tokens, but has 64."),
        ({"valid": sentence(1)}, "`valid` must have at least 2 tokens, but has 1."),
        ({"vocabulary": 6}, "`train` must hold numbers from 0 to 5, but got 0 to 6."),
    ],
)
def test_invalid_tokens_are_rejected(settings: dict[str, Any], message: str) -> None:
    text = sentence(100)
    with pytest.raises(ValueError) as error:
        train_nanogpt(**{"train": text, "valid": text, "vocabulary": 7, **settings})
    assert str(error.value) == message
