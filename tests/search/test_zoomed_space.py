from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.distributions import distribution_to_json
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
import pytest

import optuna_nnhp
from optuna_nnhp.search.zoomed_space import ZoomedSpace

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-6, 1.0, log=True),
    "idle": FloatDistribution(0.0, 1.0),
    "kind": CategoricalDistribution(("a", "b", "c", "d")),
    "depth": IntDistribution(1, 64),
    "width": IntDistribution(1, 1024, log=True),
    "share": FloatDistribution(0.0, 3.0, step=0.1),
    "even": IntDistribution(0, 40, step=2),
    "edge": FloatDistribution(0.0, 1.0),
    "one": FloatDistribution(2.0, 2.0),
}


def loss(p: dict[str, Any]) -> float:
    return float(
        5 * (np.log10(p["rate"]) + 4) ** 2
        + {"a": 60.0, "b": 0.0, "c": 0.1, "d": 60.0}[p["kind"]]
        + ((p["depth"] - 20) / 8) ** 2
        + (np.log2(p["width"]) - 6) ** 2
        + (3 * (p["share"] - 1)) ** 2
        + ((p["even"] - 10) / 4) ** 2
        + 60 * (1 - p["edge"])
    )


def searched(count: int, *, seed: int = 0, maximize: bool = False) -> optuna.Study:
    study = optuna.create_study(
        study_name="first",
        direction="maximize" if maximize else "minimize",
        sampler=RandomSampler(seed=seed),
    )
    for _ in range(count):
        trial = study.ask(SPACE)
        study.tell(trial, -loss(trial.params) if maximize else loss(trial.params))
    return study


@pytest.mark.parametrize("maximize", [False, True])
def test_ranges_close_in_on_the_best_trials(maximize: bool) -> None:
    study = searched(1000, maximize=maximize)
    space = optuna_nnhp.zoom(study)
    assert list(space) == list(SPACE)
    rate, depth, width = space["rate"], space["depth"], space["width"]
    assert isinstance(rate, FloatDistribution) and rate.log
    assert 1e-6 <= rate.low < 1e-4 < rate.high < 1.0
    assert isinstance(depth, IntDistribution) and 1 <= depth.low < 20 < depth.high < 64
    assert isinstance(width, IntDistribution) and width.log and width.low > 1
    share, even = space["share"], space["even"]
    assert isinstance(share, FloatDistribution) and share.step == 0.1 and share.high < 3.0
    assert share.low == round(share.low, 1) and share.high == round(share.high, 1)
    assert isinstance(even, IntDistribution) and even.step == 2 and even.low % 2 == 0
    assert space["kind"] == CategoricalDistribution(("b", "c"))
    assert space["one"] == SPACE["one"]


def test_each_range_has_a_reason() -> None:
    space = optuna_nnhp.zoom(searched(1000))
    assert space.reasons["rate"] == "23 of the best 25 trials lie there"
    assert space.reasons["kind"] == "dropped a, d: none of the best 25 trials, and clearly worse"
    assert space.reasons["edge"].endswith("upper end, a larger range may be better")
    assert space.reasons["one"] == "one value only"


def test_parameters_without_effect_keep_their_range() -> None:
    spaces = [optuna_nnhp.zoom(searched(100, seed=seed)) for seed in range(20)]
    idle = [space.reasons["idle"] == "no clear effect" for space in spaces]
    rate = [space.reasons["rate"] == "no clear effect" for space in spaces]
    assert sum(idle) >= 15 and sum(rate) <= 10
    assert all((s["idle"] == SPACE["idle"]) == same for s, same in zip(spaces, idle, strict=True))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [10, 30, 100])
def test_the_best_trial_lies_within_the_proposal(count: int, seed: int) -> None:
    study = searched(count, seed=seed)
    space = optuna_nnhp.zoom(study)
    assert space.best == study.best_params
    for name, distribution in space.items():
        assert distribution._contains(distribution.to_internal_repr(space.best[name]))
        assert type(distribution) is type(SPACE[name])


def test_a_range_is_cut_to_a_quarter_at_most() -> None:
    study = optuna.create_study()
    x = FloatDistribution(0.0, 1.0)
    for i in range(200):
        study.enqueue_trial({"x": i / 200})
        trial = study.ask({"x": x})
        study.tell(trial, abs(trial.params["x"] - 0.5))
    new = optuna_nnhp.zoom(study)["x"]
    assert isinstance(new, FloatDistribution)
    assert 0.25 <= new.high - new.low < 0.26


def test_pruned_trials_rank_by_their_last_step() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    for number in range(100):
        trial = study.ask({"x": FloatDistribution(0.0, 1.0)})
        good = trial.params["x"] < 0.3
        trial.report(9.0 if good else 1.0, 9 if good else 1)  # a later value is of more worth
        study.tell(trial, state=TrialState.PRUNED if number else TrialState.FAIL)
    new = optuna_nnhp.zoom(study)["x"]
    assert isinstance(new, FloatDistribution) and new.high < 0.4


def test_the_stored_space_is_the_old_one() -> None:
    study = searched(100)
    noted = {n: distribution_to_json(d) for n, d in SPACE.items()} | {
        "new": distribution_to_json(IntDistribution(1, 3))
    }
    study.set_user_attr("space", noted)
    space = optuna_nnhp.zoom(study)
    assert space["new"] == IntDistribution(1, 3)
    assert space.reasons["new"] == "no clear effect: 0 finished trials have it"


def test_edited_spaces_keep_their_source() -> None:
    space = optuna_nnhp.zoom(searched(100))
    space["rate"] = FloatDistribution(1e-5, 1e-2, log=True)
    for same in (space, copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert isinstance(same, ZoomedSpace)
        assert same.source == "first"
        assert same.reasons["rate"] == "set by hand"
        assert same.reasons["one"] == "one value only"
        assert same == dict(space) and same.best == space.best


def test_the_space_prints_as_a_table() -> None:
    text = str(optuna_nnhp.zoom(searched(1000)))
    lines = text.splitlines()
    assert lines[0] == "zoomed from study 'first'"
    assert [line.split()[0] for line in lines[2:]] == list(SPACE)
    assert "a, b, c, d" in text and "1e-06 to 1, log" in text and "step 0.1" in text
    assert lines[1].index("old") == lines[2].index("1e-06")


@pytest.mark.parametrize("count", [0, 9])
def test_too_few_trials_are_rejected(count: int) -> None:
    rule = f"^`study` must have at least 10 finished trials to zoom in on, but 'first' has {count}"
    study = searched(count)
    study.tell(study.ask(SPACE), state=TrialState.FAIL)
    study.ask(SPACE)
    with pytest.raises(ValueError, match=rule):
        optuna_nnhp.zoom(study)


def test_several_objectives_are_rejected() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    with pytest.raises(ValueError, match="one objective to zoom in on, but has 2"):
        optuna_nnhp.zoom(study)
