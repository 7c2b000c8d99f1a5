"""Weights on disk and in memory: whole, exact, and without pickle."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.training import weight_files
from optuna_nnhp.training.device import resolve_device
from optuna_nnhp.training.weight_files import BestWeights
from optuna_nnhp.training.weight_files import load_weights
from optuna_nnhp.training.weight_files import save_weights


def network(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def assert_same(one: nn.Module, two: nn.Module) -> None:
    assert state(one).keys() == state(two).keys()
    for name, tensor in state(one).items():
        assert torch.equal(tensor, state(two)[name])


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "w.safetensors"
    saved = network(1)
    saved(torch.randn(8, 3))  # moves the running means
    save_weights(saved, path)
    loaded = load_weights(network(2), path)
    assert_same(loaded, saved)
    assert not loaded.training
    assert load_file(path).keys() == state(saved).keys()
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_a_view_is_saved_as_what_it_shows(tmp_path: Path) -> None:
    stack = torch.randn(5, 4, 3)
    saved = nn.Linear(3, 4)
    saved.weight = nn.Parameter(stack[2])
    save_weights(saved, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["weight"], stack[2])
    assert (tmp_path / "w.safetensors").stat().st_size < 400


def test_a_write_that_fails_leaves_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(1), path)

    def full(tensors: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(network(2), path)
    assert_same(load_weights(network(3), path), network(1))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:30], id="stump"),
        pytest.param(lambda content: content[:-1], id="one byte short"),
        pytest.param(lambda content: b"{}" + content, id="shifted"),
        pytest.param(lambda content: b"\xff" * 100, id="ones"),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"w\.safetensors must be a whole safetensors") as error:
        load_weights(network(), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [nn.Linear(3, 1), network(width=5)])
def test_another_network(other: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(), path)
    with pytest.raises(ValueError, match=r"w\.safetensors must hold this network's weights, but"):
        load_weights(other, path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        load_weights(network(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_best_weights(in_memory: bool, tmp_path: Path) -> None:
    weights = BestWeights(None if in_memory else tmp_path / "models")
    assert 0 not in weights
    for number in range(3):
        weights.save(number, network(number))
    assert_same(weights.load_into(1, network(9)), network(1))
    weights.save(1, network(5))
    assert_same(weights.load_into(1, network(9)), network(5))
    weights.delete_others([1])
    assert [number in weights for number in range(3)] == [False, True, False]
    weights.delete_others([])
    assert 1 not in weights


def test_weights_in_memory_are_copies() -> None:
    weights, original = BestWeights(None), network(1)
    weights.save(0, original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    filled = weights.load_into(0, network(2))
    assert_same(filled, network(1))
    with torch.no_grad():
        next(filled.parameters()).zero_()
    assert_same(weights.load_into(0, network(2)), network(1))


def test_what_was_there_before_is_found_and_dropped(tmp_path: Path) -> None:
    BestWeights(tmp_path).save(4, network(4))
    weights = BestWeights(tmp_path)
    assert 4 in weights
    assert_same(weights.load_into(4, network(9)), network(4))
    weights.save(11, network(1))
    weights.delete_others([11])
    assert [path.name for path in tmp_path.iterdir()] == ["trial-11.safetensors"]


def test_what_another_process_wrote_since_is_left_alone(tmp_path: Path) -> None:
    mine, others = BestWeights(tmp_path), BestWeights(tmp_path)
    others.save(3, network(3))
    mine.save(4, network(4))
    mine.delete_others([4])
    assert 3 in mine
    assert_same(mine.load_into(3, network(9)), network(3))
    (tmp_path / "trial-4.safetensors").unlink()  # somebody cleans up
    mine.delete_others([])
    assert os.listdir(tmp_path) == ["trial-3.safetensors"]


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu"), None])
def test_device(name: Any) -> None:
    assert resolve_device(name).type == (
        "cuda" if not name and torch.cuda.is_available() else "cpu"
    )


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "mps:7"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"`device` must be usable here, but .* is not: "
    ) as error:
        resolve_device(name)
    assert "\n" not in str(error.value)
