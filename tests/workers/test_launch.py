"""Test the configuration of workers, control messages and checks before workers start."""

from __future__ import annotations

import os
from pathlib import Path
import pickle
import signal
import threading
import time
from typing import Any

import optuna
from optuna.trial import TrialState
import pytest
import torch

from optuna_nnhp.search.grid import GridPointsSampler
from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.method_config import parse_method
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.weight_files import BestWeights
from optuna_nnhp.workers import control as control_module
from optuna_nnhp.workers import worker as worker_module
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.config import WorkerResult
from optuna_nnhp.workers.control import INTERRUPT
from optuna_nnhp.workers.control import RELEASE
from optuna_nnhp.workers.control import STOP
from optuna_nnhp.workers.control import ShutdownWatcher
from optuna_nnhp.workers.control import last_control_message_id
from optuna_nnhp.workers.control import send_control_message
from optuna_nnhp.workers.launch import absolute_storage
from optuna_nnhp.workers.launch import check_workers
from optuna_nnhp.workers.launch import keep_best_weights
from optuna_nnhp.workers.launch import without_grid_points
from optuna_nnhp.workers.worker import run_worker
from tests.tiny import TINY
from tests.tiny import numbers
from tests.tiny import trials
from tests.tiny import tune

X, Y = numbers()


def worker_config(**options: Any) -> WorkerConfig:
    usual: dict[str, Any] = {
        "problem_spec": ProblemSpec(X=X, y=Y, fixed=TINY, device="cpu"),
        "storage": "s.journal",
        "study_name": "s",
        "method_config": parse_method("random", None, None, None, 0),
        "pruner": CohortHalvingPruner(),
    }
    return WorkerConfig(**(usual | options))


def test_config_is_pickled_with_its_functions(folder: Path) -> None:
    seen = []
    config = worker_config(callbacks=(lambda study, trial: seen.append(trial),), n_trials=3)
    again = pickle.loads(pickle.dumps(config))
    assert (again.study_name, again.n_trials) == ("s", 3)
    assert again.problem_spec.problem().name == config.problem_spec.problem().name
    assert callable(again.callbacks[0])
    assert "s.journal" not in repr(config)  # a URL may contain a password


def test_worker_restores_threads_log_level_and_signal_handlers(folder: Path) -> None:
    tune(X, Y, storage="s.journal", study_name="s", n_trials=1)
    before = torch.get_num_threads(), optuna.logging.get_verbosity()
    handlers = [signal.getsignal(number) for number in worker_module.SHUTDOWN_SIGNALS]
    threads = set(threading.enumerate())
    result = run_worker(worker_config(n_trials=2, threads=3, verbosity=optuna.logging.ERROR))
    assert result == WorkerResult(0)
    assert (torch.get_num_threads(), optuna.logging.get_verbosity()) == before
    assert [signal.getsignal(number) for number in worker_module.SHUTDOWN_SIGNALS] == handlers
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in left if "engine" not in name}  # that of a process stays


def test_worker_returns_errors_that_can_be_pickled(folder: Path) -> None:
    result = run_worker(worker_config(n_trials=2))
    assert isinstance(result.error, KeyError)  # there is no such study
    tune(X, Y, storage="s.journal", study_name="s", n_trials=1)
    other = run_worker(
        worker_config(problem_spec=ProblemSpec(X=X + 1, y=Y, fixed=TINY), n_trials=2)
    )
    assert "exists already with another fingerprint" in str(other.error)

    class Local(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("it cannot be sent")

    def fail(study: optuna.Study, trial: Any) -> None:
        raise Local("broken")

    result = run_worker(worker_config(n_trials=2, callbacks=(fail,)))
    assert type(result.error) is RuntimeError
    assert str(result.error) == "Local: broken"
    assert "in fail" in result.error.__notes__[0]
    pickle.dumps(result)


def test_worker_after_its_deadline_trains_nothing(folder: Path) -> None:
    tune(X, Y, storage="s.journal", study_name="s", n_trials=1)
    result = run_worker(worker_config(deadline=time.time() - 1))
    assert result == WorkerResult(0)
    study = optuna.load_study(study_name="s", storage=_journal())
    assert len(study.trials) == 1


def _journal() -> optuna.storages.BaseStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("s.journal"))


@pytest.mark.parametrize(
    ("command", "flags"),
    [(STOP, (True, False, False)), (INTERRUPT, (False, True, False)),
     (RELEASE, (False, False, True))],
)  # fmt: skip
def test_watcher_obeys_new_control_messages_only(
    command: str, flags: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "PARENT_CHECK_INTERVAL", 0.01)
    monkeypatch.setattr(control_module, "MESSAGE_CHECK_INTERVAL", 0.02)
    study = optuna.create_study()
    send_control_message(study, RELEASE)  # for workers of an earlier call
    budget = Budget(9, None)
    with ShutdownWatcher(study, budget, last_control_message_id(study)):
        time.sleep(0.2)
        assert not (study._stop_flag or budget.is_over())
        send_control_message(study, command)
        limit = time.monotonic() + 10
        while not (study._stop_flag or budget.is_over()) and time.monotonic() < limit:
            time.sleep(0.01)
    assert (study._stop_flag, budget.interrupted, budget.released) == flags


