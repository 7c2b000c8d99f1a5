"""A grid is checked against the budget, and each of its points is trained once."""

from __future__ import annotations

from collections import Counter
import os
from pathlib import Path
import signal
import subprocess
import sys
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest
from torch import nn

from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.search.grid import point_key
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.study import grid
from optuna_nnhp.study.autotune import Throughput
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.grid import GridQueue
from optuna_nnhp.study.grid import check_grid
from optuna_nnhp.study.grid import make_grid
from optuna_nnhp.study.outcomes import counts_towards_n_trials
from optuna_nnhp.study.outcomes import retries_grid_point
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import GPTTemplate
from tests.tiny import ENVIRONMENT
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import trials
from tests.tiny import tune

X, Y = classes()
# All other parameters are fixed; the default learning rate, 0.002, is on the grid.
LEVELS: dict[str, list[Any]] = {
    "learning_rate": [0.002, 0.01, 0.1],
    "optimizer": ["sgd", "adamw"],
    "beta2": [0.9, 0.999],
}
FIXED_PARAMS = {
    name: value
    for name, value in ({n: h.default for n, h in specs("binary").items()} | TINY).items()
    if name not in (*LEVELS, "iterations")
}
N_POINTS = 9  # sgd has no beta2
FOREVER = Budget(None, None)


def make_problem(**options: Any) -> DNNTemplate:
    return DNNTemplate(X, Y, device="cpu", **({"fixed": FIXED_PARAMS} | options))


def make_plan(
    n_trials: int | None = None, levels: Any = LEVELS, **options: Any
) -> GridPointsSampler:
    return make_grid(make_problem(), Budget(n_trials, None), levels, **options)


def run(storage: Any = None, n_trials: int | None = N_POINTS, **options: Any) -> Result:
    """Run a study of the whole grid, or with other options."""
    usual = {
        "sampler": make_plan(),
        "fixed": FIXED_PARAMS,
        "storage": storage,
        "n_trials": n_trials,
    }
    return tune(X, Y, **(usual | options))


