"""Test how replicates are read and shown."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest

from optuna_nnhp.inspect.dashboard import study_note
from optuna_nnhp.inspect.dashboard import trial_note
from optuna_nnhp.inspect.html_page import index_html
from optuna_nnhp.inspect.replicates import ReplicatedTrial
from optuna_nnhp.inspect.replicates import best_replicated_trial
from optuna_nnhp.inspect.replicates import replicated_trials
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.inspect.summary import summary

VALUES: dict[str, list[float | None]] = {
    "0": [0.90, 0.80, 0.85],
    "1": [0.88, 0.87, 0.86],
    "2": [0.99, 0.99, None],
}


@pytest.fixture
def study() -> optuna.Study:
    found = optuna.create_study(direction="maximize", study_name="digits")
    found.add_trials([optuna.trial.create_trial(value=v) for v in (0.93, 0.91, 0.92, 0.5)])
    record: dict[str, Any] = {n: {"seeds": [1, 2, 3], "values": v} for n, v in VALUES.items()}
    found.set_user_attr("replicates", record)
    return found


@pytest.mark.parametrize(
    "values, mean, std, text",
    [
        ((0.5, 0.7, 0.9), 0.7, 0.2, "0.7 ± 0.2 over 3 seeds"),
        ((0.5,), 0.5, math.nan, "0.5 with another seed"),
        ((0.5, None), -math.inf, math.nan, "1 of 2 diverged with other seeds"),
    ],
)
def test_mean_and_standard_deviation_over_seeds(
    values: tuple[float | None, ...], mean: float, std: float, text: str
) -> None:
    trial = ReplicatedTrial(0, 1.0, values, maximize=True)
    assert trial.mean == pytest.approx(mean)
    assert trial.std == pytest.approx(std, nan_ok=True)
    assert trial.text == text


def test_diverged_replicates_give_the_worst_mean() -> None:
    assert ReplicatedTrial(0, 1.0, (0.5, None), maximize=False).mean == math.inf


def test_best_trial_is_the_one_with_the_best_mean(study: optuna.Study) -> None:
    assert [found.number for found in replicated_trials(study)] == [1, 0, 2]
    replicated, best = best_replicated_trial(study), find_best_trial(study)
    assert replicated is not None and replicated.number == 1
    assert best is not None and best.number == 1
    assert study.best_trial.number == 0


def test_best_trial_without_replicates_has_the_best_value(study: optuna.Study) -> None:
    study.set_user_attr("replicates", {"0": {"seeds": [], "values": []}})
    assert best_replicated_trial(study) is None
    best = find_best_trial(study)
    assert best is not None and best.number == 0


def test_summary_notes_and_page_show_replicates(study: optuna.Study) -> None:
    text = "0.87 ± 0.01 over 3 seeds"
    assert summary(study)["best"] == "value 0.91 in trial 1"
    assert summary(study)["other seeds"] == text
    assert f"**value 0.91** in trial 1; {text}" in study_note(study)
    assert f"**other seeds**: {text}" in trial_note(study, study.trials[1])
    assert "other seeds" not in trial_note(study, study.trials[3])
    assert text in index_html(study, {})
