"""Joining a study from any shell: what it notes of its method, and the job that follows."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner

from optuna_nnhp.study.method_config import MethodConfig
from optuna_nnhp.study.method_config import parse_method
from optuna_nnhp.templates.problem_spec import NOT_SAVED
from optuna_nnhp.templates.problem_spec import PROBLEM_SPEC
from optuna_nnhp.workers.worker import WorkerConfig

SEARCH_KEY = "search"  # study attribute: method, options, pruner, trials and loop of its last call
HALVING, NO_PRUNER = "halving", "none"


def store_search_config(study: Study, config: WorkerConfig) -> None:
    """Note on a study how its problem is made and how it is tuned, for those who join it.

    Args:
        study:
            The opened study.
        config:
            What is done for it.
    """
    if PROBLEM_SPEC not in study.user_attrs:
        study.set_user_attr(PROBLEM_SPEC, config.problem_spec.attributes())
    method_config, pruner = config.method_config, config.pruner
    search = {
        "method": {NOT_SAVED: type(method_config.sampler).__name__}
        if method_config.is_user_sampler
        else method_config.method,
        "options": {**method_config.options, **method_config.policy_options},
        "pruner": _pruner_metadata(pruner),
        "n_trials": config.n_trials,
        "loop": dict(config.options),
    }
    if study.user_attrs.get(SEARCH_KEY) != search:
        study.set_user_attr(SEARCH_KEY, search)


def _pruner_metadata(pruner: BasePruner | None) -> Any:
    if isinstance(pruner, NopPruner):
        return NO_PRUNER
    return HALVING if pruner is None else {NOT_SAVED: type(pruner).__name__}


def stored_method_config(study: Study, method: str | None, seed: int) -> MethodConfig:
    """How a study is tuned.

    Args:
        study:
            A study that `optimize` made.
        method:
            Another method; None for the study's.
        seed:
            Of the sampler.

    Raises:
        ValueError: If it is not noted.
    """
    noted = _stored_search_config(study)
    if method == "grid" != noted["method"]:
        raise ValueError(
            "`method` must be 'grid' from a study's beginning, when its points are laid out, but "
            "this one's was another."
        )
    if method is not None:
        options = noted["options"] if method == noted["method"] else None
        return parse_method(method, None, options, None, seed)
    if isinstance(noted["method"], dict):
        raise ValueError(
            f"The method must be given: the study's sampler, {noted['method'][NOT_SAVED]}, is not "
            "kept with it."
        )
    return parse_method(noted["method"], None, noted["options"], None, seed)


def stored_pruner(study: Study) -> BasePruner | None:
    """What ends a study's trials; None for halving of whole cohorts.

    Args:
        study:
            A study that `optimize` made.

    Raises:
        ValueError: If it is a user's own.
    """
    pruner = _stored_search_config(study)["pruner"]
    if isinstance(pruner, dict):
        raise ValueError(
            f"The study's pruner must be the default one or none, but it is {pruner[NOT_SAVED]}, "
            "which is not kept with it: give `optimize` an `executor` instead."
        )
    return NopPruner() if pruner == NO_PRUNER else None


def stored_n_trials(study: Study) -> int | None:
    """How many trials a study shall have."""
    count = _stored_search_config(study)["n_trials"]
    return None if count is None else int(count)


def stored_tuner_options(study: Study) -> dict[str, Any]:
    """Options of a study's loop, such as ``trial_timeout``; none if they are not noted."""
    return dict(_stored_search_config(study).get("loop", {}))


def _stored_search_config(study: Study) -> dict[str, Any]:
    search = study.user_attrs.get(SEARCH_KEY)
    if search is None:
        raise ValueError(
            "The study must be one that `optimize` began, which notes how it is tuned, but "
            f"{study.study_name!r} does not."
        )
    return dict(search)
