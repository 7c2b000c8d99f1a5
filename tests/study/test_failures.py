"""Every failure of training has an outcome."""

from __future__ import annotations

from collections.abc import Callable
import subprocess
import sys
import time
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
import pytest
import torch
from torch import nn

from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp.study.failures import MAX_TRACEBACK_LENGTH
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.training import device
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.device import is_out_of_memory
from tests.tiny import DIVERGING
from tests.tiny import ENVIRONMENT
from tests.tiny import TINY
from tests.tiny import causes
from tests.tiny import learning_curves
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
NO_ROOM = "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory"
Train = Callable[..., Any]


@pytest.fixture
def call_before_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[Cohort], None]], None]:
    """Return a function that installs a call before every round of every cohort."""

    def install(before: Callable[[Cohort], None]) -> None:
        original = Cohort.train_round

        def train_round(cohort: Cohort, *args: Any) -> Any:
            before(cohort)
            return original(cohort, *args)

        monkeypatch.setattr(Cohort, "train_round", train_round)

    return install


def run(n_trials: int = 6, **settings: Any) -> Result:
    return tune(X, Y, n_trials=n_trials, cohort_size=6, method="random", **settings)


def leave_out(course: dict[str, Any] | list[Any], *numbers: int) -> list[Any]:
    return [c for number, c in enumerate(course) if number not in numbers]


# --- A network that raises ---


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_only_the_trial_that_raises_an_error_fails(
    bad: int, call_before_rounds: Any, log: pytest.LogCaptureFixture
) -> None:
    expected = learning_curves(run())

    def fault(cohort: Cohort) -> None:
        if max(cohort.rounds_done) >= 2 and any(m.number == bad for m in cohort.members):
            raise ZeroDivisionError(f"the fault of {bad}")

    call_before_rounds(fault)
    result = run()
    assert leave_out(learning_curves(result), bad) == leave_out(expected, bad)
    trial = trials(result)[bad]
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["cause"] == "error"
    assert trial.user_attrs["error"] == f"ZeroDivisionError: the fault of {bad}"
    assert "in fault\n" in trial.user_attrs["traceback"]
    assert len(trial.user_attrs["traceback"]) <= MAX_TRACEBACK_LENGTH
    assert "6 trials raised an error together; they continue as cohorts of 3 and 3" in log.text
    assert len(trials(result)) == 6


def test_the_study_ends_with_the_error_if_its_first_trials_fail_alike(
    call_before_rounds: Any,
) -> None:
    def fault(cohort: Cohort) -> None:
        raise KeyError("always")

    call_before_rounds(fault)
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(KeyError, match="always") as error:
        run(n_trials=50, storage=storage, study_name="s")
    assert "its first 3 trials failed alike" in "".join(error.value.__notes__)
    study = optuna.load_study(study_name="s", storage=storage)
    assert {t.state for t in study.trials} == {TrialState.FAIL}
    assert len(study.trials) == 6


def test_trials_that_were_only_added_do_not_hide_that_all_fail_alike(
    call_before_rounds: Any,
) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = run(n_trials=1, storage=storage, study_name="s").study
    copied = optuna.create_study(study_name="copy", storage=storage, direction="minimize")
    for name, value in study.user_attrs.items():
        copied.set_user_attr(name, value)
    copied.add_trial(optuna.trial.create_trial(value=1.0))

    def fault(cohort: Cohort) -> None:
        raise KeyError("always")

    call_before_rounds(fault)
    with pytest.raises(KeyError, match="always"):
        run(n_trials=50, storage=storage, study_name="copy")


def test_different_or_late_failures_do_not_end_the_study(call_before_rounds: Any) -> None:
    def fault(cohort: Cohort) -> None:
        if any(m.number < 4 for m in cohort.members):
            raise ValueError(f"one of {min(m.number for m in cohort.members)}")

    call_before_rounds(fault)
    result = run(n_trials=8)
    assert states(result)[:4] == [TrialState.FAIL] * 4
    assert states(result)[4:] == [TrialState.COMPLETE] * 4


class Picky(nn.Module):
    """A module that computes nothing for some of its parameters, once it trains for real."""

    def __init__(self, good: bool) -> None:
        super().__init__()
        self.layer, self.good = nn.Linear(3, 1), good

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.good and len(x) > 8:
            raise RuntimeError("this one does not work")
        return self.layer(x)


def test_trials_whose_network_raises_an_error_fail() -> None:
    result = optimize(
        network=lambda params: Picky(params["good"]),
        X=X,
        y=Y,
        space={"good": CategoricalDistribution([True, False])},
        fixed={"epochs": 2, "batch_size": 32},
        n_trials=12,
        method="random",
        storage=None,
        cohort_size=1,
    )
    for trial in trials(result):
        assert (trial.state == TrialState.FAIL) == (not trial.params["good"])
    (cause,) = {t.user_attrs["error"] for t in trials(result) if t.state == TrialState.FAIL}
    assert "this one does not work" in cause
    assert 0 < causes(result).count("error") < 12


# --- Memory ---


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(NO_ROOM)])
def test_a_cohort_that_does_not_fit_into_memory_is_halved_and_repeated(
    error: Exception, call_before_rounds: Any, log: pytest.LogCaptureFixture
) -> None:
    expected, sizes = learning_curves(run(12)), list[int]()

    def fault(cohort: Cohort) -> None:
        if len(cohort.members) > 2 and max(cohort.rounds_done) >= 1:
            raise error
        sizes.append(len(cohort.members))

    call_before_rounds(fault)
    result = run(12)
    assert learning_curves(result) == expected
    assert (
        "6 trials do not fit into memory together; they continue as cohorts of 3 and 3" in log.text
    )
    assert causes(result) == ["finished"] * 12


