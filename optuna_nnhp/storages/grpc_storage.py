"""Connects to a storage behind Optuna's gRPC proxy."""

from __future__ import annotations

from importlib import import_module
from urllib.parse import urlsplit
import warnings

import optuna
from optuna.storages import BaseStorage

GRPC_SCHEME = "grpc://"
NEEDED = ("grpc", "google.protobuf")
PORT = 13000  # Optuna's
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
        # A user cannot do anything about it.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=parts.hostname, port=parts.port or PORT)
    try:
        proxy.wait_server_ready(timeout=wait)
    except ConnectionError as error:
        proxy.close()
        raise ConnectionError(f"nobody answered within {wait:g} s") from error
    return proxy
