"""Callbacks are called for trials whose end the storage has accepted."""

from __future__ import annotations

from typing import Any

import optuna

from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.trial_finisher import TrialFinisher
from optuna_nnhp.training.cohort import Member


def test_callbacks_are_not_called_for_a_trial_that_another_worker_trains() -> None:
    called = list[int]()
    study = optuna.create_study()
    trial, unused = study.ask(), None
    finisher = TrialFinisher(
        *(study, *[unused] * 5),  # type: ignore[arg-type]
        callbacks=[lambda study, ended: called.append(ended.number)],
    )
    member: Any = Member(0, 0, {})
    finisher.run_callbacks([RunningTrial(trial, member, maximize=True)])
    assert called == []
    study.tell(trial, 1.0)
    finisher.run_callbacks([RunningTrial(trial, member, maximize=True)])
    assert called == [0]
