"""Files that are whole or not there: tensors beside facts, with a checksum, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

TENSORS, FACTS = ".safetensors", ".json"
CONTENT = "blake2b"  # in the header of a safetensors file: the checksum of its tensors


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, also when the power fails.

    Args:
        path:
            The file; its folder is made.
        text:
            What it will hold.

    Raises:
        OSError: If it cannot be written; what was there before is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a safetensors file, whole or not at all.

    Args:
        path:
            The file; its folder is made.
        tensors:
            By name; they may share memory.

    Returns:
        The file's checksum, see `checksum`.

    Raises:
        OSError: If it cannot be written; what was there before is there still.

    Source:
        https://huggingface.co/docs/safetensors: tensors only, no code.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        apart = _apart(tensors)
        save_file(apart, unfinished, metadata={CONTENT: _content(apart)})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        found = checksum(unfinished)
        unfinished.replace(path)
    except SafetensorError as error:  # how it says that a disk is full
        raise OSError(f"{path.name} could not be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return found


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def save_checked(stem: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts as a pair of files with one stem, the facts last.

    Args:
        stem:
            The files without their endings.
        tensors:
            By name.
        facts:
            What JSON can keep.

    Raises:
        OSError: If they cannot be written. Without the facts the tensors are nothing.
    """
    mark = write_tensors(stem.with_name(stem.name + TENSORS), tensors)
    whole = {"facts": facts, "tensors": mark}
    text = json.dumps({**whole, "checksum": _digest(whole)}, indent=1)
    write_whole(stem.with_name(stem.name + FACTS), text)


def load_checked(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checked` wrote.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If one is damaged: its name and what is wrong.
    """
    path = stem.with_name(stem.name + FACTS)
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        said = whole.pop("checksum")
        facts, mark = whole["facts"], whole["tensors"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} must be a whole JSON file, but: {error}") from error
    if said != _digest(whole):
        raise ValueError(f"{path.name} must have the checksum {said}, but is damaged.")
    path = stem.with_name(stem.name + TENSORS)
    if (found := checksum(path)) != mark:
        raise ValueError(f"{path.name} must have the checksum {mark}, but has {found}.")
    return load_tensors(path), facts


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(CONTENT)
        tensors = load_file(path)
    except SafetensorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path.name} must be a whole safetensors file, but: {reason}") from error
    if said not in (None, _content(tensors)):  # others write none
        raise ValueError(f"{path.name} must be a whole safetensors file, but is damaged.")
    return tensors


def _content(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors on the CPU: names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(whole: Mapping[str, Any]) -> str:
    """A checksum of facts, however they are laid out."""
    text = json.dumps(json.loads(json.dumps(whole)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, each with memory of its own: safetensors refuses shared memory."""
    apart, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        apart[name] = plain
    return apart


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
