"""Open a study's storage in optuna-dashboard, with the notes and figures of optuna_nnhp.

Run it beside a running study, or afterwards:

    python dashboards/serve.py
    python dashboards/serve.py results/digits.journal --port 8081
    python dashboards/serve.py sqlite:///studies.db --study-name digits
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from collections.abc import Iterable
import contextlib
from ipaddress import ip_address
from socketserver import ThreadingMixIn
import sys
from threading import Event
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.simple_server import WSGIServer
from wsgiref.simple_server import make_server

import optuna
from optuna.storages import BaseStorage

from optuna_nnhp import annotate
from optuna_nnhp import errors
from optuna_nnhp import open_existing_storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse
    from wsgiref.types import WSGIApplication
    from wsgiref.types import WSGIEnvironment

STORAGE = "optuna_nnhp.journal"
HOST = "127.0.0.1"  # only this machine: the dashboard has no login, and it can delete studies
PORT = 8080
REFRESH_SECONDS = 30.0
WARNING = (
    "Warning: everyone who can reach {host} can read, change and delete these studies, because "
    "the dashboard has no login. An SSH tunnel is safer, see --help."
)

EPILOG = """\
What you see: the list of studies; for each study its history, importances and curves
(History), slices and contours (Analytics), all trials (Trials), and our note (Note). Our figures
are in the middle of History: learning curves, learning rates and, if values changed during
training, their schedules. The best trial has a note too.

Notes and figures are refreshed while the study runs. Your own text in a note is kept if it is
below the line that says so.

STORAGE is what `optimize(..., storage=...)` was given. SQLite needs three slashes for a file in
this folder (sqlite:///studies.db) and four for an absolute path.

On another machine, use an SSH tunnel: ssh -L 8080:127.0.0.1:8080 THAT_MACHINE
"""


class ThreadedServer(ThreadingMixIn, WSGIServer):
    """Answers each request in its own thread, so that a slow plot does not block the page."""

    daemon_threads = True
    # If True, Linux lets a second server share the port, and requests go to either server.
    allow_reuse_port = False


class QuietHandler(WSGIRequestHandler):
    """Logs no requests, because the page sends one every few seconds."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Open studies in optuna-dashboard, with the notes and figures of optuna_nnhp.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "storage",
        nargs="?",
        default=STORAGE,
        metavar="STORAGE",
        help="a journal file, or a URL such as sqlite:///studies.db or "
        "postgresql://user:password@host/database (default: %(default)s in this folder)",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="default: %(default)s; 0 takes any free port"
    )
    parser.add_argument(
        "--host",
        default=HOST,
        help="default: %(default)s, this machine only; 0.0.0.0 lets everyone in the network "
        "read, change and delete the studies",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests for this host name, such as that of a proxy in front of the "
        "machine; may be given several times",
    )
    parser.add_argument("--study-name", help="open this study (default: the list of studies)")
    parser.add_argument("--no-browser-hint", action="store_true", help="print only the address")
    return parser.parse_args(argv)


def one_line(text: object, storage: str = "") -> str:
    """Return the first line of a text, without passwords and the password of the storage's URL."""
    return errors.first_line(text, storage).rstrip(".")


def is_local(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def restrict_hosts(app: WSGIApplication, names: Collection[str]) -> WSGIApplication:
    """Return an app that answers only requests for localhost or some host names.

    Without this check, a web site could let its own host name point to 127.0.0.1 (DNS rebinding),
    and the browser would let its pages read, change and delete the studies.

    Source:
        https://owasp.org/www-community/attacks/DNS_Rebinding.
    """

    allowed = {urlsplit(f"//{name}").hostname for name in names}  # lower case, without the port

    def restricted_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with contextlib.suppress(ValueError):  # raised for an invalid host name
            wanted = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
            if is_local(wanted) or wanted in allowed:
                return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"This dashboard answers to localhost only: see its option --allow.\n"]

    return restricted_app


