"""Replicates: the best configurations with other seeds."""

from __future__ import annotations

from dataclasses import dataclass
import os
import signal
import statistics
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from optuna_nnhp import Result
from optuna_nnhp.inspect.summary import summary
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.replicates import MAX_CONFIGURATIONS
from optuna_nnhp.study.replicates import MAX_TIMEOUT_SHARE
from optuna_nnhp.study.replicates import MIN_CONFIGURATIONS
from optuna_nnhp.study.replicates import REPLICATES
from optuna_nnhp.study.replicates import ReplicateTrainer
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import GPTTemplate
from optuna_nnhp.templates import Template
from tests.tiny import DIVERGING
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import numbers
from tests.tiny import tune

X, Y = numbers()


def problem_of(**options: Any) -> DNNTemplate:
    return DNNTemplate(X, Y, fixed=TINY, device="cpu", **options)


def tune_study(n_trials: int = 8, **options: Any) -> Result:
    return tune(X, Y, n_trials=n_trials, method="random", **options)


def replicate(result: Result, count: int = 3, budget: Budget | None = None) -> ReplicateTrainer:
    trainer = ReplicateTrainer(result._problem, count, budget or Budget(None, None))
    trainer.run(result.study)
    return trainer


def recorded(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = result.study.user_attrs.get(REPLICATES, {})
    return found


@pytest.fixture(scope="module")
def result() -> Result:
    found = tune_study()
    replicate(found)
    return found


def test_the_best_configurations_are_trained_with_other_seeds(result: Result) -> None:
    complete = sorted(result.study.trials, key=lambda t: t.value or 0.0)
    assert set(recorded(result)) == {str(t.number) for t in complete[:MAX_CONFIGURATIONS]}
    seeds = {tuple(entry["seeds"]) for entry in recorded(result).values()}
    assert len(seeds) == 1  # the same for all, so that they can be compared
    assert len(set(*seeds)) == 3
    assert result.study.user_attrs["seed"] not in next(iter(seeds))
    for entry in recorded(result).values():
        assert len(set(entry["values"])) == 3  # each seed has its own luck
    assert len(result.study.trials) == 8  # none of them is a trial


def test_the_frame_and_the_best_trial_follow_the_mean(result: Result) -> None:
    frame = result.replicates
    assert list(frame.columns) == ["number", "value", "mean", "std", "n", "diverged"]
    assert frame["mean"].is_monotonic_increasing
    for row in frame.itertuples():
        values = recorded(result)[str(row.number)]["values"]
        assert row.mean == pytest.approx(statistics.fmean(values))
        assert row.std == pytest.approx(statistics.stdev(values))
        assert row.value == result.study.trials[int(row.number)].value
        assert (row.n, row.diverged) == (3, 0)
    assert result.best_trial.number == frame["number"][0]
    assert result.best_value == frame["value"][0]
    assert result.best_params == result.best_trial.params


def test_the_trial_with_the_best_mean_predicts_even_if_another_has_the_best_value() -> None:
    found = tune_study()
    order = sorted(found.study.trials, key=lambda t: t.value or 0.0)
    lucky, steady = order[0].number, order[1].number
    entries = {lucky: [90.0, 91.0], steady: [50.0, 51.0]}
    found.study.set_user_attr(
        REPLICATES, {str(n): {"seeds": [1, 2], "values": v} for n, v in entries.items()}
    )
    assert found.best_trial.number == steady
    assert found.best_value == order[1].value != found.study.best_value
    # Its weights are not kept: it is trained again, as it was.
    rmse = float(np.sqrt(np.mean((found.predict(X) - Y) ** 2)))
    assert rmse < np.std(Y)
    assert found.score(*_validation(found)) == pytest.approx(found.best_value, rel=1e-5)
    assert summary(found.study)["best"].endswith(f"in trial {steady}")
    assert summary(found.study)["other seeds"] == "50.5 ± 0.7071 over 2 seeds"


def _validation(found: Result) -> tuple[Any, Any]:
    """Return the rows of the validation part as the user gave them."""
    problem: Any = found._problem
    seen = problem.data.valid_X
    everything = found.predictor.preprocessor.transform(X)  # type: ignore[union-attr]
    rows = [int(np.abs(everything - row).sum(axis=1).argmin()) for row in seen]
    return X[rows], Y[rows]


def test_a_replicate_has_the_value_of_a_study_with_its_seed(result: Result) -> None:
    number, entry = next(iter(recorded(result).items()))
    trial = result.study.trials[int(number)]
    problem = result._problem.with_seed(entry["seeds"][1])
    cohort = problem.cohort([problem.member(trial.number, trial.params)])
    while cohort.train_round().ended == [None]:  # type: ignore[union-attr]
        pass
    assert cohort.best_value(0) == pytest.approx(entry["values"][1], rel=1e-4)


def test_repeated_call_trains_no_replicate(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(DNNTemplate, "cohort", train)
    before = recorded(result)
    replicate(result)
    replicate(result, count=2)
    assert recorded(result) == before


def test_missing_replicates_are_trained() -> None:
    found = tune_study()
    replicate(found, count=1)
    once = recorded(found)
    replicate(found, count=3)
    for number, entry in recorded(found).items():
        assert len(entry["values"]) == 3
        for name in ("seeds", "values"):
            assert entry[name][:1] == once[number][name]


def test_equal_configurations_are_replicated_once() -> None:
    found = tune_study(n_trials=1)
    trial = found.study.trials[0]
    found.study.add_trials([trial, trial])
    replicate(found, count=1)
    assert set(recorded(found)) == {"0"}


def test_a_diverged_replicate_counts_as_the_worst_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = tune_study(n_trials=2)
    original = DNNTemplate.member
    monkeypatch.setattr(DNNTemplate, "member", lambda self, n, p: original(self, n, p | DIVERGING))
    replicate(found, count=2)
    monkeypatch.undo()
    entries = recorded(found)
    assert [entries[name]["values"] for name in "01"] == [[None, None]] * 2
    first, second = sorted(entries, key=lambda n: found.study.trials[int(n)].value or 0.0)
    assert found.best_trial.number == int(first)  # all diverge: the best in the study
    assert summary(found.study)["other seeds"] == "2 of 2 diverged with other seeds"
    entries[second]["values"] = [1e6, 1e6]
    found.study.set_user_attr(REPLICATES, entries)
    assert found.best_trial.number == int(second)
    frame = found.replicates
    assert frame["mean"].tolist() == [1e6, np.inf]
    assert frame["diverged"].tolist() == [0, 2]
    assert frame["std"].isna().tolist() == [False, True]


def test_a_trial_with_few_replicates_is_not_the_best_trial() -> None:
    found = tune_study()
    lengths = {0: 3, 1: 2, 2: 1}  # a timeout leaves one less; fewer are luck
    entries = {
        str(n): {"seeds": list(range(k)), "values": [10.0 - n] * k} for n, k in lengths.items()
    }
    found.study.set_user_attr(REPLICATES, entries)
    best = found.study.best_trial.number
    assert found.best_trial.number == best  # which has none: the study found it afterwards
    entries[str(best)] = {"seeds": [0], "values": [99.0]}
    found.study.set_user_attr(REPLICATES, entries)
    assert best not in lengths and found.best_trial.number == 1
    assert found.replicates["number"].tolist() == [2, 1, 0, best]


@dataclass
class BudgetInSteps(Budget):
    """A budget that is over after a number of steps."""

    steps: int = 0
    asked: int = 0

    def out_of_time(self) -> bool:
        self.asked += 1
        return self.interrupted or self.asked > self.steps


def test_unfinished_replicates_are_not_stored() -> None:
    found = tune(*classes(), n_trials=3, cohort_size=3, method="random")
    whole = tune(*classes(), n_trials=3, cohort_size=3, method="random")
    budget = BudgetInSteps(None, None, steps=10**9)
    replicate(whole, count=2, budget=budget)
    assert {len(entry["values"]) for entry in recorded(whole).values()} == {2}
    replicate(found, count=2, budget=BudgetInSteps(None, None, steps=budget.asked * 3 // 4))
    assert {len(entry["values"]) for entry in recorded(found).values()} == {1}
    for number, entry in recorded(found).items():
        assert entry["values"] == recorded(whole)[number]["values"][:1]
    assert found.best_trial.number in {0, 1, 2}


def test_without_time_there_are_no_replicates() -> None:
    found = tune_study()
    replicate(found, budget=BudgetInSteps(None, None, steps=0))
    assert recorded(found) == {}
    assert found.replicates.empty
    assert found.best_trial.number == found.study.best_trial.number
    assert "other seeds" not in summary(found.study)


def test_an_interrupt_keeps_the_finished_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune_study()
    original = DNNTemplate.with_seed

    def pressed(self: DNNTemplate, seed: int) -> DNNTemplate:
        if recorded(found):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, seed)

    monkeypatch.setattr(DNNTemplate, "with_seed", pressed)
    before = signal.getsignal(signal.SIGINT)
    replicate(found)
    assert {len(entry["values"]) for entry in recorded(found).values()} == {1}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_study_without_finished_trials_has_no_replicates() -> None:
    study = optuna.create_study()
    ReplicateTrainer(problem_of(), 3, Budget(None, None)).run(study)
    assert REPLICATES not in study.user_attrs


def test_a_quarter_of_the_timeout_is_reserved_and_unneeded_time_is_returned() -> None:
    found = tune_study()
    budget = Budget(None, timeout=1000.0)
    trainer = ReplicateTrainer(found._problem, 3, budget)
    assert budget.timeout == 1000.0 * (1 - MAX_TIMEOUT_SHARE)
    trial = found.study.trials[0]
    trainer(found.study, trial)
    assert budget.timeout == 1000.0 * (1 - MAX_TIMEOUT_SHARE)  # too early to know
    budget.started -= 600.0
    trainer(found.study, trial)
    given_back = budget.timeout
    assert 900.0 < given_back < 1000.0  # networks of a few milliseconds
    trainer.run(found.study)
    assert budget.timeout == 1000.0
    assert {len(entry["values"]) for entry in recorded(found).values()} == {3}


@pytest.mark.parametrize("seconds, configurations", [(0.5, 5), (1.1, 4), (1.6, 3), (9.0, 2)])
def test_with_little_time_fewer_configurations_have_all_replicates(
    monkeypatch: pytest.MonkeyPatch, seconds: float, configurations: int
) -> None:
    found, budget = tune_study(), Budget(None, timeout=1000.0)
    trainer = ReplicateTrainer(found._problem, 3, budget)
    left = 1000.0 - budget.seconds
    # A training of each configuration takes as much as a fifth of the time that is left, or so.
    monkeypatch.setattr(trainer, "_estimate_seconds", lambda some: len(some) / 5 * left * seconds)
    trainer.run(found.study)
    assert [len(entry["values"]) for entry in recorded(found).values()] == [3] * configurations
    best = sorted(found.study.trials, key=lambda t: t.value or 0.0)[:configurations]
    assert set(recorded(found)) == {str(trial.number) for trial in best}


def test_the_best_configurations_are_replicated_if_their_time_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def no_room(some: object) -> float:
        raise MemoryError

    found, budget = tune_study(), Budget(None, timeout=1000.0)
    trainer = ReplicateTrainer(found._problem, 3, budget)
    monkeypatch.setattr(trainer, "_estimate_seconds", no_room)
    trainer.run(found.study)
    assert len(recorded(found)) == MIN_CONFIGURATIONS
    assert "The replicates' time could not be measured" in log.text


@pytest.mark.parametrize("is_late", [True, False])
def test_replicates_are_trained_after_the_timeout_only_if_workers_started_late(
    is_late: bool,
) -> None:
    found, budget = tune_study(), Budget(None, timeout=100.0)
    trainer = ReplicateTrainer(found._problem, 3, budget)
    budget.started -= 1000.0
    trainer.run(found.study, is_late=is_late)
    assert bool(found.study.user_attrs.get(REPLICATES)) == is_late


def test_the_reserve_stays_a_quarter_if_trials_are_long() -> None:
    found = tune_study()
    for trial in found.study.get_trials(deepcopy=False):
        trial.user_attrs["iterations"] = 10**9
    budget = Budget(None, timeout=1000.0)
    trainer = ReplicateTrainer(found._problem, 3, budget)
    budget.started -= 600.0
    trainer(found.study, found.study.trials[0])
    assert trainer.predicted
    assert budget.timeout == 1000.0 * (1 - MAX_TIMEOUT_SHARE)


def test_without_a_timeout_nothing_is_reserved() -> None:
    found, budget = tune_study(), Budget(8, None)
    trainer = ReplicateTrainer(found._problem, 3, budget)
    trainer(found.study, found.study.trials[0])
    assert budget.timeout is None
    assert not trainer.predicted


def network(params: Any) -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))


PROBLEMS = {
    "dnn": problem_of,
    "own": lambda: CustomNetworkTemplate(
        network, X, Y, fixed={"epochs": 2, "batch_size": 32}, device="cpu"
    ),
    "gpt": lambda: GPTTemplate(
        "to be or not to be\n" * 99,
        fixed={"iterations": 9, "width": 16, "layers": 1, "context": 16},
        device="cpu",
    ),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_another_seed_changes_only_the_weights_and_the_order_of_rows(kind: str) -> None:
    problem: Template = PROBLEMS[kind]()

    def trained(some: Template) -> tuple[list[float], list[float]]:
        cohort = some.cohort([some.member(0, some.defaults())])
        first = [float(p.detach().sum()) for p in cohort.network.parameters()]
        rows = [float(row.double().mean()) for row in cohort.batches.rows([0])]
        return first, rows

    other = problem.with_seed(7)
    (first, rows), (other_first, other_rows) = trained(problem), trained(other)
    assert first != other_first
    assert rows != other_rows
    assert trained(problem.with_seed(7)) == (other_first, other_rows)
    assert problem.seed == 0  # it is left as it was
    assert trained(problem) == (first, rows)
    if isinstance(problem, DNNTemplate):
        assert isinstance(other, DNNTemplate)
        assert other._task.arrays is problem._task.arrays  # the same split


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3", float("nan")])
def test_replicates_must_be_a_positive_integer(count: Any) -> None:
    with pytest.raises(ValueError, match=f"`replicates` must be at least 1, but got {count!r}"):
        tune_study(n_trials=1, replicates=count)


def test_the_number_of_replicates_may_be_of_numpy() -> None:
    assert len(tune_study(n_trials=1, replicates=np.int64(2)).replicates) == 1


def test_the_frame_is_empty_without_replicates() -> None:
    frame = tune_study(n_trials=1).replicates
    assert isinstance(frame, pd.DataFrame)
    assert frame.empty
