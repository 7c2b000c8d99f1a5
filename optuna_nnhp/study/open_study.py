"""Create or load a study; check that a loaded one has the same problem."""

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

IDENTITY = (
    "template",
    "task",
    "metric",
    "fingerprint",
)  # study attributes that are the same in all calls
MODELS = "models"  # study attribute: name of the folder of its best weights
MAX_OPEN_WAIT = 60.0  # seconds to wait for an unavailable storage
MAX_DESCRIPTION_WAIT = 5.0  # seconds to wait until another process has described its new study
DESCRIPTION_COMPLETE = "version"  # study attribute that is written last, after the others


def open_study(
    problem: Problem,
    storage: BaseStorage,
    study_name: str | None,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> optuna.Study:
    """Create a problem's study or load it, with a `BufferedStorage` around the storage.

    Raises:
        ValueError: If the storage has a study with this name (the problem's own name if None),
            but of another problem.
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
    """Create a study; wait while the storage is unavailable or locked by a killed process."""
    while True:
        try:
            return ask()
        except StorageUnavailable:
            if not storage.wait_until_available(MAX_OPEN_WAIT):
                raise


def _wait_for_description(study: optuna.Study) -> None:
    """Wait until the process that has created a study has also described it."""
    until = time.monotonic() + MAX_DESCRIPTION_WAIT
    while DESCRIPTION_COMPLETE not in study.user_attrs and time.monotonic() < until:
        if study.get_trials(deepcopy=False):
            return
        time.sleep(0.1)


def without_cache(study: optuna.Study) -> optuna.Study:
    """Return the same study with the storage behind the buffer, which is flushed."""
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
    """Return the name of the worker that writes to a storage, as `open_study` has set it.

    Example:
        >>> memory = optuna.storages.InMemoryStorage()
        >>> worker_name(BufferedStorage(memory, trial_attrs={"worker": "me"}))
        'me'
    """
    return str(storage.trial_attrs.get(WORKER) or new_worker_name())


def _check_same_problem(study: optuna.Study, problem: Problem) -> None:
    """Raise if a study is of another problem, or has other ranges or fixed values."""
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
