from __future__ import annotations

import pytest

from optuna_nnhp.training.batches import MAX_EXAMPLES_PER_ROUND
from optuna_nnhp.training.batches import epochs
from optuna_nnhp.training.batches import next_evaluation
from optuna_nnhp.training.batches import rounds_per_epoch
from optuna_nnhp.training.cohort import Cohort
from tests.members import task
from tests.members import varied


@pytest.mark.parametrize("examples", [1, 8192, 8193, 24_576, 24_577, 1_000_000])
def test_a_round_is_bounded_and_no_smaller_than_it_must_be(examples: int) -> None:
    per_epoch = rounds_per_epoch(examples)
    assert examples / per_epoch <= MAX_EXAMPLES_PER_ROUND
    assert per_epoch == 1 or examples / (per_epoch / 3) > MAX_EXAMPLES_PER_ROUND


@pytest.mark.parametrize(
    ("per_epoch", "course"), [(1, [1, 2, 3, 4]), (3, [1, 3, 6, 9]), (27, [1, 3, 9, 27, 54])]
)
def test_evaluations(per_epoch: int, course: list[int]) -> None:
    done = 0
    for expected in course:
        done = next_evaluation(done, per_epoch)
        assert done == expected


@pytest.mark.parametrize(
    ("done", "expected"), [(0, 0), (1, 0.1111), (9, 1), (10, 1.1111), (27, 3)]
)
def test_epochs(done: int, expected: float) -> None:
    assert epochs(done, 9) == expected


@pytest.fixture
def nine_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna_nnhp.training.batches.MAX_EXAMPLES_PER_ROUND", 12)  # of 100 rows


def test_long_epochs_are_evaluated_within(nine_rounds: None) -> None:
    cohort = Cohort(varied(3, epochs=2, batch_size=8), task())
    seen = []
    for _ in range(4):
        scores = cohort.train_round()
        assert scores is not None
        seen.append((scores.rounds, cohort.iterations[0]))
    assert seen == [([1] * 3, 2), ([3] * 3, 6), ([9] * 3, 18), ([18] * 3, 36)]
    assert scores.ended == ["finished"] * 3


def test_members_in_different_rounds_are_evaluated_when_due(nine_rounds: None) -> None:
    older, younger = varied(3, epochs=2, batch_size=8)[:1], varied(3, epochs=2, batch_size=8)[1:]
    cohort = Cohort(older, task())
    cohort.train_round()
    cohort.train_round()
    cohort.append(younger)
    seen = []
    for _ in range(5):
        scores = cohort.train_round()
        assert scores is not None
        numbers = [m.number for m in cohort.members]
        seen.append({numbers[p]: r for p, r in zip(scores.indices, scores.rounds, strict=True)})
    assert seen == [{1: 1, 2: 1}, {1: 3, 2: 3}, {0: 9}, {1: 9, 2: 9}, {0: 18}]


def test_patience_is_counted_in_epochs(nine_rounds: None) -> None:
    # A rate of nearly zero: nothing improves after the first evaluation.
    members = varied(1, epochs=9, batch_size=8, learning_rate=1e-10, patience=2)
    cohort = Cohort(members, task())
    ended = None
    while ended is None:
        scores = cohort.train_round()
        assert scores is not None
        ended = scores.ended[0]
    assert (ended, cohort.rounds_done) == ("early stopping", [18])


def test_a_budget_in_iterations_ends_within_an_epoch(nine_rounds: None) -> None:
    cohort = Cohort(varied(2, iterations=4, batch_size=8), task())
    for _ in range(2):
        scores = cohort.train_round()
    assert scores is not None
    assert (cohort.iterations, scores.ended) == ([4, 4], ["finished", "finished"])


def test_a_batch_is_at_most_a_round(nine_rounds: None) -> None:
    cohort = Cohort(varied(2, epochs=2, batch_size=50), task())
    assert (cohort.batches.size, cohort.batches.per_round) == (11, 1)
    assert cohort.total_steps == [18, 18]
