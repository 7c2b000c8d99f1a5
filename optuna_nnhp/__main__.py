"""The command line: `python -m optuna_nnhp worker` joins a study from any shell.

    python -m optuna_nnhp worker --study digits --storage postgresql://host/db --data digits.csv

`optuna_nnhp.optimize` begins the study, anywhere, and notes in its storage how its problem is
made and tuned; workers join and leave at any time. They need the same data, which a fingerprint
checks before anything is trained: by default the file whose path the study notes, else

    --data table.csv         a CSV file with a header
    --data arrays.npz        X and y, as numpy.savez writes them (X_val and y_val too, if given)
    --data text.txt more/    texts, for a language model

A network of your own is named as module:function, as is a metric; the module must be importable
here. Ctrl-C ends a worker tidily: trials end as they stand. So does SIGTERM, as of Slurm or
Kubernetes: then whoever works on the study next goes on with its trials where they were.

Exit codes: 0 when the study has its trials or the time is over, 2 for what cannot be begun, 1 for
what failed later, 130 after Ctrl-C, 143 after SIGTERM.
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
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.paths import DEFAULT_STORAGE
from optuna_nnhp.storages.paths import check_storage_exists
from optuna_nnhp.storages.paths import models_folder
from optuna_nnhp.storages.paths import safe_join
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import last_control_message_id
from optuna_nnhp.workers.study_metadata import stored_method_config
from optuna_nnhp.workers.study_metadata import stored_n_trials
from optuna_nnhp.workers.study_metadata import stored_pruner
from optuna_nnhp.workers.study_metadata import stored_tuner_options
from optuna_nnhp.workers.worker import WorkerConfig
from optuna_nnhp.workers.worker import WorkerResult
from optuna_nnhp.workers.worker import build_problem_on_free_device
from optuna_nnhp.workers.worker import run_worker

EXIT_FAILED, EXIT_REFUSED = 1, 2
EXIT_CODES = {
    None: 0,
    INTERRUPT: 130,
    RELEASE: 143,
}  # as shells have it: 128 and the signal's number


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv:
            Its words; those of this process if None.

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
    add("--study", required=True, metavar="NAME", help="the study's name")
    add(
        "--storage",
        default=DEFAULT_STORAGE,
        help="journal file, URL of a database, or grpc://host:port (default: %(default)s)",
    )
    add("--data", nargs="+", metavar="PATH", help="where the data are here (default: as noted)")
    add("--target", metavar="COLUMN", help="what to predict, if the study notes no column")
    add("--validation", metavar="PATH", help="a text to judge by, if the study had one as data")
    add("--network", metavar="MODULE:FUNCTION", help="what makes the networks, if not a template")
    add("--metric", metavar="MODULE:FUNCTION", help="what judges, if it was a function")
    add("--method", help="another way to search than the study's")
    add("--timeout", type=float, metavar="S", help="seconds from now (default: no bound)")
    add(
        "--n-trials",
        type=int,
        metavar="N",
        help="end when the study has so many trials, of all workers (default: as noted, or "
        "with --timeout no bound)",
    )
    add("--device", help="such as cuda:1 or cpu (default: a GPU that no other worker has, if any)")
    add("--threads", type=int, metavar="N", help="of this worker (default: one for each core)")
    add("--seed", type=int, help="of what this worker proposes (default: none that another has)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code.

    Args:
        argv:
            The words of the command line; those of this process if None.
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


def _report(options: argparse.Namespace, outcome: WorkerResult) -> int:
    """Say how it ended; the exit code."""
    if outcome.error is not None:
        text = f"{type(outcome.error).__name__}: {outcome.error}"
        for line in (text, *getattr(outcome.error, "__notes__", ())):
            print(hide_passwords(line, options.storage), file=sys.stderr)
        return EXIT_FAILED
    how = {None: "has come to its end", INTERRUPT: "was interrupted", RELEASE: "was told to end"}
    print(f"This worker of the study {options.study!r} {how[outcome.ended]}.")
    return EXIT_CODES[outcome.ended]


def _worker_config(options: argparse.Namespace) -> tuple[WorkerConfig, Template]:
    """What the command line and the study say together; with the data, which are the study's.

    Raises:
        ValueError: If something is missing, or does not belong to the study.
    """
    for name in ("timeout", "n_trials", "threads"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"`{option}` must be more than 0, but got {value:g}.")
    check_storage_exists(options.storage)
    storage = open_storage(options.storage)
    study = _load_study(options, storage)
    seed = uuid4().int % 2**32 if options.seed is None else check_seed(options.seed)
    method_config = stored_method_config(study, options.method, seed)
    problem_spec, pruner = _problem_spec(options, study), stored_pruner(study)
    n_trials = options.n_trials
    if n_trials is None and options.timeout is None:
        n_trials = stored_n_trials(study)
    if n_trials is None and options.timeout is None:
        raise ValueError("`--timeout` or `--n-trials` must be given: the study notes neither.")
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
        sampler=GridPointsSampler([], "what waits", is_part=True) if is_grid else None,
        options=stored_tuner_options(study),
        folder=None if folder is None else safe_join(folder, study.user_attrs[MODELS]),
        threads=options.threads,
        last_message_id=last_control_message_id(study),
    )
    return config, build_problem_on_free_device(problem_spec, study)


def _load_study(options: argparse.Namespace, storage: BaseStorage) -> Study:
    """The study, which exists."""
    try:
        return optuna.load_study(study_name=options.study, storage=storage)
    except KeyError as error:
        known = ", ".join(map(repr, optuna.get_all_study_names(storage))) or "none"
        raise ValueError(
            f"`--study` must name one of the storage's studies, {known}, but got "
            f"{options.study!r}."
        ) from error


def _problem_spec(options: argparse.Namespace, study: Study) -> ProblemSpec:
    """How the study's problem is made here."""
    data = _load_data(options.data)
    if options.validation is not None:
        data["validation"] = options.validation
    for name in ("network", "metric"):
        if getattr(options, name) is not None:
            data[name] = _import_function(name, getattr(options, name))
    return ProblemSpec.from_study(study, target=options.target, device=options.device, **data)


def _load_data(paths: list[str] | None) -> dict[str, Any]:
    """The data that paths name: arrays are read here."""
    if paths is None:
        return {}
    if len(paths) > 1:
        return {"X": paths}
    path = Path(paths[0])
    if path.suffix != ".npz":
        return {"X": str(path)}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"`--data` must be a CSV file, a text or what numpy.savez writes, but {path.name} "
            f"cannot be read: {error}"
        ) from error
    if not {"X", "y"} <= arrays.keys():
        found = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"`--data` must hold the arrays X and y, but {path.name} has {found}.")
    data: dict[str, Any] = {"X": arrays["X"], "y": arrays["y"]}
    if {"X_val", "y_val"} <= arrays.keys():
        data["validation"] = (arrays["X_val"], arrays["y_val"])
    return data


def _import_function(name: str, text: str) -> Callable[..., Any]:
    """A function of the user's that the command line names: it says so, no storage does."""
    module, _, path = text.partition(":")
    if not module or not path:
        raise ValueError(f"`--{name}` must be like module:function, but got {text!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a user's module raises
        kind = type(error).__name__
        raise ValueError(
            f"`--{name}` must name a function that can be imported here, but {text} cannot: "
            f"{kind}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"`--{name}` must be a function, but {text} is {found!r}.")
    return found  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
