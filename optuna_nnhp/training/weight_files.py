"""Write weights, tensors with JSON metadata, and text files atomically, without pickle."""

from __future__ import annotations

from collections.abc import Iterable
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
from torch import nn

TENSORS_SUFFIX, JSON_SUFFIX = ".safetensors", ".json"
TENSOR_CHECKSUM_KEY = "blake2b"  # in the header of a safetensors file


class BestWeights:
    """The weights of the best trials of a study, in a folder, or in memory if that is None.

    Example:
        >>> weights = BestWeights(None)
        >>> weights.save(3, nn.Linear(1, 1))
        >>> 3 in weights, 4 in weights
        (True, False)
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[int, dict[str, Tensor]] = {}
        files = folder.glob("trial-*.safetensors") if folder else ()
        self._files = {int(file.stem.removeprefix("trial-")) for file in files}

    def __contains__(self, number: int) -> bool:
        return number in self._memory or (
            self.folder is not None and self._weights_path(number).exists()
        )

    def save(self, number: int, network: nn.Module) -> None:
        """Save the weights of a trial's plain network."""
        if self.folder is None:
            state = network.state_dict()
            self._memory[number] = {n: w.detach().cpu().clone() for n, w in state.items()}
        else:
            save_weights(network, self._weights_path(number))
            self._files.add(number)

    def load_into(self, number: int, network: nn.Module) -> nn.Module:
        """Load a trial's weights into its plain network, and return it in evaluation mode."""
        if number in self._memory:
            network.load_state_dict(self._memory[number])
            return network.eval()
        return load_weights(network, self._weights_path(number))

    def delete_others(self, keep: Iterable[int]) -> None:
        """Delete the weights of all trials but some.

        Files that other processes wrote after this object was created are kept: their trials may
        become the best.
        """
        kept = set(keep)
        self._memory = {n: state for n, state in self._memory.items() if n in kept}
        for number in self._files - kept:
            self._weights_path(number).unlink(missing_ok=True)
        self._files &= kept

    def _weights_path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"trial-{number}.safetensors"


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the weights of a plain network to a safetensors file; create its folder.

    Raises:
        OSError: If the file cannot be written.
    """
    write_tensors(path, network.state_dict())


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load weights from a safetensors file, and return the network in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or belongs to another network; the network is then
            unchanged.
    """
    state, expected = load_tensors(path), network.state_dict()
    shapes = [{name: w.shape for name, w in weights.items()} for weights in (expected, state)]
    if different := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            f"{path.name} must hold this network's weights, but differs in {different[0]}."
        )
    network.load_state_dict(state)
    return network.eval()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically, even if the power fails; create its folder.

    Raises:
        OSError: If the file cannot be written; an existing file is then unchanged.
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
    """Write tensors to a safetensors file atomically, create its folder, return its checksum.

    The tensors may share memory.

    Raises:
        OSError: If the file cannot be written; an existing file is then unchanged.

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
        file_checksum = checksum(temporary)
        temporary.replace(path)
    except SafetensorError as error:  # also raised if the disk is full
        raise OSError(f"{path.name} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file_checksum


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(TENSOR_CHECKSUM_KEY)
        tensors = load_file(path)
    except SafetensorError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path.name} must be a whole safetensors file, but: {reason}") from error
    if expected not in (None, _tensor_checksum(tensors)):  # None: written by another program
        raise ValueError(f"{path.name} must be a whole safetensors file, but is damaged.")
    return tensors


def checksum(path: Path) -> str:
    """Return the BLAKE2b checksum of a file, 16 bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def save_with_checksum(
    stem: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and metadata as a pair of files, the metadata last.

    Both files have the path ``stem`` and a suffix; JSON must be able to store the metadata.

    Raises:
        OSError: If a file cannot be written.
    """
    file_checksum = write_tensors(stem.with_name(stem.name + TENSORS_SUFFIX), tensors)
    content = {"metadata": metadata, "tensors": file_checksum}
    text = json.dumps({**content, "checksum": _json_checksum(content)}, indent=1)
    write_atomically(stem.with_name(stem.name + JSON_SUFFIX), text)


def load_with_checksum(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata that `save_with_checksum` wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    path = stem.with_name(stem.name + JSON_SUFFIX)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = content.pop("checksum")
        metadata, tensors_checksum = content["metadata"], content["tensors"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} must be a whole JSON file, but: {error}") from error
    if expected != _json_checksum(content):
        raise ValueError(f"{path.name} must have the checksum {expected}, but is damaged.")
    path = stem.with_name(stem.name + TENSORS_SUFFIX)
    if (found := checksum(path)) != tensors_checksum:
        raise ValueError(
            f"{path.name} must have the checksum {tensors_checksum}, but has {found}."
        )
    return load_tensors(path), metadata


def _tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the names, dtypes, shapes and bytes of CPU tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _json_checksum(content: Mapping[str, Any]) -> str:
    """Return a checksum of JSON content that does not depend on the order of keys."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU tensors that share no memory, as safetensors requires; copy only if needed."""
    separate, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        cpu_tensor = tensor.detach().cpu().contiguous()
        storage = cpu_tensor.untyped_storage()
        if storage.nbytes() != cpu_tensor.nbytes or storage.data_ptr() in seen:
            cpu_tensor = cpu_tensor.clone()
        seen.add(cpu_tensor.untyped_storage().data_ptr())
        separate[name] = cpu_tensor
    return separate


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