def test_later_cohorts_of_the_same_shape_are_small_from_the_beginning(
    call_before_rounds: Any,
) -> None:
    tried = list[int]()

    def fault(cohort: Cohort) -> None:
        tried.append(len(cohort.members))
        if len(cohort.members) > 3:
            raise MemoryError

    call_before_rounds(fault)
    result = run(18)
    assert causes(result) == ["finished"] * 18
    assert sum(size > 3 for size in tried) == 1


def test_a_cohort_that_does_not_fit_while_it_is_built_is_halved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = DNNTemplate.cohort

    def cohort(problem: DNNTemplate, members: Any) -> Cohort:
        if len(members) > 1:
            raise RuntimeError(NO_ROOM)
        return original(problem, members)

    expected = learning_curves(run())
    monkeypatch.setattr(DNNTemplate, "cohort", cohort)
    assert learning_curves(run()) == expected


def test_a_trial_that_does_not_fit_alone_fails_and_records_the_needed_bytes(
    call_before_rounds: Any,
) -> None:
    def fault(cohort: Cohort) -> None:
        if cohort.rounds_done[0] >= 1 and any(m.number == 2 for m in cohort.members):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    call_before_rounds(fault)
    result = run()
    trial = trials(result)[2]
    assert (trial.state, trial.user_attrs["cause"]) == (TrialState.FAIL, "out of memory")
    assert trial.user_attrs["needed_bytes"] > 1000
    assert causes(result).count("finished") == 5


def test_trials_that_cannot_fit_into_memory_are_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optuna_nnhp.templates import supervised

    def free(device: torch.device) -> int:
        return 40_000

    monkeypatch.setattr(supervised, "free_memory", free)
    space = {"width": CategoricalDistribution([16, 512])}
    fixed = {name: value for name, value in TINY.items() if name != "width"}
    result = tune(X, Y, space=space, fixed=fixed, n_trials=8, method="random")
    for trial in trials(result):
        cause = "out of memory" if trial.params["width"] == 512 else "finished"
        assert trial.user_attrs["cause"] == cause
    errors = {t.user_attrs.get("error", "") for t in trials(result)}
    assert any("A trial must fit into 0.0 GiB of memory" in error for error in errors)


def test_errors_of_missing_memory_are_recognized() -> None:
    assert is_out_of_memory(RuntimeError(NO_ROOM))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    outer = ValueError("outer")
    outer.__cause__ = MemoryError()
    assert is_out_of_memory(outer)
    assert device.OUT_OF_MEMORY_MESSAGES


REAL = """
import resource
import optuna
from optuna_nnhp.templates import DNNTemplate
from tests.tiny import TINY, numbers, trials, tune

X, y = numbers(2000)
fixed = TINY | {"width": 512, "hidden_layers": 4, "batch_size": 512, "epochs": 2, "dropout": 0.0}
tune(X, y, fixed=fixed, n_trials=1)  # all that is loaded once is loaded
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 800 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
result = tune(X, y, fixed=fixed, n_trials=40, cohort_size=40, method="random")
print(sorted({t.user_attrs["cause"] for t in trials(result)}), len(trials(result)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_study_finishes_in_a_process_with_limited_memory() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REAL], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert "do not fit into memory together" in ran.stderr
    assert ran.stdout.strip() == "['finished'] 40", ran.stderr[-2000:]


# --- Time ---


def test_a_trial_ends_at_its_timeout_with_its_best_value(call_before_rounds: Any) -> None:
    call_before_rounds(lambda cohort: time.sleep(0.02))
    fixed = TINY | {"epochs": 10**6, "patience": 10**6}
    result = run(3, fixed=fixed, trial_timeout=0.3)
    assert causes(result) == ["trial timeout"] * 3
    assert len(trials(result)) == 3
    for trial in trials(result):
        assert trial.user_attrs["trial_timeout"] == 0.3
        assert 2 <= trial.user_attrs["epochs"] < 100
    assert result.best_value == min(t.user_attrs["best_value"] for t in trials(result))


def test_a_trial_without_a_value_at_its_timeout_fails_and_counts() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 1:
                time.sleep(0.05)
            return self.layer(x)

    result = optimize(
        network=lambda params: Slow(),
        X=X,
        y=Y,
        fixed={"epochs": 2, "batch_size": 1},
        n_trials=2,
        trial_timeout=0.4,
        storage=None,
        cohort_size=1,
    )
    assert [t.state for t in trials(result)] == [TrialState.FAIL] * 2
    assert causes(result) == ["trial timeout"] * 2


@pytest.mark.parametrize("seconds", [0, -1.0, "1", True, float("nan")])
def test_seconds_must_be_positive_numbers(seconds: Any) -> None:
    for name in ("trial_timeout", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be more than 0 seconds, but got"):
            tune(X, Y, **{name: seconds})


# --- Divergence ---


def test_a_diverged_trial_has_its_last_finite_value() -> None:
    fixed = DIVERGING | {"epochs": 30}
    del fixed["learning_rate"]
    space = {"learning_rate": optuna.distributions.FloatDistribution(0.01, 100, log=True)}
    result = tune(X, Y, fixed=fixed, space=space, n_trials=12, method="random")
    found = [t for t in trials(result) if t.user_attrs["cause"] == "diverged"]
    assert 0 < len(found) < 12
    for trial in found:
        assert trial.state == TrialState.PRUNED
        if trial.intermediate_values:
            assert trial.value == trial.intermediate_values[trial.last_step]
