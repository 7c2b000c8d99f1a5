"""A saved model: its weights (safetensors) and everything else (JSON), both with a checksum."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from optuna_nnhp.training.checkpoint import save_weights
from optuna_nnhp.training.files import checksum
from optuna_nnhp.training.files import write_whole
from optuna_nnhp.version import __version__

WEIGHTS, RECORD = "model.safetensors", "model.json"
FORMAT = 1


def write_model(folder: str | Path, network: nn.Module, record: Mapping[str, Any]) -> Path:
    """Write a model's two files, each whole or not at all.

    Args:
        folder:
            Where; it is made.
        network:
            The network.
        record:
            What else there is to know, as JSON without NaN and infinities.

    Returns:
        The folder.
    """
    folder = Path(folder)
    save_weights(network, folder / WEIGHTS)
    whole = {
        "format": FORMAT,
        "version": __version__,
        **record,
        "weights": checksum(folder / WEIGHTS),
    }
    text = json.dumps({**whole, "checksum": _digest(whole)}, indent=1, allow_nan=False)
    write_whole(folder / RECORD, text)
    return folder


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a model, both of whose files are there and as they were written.

    Raises:
        FileNotFoundError: If one of them is missing.
        ValueError: If one of them is damaged, or from a newer version.
    """
    for name in (RECORD, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold a saved model, but has no {name}.")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format must be {FORMAT}, but is {record['format']}")
        said = record.pop("checksum", None)  # versions before it wrote none
        if said not in (None, _digest(record)):
            raise ValueError("its checksum is that of another text: it is damaged")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(error) from error
    mark = record.get("weights")
    if mark is not None and checksum(folder / WEIGHTS) != mark:
        raise ValueError(
            f"{WEIGHTS} must hold this network's weights, but is damaged, or another model's: its "
            f"checksum is not that in {RECORD}."
        )
    return record


def unreadable(error: Exception) -> ValueError:
    """What to raise if a record cannot be understood."""
    return ValueError(f"{RECORD} must be one that `save` wrote, but cannot be read: {error}")


def _digest(record: Mapping[str, Any]) -> str:
    """A checksum of a record, however it is laid out."""
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
