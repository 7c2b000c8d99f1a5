"""Opening the storage that a user names."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from optuna_nnhp.errors import contains_password
from optuna_nnhp.errors import first_line
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.storages.grpc_storage import GRPC_SCHEME
from optuna_nnhp.storages.grpc_storage import open_grpc_proxy
from optuna_nnhp.storages.journal_file import open_journal


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """The storage that a user names.

    Args:
        storage:
            The path of a journal file, a URL such as ``"sqlite:///study.db"``,
            ``"postgresql://..."`` or ``"grpc://host:port"`` (Optuna's proxy), an Optuna storage,
            or None for memory only.

    Raises:
        ValueError: If it cannot be written.

    Example:
        >>> type(open_storage(None)).__name__
        'InMemoryStorage'
    """
    if storage is None or isinstance(storage, BaseStorage):
        return optuna.storages.get_storage(storage)
    try:
        if str(storage).startswith(GRPC_SCHEME):
            return open_grpc_proxy(str(storage))
        if "://" in str(storage):
            return optuna.storages.get_storage(str(storage))
        path = Path(storage)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.open("ab").close()
        return open_journal(path)
    except Exception as error:  # drivers and SQLAlchemy raise types of their own
        cause = error
    name = " ".join(hide_passwords(storage, storage).split())
    reason = first_line(cause, storage)
    text = f"The storage must be one that can be written, but {name} cannot: {reason}"
    # Outside of the `except`: a driver's own text would be shown above ours.
    raise ValueError(text) from (None if contains_password(cause, str(storage)) else cause)
