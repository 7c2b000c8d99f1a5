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

from optuna_nnhp.messages import without_password
from optuna_nnhp.search.levels import LevelsSampler
from optuna_nnhp.seeds import check_seed
from optuna_nnhp.storages.opening import open_storage
from optuna_nnhp.storages.places import DEFAULT_STORAGE
from optuna_nnhp.storages.places import check_exists
from optuna_nnhp.storages.places import inside
from optuna_nnhp.storages.places import models_folder
from optuna_nnhp.study.opening import MODELS
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.recipe import Recipe
from optuna_nnhp.workers.job import Job
from optuna_nnhp.workers.job import Outcome
from optuna_nnhp.workers.job import settled
from optuna_nnhp.workers.job import work
from optuna_nnhp.workers.joining import noted_options
from optuna_nnhp.workers.joining import noted_pruner
from optuna_nnhp.workers.joining import noted_trials
from optuna_nnhp.workers.joining import noted_wish
from optuna_nnhp.workers.watch import INTERRUPT
from optuna_nnhp.workers.watch import RELEASE
from optuna_nnhp.workers.watch import last_told

FAILED, REFUSED = 1, 2
ENDED = {None: 0, INTERRUPT: 130, RELEASE: 143}  # as shells have it: 128 and the signal's number


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv:
            Its words; those of this process if None.

    Example:
        >>> parse(["worker", "--study", "digits"]).storage
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
    options = parse(argv)
    try:
        job, problem = _job(options)
    except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
        text = str(error) if str(error) else type(error).__name__
        print(f"error: {without_password(text, options.storage)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return ENDED[INTERRUPT]
    return _told(options, work(job, problem))


def _told(options: argparse.Namespace, outcome: Outcome) -> int:
    """Say how it ended; the exit code."""
    if outcome.error is not None:
        text = f"{type(outcome.error).__name__}: {outcome.error}"
        for line in (text, *getattr(outcome.error, "__notes__", ())):
            print(without_password(line, options.storage), file=sys.stderr)
        return FAILED
    how = {None: "has come to its end", INTERRUPT: "was interrupted", RELEASE: "was told to end"}
    print(f"This worker of the study {options.study!r} {how[outcome.ended]}.")
    return ENDED[outcome.ended]


def _job(options: argparse.Namespace) -> tuple[Job, Template]:
    """What the command line and the study say together; with the data, which are the study's.

    Raises:
        ValueError: If something is missing, or does not belong to the study.
    """
    for name in ("timeout", "n_trials", "threads"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"`{option}` must be more than 0, but got {value:g}.")
    check_exists(options.storage)
    storage = open_storage(options.storage)
    study = _opened(options, storage)
    seed = uuid4().int % 2**32 if options.seed is None else check_seed(options.seed)
    wish = noted_wish(study, options.method, seed)
    recipe, pruner = _recipe(options, study), noted_pruner(study)
    n_trials = options.n_trials
    if n_trials is None and options.timeout is None:
        n_trials = noted_trials(study)
    if n_trials is None and options.timeout is None:
        raise ValueError("`--timeout` or `--n-trials` must be given: the study notes neither.")
    is_grid = wish.method == "grid"
    folder = models_folder(storage, options.storage)
    job = Job(
        recipe,
        storage,
        options.study,
        wish,
        pruner,
        n_trials,
        options.timeout,
        sampler=LevelsSampler([], "what waits", is_part=True) if is_grid else None,
        options=noted_options(study),
        folder=None if folder is None else inside(folder, study.user_attrs[MODELS]),
        threads=options.threads,
        told=last_told(study),
    )
    return job, settled(recipe, study)


def _opened(options: argparse.Namespace, storage: BaseStorage) -> Study:
    """The study, which exists."""
    try:
        return optuna.load_study(study_name=options.study, storage=storage)
    except KeyError as error:
        known = ", ".join(map(repr, optuna.get_all_study_names(storage))) or "none"
        raise ValueError(
            f"`--study` must name one of the storage's studies, {known}, but got "
            f"{options.study!r}."
        ) from error


def _recipe(options: argparse.Namespace, study: Study) -> Recipe:
    """How the study's problem is made here."""
    data = _data(options.data)
    if options.validation is not None:
        data["validation"] = options.validation
    for name in ("network", "metric"):
        if getattr(options, name) is not None:
            data[name] = _function(name, getattr(options, name))
    return Recipe.of(study, target=options.target, device=options.device, **data)


def _data(paths: list[str] | None) -> dict[str, Any]:
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


def _function(name: str, text: str) -> Callable[..., Any]:
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
