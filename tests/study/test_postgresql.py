"""A study in a real PostgreSQL, started for these tests alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.postgresql import Database
from tests.tiny import courses
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune


def test_a_study_runs_and_goes_on(postgresql: Database, folder: Path) -> None:
    X, y = numbers()
    first = tune(X, y, storage=postgresql.url, n_trials=4, cohort_size=2)
    course = courses(first)
    assert course == courses(tune(X, y, storage=None, n_trials=4, cohort_size=2))
    assert [path.name for path in folder.iterdir()] == ["optuna_nnhp.models"]
    again = tune(X, y, storage=postgresql.url, n_trials=4)
    assert again.best_value == first.best_value
    assert np.array_equal(again.predict(X), first.predict(X))
    more = tune(X, y, storage=postgresql.url, n_trials=6)
    assert courses(more)[:4] == course
    assert len(trials(more)) == 6