def finished_by_point(result: Result) -> dict[str, list[FrozenTrial]]:
    """Return the finished trials by their point, without those that do not count."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in trials(result):
        if trial.state.is_finished() and not retries_grid_point(trial):
            found.setdefault(point_key(trial.params), []).append(trial)
    return found


# --- Plans ---


def test_points_are_complete_and_the_default_comes_first() -> None:
    problem = make_problem(fixed=TINY)
    plan = make_grid(problem, FOREVER, LEVELS)
    assert len(plan.points) == N_POINTS
    assert plan.points[0] == problem.defaults()
    rest = {n: v for n, v in problem.defaults().items() if n not in LEVELS}
    for point in plan.points:
        assert point.keys() == problem.space.keys()
        assert {**point, **rest} == point
        assert point["optimizer"] == "adamw" or point["beta2"] == 0.999


def test_a_default_that_is_not_on_the_grid_is_not_tried() -> None:
    plan = make_plan(levels=LEVELS | {"learning_rate": [0.01, 0.1]})
    assert {point["learning_rate"] for point in plan.points} == {0.01, 0.1}


def test_without_levels_tuned_parameters_have_the_catalogues_grid_values() -> None:
    plan = make_plan(levels=None)
    points = {(p["learning_rate"], p["optimizer"], p["beta2"]) for p in plan.points}
    rates, names = (0.1, 0.01, 0.001), ("adam", "adamw", "rmsprop")
    assert points == {
        *((rate, name, decay) for rate in rates for name in names for decay in (0.95, 0.999)),
        *((rate, "sgd", 0.999) for rate in rates),
    }


def test_a_default_outside_the_space_is_replaced_by_a_level() -> None:
    space = {"optimizer": CategoricalDistribution(("sgd", "nesterov"))}
    plan = make_grid(make_problem(space=space), FOREVER, {"learning_rate": [0.1]})
    assert [point["optimizer"] for point in plan.points] == ["sgd"]


def test_parameters_of_a_users_network_have_an_effect_whatever_the_catalogue_says() -> None:
    def network(params: Any) -> nn.Module:
        width = params["width"] if params["width_shape"] == "funnel" else params["heads"]
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))

    levels: dict[str, Any] = {"width_shape": ["constant", "funnel"], "hidden_layers": [1]}
    space: dict[str, BaseDistribution] = {"heads": IntDistribution(1, 3)}
    own = CustomNetworkTemplate(network, X, Y, space=space, fixed={"epochs": 1}, device="cpu")
    del levels["hidden_layers"]
    assert len(make_grid(own, FOREVER, levels | {"heads": [1, 2]}).points) == 4
    table = make_problem(fixed={"epochs": 1})
    assert len(make_grid(table, FOREVER, levels | {"hidden_layers": [1]}).points) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"n_trials": 8},
            r"at most `n_trials` points, 8, but has 9 points: learning_rate 3 x optimizer 2 x "
            r"beta2 2, less those without a difference: give fewer `levels`.*partial",
        ),
        ({"levels": {"learning_rate": [1.0]}}, r"`learning_rate` must be .* but got 1\.0"),
        ({"levels": {"epochs": [1]}}, "'epochs' is not a hyperparameter that is tuned"),
    ],
)
def test_invalid_grids_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**options)


@pytest.mark.parametrize("n_trials", [None, 10**9])
def test_a_huge_grid_is_rejected_unless_it_is_partial(n_trials: int | None) -> None:
    problem, budget = make_problem(fixed=TINY), Budget(n_trials, 60.0)
    with pytest.raises(ValueError, match=r"at most 100,000 points, but has [\d,]{9,} points"):
        make_grid(problem, budget)
    assert len(make_grid(problem, Budget(12, None), partial=True).points) == 12
    assert (
        len(make_grid(problem, Budget(None, 60.0), partial=True).points) == grid.MAX_LISTED_POINTS
    )


def test_a_grid_must_have_something_to_tune() -> None:
    fixed = FIXED_PARAMS | {name: values[0] for name, values in LEVELS.items()}
    with pytest.raises(ValueError, match="must have something to tune"):
        make_grid(make_problem(fixed=fixed), FOREVER)


def test_a_partial_grid_has_the_first_points_of_the_whole() -> None:
    part, whole = make_plan(5, partial=True), make_plan()
    assert part.points == whole.points[:5]
    assert part.text == f"{whole.text}; 5 are tried, spread over it"


# --- Studies ---


def test_the_size_of_the_grid_is_logged_before_training(log: pytest.LogCaptureFixture) -> None:
    storage, seen = optuna.storages.InMemoryStorage(), list[bool]()
    text = "The grid has 9 points: learning_rate 3 x optimizer 2 x beta2 2, less"
    sampler = make_plan(4, partial=True)
    run(storage, 4, sampler=sampler, callbacks=[lambda *_: seen.append(text in log.text)])
    assert seen == [True] * 4
    run(storage)
    assert f"{text} those without a difference; begun before: 4." in log.text


@pytest.mark.parametrize("budget", [{"n_trials": N_POINTS}, {"n_trials": None, "timeout": 300}])
def test_each_point_is_trained_once(budget: dict[str, Any]) -> None:
    result = run(**budget)
    assert trials(result)[0].params == make_problem().defaults()
    assert Counter(map(len, finished_by_point(result).values())) == {1: N_POINTS}
    assert len(trials(result)) == N_POINTS


def test_a_partial_grid_can_be_continued_to_the_whole() -> None:
    storage = optuna.storages.InMemoryStorage()
    seen = [
        len(trials(run(storage, n, sampler=make_plan(n, partial=True))))
        for n in (3, 3, 5, N_POINTS)
    ]
    assert seen == [3, 3, 5, N_POINTS]  # and none is left waiting for another method
    assert Counter(map(len, finished_by_point(run(storage, 50)).values())) == {1: N_POINTS}


def test_interrupted_points_are_trained_again() -> None:
    class Pressed(optuna.pruners.NopPruner):
        """Prunes nothing, and presses Ctrl-C after the second epoch."""

        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            if trial.number == 0 and trial.last_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().prune(study, trial)

    storage = optuna.storages.InMemoryStorage()
    first = run(storage, pruner=Pressed(), cohort_size=4)
    cut = [trial for trial in trials(first) if not counts_towards_n_trials(trial, on_grid=True)]
    assert {trial.state for trial in cut} == {TrialState.PRUNED}
    result = run(storage)
    assert Counter(map(len, finished_by_point(result).values())) == {1: N_POINTS}
    assert len(trials(result)) == N_POINTS + len(cut)
    assert all(trial.state.is_finished() for trial in trials(result))


def test_a_point_that_failed_is_tried_again_if_there_are_trials_left() -> None:
    storage = optuna.storages.InMemoryStorage()
    run(storage, 4, sampler=make_plan(4, partial=True))
    study = optuna.load_study(study_name=None, storage=storage)
    failed = make_plan().points[5]
    study.enqueue_trial(failed)
    study.tell(study.ask(), state=TrialState.FAIL)
    result = run(storage)  # its trials are those of the points but one: no fault
    assert len(trials(result)) == N_POINTS
    assert point_key(failed) not in finished_by_point(result)
    assert Counter(map(len, finished_by_point(run(storage, N_POINTS + 1)).values())) == {
        1: N_POINTS
    }


def test_the_trials_left_must_suffice_for_the_points_left() -> None:
    storage = optuna.storages.InMemoryStorage()
    run(storage, 4, sampler=None, method="random")
    with pytest.raises(ValueError, match=r"`n_trials` leaves trials, 5, but is [89]: give fewer"):
        run(storage)
    assert len(trials(run(storage, sampler=make_plan(N_POINTS, partial=True)))) == N_POINTS
    assert len(trials(run(storage))) == N_POINTS  # nothing to do is no fault


def test_the_timeout_must_suffice_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "estimate_seconds", lambda problem, member: 10.0)
    message = "fit into the timeout of 60 s, but 9 points take about 90 s if none ends early: give"
    with pytest.raises(ValueError, match=message):
        run(n_trials=None, timeout=60)
    part = run(n_trials=None, timeout=60, sampler=make_plan(partial=True))
    assert len(finished_by_point(part)) == N_POINTS
    assert len(finished_by_point(run(n_trials=None, timeout=95))) == N_POINTS


TEXT = "to be or not to be that is the question " * 60


@pytest.mark.parametrize(
    "budget, seconds", [({"epochs": 4}, 2.0), ({"iterations": 10}, 2.5), ({"iterations": 2}, 0.5)]
)
def test_the_seconds_of_a_point_follow_from_its_budget(
    budget: dict[str, int], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "measure_throughput", lambda *_: Throughput(size=1, round=0.5))
    problem = make_problem(fixed={n: v for n, v in FIXED_PARAMS.items() if n != "epochs"} | budget)
    member = problem.member(0, problem.defaults())
    assert grid.estimate_seconds(problem, member) == seconds  # a round is of two steps


@pytest.mark.parametrize(
    "budget, seconds", [({"seconds": 3.0}, 3.0), ({"iterations": 20}, 2.0), ({"seconds": 7}, 7.0)]
)
def test_the_seconds_of_a_point_of_a_text_follow_from_its_budget(
    budget: dict[str, float], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPTTemplate, "seconds_per_step", lambda *_: 0.1)
    problem = GPTTemplate(TEXT, fixed={"context": 32, **budget}, device="cpu")
    assert grid.estimate_seconds(problem, problem.member(0, problem.defaults())) == seconds


def test_points_that_cannot_be_trained_count_as_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Any, member: Any) -> float:
        if member.params["optimizer"] == "sgd":
            raise TrialError
        return 4.0

    monkeypatch.setattr(grid, "estimate_seconds", refuse)
    points: list[dict[str, Any]] = [
        {"optimizer": name} for name in ("sgd", "adam", "adam", "adam")
    ]
    assert grid._mean_seconds_per_point(make_problem(), points) == 3.0


def test_a_grid_over_a_users_network_visits_each_point() -> None:
    def network(params: Any) -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, params["units"]), nn.ReLU(), nn.Linear(params["units"], 2)
        )

    space: dict[str, BaseDistribution] = {"units": IntDistribution(2, 8, log=True)}
    settings: dict[str, Any] = {"space": space, "fixed": {"epochs": 1}}
    own = CustomNetworkTemplate(network, X, Y, device="cpu", **settings)
    plan = make_grid(own, Budget(6, None), {"units": [2, 4, 8], "optimizer": ["sgd", "adamw"]})
    result = optimize(
        network=network, X=X, y=Y, sampler=plan, n_trials=6, storage=None, device="cpu", **settings
    )
    points = {(t.params["units"], t.params["optimizer"]) for t in trials(result)}
    assert len(points) == len(trials(result)) == 6


def test_a_grid_over_language_models_starts_with_the_default() -> None:
    fixed = {"iterations": 9, "layers": 1, "heads": 2, "context": 32, "batch_tokens": 64}
    levels: Any = {"optimizer": ["muon", "adamw"], "muon_learning_rate": [0.01, 0.02]}
    problem = GPTTemplate(TEXT, fixed=fixed, device="cpu")
    plan = make_grid(problem, Budget(3, None), levels)
    settings: dict[str, Any] = {"fixed": fixed, "n_trials": 3, "storage": None, "device": "cpu"}
    result = optimize("gpt", TEXT, sampler=plan, **settings)
    points = [(t.params["optimizer"], t.params["muon_learning_rate"]) for t in trials(result)]
    assert points[0] == ("muon", 0.02)  # the default
    assert sorted(points) == [("adamw", 0.02), ("muon", 0.01), ("muon", 0.02)]


# --- Optuna's own ---


@pytest.mark.parametrize(
    "levels, message",
    [
        ({"learning_rate": [0.1, 0.7]}, r"`learning_rate` must be .* but got 0\.7"),
        ({"depth": [1]}, r"lacks \[learning_rate\] and has \[depth\] besides"),
    ],
)
def test_invalid_grids_of_optuna_are_rejected(levels: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid(GridSampler(levels), {"learning_rate": FloatDistribution(0.1, 0.5)})


def test_a_huge_grid_of_optuna_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "MAX_GRID_POINTS", 5)
    with pytest.raises(ValueError, match="at most 5 points, but has 6"):
        check_grid(GridSampler({"x": range(6)}), {"x": IntDistribution(0, 9)})


# --- Workers ---


def two_workers() -> tuple[GridQueue, GridQueue, optuna.Study]:
    """Return the queues of two workers of one study, and the study."""
    backend = optuna.storages.InMemoryStorage()
    plain = optuna.create_study(storage=backend, study_name="both")

    def worker() -> GridQueue:
        storage = BufferedStorage(backend)
        return GridQueue(optuna.load_study(study_name="both", storage=storage), storage)

    return worker(), worker(), plain


def test_of_equal_points_the_one_with_the_lowest_number_is_trained() -> None:
    one, other, study = two_workers()
    one.add([{"x": 1}, {"x": 2}])
    other.add([{"x": 2}, {"x": 1}, {"x": 3}])
    taken = [trial.number for trial in iter(one.take, None)]
    assert taken == [0, 1, 4]
    assert [t.state.name for t in study.trials] == [
        "RUNNING",
        "RUNNING",
        "FAIL",
        "FAIL",
        "RUNNING",
    ]
    assert {t.user_attrs.get("cause") for t in study.trials[2:4]} == {"duplicate"}
    assert other.take() is None


def test_a_worker_ends_its_points_that_another_worker_enqueued_before() -> None:
    one, other, study = two_workers()
    one.add([{"x": 1}, {"x": 2}])
    first = one.take()
    other.add([{"x": 1}, {"x": 2}])
    other.end_duplicates()
    assert [t.state.name for t in study.trials] == ["RUNNING", "WAITING", "FAIL", "FAIL"]
    second = other.take()
    assert first is not None and second is not None
    assert (first.number, second.number, one.take()) == (0, 1, None)


def test_duplicates_that_have_not_ended_yet_are_not_trained() -> None:
    backend = optuna.storages.InMemoryStorage()
    run(backend, 1, sampler=make_plan(1, partial=True))
    study = optuna.load_study(study_name=None, storage=backend)
    for point in make_plan().points[1:] * 2:
        study.enqueue_trial(point)
    result = run(backend)
    assert Counter(map(len, finished_by_point(result).values())) == {1: N_POINTS}
    assert sum(t.state == TrialState.FAIL for t in trials(result)) == N_POINTS - 1


def test_a_point_whose_earlier_trial_failed_is_not_a_duplicate() -> None:
    one, _, study = two_workers()
    one.add([{"x": 1}, {"x": 1}])
    study._storage.set_trial_state_values(study.trials[0]._trial_id, TrialState.FAIL)
    taken = one.take()
    assert taken is not None and taken.number == 1


def test_waiting_trials_that_were_not_enqueued_are_ignored() -> None:
    one, _, study = two_workers()
    study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
    assert (one.n_points_left, one.take()) == (0, None)


STORAGES = {"journal": "both.journal", "sqlite": "sqlite:///both.db"}
WORKER = """
import sys, time
from pathlib import Path
from optuna_nnhp.study.grid import GridQueue
from tests.study import test_grid

