"""What workers ask of a PostgreSQL, and how much of it one takes: for `docs/guides/workers.md`.

    python -m tests.benchmarks.storage_load --json load.json

A server is started for this alone. Three parts, each with the server's own seconds of CPU, since
on one machine workers and server share the cores:

- worker: one real worker (`optimize`) tunes small networks, and its transactions and statements
  are counted, by second and by trial;
- crowd: processes that do what workers do to a study, without training: start trials of 17
  parameters, report, end them, read what others did, as fast as they can;
- reading: what it takes to read a study once, with so many trials of others that run: in full,
  which happens seldom (`storages/rdb_adapter.py`), and otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from multiprocessing import get_context
import os
from pathlib import Path
import shutil
import sys
import tempfile
import time
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import event

from optuna_nnhp import optimize
from optuna_nnhp.storages.buffered import BufferedStorage
from tests.benchmarks.common import write_json
from tests.benchmarks.sides import Settings
from tests.postgresql import Server
from tests.postgresql import _programs

SECONDS, CROWDS, RUNNING = 20.0, (1, 2, 4, 8), (0, 100, 1000, 4000)
COHORT, REPORTS = 16, 5  # trials that a worker of the crowd starts at once; values of each
REPEATS = 5  # of a reading
SPACE = {f"parameter{i}": FloatDistribution(0.0, 1.0) for i in range(17)}
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Count:
    """Number of statements and transactions of a storage."""

    statements: int = 0
    transactions: int = 0

    @classmethod
    def of(cls, storage: RDBStorage) -> Count:
        """Count from now on."""
        count = cls()

        def statement(*_: Any) -> None:
            count.statements += 1

        def transaction(*_: Any) -> None:
            count.transactions += 1

        event.listen(storage.engine, "before_cursor_execute", statement)
        for end in ("commit", "rollback"):
            event.listen(storage.engine, end, transaction)
        return count


@dataclass
class Cluster:
    """A PostgreSQL server for this benchmark."""

    server: Server
    urls: list[str] = field(default_factory=list)

    def url(self) -> str:
        """An empty database."""
        return self.server.new_database()

    def seconds(self) -> float:
        """CPU that the server has taken, of connections that are closed too."""
        pid = int((self.server.folder / "data" / "postmaster.pid").read_text().split()[0])
        total = 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if path.name == str(pid):
                total += sum(map(int, fields[11:15]))  # its own, and its children's that ended
            elif fields[1] == str(pid):
                total += int(fields[11]) + int(fields[12])
        return total / TICKS


@contextmanager
def cluster(*, fsync: bool) -> Iterator[Cluster]:
    """A server until the end of the block."""
    programs = _programs()
    if programs is None:
        raise SystemExit("PostgreSQL's initdb is not installed.")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Server(programs, folder)
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        server.user = ["runuser", "-u", "postgres", "--"]
    try:
        server.create()
        settings = f"-c listen_addresses='' -c fsync={'on' if fsync else 'off'} -k {folder}"
        server._control("start", "-l", str(folder / "log"), "-o", settings)
        try:
            yield Cluster(server)
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def one_worker(place: Cluster, options: argparse.Namespace) -> dict[str, float]:
    """What a real worker asks, by second of its study and by trial."""
    storage = RDBStorage(place.url())
    count, cpu, began = Count.of(storage), place.seconds(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        here = os.getcwd()
        os.chdir(name)  # where weights go
        try:
            result = optimize(
                "dnn",
                **Settings(options.data).table(),
                timeout=options.timeout,
                storage=storage,
                device="cpu",
            )
        finally:
            os.chdir(here)
    seconds, cpu = time.monotonic() - began, place.seconds() - cpu
    trials = len(result.study.trials)
    storage.engine.dispose()
    return {
        "trials per second": trials / seconds,
        "transactions per second": count.transactions / seconds,
        "statements per second": count.statements / seconds,
        "transactions per trial": count.transactions / trials,
        "statements per trial": count.statements / trials,
        "server CPU, ms per second": 1000 * cpu / seconds,
        "server CPU, ms per trial": 1000 * cpu / trials,
    }


def work(url: str, name: str, seconds: float) -> tuple[int, int, int]:
    """What a worker does to a study, without training: trials, transactions, statements."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = RDBStorage(url)
    count = Count.of(backend)
    storage = BufferedStorage(backend)
    study = optuna.load_study(
        study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler()
    )
    trials, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        storage.refresh()
        study.get_trials(deepcopy=False)
        with storage.prefetch_trials(COHORT):
            asked = [study.ask(SPACE) for _ in range(COHORT)]
        for step in range(1, REPORTS + 1):
            for trial in asked:
                trial.report(0.5, step)
            storage.flush()
        with storage.batch():
            for trial in asked:
                study.tell(trial, 0.5)
        trials += COHORT
    storage.flush()
    backend.engine.dispose()
    return trials, count.transactions, count.statements


