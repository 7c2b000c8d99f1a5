"""Each way to end has a state in Optuna, and counts or does not count."""

from __future__ import annotations

from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.outcomes import counts_towards_n_trials
from optuna_nnhp.study.outcomes import outcome_of
from optuna_nnhp.study.outcomes import outcome_table
from optuna_nnhp.study.outcomes import retries_grid_point

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
ENDS_EARLY = ("trial timeout", "timeout", "interrupted")


def trial(state: TrialState, cause: str | None) -> FrozenTrial:
    attributes = {} if cause is None else {"cause": cause}
    return create_trial(state=state, value=None if state == FAIL else 1.0, user_attrs=attributes)


@pytest.mark.parametrize("cause", ["finished", "early stopping", "diverged"])
def test_each_cause_that_training_reports_is_an_outcome(cause: str) -> None:
    outcome = TrialOutcome.from_cause(cause)
    assert outcome is not None and outcome.value == cause
    for has_value in (False, True):
        assert outcome.final_state(has_value=has_value, is_best=has_value) == outcome.state
    assert TrialOutcome.from_cause(None) is None


@pytest.mark.parametrize("cause", ENDS_EARLY)
def test_an_interrupted_trial_is_complete_only_if_it_is_the_best(cause: str) -> None:
    outcome = TrialOutcome.from_cause(cause)
    assert outcome is not None
    assert outcome.final_state(has_value=False, is_best=False) == FAIL
    assert outcome.final_state(has_value=True, is_best=False) == PRUNED
    assert outcome.final_state(has_value=True, is_best=True) == COMPLETE


@pytest.mark.parametrize("cause", ["timeout", "interrupted", "killed", "duplicate"])
def test_failed_trials_do_not_count_if_they_did_not_cause_the_failure(cause: str) -> None:
    assert not counts_towards_n_trials(trial(FAIL, cause))


@pytest.mark.parametrize("cause", ["trial timeout", "error", "out of memory", None])
def test_all_other_failed_trials_count(cause: str | None) -> None:
    assert counts_towards_n_trials(trial(FAIL, cause))


@pytest.mark.parametrize("cause", ENDS_EARLY)
def test_interrupted_trials_with_a_value_count_except_on_a_grid(
    cause: str,
) -> None:
    assert counts_towards_n_trials(trial(PRUNED, cause)) and not counts_towards_n_trials(
        trial(PRUNED, cause), on_grid=True
    )
    assert counts_towards_n_trials(trial(COMPLETE, cause), on_grid=True)


def test_a_grid_point_is_tried_again_unless_it_has_a_result() -> None:
    for outcome in TrialOutcome:
        assert retries_grid_point(trial(FAIL, outcome.value))
        assert not retries_grid_point(trial(COMPLETE, outcome.value))
    assert not retries_grid_point(trial(PRUNED, "pruned"))
    assert not retries_grid_point(trial(PRUNED, "diverged"))
    assert all(retries_grid_point(trial(PRUNED, cause)) for cause in ENDS_EARLY)


def test_trials_of_other_programs_have_no_outcome() -> None:
    assert outcome_of(trial(COMPLETE, None)) is None
    assert outcome_of(trial(COMPLETE, "full moon")) is None
    assert counts_towards_n_trials(trial(FAIL, None)) and retries_grid_point(trial(FAIL, None))


def test_the_table_has_a_row_for_each_outcome() -> None:
    lines = outcome_table()
    assert len(lines) == 2 + len(TrialOutcome)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    for outcome, line in zip(TrialOutcome, lines[2:], strict=True):
        assert line.startswith(f"| {outcome.value} |") and line.endswith(f"{outcome.meaning} |")
