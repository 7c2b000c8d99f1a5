"""Opens the storage that a user names."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna.storages import RDBStorage

from optuna_nnhp.errors import contains_password
from optuna_nnhp.errors import first_line
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.storages.grpc_storage import GRPC_SCHEME
from optuna_nnhp.storages.grpc_storage import open_grpc_proxy
from optuna_nnhp.storages.journal_file import open_journal


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """Open the storage that a user names.

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


def open_existing_storage(storage: str) -> BaseStorage:
    """Open a storage to look at its studies; create neither a file nor tables.

    Args:
        storage:
            The path of a journal file, or a URL.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a journal.
        Exception: Whatever the database's driver raises.

    Example:
        >>> open_existing_storage("sqlite:///missing.db")
        Traceback (most recent call last):
        ...
        FileNotFoundError: there is no file 'missing.db'
    """
    if storage.startswith(GRPC_SCHEME):
        return open_grpc_proxy(storage)
    if "://" in storage:
        from sqlalchemy.engine import make_url

        url = make_url(storage)
        path = url.database if url.get_backend_name() == "sqlite" else None
        if path and not path.startswith("file:") and not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path!r}")
        # Without it, Optuna would make its tables in a database that holds something else.
        return RDBStorage(storage, skip_table_creation=True)
    if not Path(storage).is_file():
        raise FileNotFoundError(f"there is no file {storage!r}")
    with open(storage, "rb") as file:
        if file.read(15) == b"SQLite format 3":
            raise ValueError(f"it is an SQLite database: say sqlite:///{storage}")
    try:
        return open_journal(storage)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("it is not a journal of Optuna") from None
