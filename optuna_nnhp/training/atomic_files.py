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

TENSORS_SUFFIX, JSON_SUFFIX = ".safetensors", ".json"
TENSOR_CHECKSUM_KEY = "blake2b"  # in the header of a safetensors file: the checksum of its tensors


def write_atomically(path: Path, text: str) -> None:
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
    temporary = _temporary_path(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    temporary = _temporary_path(path)
    try:
        separate = _with_own_memory(tensors)
        save_file(separate, temporary, metadata={TENSOR_CHECKSUM_KEY: _tensor_checksum(separate)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        found = checksum(temporary)
        temporary.replace(path)
    except SafetensorError as error:  # how it says that a disk is full
        raise OSError(f"{path.name} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return found


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def save_with_checksum(
    stem: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
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
    mark = write_tensors(stem.with_name(stem.name + TENSORS_SUFFIX), tensors)
    whole = {"facts": facts, "tensors": mark}
    text = json.dumps({**whole, "checksum": _json_checksum(whole)}, indent=1)
    write_atomically(stem.with_name(stem.name + JSON_SUFFIX), text)


def load_with_checksum(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_with_checksum` wrote.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If one is damaged: its name and what is wrong.
    """
    path = stem.with_name(stem.name + JSON_SUFFIX)
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        expected = whole.pop("checksum")
        facts, mark = whole["facts"], whole["tensors"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} must be a whole JSON file, but: {error}") from error
    if expected != _json_checksum(whole):
        raise ValueError(f"{path.name} must have the checksum {expected}, but is damaged.")
    path = stem.with_name(stem.name + TENSORS_SUFFIX)
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
            expected = (file.metadata() or {}).get(TENSOR_CHECKSUM_KEY)
        tensors = load_file(path)
    except SafetensorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path.name} must be a whole safetensors file, but: {reason}") from error
    if expected not in (None, _tensor_checksum(tensors)):  # others write none
        raise ValueError(f"{path.name} must be a whole safetensors file, but is damaged.")
    return tensors


def _tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors on the CPU: names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _json_checksum(whole: Mapping[str, Any]) -> str:
    """A checksum of facts, however they are laid out."""
    text = json.dumps(json.loads(json.dumps(whole)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, each with memory of its own: safetensors refuses shared memory."""
    separate, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
