"""The storage that a user names: opening it, and the paths of the files beside it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
import re
from urllib.parse import urlsplit
import warnings

import optuna
from optuna.storages import BaseStorage
from optuna.storages import InMemoryStorage
from optuna.storages import RDBStorage

from optuna_nnhp.errors import contains_password
from optuna_nnhp.errors import first_line
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.storages._optuna_internals import without_cache
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.journal_file import open_journal

DEFAULT_STORAGE = "optuna_nnhp.journal"
SQLITE = re.compile(r"sqlite(?:\+\w+)?:///([^?]+)")
LONGEST_NAME = 60  # of 255 bytes at most, and a letter may take four


def is_in_memory(storage: str | Path | BaseStorage | None) -> bool:
    """Return whether only this process can read a storage.

    Example:
        >>> [is_in_memory(s) for s in (None, "sqlite:///:memory:", "sqlite:///b.db", "a.journal")]
        [True, True, False, False]
    """
    if isinstance(storage, BufferedStorage):
        storage = storage.backend
    if isinstance(storage, BaseStorage):
        storage = without_cache(storage)
    if isinstance(storage, RDBStorage):
        storage = storage.url
    if isinstance(storage, str):
        return re.fullmatch(r"sqlite(\+\w+)?://(/(:memory:)?)?(\?.*)?", storage) is not None
    return storage is None or isinstance(storage, InMemoryStorage)


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
    if is_in_memory(storage):
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


GRPC_SCHEME = "grpc://"
NEEDED = ("grpc", "google.protobuf")
PORT = 13000  # the default of Optuna's gRPC proxy
WAIT = 20.0  # seconds for the server to answer


def open_grpc_proxy(url: str, wait: float = WAIT) -> BaseStorage:
    """Connect to the storage behind a server of `optuna.storages.run_grpc_proxy_server`.

    Args:
        url:
            ``"grpc://host:port"``.
        wait:
            Seconds for the server to answer.

    Raises:
        ValueError: If that is no address, or has more than host and port.
        ModuleNotFoundError: If there is no gRPC here.
        ConnectionError: If nobody answers.

    Example:
        >>> open_grpc_proxy("grpc://host/database")
        Traceback (most recent call last):
        ValueError: A gRPC storage must be grpc://host:port and no more.

    Source:
        https://optuna.readthedocs.io/en/stable/reference/generated/optuna.storages.GrpcStorageProxy.html
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise ValueError("A gRPC storage must be grpc://host:port and no more.")
    try:
        for name in NEEDED:
            import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A gRPC storage must have the packages grpcio and protobuf, but there is no "
            f"{error.name}: pip install grpcio protobuf.",
            name=error.name,
        ) from error
    with warnings.catch_warnings():
        # The warning needs no action from the user.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=parts.hostname, port=parts.port or PORT)
    try:
        proxy.wait_server_ready(timeout=wait)
    except ConnectionError as error:
        proxy.close()
        raise ConnectionError(f"nobody answered within {wait:g} s") from error
    return proxy


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