def our_studies(storage: BaseStorage, name: str | None) -> list[optuna.Study]:
    """Return the studies of optuna_nnhp in a storage, or only the one with a name.

    Raises:
        LookupError: If the storage has no study, or none with this name.
    """
    found = storage.get_all_studies()
    if not found:
        raise LookupError("it holds no study yet")
    if name is not None and name not in {study.study_name for study in found}:
        names = ", ".join(repr(study.study_name) for study in found)
        raise LookupError(f"it holds no study {name!r}; it has {names}")
    return [
        optuna.load_study(study_name=study.study_name, storage=storage)
        for study in found
        if "template" in study.user_attrs and name in (None, study.study_name)
    ]


def refresh(storage: BaseStorage, name: str | None, text: str, stop: Event) -> None:
    """Annotate all studies, new ones too, every `REFRESH_SECONDS` until ``stop`` is set."""
    cached = optuna.storages.get_storage(storage)  # reads finished trials of a database only once
    printed = ""
    while not stop.is_set():
        try:
            for study in our_studies(cached, name):
                annotate(study)
        # Drivers raise errors of any type, for example of a locked database.
        except Exception as error:
            line = one_line(error, text)
            if line != printed:
                print(f"The notes could not be refreshed: {line}", file=sys.stderr)
            printed = line
        stop.wait(REFRESH_SECONDS)


def start(app: WSGIApplication, host: str, port: int) -> ThreadedServer:
    """Return a server that listens, but answers only after ``serve_forever`` is called.

    Raises:
        OSError: If the port is in use, or the host is not an address of this machine.
        OverflowError: If the port number is too large.
    """
    return make_server(host, port, app, server_class=ThreadedServer, handler_class=QuietHandler)


def page_url(server: ThreadedServer, storage: BaseStorage, name: str | None) -> str:
    """Return the URL of the study with this name, or of the list of studies."""
    host = str(server.server_address[0]).replace("0.0.0.0", "localhost")
    page = f"studies/{storage.get_study_id_from_name(name)}" if name else ""
    return f"http://{host}:{server.server_port}/dashboard/{page}"


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C.

    Returns:
        0 after Ctrl-C, 2 if the storage or the port cannot be opened.
    """
    args = parse_arguments(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        from optuna_dashboard import wsgi
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'optuna-nnhp[dashboard]'", file=sys.stderr)
        return 2
    try:
        storage = open_existing_storage(args.storage)
        ours = our_studies(storage, args.study_name)
    # Each driver has its own errors; a missing driver raises ImportError.
    except Exception as error:
        name, why = (
            # The error that Optuna wraps says more: no such table, no driver, no answer.
            one_line(text, args.storage)
            for text in (args.storage, error.__cause__ or error)
        )
        print(f"{name} cannot be opened: {why}.", file=sys.stderr)
        return 2
    app: WSGIApplication = wsgi(storage)
    if is_local(args.host):
        app = restrict_hosts(app, args.allow)
    else:
        print(WARNING.format(host=args.host), file=sys.stderr)
    try:
        server = start(app, args.host, args.port)
    except (OSError, OverflowError) as error:
        print(
            f"{args.host}:{args.port} cannot be opened: {one_line(error)}.",
            file=sys.stderr,
        )
        return 2
    print(page_url(server, storage, args.study_name), flush=True)
    if not args.no_browser_hint:
        names = ", ".join(repr(study.study_name) for study in ours) or "none of optuna_nnhp"
        print(f"Open it in a browser; Ctrl-C ends it. Studies: {names}.", flush=True)
    stop = Event()
    watcher = Thread(target=refresh, args=(storage, args.study_name, args.storage, stop))
    watcher.daemon = True
    watcher.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the server
            server.serve_forever()
    finally:
        stop.set()
        server.server_close()
        # An interrupted write would leave the lock of a journal behind, which blocks the study.
        watcher.join(timeout=10.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
