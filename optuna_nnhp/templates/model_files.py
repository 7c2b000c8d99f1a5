"""Files of a saved model: weights (safetensors) and metadata (JSON), both with a checksum."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from optuna_nnhp.templates.base import NetworkBuilder
from optuna_nnhp.templates.base import find_template
from optuna_nnhp.training.weight_files import checksum
from optuna_nnhp.training.weight_files import load_weights
from optuna_nnhp.training.weight_files import save_weights
from optuna_nnhp.training.weight_files import write_atomically
from optuna_nnhp.version import __version__

WEIGHTS_FILE, METADATA_FILE = "model.safetensors", "model.json"
FORMAT_VERSION = 1


def write_model_files(folder: str | Path, network: nn.Module, metadata: Mapping[str, Any]) -> Path:
    """Write a model's two files, each atomically.

    Args:
        folder:
            The folder; it is created.
        network:
            The network.
        metadata:
            Everything else, as JSON without NaN and infinities.

    Returns:
        The folder.
    """
    folder = Path(folder)
    save_weights(network, folder / WEIGHTS_FILE)
    whole = {
        "format": FORMAT_VERSION,
        "version": __version__,
        **metadata,
        "weights": checksum(folder / WEIGHTS_FILE),
    }
    text = json.dumps({**whole, "checksum": _metadata_checksum(whole)}, indent=1, allow_nan=False)
    write_atomically(folder / METADATA_FILE, text)
    return folder


def load(folder: str | Path, network: NetworkBuilder | None = None) -> Any:
    """Read a model that `Result.save` wrote; nothing in the files is executed.

    Args:
        folder:
            The folder where it was saved.
        network:
            The function that made the network, if that was your own.

    Returns:
        A `Predictor` or a `LanguageModel`, or the model of another template.

    Raises:
        FileNotFoundError: If the folder or one of its two files does not exist.
        ValueError: If a file is damaged, or from a newer version, or ``network`` is missing.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    try:
        template = find_template(metadata["template"])
        found = template.restore_model(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable_error(error) from error
    found = template.with_user_network(found, network)
    load_weights(found.model, folder / WEIGHTS_FILE)
    return found


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read a model's metadata after checking both files.

    Raises:
        FileNotFoundError: If one of them is missing.
        ValueError: If one of them is damaged, or from a newer version.
    """
    for name in (METADATA_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold a saved model, but has no {name}.")
    try:
        metadata: dict[str, Any] = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        if metadata["format"] != FORMAT_VERSION:
            raise ValueError(f"its format must be {FORMAT_VERSION}, but is {metadata['format']}")
        expected = metadata.pop("checksum", None)
        if expected not in (None, _metadata_checksum(metadata)):
            raise ValueError("it is damaged: its checksum does not match")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable_error(error) from error
    weights_checksum = metadata.get("weights")
    if weights_checksum is not None and checksum(folder / WEIGHTS_FILE) != weights_checksum:
        raise ValueError(
            f"{WEIGHTS_FILE} must hold this network's weights, but is damaged, or another "
            f"model's: its "
            f"checksum is not that in {METADATA_FILE}."
        )
    return metadata


def unreadable_error(error: Exception) -> ValueError:
    """Return the error for metadata that cannot be understood."""
    return ValueError(
        f"{METADATA_FILE} must be one that `save` wrote, but cannot be read: {error}"
    )


def _metadata_checksum(metadata: Mapping[str, Any]) -> str:
    """Return a checksum of metadata that does not depend on its layout."""
    text = json.dumps(json.loads(json.dumps(metadata)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
