"""Each private part of Optuna that `study` uses has a test that names it."""

from __future__ import annotations

import optuna
import pytest

from optuna_nnhp.search.bounded_tpe import BoundedTPESampler
from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.study import _optuna_internals as internals


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_a_view_asks_its_own_sampler_and_does_not_change_the_studys(
    study: optuna.Study,
) -> None:
    other = optuna.samplers.PartialFixedSampler({"x": 0.25}, study.sampler)
    before = study.sampler
    view = internals.with_sampler(study, other)
    trial = view.ask()
    assert trial.suggest_float("x", 0, 1) == 0.25
    assert study.sampler is before and view.sampler is other
    view.tell(trial, 1.0)
    assert [t.value for t in study.trials] == [1.0]
    assert internals.with_sampler(study, before) is study


def test_a_view_reports_ended_trials_to_its_own_sampler(study: optuna.Study) -> None:
    told = list[int]()

    class Listening(optuna.samplers.RandomSampler):
        def after_trial(self, study: optuna.Study, trial: object, *_: object) -> None:
            told.append(trial.number)  # type: ignore[attr-defined]

    view = internals.with_sampler(study, Listening())
    view.tell(study.ask(), 1.0)
    study.tell(study.ask(), 1.0)
    assert told == [0]


def test_study_stop_is_allowed_in_the_context_and_a_view_stops_its_study(
    study: optuna.Study,
) -> None:
    with internals.allow_study_stop(study):
        assert not internals.is_stopped(study)
        internals.with_sampler(study, optuna.samplers.RandomSampler()).stop()
        assert internals.is_stopped(study)
    with pytest.raises(RuntimeError, match="inside an objective function"):
        study.stop()


def test_a_view_proposes_from_the_bounded_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna's own step reads all trials at every proposal."""

    def fail(*arguments: object) -> None:
        raise AssertionError("Optuna's own step was called.")

    monkeypatch.setattr(optuna.samplers.TPESampler, "_get_internal_repr", fail)
    sampler = BoundedTPESampler(seed=0, n_startup_trials=3, multivariate=True)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    view = internals.with_sampler(study, sampler)
    for _ in range(6):
        trial = view.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    assert len(sampler._trial_history.trials) == 6


def test_a_study_is_stopped_by_its_flag(study: optuna.Study) -> None:
    assert not internals.is_stopped(study)
    internals.stop(study)
    assert internals.is_stopped(study)


def test_ids_and_storages_are_those_of_optuna(study: optuna.Study) -> None:
    trial = study.ask()
    storage, number = internals.storage_of(study), internals.study_id(study)
    assert storage.get_study_name_from_id(number) == study.study_name
    assert storage.get_trial(id_of(trial)).number == trial.number
    assert id_of(study.trials[0]) == id_of(trial)


def test_known_values_are_the_reported_ones(study: optuna.Study) -> None:
    trial = study.ask()
    trial.report(0.5, step=3)
    assert internals.known_values(trial) == {3: 0.5}


def test_grid_of_returns_the_values_of_a_grid_sampler() -> None:
    sampler = optuna.samplers.GridSampler({"x": [1, 2]})
    assert {name: list(values) for name, values in internals.grid_of(sampler).items()} == {
        "x": [1, 2]
    }
