"""The files of a study: beside its storage, and never outside of their folder."""

from __future__ import annotations

from pathlib import Path
import re

import optuna
from optuna.storages import BaseStorage
from optuna.storages import RDBStorage

from optuna_nnhp.storages._optuna_internals import without_cache
from optuna_nnhp.storages.buffered import BufferedStorage

DEFAULT_STORAGE = "optuna_nnhp.journal"
SQLITE = re.compile(r"sqlite(?:\+\w+)?:///([^?]+)")
LONGEST_NAME = 60  # of 255 bytes at most, and a letter may take four


def models_folder(storage: BaseStorage, given: str | Path | None) -> Path | None:
    """Return the folder of a study's weights: beside a journal or SQLite file, else here.

    Args:
        storage:
            The opened storage.
        given:
            What the user named.

    Returns:
        The folder, or None when the study lives in memory only.
    """
    if isinstance(storage, BufferedStorage):
        storage = storage.backend
    if isinstance(storage, optuna.storages.InMemoryStorage):
        return None
    if given is None:
        backend = without_cache(storage)
        given = backend.url if isinstance(backend, RDBStorage) else DEFAULT_STORAGE
    return sibling_path(str(given), ".models")


def sibling_path(storage: str, suffix: str) -> Path:
    """Return a path beside a journal or SQLite file, or here for another database.

    Example:
        >>> [
        ...     str(sibling_path(s, ".models"))
        ...     for s in ("a.journal", "sqlite:///b.db", "mysql://host/c")
        ... ]
        ['a.models', 'b.models', 'optuna_nnhp.models']
    """
    match = SQLITE.match(storage)
    path = match.group(1) if match else "optuna_nnhp" if "://" in storage else storage
    path = path.removeprefix("file:") if match else path
    return Path(path).with_suffix(suffix)


def check_storage_exists(storage: str | Path) -> None:
    """Raise an error if a journal or SQLite file does not exist: opening it would make it.

    Args:
        storage:
            A path or URL.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    text = str(storage)
    match = SQLITE.match(text)
    path = match.group(1) if match else None if "://" in text else text
    if path is None or path.startswith(("file:", ":memory:")):
        return
    if not Path(path).exists():
        raise FileNotFoundError(f"A study's storage must exist, but there is no file {path}.")


def safe_file_name(text: str) -> str:
    """Turn a text into a file name for any file system; different texts may share one.

    Example:
        >>> safe_file_name("../my study: 1")
        '.._my_study_1'
    """
    plain = re.sub(r"[^\w.-]+", "_", text)[:LONGEST_NAME]
    return plain if plain.strip(".") else "_"


def safe_join(folder: Path, name: object) -> Path:
    """Return a path right inside a folder, by a name from a storage that others write to.

    Args:
        folder:
            The folder.
        name:
            Such as `safe_file_name` makes.

    Raises:
        ValueError: If that would be elsewhere.

    Example:
        >>> safe_join(Path("optuna_nnhp.models"), "digits-1a2b3c4d").name
        'digits-1a2b3c4d'
    """
    if not isinstance(name, str) or not name.strip(".") or re.search(r"[^\w.-]", name):
        raise ValueError(
            "A folder that a study names must be of letters, digits, `_`, `-` and `.`, but is "
            f"{name!r}."
        )
    return folder / name
