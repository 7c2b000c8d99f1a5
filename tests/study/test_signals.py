"""After Ctrl-C a study ends in order and keeps its results."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp.study import tuner
from optuna_nnhp.study._optuna_internals import allow_study_stop
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.budget import graceful_shutdown
from optuna_nnhp.study.policies.halving import HalvingPolicy
from optuna_nnhp.training.cohort import Cohort
from tests.tiny import ENVIRONMENT
from tests.tiny import TINY
from tests.tiny import causes
from tests.tiny import numbers
from tests.tiny import states
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()
ENDLESS = TINY | {"epochs": 10**6, "patience": 10**6}


class Interrupt:
    """A callback that presses Ctrl-C after the first trial."""

    pressed = False

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if not self.pressed:
            os.kill(os.getpid(), signal.SIGINT)
        self.pressed = True


def test_an_interrupt_keeps_finished_trials_and_marks_running_ones() -> None:
    # Trials of 1 to 9 epochs: the shortest ends, and the others are interrupted.
    space = {"epochs": optuna.distributions.IntDistribution(1, 9)}
    fixed = {name: value for name, value in TINY.items() if name != "epochs"}
    settings: dict[str, Any] = {"space": space, "fixed": fixed, "method": "random"}
    result = tune(X, Y, **settings, callbacks=[Interrupt()], n_trials=20, cohort_size=6)
    assert len(trials(result)) == 6
    assert set(causes(result)) == {"finished", "interrupted"}
    for trial in trials(result):
        if trial.user_attrs["cause"] == "finished":
            assert trial.state == TrialState.COMPLETE
            assert trial.user_attrs["epochs"] == trial.params["epochs"]
        else:
            assert 1 <= trial.user_attrs["epochs"] < trial.params["epochs"]
            assert trial.user_attrs["best_value"] == min(trial.intermediate_values.values())
    best = min(t.value for t in trials(result) if t.state == TrialState.COMPLETE and t.value)
    assert result.best_value == best
    assert result.predict(X).shape == (80,)


def test_an_interrupted_study_can_be_continued() -> None:
    storage = optuna.storages.InMemoryStorage()
    cut = tune(X, Y, storage=storage, callbacks=[Interrupt()], n_trials=6, cohort_size=2)
    assert len(trials(cut)) < 6
    again = tune(X, Y, storage=storage, n_trials=6, cohort_size=2)
    assert len([t for t in trials(again) if t.state != TrialState.FAIL]) == 6


def test_an_interrupt_ends_all_running_trials_with_their_values() -> None:
    class Pressed(optuna.pruners.NopPruner):
        """Prunes nothing, and presses Ctrl-C after the fifth epoch."""

        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            if trial.number == 0 and trial.last_step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().prune(study, trial)

    result = tune(X, Y, fixed=ENDLESS, n_trials=4, cohort_size=4, pruner=Pressed())
    assert causes(result) == ["interrupted"] * 4
    assert [t.user_attrs["epochs"] for t in trials(result)] == [5] * 4
    assert TrialState.RUNNING not in states(result)
    assert result.best_value == min(t.user_attrs["best_value"] for t in trials(result))


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_an_error_while_asking_stops_the_round_in_training(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_told = list[bool]()

    def endless(cohort: Cohort, stop: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not stop() and time.monotonic() < until:
            time.sleep(0.01)
        is_told.append(stop())

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(tuner, "_train_to_evaluation", endless)
    monkeypatch.setattr(HalvingPolicy, "ask_ahead", fails)
    with pytest.raises(error):
        tune(X, Y, fixed=ENDLESS, n_trials=2, cohort_size=2)
    assert is_told == [True]


SCRIPT = f"""
from tests.tiny import numbers, tune

def ready(study, trial):
    print("ready", flush=True)

fixed = {ENDLESS} | {{"epochs": 1}}
tune(*numbers(), storage="s.journal", n_trials=1, fixed=fixed, callbacks=[ready])
result = tune(*numbers(), storage="t.journal", n_trials=10**6, fixed=fixed, callbacks=[ready])
print("best", result.best_value, flush=True)
"""


def test_a_script_continues_after_an_interrupt_of_its_study(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    name, value = output.splitlines()[-1].split()
    fixed = ENDLESS | {"epochs": 1}
    result = tune(X, Y, storage="t.journal", n_trials=1, fixed=fixed)
    assert name == "best"
    assert result.best_value == float(value)
    assert TrialState.RUNNING not in states(result)
    assert list(folder.glob("t.models/*/trial-*.safetensors"))


def test_the_second_interrupt_is_not_caught() -> None:
    budget = Budget(None, None)
    with pytest.raises(KeyboardInterrupt), graceful_shutdown(budget):
        os.kill(os.getpid(), signal.SIGINT)
        assert budget.interrupted
        assert budget.out_of_time()
        os.kill(os.getpid(), signal.SIGINT)


def test_the_previous_signal_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with graceful_shutdown(Budget(None, None)):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_study_can_run_in_another_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(tune(X, Y)))
    thread.start()
    thread.join()
    assert states(results[0]) == [TrialState.COMPLETE] * 3


@pytest.mark.parametrize(
    ("n_trials", "finished", "left"), [(10, 3, 7), (10, 12, 0), (None, 5, None)]
)
def test_the_budget_counts_the_trials_left(
    n_trials: int | None, finished: int, left: int | None
) -> None:
    assert Budget(n_trials, timeout=1).n_trials_left(finished) == left


def test_the_budget_is_over_after_its_timeout_or_an_interrupt() -> None:
    assert not Budget(1, timeout=None).out_of_time()
    assert not Budget(1, timeout=1000).out_of_time()
    assert Budget(1, timeout=1e-9).out_of_time()
    assert Budget(1, timeout=None, interrupted=True).out_of_time()


def test_study_stop_is_allowed_only_inside_the_context() -> None:
    study = optuna.create_study()
    with allow_study_stop(study):
        study.stop()
        assert study._stop_flag
    with pytest.raises(RuntimeError, match="inside an objective function"):
        study.stop()
