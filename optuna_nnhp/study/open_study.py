"""Opening a study: new, or is it the same one?"""

from __future__ import annotations

from collections.abc import Callable
import functools
from pathlib import Path
import time
from typing import TYPE_CHECKING
from uuid import uuid4
import warnings

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import distribution_to_json
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage

from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.circuit_breaker import StorageUnavailable
from optuna_nnhp.storages.lease import new_worker_name
from optuna_nnhp.storages.open_storage import safe_file_name
from optuna_nnhp.storages.open_storage import safe_join
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study.environment import record_environment
from optuna_nnhp.version import __version__

if TYPE_CHECKING:
    from optuna_nnhp.study.problem import Problem

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

IDENTITY = ("template", "task", "metric", "fingerprint")  # what one study cannot mix
MODELS = "models"  # study attribute: the folder of its best weights, inside the storage's
MAX_OPEN_WAIT = 60.0  # seconds that a storage may be away when a study is opened
MAX_DESCRIPTION_WAIT = (
    5.0  # seconds, after which a study without a description has lost its creator
)
DESCRIPTION_COMPLETE = "version"  # study attribute that is written last: the others are there


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
            Where the study is kept; it is written behind, see `BufferedStorage`.
        study_name:
            Its name; the problem's default name if None.
        sampler:
            Who proposes.
        pruner:
            Who ends trials.

    Raises:
        ValueError: If the storage holds another study under this name.
    """
    if not isinstance(storage, BufferedStorage):
        storage = BufferedStorage(storage, trial_attrs={WORKER: new_worker_name()})
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
        study = _retry_until_available(storage, create)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        _wait_for_description(study)
    _check_same_problem(study, problem)
    if DESCRIPTION_COMPLETE not in study.user_attrs:
        attributes = {
            **problem.description,
            "space": {n: distribution_to_json(d) for n, d in problem.space.items()},
            "fixed": problem.fixed,
            "seed": problem.seed,
            # Studies in other storages may have the same name, and keep their weights here too.
            MODELS: f"{safe_file_name(study.study_name)}-{uuid4().hex[:8]}",
            DESCRIPTION_COMPLETE: __version__,
        }
        for name, value in attributes.items():
            study.set_user_attr(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([problem.description["metric"]])
    record_environment(study, problem)
    return study


def _retry_until_available(
    storage: BufferedStorage, ask: Callable[[], optuna.Study]
) -> optuna.Study:
    """Ask a storage that may be away for a while, or locked by a process that was killed."""
    while True:
        try:
            return ask()
        except StorageUnavailable:
            if not storage.wait_until_available(MAX_OPEN_WAIT):
                raise


def _wait_for_description(study: optuna.Study) -> None:
    """Give another process, that has just created a study, the time to describe it."""
    until = time.monotonic() + MAX_DESCRIPTION_WAIT
    while DESCRIPTION_COMPLETE not in study.user_attrs and time.monotonic() < until:
        if study.get_trials(deepcopy=False):
            return
        time.sleep(0.1)


def without_cache(study: optuna.Study) -> optuna.Study:
    """The same study without what is kept in memory: whoever reads it reads what there is."""
    storage = storage_of(study)
    if not isinstance(storage, BufferedStorage):
        return study
    storage.flush()
    return optuna.load_study(
        study_name=study.study_name,
        storage=storage.backend,
        sampler=study.sampler,
        pruner=study.pruner,
    )


def worker_name(storage: BufferedStorage) -> str:
    """Who writes to a storage: what `open_study` has named it.

    Example:
        >>> memory = optuna.storages.InMemoryStorage()
        >>> worker_name(BufferedStorage(memory, trial_attrs={"worker": "me"}))
        'me'
    """
    return str(storage.trial_attrs.get(WORKER) or new_worker_name())


def _check_same_problem(study: optuna.Study, problem: Problem) -> None:
    """Raise if the study is not this problem's."""
    safe_join(Path(), study.user_attrs.get(MODELS, "none"))
    text = f"The study {study.study_name!r} exists already with another "
    advice = "; choose another `study_name`."
    known, wanted = study.user_attrs, "maximize" if problem.maximize else "minimize"
    directions = ", ".join(direction.name.lower() for direction in study.directions)
    is_new = DESCRIPTION_COMPLETE not in known
    if is_new and study.get_trials(deepcopy=False):
        raise ValueError(f"{text}origin: its trials are not optuna_nnhp's{advice}")
    for name in () if is_new else IDENTITY:
        if known.get(name) != problem.description.get(name):
            old, new = known.get(name), problem.description.get(name)
            raise ValueError(f"{text}{name}: {old!r}, but this one has {new!r}{advice}")
    if directions != wanted:
        raise ValueError(f"{text}direction: {directions}{advice}")
    if is_new:
        return
    old_space = {name: json_to_distribution(text) for name, text in known["space"].items()}
    for name in {**old_space, **problem.space}:
        old_values = old_space.get(name, known["fixed"].get(name))
        new_values = problem.space.get(name, problem.fixed.get(name))
        if not _are_equal(old_values, new_values):
            raise ValueError(
                f"{text}range of `{name}`: {old_values}, but this one has {new_values}{advice}"
            )
    for name, value in problem.fixed.items():
        if not _are_equal(known["fixed"].get(name), value):
            raise ValueError(
                f"{text}value of `{name}`: {known['fixed'].get(name)}, but this one has "
                f"{value}{advice}"
            )
    if known["seed"] != problem.seed:
        _logger.warning(
            f"The study began with the seed {known['seed']} and continues with {problem.seed}."
        )


def _are_equal(old: object, new: object) -> bool:
    if isinstance(old, BaseDistribution) or isinstance(new, BaseDistribution):
        return old == new
    return old == new and type(old) is type(new)
