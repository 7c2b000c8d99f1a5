"""Opening a study: where it is kept, and whether it is the same study."""

from __future__ import annotations

import os
from pathlib import Path
import re
import socket
from typing import TYPE_CHECKING
from uuid import uuid4
import warnings

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import distribution_to_json
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal import JournalFileOpenLock
from optuna.trial import TrialState

from optuna_nnhp.study.deferred import DeferredStorage
from optuna_nnhp.version import __version__

if TYPE_CHECKING:
    from optuna_nnhp.study.problem import Problem

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

DEFAULT_STORAGE = "optuna_nnhp.journal"
IDENTITY = ("template", "task", "metric", "fingerprint")  # what one study cannot mix
WORKER = "worker"  # trial attribute: who trains it
MODELS = "models"  # study attribute: the folder of its best weights, inside the storage's
LAST = "version"  # study attribute that is written last: the others are there


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """The storage that a user names.

    Args:
        storage:
            The path of a journal file, a URL such as ``"sqlite:///study.db"`` or
            ``"postgresql://..."``, an Optuna storage, or None for memory only.

    Raises:
        ValueError: If it cannot be written.

    Example:
        >>> type(open_storage(None)).__name__
        'InMemoryStorage'
    """
    if storage is None or isinstance(storage, BaseStorage):
        return optuna.storages.get_storage(storage)
    name = without_password(str(storage))
    try:
        if "://" in str(storage):
            return optuna.storages.get_storage(str(storage))
        path = Path(storage)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.open("ab").close()
        lock = JournalFileOpenLock(str(path)) if os.name == "nt" else None  # no symbolic links
        return JournalStorage(JournalFileBackend(str(path), lock))
    except Exception as error:  # drivers and SQLAlchemy raise types of their own
        reason = without_password(str(error).strip().splitlines()[0] if str(error) else "")
        text = f"The storage must be one that can be written, but {name} cannot: {reason}"
        raise ValueError(text) from error


def without_password(text: str) -> str:
    """A text with the password of any URL in it hidden.

    Example:
        >>> without_password("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
    """
    return re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", text)


def models_folder(storage: BaseStorage, given: str | Path | None) -> Path | None:
    """Where the best weights are kept: beside a journal or SQLite file, else here.

    Args:
        storage:
            The opened storage.
        given:
            What the user named.

    Returns:
        The folder, or None when the study lives in memory only.
    """
    if isinstance(storage, DeferredStorage):
        storage = storage.backend
    if isinstance(storage, optuna.storages.InMemoryStorage):
        return None
    if given is None:
        backend = getattr(storage, "_backend", storage)  # Optuna caches databases
        given = backend.url if isinstance(backend, RDBStorage) else DEFAULT_STORAGE
    return beside(str(given), ".models")


def beside(storage: str, suffix: str) -> Path:
    """A path beside a journal or SQLite file, or here for another database.

    Example:
        >>> [str(beside(s, ".models")) for s in ("a.journal", "sqlite:///b.db", "mysql://host/c")]
        ['a.models', 'b.models', 'optuna_nnhp.models']
    """
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", storage)
    path = match.group(1) if match else "optuna_nnhp" if "://" in storage else storage
    return Path(path).with_suffix(suffix)