add = GridQueue.add


def add_together(points, missing):
    Path(f"{storage}-{sys.argv[1]}").touch()
    while not all(Path(f"{storage}-{name}").exists() for name in "ab"):
        time.sleep(1e-3)
    add(points, missing)


GridQueue.add = add_together
for storage, url in test_grid.STORAGES.items():
    test_grid.run(url)
"""


@pytest.fixture(scope="module")
def folder_of_two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two processes that enqueued all points at the same time."""
    folder = tmp_path_factory.mktemp("both")
    environment = {**os.environ, **ENVIRONMENT}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for url in STORAGES.values():
            open_storage(url)
        workers = [
            subprocess.Popen([sys.executable, "-c", WORKER, name], env=environment)
            for name in "ab"
        ]
        assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    return folder


@pytest.mark.parametrize("storage", STORAGES)
def test_two_processes_train_each_point_once(
    storage: str, folder_of_two_workers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of_two_workers)
    (study,) = (
        optuna.load_study(study_name=name, storage=open_storage(STORAGES[storage]))
        for name in optuna.get_all_study_names(open_storage(STORAGES[storage]))
    )
    causes = Counter(trial.user_attrs["cause"] for trial in study.trials)
    assert causes.pop("duplicate") == N_POINTS  # both had enqueued all
    assert sum(causes.values()) == N_POINTS
    done = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert len({point_key(trial.params) for trial in done}) == len(done) == N_POINTS
    assert not any(t.params for t in study.trials if t.user_attrs["cause"] == "duplicate")