def ready() -> None:
    """Import everything, and keep the CPU busy until all other processes have started."""
    time.sleep(3.0)


def crowd(place: Cluster, processes: int, seconds: float) -> dict[str, float]:
    """Measure several processes at once."""
    url = place.url()
    storage = RDBStorage(url)
    study = optuna.create_study(storage=storage)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for call in [pool.submit(ready) for _ in range(processes)]:
            call.result()
        before, began = place.seconds(), time.monotonic()
        calls = [pool.submit(work, url, study.study_name, seconds) for _ in range(processes)]
        done = [call.result() for call in calls]
        took, cpu = time.monotonic() - began, place.seconds() - before
    storage.engine.dispose()
    trials, transactions, statements = (sum(column) for column in zip(*done, strict=True))
    return {
        "trials per second": trials / took,
        "transactions per second": transactions / took,
        "statements per second": statements / took,
        "server CPU, cores": cpu / took,
        "server CPU, ms per trial": 1000 * cpu / trials,
        "trials per second and core of the server": trials / max(cpu, 1 / TICKS),
    }


def reading(place: Cluster, running: int) -> dict[str, float]:
    """One reading of a study in which others have so many trials that run."""
    backend = RDBStorage(place.url())
    study = optuna.create_study(storage=backend)
    others = BufferedStorage(backend)
    theirs = optuna.load_study(
        study_name=study.study_name, storage=others, sampler=optuna.samplers.RandomSampler()
    )
    with others.prefetch_trials(running):
        for _ in range(running):
            trial = theirs.ask(SPACE)
            for step in range(1, REPORTS + 1):
                trial.report(0.5, step)
    others.flush()
    storage = BufferedStorage(backend)
    mine = optuna.load_study(study_name=study.study_name, storage=storage)
    mine.get_trials(deepcopy=False)
    found: dict[str, float] = {"running trials": running}
    for name, times in (("in full", 1), ("of what has changed", REPEATS)):
        own, cpu, began = time.process_time(), place.seconds(), time.monotonic()
        for _ in range(times):
            storage.refresh()
            assert len(mine.get_trials(deepcopy=False, states=(TrialState.RUNNING,))) == running
        found[f"{name}, seconds"] = (time.monotonic() - began) / times
        found[f"{name}, worker CPU, seconds"] = (time.process_time() - own) / times
        found[f"{name}, server CPU, seconds"] = (place.seconds() - cpu) / times
    backend.engine.dispose()
    return found


def table(title: str, rows: list[dict[str, float]]) -> str:
    """Figures as text: a line for each, a column for each row."""
    lines = [title]
    for name in rows[0]:
        lines.append(f"  {name:44s}" + "".join(f"{row[name]:14.4g}" for row in rows))
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--timeout", type=float, default=SECONDS, help="seconds of the worker and of each crowd")
    add("--data", default="digits", help="of the worker: digits, classes or regression")
    add("--crowds", type=int, nargs="*", default=CROWDS, help="processes at once")
    add("--running", type=int, nargs="*", default=RUNNING, help="trials of others")
    add("--no-fsync", action="store_true", help="let the server forget when the power fails")
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the figures, and write the same as JSON."""
    options = arguments().parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record: dict[str, Any] = {}
    with cluster(fsync=not options.no_fsync) as place:
        record["worker"] = [one_worker(place, options)]
        print(table("one worker, small networks", record["worker"]), end="\n\n")
        record["crowd"] = [
            {"processes": n, **crowd(place, n, options.timeout)} for n in options.crowds
        ]
        print(table("a crowd without training", record["crowd"]), end="\n\n")
        record["reading"] = [reading(place, n) for n in options.running]
        print(table("one reading of a study", record["reading"]))
    asked = {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items()}
    write_json(options.json, {"arguments": asked, **record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
