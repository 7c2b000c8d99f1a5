"""Callbacks are called for trials whose end the storage has accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.storages import RDBStorage

from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.training.cohort import Member


def start(trial: optuna.Trial) -> RunningTrial:
    member: Any = Member(trial.number, 0, {})
    return RunningTrial(trial, member, maximize=True)


def test_callbacks_are_not_called_for_a_trial_that_another_worker_trains() -> None:
    called = list[int]()
    study = optuna.create_study()
    trial, unused = study.ask(), None
    finisher = TrialFinisher(
        *(study, *[unused] * 4),  # type: ignore[arg-type]
        callbacks=[lambda study, ended: called.append(ended.number)],
    )
    finisher.run_callbacks([start(trial)])
    assert called == []
    study.tell(trial, 1.0)
    finisher.run_callbacks([start(trial)])
    assert called == [0]


def test_callbacks_are_not_called_for_a_trial_that_another_process_has_ended(
    tmp_path: Path,
) -> None:
    called = list[int]()
    backend = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    storage = BufferedStorage(backend)
    study = optuna.create_study(storage=storage, study_name="s")
    lost, own = study.ask(), study.ask()
    storage.flush()
    optuna.load_study(study_name="s", storage=backend).tell(lost.number, 1.0)

    problem: Any = SimpleNamespace(
        rounds_per_epoch=1, count_weights=lambda member: 1, attributes=lambda member: {}
    )
    source: Any = SimpleNamespace(tell=study.tell, end=lambda trials, counts: None)
    unused: Any = None
    finisher = TrialFinisher(
        *(study, problem, storage, source, unused),
        callbacks=[lambda study, ended: called.append(ended.number)],
    )
    running = [start(lost), start(own)]
    finisher.fail_unstarted(running, TrialOutcome.INTERRUPTED)
    assert [trial.ended_elsewhere for trial in running] == [True, False]
    assert called == [own.number]
    assert study.trials[lost.number].value == 1.0
