"""Opening a study: where it is kept, and whether it is the same study."""

from __future__ import annotations

from collections.abc import Callable
import functools
from pathlib import Path
import re
import time
from typing import TYPE_CHECKING
from uuid import uuid4
import warnings

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import distribution_to_json
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage
from optuna.storages import RDBStorage

from optuna_nnhp.messages import holds_password
from optuna_nnhp.messages import without_password as without_password
from optuna_nnhp.study.batches import WORKER as WORKER
from optuna_nnhp.study.deferred import DeferredStorage
from optuna_nnhp.study.environment import Marks
from optuna_nnhp.study.environment import note_environment
from optuna_nnhp.study.journal import open_journal
from optuna_nnhp.study.lease import new_worker_name
from optuna_nnhp.study.proxy import SCHEME
from optuna_nnhp.study.proxy import grpc_proxy
from optuna_nnhp.study.reach import Unreachable
from optuna_nnhp.version import __version__

if TYPE_CHECKING:
    from optuna_nnhp.study.problem import Problem

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

DEFAULT_STORAGE = "optuna_nnhp.journal"
IDENTITY = ("template", "task", "metric", "fingerprint")  # what one study cannot mix
MODELS = "models"  # study attribute: the folder of its best weights, inside the storage's
LONGEST_NAME = 60  # of 255 bytes at most, and a letter may take four
OPENED_IN = 60.0  # seconds that a storage may be away when a study is opened
DESCRIBED_IN = 5.0  # seconds, after which a study without a description has lost its creator
LAST = "version"  # study attribute that is written last: the others are there


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """The storage that a user names.

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
        if str(storage).startswith(SCHEME):
            return grpc_proxy(str(storage))
        if "://" in str(storage):
            return optuna.storages.get_storage(str(storage))
        path = Path(storage)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.open("ab").close()
        return open_journal(path)
    except Exception as error:  # drivers and SQLAlchemy raise types of their own
        cause = error
    name = " ".join(without_password(storage, storage).split())
    lines = without_password(cause, storage).strip().splitlines() or [type(cause).__name__]
    text = f"The storage must be one that can be written, but {name} cannot: {lines[0]}"
    # Outside of the `except`: a driver's own text would be shown above ours.
    raise ValueError(text) from (None if holds_password(cause, str(storage)) else cause)


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
    path = path.removeprefix("file:") if match else path
    return Path(path).with_suffix(suffix)


def file_name(text: str) -> str:
    """A text as the name of a file or folder in any file system; different ones may share it.

    Example:
        >>> file_name("../my study: 1")
        '.._my_study_1'
    """
    plain = re.sub(r"[^\w.-]+", "_", text)[:LONGEST_NAME]
    return plain if plain.strip(".") else "_"


def inside(folder: Path, name: object) -> Path:
    """What lies right inside a folder, by a name that a storage holds: others write to it too.

    Args:
        folder:
            The folder.
        name:
            Such as `file_name` makes.

    Raises:
        ValueError: If that would be elsewhere.

    Example:
        >>> inside(Path("optuna_nnhp.models"), "digits-1a2b3c4d").name
        'digits-1a2b3c4d'
    """
    if not isinstance(name, str) or not name.strip(".") or re.search(r"[^\w.-]", name):
        raise ValueError(
            "A folder that a study names must be of letters, digits, `_`, `-` and `.`, but is "
            f"{name!r}."
        )
    return folder / name


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
        storage = DeferredStorage(storage, mark=Marks({WORKER: new_worker_name()}))
    name = study_name or problem.name
    create = functools.partial(
        optuna.create_study,
        study_name=name,
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        direction="maximize" if problem.maximize else "minimize",
    )
    try:
        study = _patiently(storage, create)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        _await_description(study)
    _check_same(study, problem)
    if LAST not in study.user_attrs:
        attributes = {
            **problem.description,
            "space": {n: distribution_to_json(d) for n, d in problem.space.items()},
            "fixed": problem.fixed,
            "seed": problem.seed,
            # Studies in other storages may have the same name, and keep their weights here too.
            MODELS: f"{file_name(study.study_name)}-{uuid4().hex[:8]}",
            LAST: __version__,
        }
        for name, value in attributes.items():
            study.set_user_attr(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([problem.description["metric"]])
    note_environment(study, problem)
    return study


def _patiently(storage: DeferredStorage, ask: Callable[[], optuna.Study]) -> optuna.Study:
    """Ask a storage that may be away for a while, or locked by a process that was killed."""
    while True:
        try:
            return ask()
        except Unreachable:
            if not storage.wait_until_reachable(OPENED_IN):
                raise


def _await_description(study: optuna.Study) -> None:
    """Give another process, that has just created a study, the time to describe it."""
    until = time.monotonic() + DESCRIBED_IN
    while LAST not in study.user_attrs and time.monotonic() < until:
        if study.get_trials(deepcopy=False):
            return
        time.sleep(0.1)


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


def worker_of(storage: DeferredStorage) -> str:
    """Who writes to a storage: what `open_study` has named it.

    Example:
        >>> worker_of(DeferredStorage(open_storage(None), mark=lambda: {"worker": "me"}))
        'me'
    """
    return str(storage._mark().get(WORKER) or new_worker_name())


def _check_same(study: optuna.Study, problem: Problem) -> None:
    """Raise if the study is not this problem's."""
    inside(Path(), study.user_attrs.get(MODELS, "none"))
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