def open_study(
    problem: Problem,
    storage: BaseStorage,
    study_name: str | None,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> optuna.Study:
    """Create a problem's study, or continue it.

    Args:
        problem:
            What is tuned.
        storage:
            Where the study is kept; it is written behind, see `DeferredStorage`.
        study_name:
            Its name; the problem's default name if None.
        sampler:
            Who proposes.
        pruner:
            Who ends trials.

    Raises:
        ValueError: If the storage holds another study under this name.
    """
    if not isinstance(storage, DeferredStorage):
        storage = DeferredStorage(storage, mark=_mark)
    study = optuna.create_study(
        study_name=study_name or problem.name,
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        direction="maximize" if problem.maximize else "minimize",
        load_if_exists=True,
    )
    _check_same(study, problem)
    if LAST not in study.user_attrs:
        plain_name = re.sub(r"[^\w.-]+", "_", study.study_name)
        attributes = {
            **problem.description,
            "space": {n: distribution_to_json(d) for n, d in problem.space.items()},
            "fixed": problem.fixed,
            "seed": problem.seed,
            # Studies in other storages may have the same name, and keep their weights here too.
            MODELS: f"{plain_name}-{uuid4().hex[:8]}",
            LAST: __version__,
        }
        for name, value in attributes.items():
            study.set_user_attr(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([problem.description["metric"]])
    _end_abandoned(study)
    return study


def read_directly(study: optuna.Study) -> optuna.Study:
    """The same study without what is kept in memory: whoever reads it reads what there is."""
    storage = study._storage
    if not isinstance(storage, DeferredStorage):
        return study
    storage.flush()
    return optuna.load_study(
        study_name=study.study_name,
        storage=storage.backend,
        sampler=study.sampler,
        pruner=study.pruner,
    )


def worker_name() -> str:
    """Who this process is, on all machines.

    Example:
        >>> worker_name().endswith(str(os.getpid()))
        True
    """
    return f"{socket.gethostname()}:{os.getpid()}"


def _mark() -> dict[str, str]:
    """What every trial of this process carries from its start."""
    return {WORKER: worker_name()}


def _check_same(study: optuna.Study, problem: Problem) -> None:
    """Raise if the study is not this problem's."""
    text = f"The study {study.study_name!r} exists already with another "
    advice = "; choose another `study_name`."
    known = study.user_attrs
    if LAST not in known:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"{text}origin: its trials are not optuna_nnhp's{advice}")
        return
    for name in IDENTITY:
        if known.get(name) != problem.description.get(name):
            old, new = known.get(name), problem.description.get(name)
            raise ValueError(f"{text}{name}: {old!r}, but this one has {new!r}{advice}")
    if study.direction.name.lower() != ("maximize" if problem.maximize else "minimize"):
        raise ValueError(f"{text}direction: {study.direction.name.lower()}{advice}")
    old_space = {name: json_to_distribution(text) for name, text in known["space"].items()}
    for name in {**old_space, **problem.space}:
        old_values = old_space.get(name, known["fixed"].get(name))
        new_values = problem.space.get(name, problem.fixed.get(name))
        if not _equal(old_values, new_values):
            raise ValueError(
                f"{text}range of `{name}`: {old_values}, but this one has {new_values}{advice}"
            )
    for name, value in problem.fixed.items():
        if not _equal(known["fixed"].get(name), value):
            raise ValueError(
                f"{text}value of `{name}`: {known['fixed'].get(name)}, but this one has "
                f"{value}{advice}"
            )
    if known["seed"] != problem.seed:
        _logger.warning(
            f"The study began with the seed {known['seed']} and continues with {problem.seed}."
        )


def _equal(old: object, new: object) -> bool:
    if isinstance(old, BaseDistribution) or isinstance(new, BaseDistribution):
        return old == new
    return old == new and type(old) is type(new)


def _end_abandoned(study: optuna.Study) -> None:
    """Mark as failed what a killed process of this machine left running."""
    host = socket.gethostname()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner, _, process = str(trial.user_attrs.get(WORKER, "")).rpartition(":")
        if owner != host or not process.isdigit() or _alive(int(process)):
            continue
        study._storage.set_trial_user_attr(trial._trial_id, "cause", "killed")
        study.tell(trial.number, state=TrialState.FAIL)
        _logger.warning(f"Trial {trial.number} was left running by a process that is gone.")


def _alive(process: int) -> bool:
    if process == os.getpid():  # a number used again, or a notebook that was interrupted
        return False
    if os.name == "nt":  # where signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
