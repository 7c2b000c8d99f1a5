"""Files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optuna_nnhp.training import weight_files
from optuna_nnhp.training.weight_files import load_with_checksum
from optuna_nnhp.training.weight_files import save_with_checksum
from optuna_nnhp.training.weight_files import write_atomically

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}
FACTS: dict[str, Any] = {"n": {1: [0.1, float("nan")], 10: None, 2: "x"}}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    save_with_checksum(tmp_path / "sub" / "one", TENSORS, FACTS)
    tensors, facts = load_with_checksum(tmp_path / "sub" / "one")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert str(facts) == str(json.loads(json.dumps(FACTS)))
    names = sorted(path.name for path in (tmp_path / "sub").iterdir())
    assert names == ["one.json", "one.safetensors"]


def test_parts_of_one_memory_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    save_with_checksum(tmp_path / "x", {"w": whole, "same": whole, "row": whole[1]}, {})
    tensors, _ = load_with_checksum(tmp_path / "x")
    assert torch.equal(tensors["row"], whole[1])
    assert torch.equal(tensors["same"], whole)
    assert (tmp_path / "x.safetensors").stat().st_size < 500


@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_damage_is_refused_and_the_file_named(tmp_path: Path, name: str, harm: str) -> None:
    save_with_checksum(tmp_path / "x", TENSORS, FACTS)
    path = tmp_path / name
    whole = path.read_bytes()
    if harm == "gone":
        path.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_with_checksum(tmp_path / "x")
        return
    for place in range(1, len(whole), 7):
        flipped = bytes([whole[place] ^ 1])
        path.write_bytes(
            whole[:place] if harm == "cut" else whole[:place] + flipped + whole[place + 1 :]
        )
        try:
            tensors, facts = load_with_checksum(tmp_path / "x")
        except ValueError as error:
            assert name in str(error)
        else:  # white space of the JSON
            assert str(facts) == str(json.loads(json.dumps(FACTS)))
            assert all(torch.equal(tensors[n], tensor) for n, tensor in TENSORS.items())


def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "old")

    def full(number: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(weight_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    with pytest.raises(OSError, match="No space"):
        save_with_checksum(tmp_path / "y", TENSORS, FACTS)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
