"""All uses of Optuna's private parts in `study`, each with a test that names it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

from optuna import Study
from optuna import Trial
from optuna.samplers import BaseSampler
from optuna.samplers import GridSampler
from optuna.storages import BaseStorage


class StudyView(Study):
    """The same study with another sampler, as an argument of who asks it for trials.

    `Study.ask`, `Study.tell` and `Trial.suggest_*` read ``study.sampler``. A view shares all other
    state with its study, `Study.stop` and the list of trials that a thread has read included.

    Args:
        study:
            The study.
        sampler:
            What proposes its trials.

    Example:
        >>> import optuna
        >>> study = optuna.create_study()
        >>> view = StudyView(study, optuna.samplers.PartialFixedSampler({"x": 3}, study.sampler))
        >>> trial = view.ask()
        >>> trial.suggest_int("x", 1, 9), study.trials[0].params
        (3, {'x': 3})
    """

    def __init__(self, study: Study, sampler: BaseSampler) -> None:
        vars(self).update(vars(study))
        self._study, self.sampler = study, sampler

    def stop(self) -> None:
        """Stop the study."""
        self._study.stop()


def with_sampler(study: Study, sampler: BaseSampler) -> Study:
    """Return the study, or a view of it, whose sampler is another one."""
    return study if study.sampler is sampler else StudyView(study, sampler)


def is_stopped(study: Study) -> bool:
    """Return whether somebody has called `Study.stop`."""
    return study._stop_flag


def stop(study: Study) -> None:
    """Stop a study as `Study.stop` does, which raises an error outside of callbacks."""
    study._stop_flag = True


@contextmanager
def allow_study_stop(study: Study) -> Iterator[None]:
    """Allow `study.stop()` within, as Optuna's own `optimize` does.

    Callbacks such as `MaxTrialsCallback` and exhausted samplers call it; Optuna allows it only
    under this private flag.
    """
    study._stop_flag = False
    study._thread_local.in_optimize_loop = True
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def storage_of(study: Study) -> BaseStorage:
    """Return the storage of a study."""
    return study._storage


def study_id(study: Study) -> int:
    """Return the number of a study in its storage."""
    return study._study_id


def known_values(trial: Trial) -> Mapping[int, float]:
    """Return the intermediate values that a running trial has reported, by step."""
    return trial._cached_frozen_trial.intermediate_values


def grid_of(sampler: GridSampler) -> Mapping[str, Any]:
    """Return the search space of Optuna's grid sampler."""
    return sampler._search_space
