"""A PostgreSQL server for tests, which can be stopped in the middle of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from dataclasses import field
import itertools
import os
from pathlib import Path
import shutil
import subprocess
import tempfile
from typing import Any

import pytest

_numbers = itertools.count()


@dataclass
class Server:
    """A cluster of databases on a Unix socket, with no port and no password."""

    programs: Path
    folder: Path
    user: list[str] = field(default_factory=list)

    def run(self, program: str, *options: str) -> None:
        command = [*self.user, str(self.programs / program), *options]
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, stdout=quiet, cwd=self.folder, timeout=60)

    def create(self) -> None:
        data = str(self.folder / "data")
        self.run("initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync")

    def start(self) -> None:
        """Start, and wait until it answers."""
        settings = f"-c listen_addresses='' -c fsync=off -k {self.folder}"
        self._control("start", "-l", str(self.folder / "log"), "-o", settings)

    def stop(self) -> None:
        """Stop in the middle of whatever runs, as if it were killed."""
        self._control("stop", "-m", "immediate")

    def _control(self, action: str, *options: str) -> None:
        self.run("pg_ctl", action, "-w", "-D", str(self.folder / "data"), *options)

    def connect(self) -> Any:
        import psycopg2

        return psycopg2.connect(host=str(self.folder), user="tester", dbname="postgres")

    def is_up(self) -> bool:
        import psycopg2

        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def new_database(self) -> str:
        """URL of an empty database."""
        name = f"study{next(_numbers)}"
        with closing(self.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg2://tester@/{name}?host={self.folder}"


@dataclass
class Database:
    """An empty database of a server that tests use one after the other."""

    url: str
    server: Server

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server.start()

    def restart(self) -> None:
        """Kill it and start it again: all connections are broken."""
        self.server.stop()
        self.server.start()


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian does not put it on the PATH."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """Start a server; skip the tests if its programs are not installed."""
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    # Not tmp_path: a socket's path may have 107 characters, and its owner is another user.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Server(programs, folder)
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        server.user = ["runuser", "-u", "postgres", "--"]
    try:
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgresql(postgresql_server: Server) -> Iterator[Database]:
    """An empty database, whose server may be stopped."""
    database = Database(postgresql_server.new_database(), postgresql_server)
    yield database
    if not postgresql_server.is_up():  # a test failed in between
        database.start()
