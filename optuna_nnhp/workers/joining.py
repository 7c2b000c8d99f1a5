"""Joining a study from any shell: what it notes of its method, and the job that follows."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner

from optuna_nnhp.study.wish import Wish
from optuna_nnhp.study.wish import wish_of
from optuna_nnhp.templates.recipe import NOT_KEPT
from optuna_nnhp.templates.recipe import RECIPE
from optuna_nnhp.workers.job import Job

SEARCH = "search"  # study attribute: method, options, pruner, trials and loop of its last call
HALVING, NO_PRUNER = "halving", "none"


def note_search(study: Study, job: Job) -> None:
    """Note on a study how its problem is made and how it is tuned, for those who join it.

    Args:
        study:
            The opened study.
        job:
            What is done for it.
    """
    if RECIPE not in study.user_attrs:
        study.set_user_attr(RECIPE, job.recipe.attributes())
    wish, pruner = job.wish, job.pruner
    search = {
        "method": {NOT_KEPT: type(wish.sampler).__name__} if wish.is_own else wish.method,
        "options": {**wish.options, **wish.loop_options},
        "pruner": _noted_pruner(pruner),
        "n_trials": job.n_trials,
        "loop": dict(job.options),
    }
    if study.user_attrs.get(SEARCH) != search:
        study.set_user_attr(SEARCH, search)


def _noted_pruner(pruner: BasePruner | None) -> Any:
    if isinstance(pruner, NopPruner):
        return NO_PRUNER
    return HALVING if pruner is None else {NOT_KEPT: type(pruner).__name__}


def noted_wish(study: Study, method: str | None, seed: int) -> Wish:
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
    noted = _noted(study)
    if method == "grid" != noted["method"]:
        raise ValueError(
            "`method` must be 'grid' from a study's beginning, when its points are laid out, but "
            "this one's was another."
        )
    if method is not None:
        options = noted["options"] if method == noted["method"] else None
        return wish_of(method, None, options, None, seed)
    if isinstance(noted["method"], dict):
        raise ValueError(
            f"The method must be given: the study's sampler, {noted['method'][NOT_KEPT]}, is not "
            "kept with it."
        )
    return wish_of(noted["method"], None, noted["options"], None, seed)


def noted_pruner(study: Study) -> BasePruner | None:
    """What ends a study's trials; None for halving of whole cohorts.

    Args:
        study:
            A study that `optimize` made.

    Raises:
        ValueError: If it is a user's own.
    """
    pruner = _noted(study)["pruner"]
    if isinstance(pruner, dict):
        raise ValueError(
            f"The study's pruner must be the default one or none, but it is {pruner[NOT_KEPT]}, "
            "which is not kept with it: give `optimize` an `executor` instead."
        )
    return NopPruner() if pruner == NO_PRUNER else None


def noted_trials(study: Study) -> int | None:
    """How many trials a study shall have."""
    count = _noted(study)["n_trials"]
    return None if count is None else int(count)


def noted_options(study: Study) -> dict[str, Any]:
    """Options of a study's loop, such as ``trial_timeout``; none if they are not noted."""
    return dict(_noted(study).get("loop", {}))


def _noted(study: Study) -> dict[str, Any]:
    search = study.user_attrs.get(SEARCH)
    if search is None:
        raise ValueError(
            "The study must be one that `optimize` began, which notes how it is tuned, but "
            f"{study.study_name!r} does not."
        )
    return dict(search)
