from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp.search.population import PopulationSampler

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "momentum": FloatDistribution(0.5, 0.99),
    "width": IntDistribution(16, 64),
    "activation": CategoricalDistribution(("relu", "tanh", "gelu")),
}


class TestBasic(BasicSamplerTestCase):
    """Optuna's own tests of a sampler."""

    @pytest.fixture(params=[2, 8])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: PopulationSampler(size=request.param, seed=0)


def generations(
    values: list[list[float | None]], *, direction: str = "maximize", **options: Any
) -> list[FrozenTrial]:
    """A study in which whole generations come to these values; None is a pruned trial."""
    size = len(values[0])
    sampler = PopulationSampler(size=size, seed=0, **options)
    study = optuna.create_study(direction=direction, sampler=sampler)
    for generation in values:
        trials = [study.ask(SPACE) for _ in generation]
        for trial, value in zip(trials, generation, strict=True):
            state = TrialState.PRUNED if value is None else TrialState.COMPLETE
            study.tell(trial, value, state)
    return study.get_trials()


def test_the_worst_continue_from_the_best_with_perturbed_values() -> None:
    trials = generations([[0.1, 0.9, 0.5, 0.4], [0.0] * 4])
    first, second = trials[:4], trials[4:]
    assert [t.user_attrs["slot"] for t in second] == [0, 1, 2, 3]
    assert [t.user_attrs["generation"] for t in second] == [1] * 4
    assert [t.user_attrs["parent"] for t in first] == [None] * 4
    assert [t.user_attrs["parent"] for t in second] == [1, 1, 2, 3]
    for lineage in (1, 2, 3):  # who is no worse goes on as it was
        assert second[lineage].params == first[lineage].params
    copied, best = second[0].params, first[1].params
    assert copied != best
    ratio = copied["rate"] / best["rate"]
    assert ratio == pytest.approx(1.25) or ratio == pytest.approx(0.8)
    assert abs(copied["width"] - best["width"]) in range(1, 8)


def test_the_best_are_the_lowest_when_minimizing() -> None:
    trials = generations([[0.1, 0.9, 0.5, 0.4], [0.0] * 4], direction="minimize")
    assert [t.user_attrs["parent"] for t in trials[4:]] == [0, 0, 2, 3]


def test_inherited_parameters_are_never_perturbed() -> None:
    names = ("activation", "width", "momentum")
    trials = generations([[0.1, 0.9, 0.5, 0.4]] * 6, inherited=names)
    by_number = {t.number: t for t in trials}
    copied = [t for t in trials if t.user_attrs["parent"] is not None]
    assert len(copied) == 20
    for trial in copied:
        parent = by_number[trial.user_attrs["parent"]]
        assert all(trial.params[name] == parent.params[name] for name in names)
    assert len({t.params["rate"] for t in trials}) > len(trials[:4])


def test_pruned_trials_are_never_parents() -> None:
    trials = generations([[0.1, 0.9, 0.5, 0.4], [0.2, None, 0.3, 0.4], [0.0] * 4])
    third = trials[8:]
    assert third[1].user_attrs["parent"] == 7  # the best of those that have a value
    assert {t.user_attrs["parent"] for t in third} <= {4, 6, 7}


def test_another_sampler_continues_the_population() -> None:
    first = PopulationSampler(size=3, seed=0)
    study = optuna.create_study(direction="maximize", sampler=first)
    for value in (0.1, 0.2, 0.3, 0.4):
        study.tell(study.ask(SPACE), value)
    study.sampler = PopulationSampler(size=3, seed=1)
    trial = study.ask(SPACE)
    assert trial.user_attrs["slot"] == 1 and trial.user_attrs["generation"] == 1


def test_populations_of_one_study_do_not_mix() -> None:
    study = optuna.create_study(direction="maximize")
    for name in ("a", "b"):
        study.sampler = PopulationSampler(size=2, population=name, seed=0)
        for value in (0.5, 0.6, 0.7):
            study.tell(study.ask(SPACE), value)
    assert [t.user_attrs["parent"] for t in study.trials] == [None, None, 1, None, None, 4]


def test_idle_members_are_next() -> None:
    study = optuna.create_study(sampler=PopulationSampler(size=2, seed=0))
    first, second = study.ask(SPACE), study.ask(SPACE)
    study.tell(second, 0.5)
    assert study.ask(SPACE).user_attrs["slot"] == second.user_attrs["slot"]
    assert first.user_attrs["slot"] != second.user_attrs["slot"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 1}, "`size` must be at least 2, but got 1."),
        ({"quantile": 0.6}, "`quantile` must be above 0 and at most 0.5, but got 0.6."),
        ({"quantile": 0.0}, "`quantile` must be above 0 and at most 0.5, but got 0.0."),
        ({"factor": 1.0}, "`factor` must be above 1, but got 1.0."),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PopulationSampler(**options)