def test_watcher_sends_stop_once_when_the_study_is_stopped() -> None:
    study = optuna.create_study()
    watcher = ShutdownWatcher(study, Budget(9, None))
    trial: Any = None
    watcher(study, trial)
    assert last_control_message_id(study) is None
    study._stop_flag = True
    watcher(study, trial)
    message_id = last_control_message_id(study)
    assert message_id is not None
    watcher(study, trial)
    assert last_control_message_id(study) == message_id


def test_unreachable_storage_does_not_end_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    study, budget = optuna.create_study(), Budget(9, None)

    def fail(study_id: int) -> dict[str, Any]:
        raise ConnectionError

    monkeypatch.setattr(study._storage, "get_study_system_attrs", fail)
    with ShutdownWatcher(study, budget):
        pass
    assert not budget.is_over()


def test_worker_is_released_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "PARENT_CHECK_INTERVAL", 0.01)
    study, budget = optuna.create_study(), Budget(9, None)
    with ShutdownWatcher(study, budget, parent=os.getpid()):  # not its own parent
        limit = time.monotonic() + 10
        while not budget.released and time.monotonic() < limit:
            time.sleep(0.01)
    assert budget.released


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True, None])
def test_workers_must_be_a_positive_integer(workers: object) -> None:
    with pytest.raises(ValueError, match="`workers` must be at least 1, but got"):
        tune(*numbers(), n_trials=1, workers=workers)


@pytest.mark.parametrize(
    "storage",
    [
        *(None, "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:"),
        optuna.storages.InMemoryStorage(),
        optuna.storages.RDBStorage("sqlite://"),
    ],
)
def test_in_memory_storages_do_not_allow_several_workers(storage: Any) -> None:
    with pytest.raises(ValueError, match="`storage` must be one that several processes can open"):
        check_workers(None, storage)


@pytest.mark.parametrize("storage", ["a.journal", Path("a"), "sqlite:///a.db", "mysql://h/d"])
def test_files_and_databases_allow_several_workers(storage: Any) -> None:
    check_workers(None, storage)


def test_executor_must_have_submit() -> None:
    with pytest.raises(ValueError, match="`executor` must have a method `submit`"):
        check_workers(object(), "a.journal")


def test_relative_paths_become_absolute(folder: Path) -> None:
    here = os.getcwd()
    assert absolute_storage("a.journal") == f"{here}/a.journal"
    assert absolute_storage(Path("b")) == f"{here}/b"
    assert absolute_storage("sqlite:///c.db?x=1") == f"sqlite:///{here}/c.db?x=1"
    assert absolute_storage("sqlite:////d.db") == "sqlite:////d.db"
    assert absolute_storage("grpc://host:1") == "grpc://host:1"


def test_workers_divide_the_remaining_trials() -> None:
    assert Budget(10, None, workers=4).n_trials_left(finished=1) == 3
    assert Budget(10, None, workers=4).n_trials_left(finished=9) == 1
    assert Budget(10, None, workers=4).n_trials_left(finished=10) == 0


def test_grid_samplers_of_workers_propose_nothing() -> None:
    grid = GridPointsSampler([{"a": 1}])
    plan = without_grid_points(grid)
    assert isinstance(plan, GridPointsSampler)
    assert (plan.points, plan.is_part) == ([], True)
    sampler = optuna.samplers.RandomSampler()
    assert without_grid_points(sampler) is sampler


def test_workers_draw_different_random_numbers() -> None:
    study = optuna.create_study()
    distribution = optuna.distributions.FloatDistribution(0, 1)

    def first(sampler: optuna.samplers.BaseSampler) -> float:
        trial = optuna.trial.create_trial(state=TrialState.RUNNING)
        return float(sampler.sample_independent(study, trial, "x", distribution))

    own = optuna.samplers.RandomSampler(seed=0)
    for method, sampler in (("random", None), ("bayes", own)):
        methods = [parse_method(method, sampler, None, None, seed=0) for _ in range(4)]
        values = [first(w.sampler_for(study, few=False, worker=i)) for i, w in enumerate(methods)]
        assert len(set(values)) == 4
    method_config = parse_method("random", None, None, None, seed=0)
    again = [first(method_config.sampler_for(study, few=False, worker=1)) for _ in range(2)]
    assert again[0] == again[1]
    # Workers share one quasi-random sequence, which the storage counts.
    plan = parse_method("quasi-random", None, None, None, seed=0)
    assert plan.sampler_for(study, few=False, worker=3) is plan.sampler


def test_only_weights_of_best_and_unfinished_trials_are_kept(folder: Path) -> None:
    result = tune(X, Y, n_trials=4, storage="s.journal", cohort_size=1)
    (path,) = folder.rglob("trial-*.safetensors")
    study, network = result.study, result.model
    study.ask()  # may have weights already
    for number in range(5):
        BestWeights(path.parent).save(number, network)
    keep_best_weights(study, BestWeights(path.parent), 2, False)
    best = sorted(trials(result)[:4], key=lambda t: t.value or 0.0)[:2]
    names = {f"trial-{number}.safetensors" for number in (best[0].number, best[1].number, 4)}
    assert {p.name for p in path.parent.glob("trial-*")} == names


def test_worker_does_not_delete_weights_of_other_workers(folder: Path) -> None:
    network = torch.nn.Linear(1, 1)
    BestWeights(folder).save(7, network)
    mine = worker_module._WeightsOfThisWorker(folder)
    for number in (8, 9):
        mine.save(number, network)
    mine.delete_others([9])
    assert {p.name for p in folder.iterdir()} == {"trial-7.safetensors", "trial-9.safetensors"}
