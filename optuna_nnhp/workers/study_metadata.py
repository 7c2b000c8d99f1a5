"""Store in a study how it is tuned, for workers that join it from the command line."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner

from optuna_nnhp.study.method_config import MethodConfig
from optuna_nnhp.study.method_config import parse_method
from optuna_nnhp.templates.base import NOT_SAVED
from optuna_nnhp.templates.problem_spec import PROBLEM_SPEC
from optuna_nnhp.workers.config import WorkerConfig

SEARCH_KEY = "search"  # study attribute: how the last call of `optimize` tuned the study
HALVING, NO_PRUNER = "halving", "none"


def store_search_config(study: Study, config: WorkerConfig) -> None:
    """Store in a study how its problem is built and how it is tuned.

    Args:
        study:
            The opened study.
        config:
            Configuration of its workers.
    """
    if PROBLEM_SPEC not in study.user_attrs:
        study.set_user_attr(PROBLEM_SPEC, config.problem_spec.attributes())
    method = config.method_config
    search = {
        "method": {NOT_SAVED: type(method.sampler).__name__}
        if method.is_user_sampler
        else method.method,
        "options": {**method.options, **method.policy_options},
        "pruner": _pruner_metadata(config.pruner),
        "n_trials": config.n_trials,
        "tuner_options": dict(config.tuner_options),
    }
    if study.user_attrs.get(SEARCH_KEY) != search:
        study.set_user_attr(SEARCH_KEY, search)


def _pruner_metadata(pruner: BasePruner | None) -> str | dict[str, str]:
    """Return what is stored of a pruner: of a user's own only its name."""
    if isinstance(pruner, NopPruner):
        return NO_PRUNER
    return HALVING if pruner is None else {NOT_SAVED: type(pruner).__name__}


def stored_method_config(study: Study, method: str | None, seed: int) -> MethodConfig:
    """Return the search method of a study.

    Args:
        study:
            A study that `optimize` created.
        method:
            Another method to use instead; None for the study's.
        seed:
            Seed of the sampler.

    Raises:
        ValueError: If the study was tuned with a user's sampler, or only one of the two methods
            is a grid.
    """
    search = _stored_search_config(study)
    stored = search["method"]
    if method == "grid" != stored:
        raise ValueError(
            "`method` must be 'grid' from the beginning of a study, when the points of the grid "
            "are enqueued, but this study began with another method."
        )
    if method is None and isinstance(stored, dict):
        raise ValueError(
            f"`method` must be given, but is missing: the study's sampler, {stored[NOT_SAVED]}, "
            "is not stored in it."
        )
    is_stored = method is None or method == stored
    return parse_method(
        stored if method is None else method,
        None,
        search["options"] if is_stored else None,
        None,
        seed,
    )


def stored_pruner(study: Study) -> BasePruner | None:
    """Return the pruner of a study; None for successive halving of whole cohorts.

    Args:
        study:
            A study that `optimize` created.

    Raises:
        ValueError: If the pruner is a user's own.
    """
    pruner = _stored_search_config(study)["pruner"]
    if isinstance(pruner, dict):
        raise ValueError(
            f"The study's pruner must be the default one or none, but it is {pruner[NOT_SAVED]}, "
            "which is not stored in it: give `optimize` an `executor` instead."
        )
    return NopPruner() if pruner == NO_PRUNER else None


def stored_n_trials(study: Study) -> int | None:
    """Return the number of trials that a study should have; None if there is no limit."""
    count = _stored_search_config(study)["n_trials"]
    return None if count is None else int(count)


def stored_tuner_options(study: Study) -> dict[str, Any]:
    """Return the tuner options of a study, such as ``trial_timeout``."""
    return dict(_stored_search_config(study)["tuner_options"])


def _stored_search_config(study: Study) -> dict[str, Any]:
    """Return what `store_search_config` stored, or raise if there is nothing."""
    search = study.user_attrs.get(SEARCH_KEY)
    if search is None:
        raise ValueError(
            f"The study must be one that `optimize` started, but {study.study_name!r} is not: it "
            "stores no search configuration."
        )
    return dict(search)
