"""Run the command line: `python -m optuna_nnhp worker` joins a study from any shell.

    python -m optuna_nnhp worker --study digits --storage postgresql://host/db --data digits.csv

`optuna_nnhp.optimize` creates the study and stores in it which problem is tuned and how. Workers
can join and leave at any time. They need the same data, which a fingerprint checks before
training starts. The default is the file whose path the study stores; otherwise pass one of

    --data table.csv         a CSV file with a header
    --data arrays.npz        X and y, as numpy.savez writes them (optionally X_val and y_val)
    --data text.txt more/    texts, for a language model

Pass a network or metric of your own as module:function; the module must be importable here.
Ctrl-C ends a worker and keeps the values that its running trials have reached. SIGTERM, as sent
by Slurm or Kubernetes, ends a worker and requeues its running trials: another worker resumes them.

Exit codes: 0 if the study is complete or the time is over, 2 if the worker cannot start, 1 if it
fails later, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import importlib
import os
from pathlib import Path
import sys
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import optuna
from optuna import Study
from optuna.storages import BaseStorage

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.rng import check_seed
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.storages.open_storage import DEFAULT_STORAGE
from optuna_nnhp.storages.open_storage import check_storage_exists
from optuna_nnhp.storages.open_storage import models_folder
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.open_storage import safe_join
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.config import WorkerResult
from optuna_nnhp.workers.config import stored_method_config
from optuna_nnhp.workers.config import stored_n_trials
from optuna_nnhp.workers.config import stored_pruner
from optuna_nnhp.workers.config import stored_tuner_options
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import last_control_message_id
from optuna_nnhp.workers.worker import run_worker

EXIT_FAILED, EXIT_REFUSED = 1, 2
# The shell's convention after a signal: 128 plus its number.
EXIT_CODES = {None: 0, INTERRUPT: 130, RELEASE: 143}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv:
            The arguments; those of this process if None.

    Example:
        >>> parse_arguments(["worker", "--study", "digits"]).storage
        'optuna_nnhp.journal'
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m optuna_nnhp", description="Tune networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    worker = commands.add_parser(
        "worker", help="join a study", description=__doc__, formatter_class=raw
    )
    add = worker.add_argument
    add("--study", required=True, metavar="NAME", help="name of the study")
    add(
        "--storage",
        default=DEFAULT_STORAGE,
        help="journal file, URL of a database, or grpc://host:port (default: %(default)s)",
    )
    add("--data", nargs="+", metavar="PATH", help="path of the data here (default: as stored)")
    add("--target", metavar="COLUMN", help="column to predict, if the study stores none")
    add("--validation", metavar="PATH", help="validation text, if the study was given one as data")
    add("--network", metavar="MODULE:FUNCTION", help="function that builds your own networks")
    add("--metric", metavar="MODULE:FUNCTION", help="metric, if the study's is a function")
    add("--method", help="search method, if not the study's")
    add("--timeout", type=float, metavar="S", help="seconds from now (default: no limit)")
    add(
        "--n-trials",
        type=int,
        metavar="N",
        help="stop when the study has this many trials, of all workers (default: as stored, or "
        "no limit with --timeout)",
    )
    add("--device", help="such as cuda:1 or cpu (default: a GPU that no other worker uses)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    add("--seed", type=int, help="seed of this worker's proposals (default: a new random seed)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv:
            The arguments; those of this process if None.
    """
    options = parse_arguments(argv)
    try:
        config, problem = _worker_config(options)
    except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        text = str(error) if str(error) else type(error).__name__
        print(f"error: {hide_passwords(text, options.storage)}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_CODES[INTERRUPT]
    return _report(options, run_worker(config, problem))


def _report(options: argparse.Namespace, result: WorkerResult) -> int:
    """Print how the worker ended, and return the exit code."""
    if result.error is not None:
        text = f"{type(result.error).__name__}: {result.error}"
        for line in (text, *getattr(result.error, "__notes__", ())):
            print(hide_passwords(line, options.storage), file=sys.stderr)
        return EXIT_FAILED
    verbs = {None: "finished", INTERRUPT: "was interrupted", RELEASE: "was told to shut down"}
    print(f"This worker of the study {options.study!r} {verbs[result.stopped_by]}.")
    return EXIT_CODES[result.stopped_by]


def _worker_config(options: argparse.Namespace) -> tuple[WorkerConfig, Template]:
    """Combine the command line with what the study stores.

    Returns:
        The worker's configuration, and the problem with its data.

    Raises:
        ValueError: If something is missing, or does not match the study.
    """
    _check_limits(options)
    check_storage_exists(options.storage)
    storage = open_storage(options.storage)
    study = _load_study(options, storage)
    seed = uuid4().int % 2**32 if options.seed is None else check_seed(options.seed)
    method_config = stored_method_config(study, options.method, seed)
    problem_spec, pruner = _problem_spec(options, study), stored_pruner(study)
    n_trials = options.n_trials
    if n_trials is None and options.timeout is None:
        n_trials = stored_n_trials(study)
        if n_trials is None:
            raise ValueError(
                "`--timeout` or `--n-trials` must be given: the study stores neither."
            )
    is_grid = method_config.method == "grid"
    folder = models_folder(storage, options.storage)
    config = WorkerConfig(
        problem_spec,
        storage,
        options.study,
        method_config,
        pruner,
        n_trials,
        options.timeout,
        # The points of a grid are enqueued in the study already.
        sampler=GridPointsSampler([], "enqueued trials", is_part=True) if is_grid else None,
        tuner_options=stored_tuner_options(study),
        weights_folder=None if folder is None else safe_join(folder, study.user_attrs[MODELS]),
        threads=options.threads,
        last_message_id=last_control_message_id(study),
    )
    return config, problem_spec.problem_on_free_device(study)


def _check_limits(options: argparse.Namespace) -> None:
    """Raise unless all numbers on the command line are positive."""
    for name in ("timeout", "n_trials", "threads"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"`{option}` must be more than 0, but got {value:g}.")


def _load_study(options: argparse.Namespace, storage: BaseStorage) -> Study:
    """Load the study, which must exist."""
    try:
        return optuna.load_study(study_name=options.study, storage=storage)
    except KeyError as error:
        known = ", ".join(map(repr, optuna.get_all_study_names(storage))) or "none"
        raise ValueError(
            f"`--study` must name one of the storage's studies, {known}, but got "
            f"{options.study!r}."
        ) from error


def _problem_spec(options: argparse.Namespace, study: Study) -> ProblemSpec:
    """Build the study's problem specification from the data given here."""
    data = _load_data(options.data)
    if options.validation is not None:
        data["validation"] = options.validation
    for name in ("network", "metric"):
        if getattr(options, name) is not None:
            data[name] = _import_function(name, getattr(options, name))
    return ProblemSpec.from_study(study, target=options.target, device=options.device, **data)


def _load_data(paths: list[str] | None) -> dict[str, Any]:
    """Return the data arguments for the given paths, with the arrays of an NPZ file loaded."""
    if paths is None:
        return {}
    if len(paths) > 1:
        return {"X": paths}
    path = Path(paths[0])
    if path.suffix != ".npz":
        return {"X": str(path)}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            arrays = {name: npz[name] for name in npz.files}
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"`--data` must be a CSV file, a text or an NPZ file of numpy.savez, but {path.name} "
            f"cannot be read: {error}"
        ) from error
    if not {"X", "y"} <= arrays.keys():
        names = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"`--data` must hold the arrays X and y, but {path.name} has {names}.")
    data: dict[str, Any] = {"X": arrays["X"], "y": arrays["y"]}
    if {"X_val", "y_val"} <= arrays.keys():
        data["validation"] = (arrays["X_val"], arrays["y_val"])
    return data


def _import_function(name: str, text: str) -> Callable[..., Any]:
    """Import a function that the command line names as module:function.

    The name comes from the command line only, never from the storage.
    """
    module, _, path = text.partition(":")
    if not module or not path:
        raise ValueError(f"`--{name}` must be like module:function, but got {text!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except Exception as error:  # a user's module can raise anything
        kind = type(error).__name__
        raise ValueError(
            f"`--{name}` must name a function that can be imported here, but {text} cannot: "
            f"{kind}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"`--{name}` must be a function, but {text} is {function!r}.")
    return function  # type: ignore[no-any-return]
