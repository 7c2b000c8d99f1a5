from __future__ import annotations

import math
import random
from typing import Literal

import optuna
from optuna import Trial
from optuna.trial import TrialState
from optuna.trial import create_trial
import pytest

from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.search.halving import best_values_at_rung

NAN, INF = math.nan, math.inf

Direction = Literal["maximize", "minimize"]


@pytest.mark.parametrize(
    "reduction_factor, min_resource, rungs",
    [
        (2, 1, {1, 2, 4, 8, 16, 32}),
        (3, 1, {1, 3, 9, 27}),
        (3, 2, {2, 6, 18}),
        (10, 5, {5}),
        (4, 40, {40}),
    ],
)
def test_rungs_are_powers_of_the_reduction_factor(
    reduction_factor: int, min_resource: int, rungs: set[int]
) -> None:
    pruner = CohortHalvingPruner(reduction_factor=reduction_factor, min_resource=min_resource)
    assert {step for step in range(50) if pruner.is_rung(step)} == rungs


@pytest.mark.parametrize(
    "reduction_factor, values, maximize, kept",
    [
        (3, {0: 0.5, 1: 0.9, 2: 0.7}, True, {1}),
        (3, {0: 0.5, 1: 0.9, 2: 0.7}, False, {0}),
        (2, {0: 0.5, 1: 0.9, 2: 0.7}, True, {1, 2}),  # a half of three, rounded up
        (3, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, True, {2, 3}),
        (3, {i: float(i) for i in range(9)}, True, {6, 7, 8}),
        (3, {i: float(i) for i in range(9)}, False, {0, 1, 2}),
        (3, {i: float(i) for i in range(10)}, True, {6, 7, 8, 9}),
        # fewer than eta
        (3, {}, True, set()),
        (3, {0: 0.5}, True, {0}),
        (3, {0: 0.5, 1: 0.1}, True, {0, 1}),
        (4, {0: 0.5, 1: 0.1, 2: 0.2}, False, {0, 1, 2}),
        # ties
        (3, {0: 0.5, 1: 0.5, 2: 0.5}, True, {0, 1, 2}),
        (3, {0: 0.9, 1: 0.9, 2: 0.5}, True, {0, 1}),
        (2, {0: 0.9, 1: 0.5, 2: 0.5, 3: 0.5}, False, {1, 2, 3}),
        # NaN never goes on, and counts among those that have reached the rung
        (3, {0: NAN, 1: 0.1, 2: 0.2}, True, {2}),
        (3, {0: NAN, 1: 0.1, 2: 0.2}, False, {1}),
        (3, {0: NAN, 1: 0.1}, True, {1}),
        (3, {0: NAN, 1: NAN, 2: NAN}, True, set()),
        (3, {0: NAN}, True, set()),
        (2, {0: NAN, 1: NAN, 2: NAN, 3: 0.1}, True, {3}),
        (2, {0: NAN, 1: NAN, 2: NAN, 3: 0.1, 4: 0.2, 5: 0.3}, True, {3, 4, 5}),
        # infinite values are values
        (3, {0: INF, 1: 0.1, 2: 0.2}, False, {1}),
        (3, {0: INF, 1: 0.1, 2: 0.2}, True, {0}),
        (2, {0: -INF, 1: 0.1}, True, {1}),
    ],
)
def test_select_survivors_keeps_the_best(
    reduction_factor: int, values: dict[int, float], maximize: bool, kept: set[int]
) -> None:
    assert (
        CohortHalvingPruner(reduction_factor=reduction_factor).select_survivors(
            values, maximize=maximize
        )
        == kept
    )


@pytest.mark.parametrize("reduction_factor", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 5, 30, 31])
def test_survivors_are_one_in_reduction_factor_in_both_directions(
    reduction_factor: int, n: int
) -> None:
    draw = random.Random(n)
    values = {i: draw.random() for i in range(n)}
    pruner = CohortHalvingPruner(reduction_factor=reduction_factor)
    kept = pruner.select_survivors(values, maximize=True)
    assert len(kept) == (math.ceil(n / reduction_factor) if n >= reduction_factor else n)
    assert min(values[i] for i in kept) >= max(
        (v for i, v in values.items() if i not in kept), default=-1
    )
    assert pruner.select_survivors({i: -v for i, v in values.items()}, maximize=False) == kept


@pytest.mark.parametrize(
    "intermediate, step, maximize, expected",
    [
        ({1: 0.4, 2: 0.3}, 2, True, 0.4),
        ({1: 0.4, 2: 0.3}, 2, False, 0.3),
        ({1: 0.4, 2: 0.3, 3: 0.9}, 2, True, 0.4),  # what came later does not count
        ({2: 0.3}, 2, True, 0.3),
        ({1: NAN, 2: 0.3}, 2, True, 0.3),
        ({1: 0.3, 2: NAN}, 2, True, 0.3),
        ({1: NAN, 2: 0.3}, 2, False, 0.3),
        ({1: 0.3, 2: NAN, 3: 0.2}, 3, False, 0.2),
    ],
)
def test_best_value_up_to_a_rung_counts(
    intermediate: dict[int, float], step: int, maximize: bool, expected: float
) -> None:
    trial = create_trial(value=0.0, intermediate_values=intermediate)
    assert best_values_at_rung([trial], step, maximize=maximize) == {trial.number: expected}


@pytest.mark.parametrize("maximize", [True, False])
def test_trials_with_only_nan_have_nan(maximize: bool) -> None:
    trial = create_trial(value=0.0, intermediate_values={1: NAN, 2: NAN})
    assert math.isnan(best_values_at_rung([trial], 2, maximize=maximize)[trial.number])


def test_trials_below_the_rung_do_not_count() -> None:
    trial = create_trial(value=0.0, intermediate_values={1: 0.4})
    assert best_values_at_rung([trial], 2, maximize=True) == {}
    assert best_values_at_rung([], 1, maximize=True) == {}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reduction_factor": 1}, "^`reduction_factor` must be at least 2, but got 1"),
        ({"reduction_factor": 0}, "^`reduction_factor` must be at least 2, but got 0"),
        ({"min_resource": 0}, "^`min_resource` must be at least 1, but got 0"),
        ({"min_resource": -3}, "^`min_resource` must be at least 1, but got -3"),
    ],
)
def test_invalid_options_are_rejected(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CohortHalvingPruner(**settings)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_in_plain_optuna_it_prunes_the_bad_and_never_the_best(direction: Direction) -> None:
    sign = 1 if direction == "maximize" else -1
    order = random.Random(0).sample(range(30), 30)
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=CohortHalvingPruner(reduction_factor=3),
        direction=direction,
    )

    def objective(trial: Trial) -> float:
        quality = order[trial.number]
        for step in range(1, 11):
            # Curves that do not cross.
            trial.report(sign * (quality + step / 100), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(sign * quality)

    study.optimize(objective, n_trials=30)
    trials = study.get_trials()
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    assert len(pruned) >= 15
    assert {t.last_step for t in pruned} <= {1, 3, 9}
    assert all(t.state != TrialState.FAIL for t in trials)
    best = -1
    for trial in trials:  # whoever is the best so far is trained to the end
        if order[trial.number] > best:
            best = order[trial.number]
            assert trial.state == TrialState.COMPLETE
    assert study.best_value == sign * 29
    # The worst of all went no further than the first rung, once there was anyone to compare.
    worst = trials[order.index(0)]
    assert order.index(0) >= 3 and worst.last_step == 1


@pytest.mark.parametrize(
    "step, previous, expected",
    [(3, 1, True), (9, 3, True), (18, 9, True), (20, 18, False), (1, 0, True), (4, 2, True)],
)
def test_a_rung_between_two_reports_is_judged_late(
    step: int, previous: int, expected: bool
) -> None:
    assert CohortHalvingPruner(reduction_factor=2).is_rung(step, previous) is expected


@pytest.mark.parametrize("direction, kept", [("maximize", 2), ("minimize", 0)])
def test_trials_side_by_side_are_judged_by_each_other(direction: Direction, kept: int) -> None:
    study = optuna.create_study(
        pruner=CohortHalvingPruner(reduction_factor=3), direction=direction
    )
    trials = [study.ask() for _ in range(3)]
    for value, trial in enumerate(trials):
        trial.report(float(value), 1)
    assert [t.should_prune() for t in trials] == [i != kept for i in range(3)]


@pytest.mark.parametrize("steps, pruned", [([], False), ([2], True), ([1], True), ([1, 2], False)])
def test_only_a_rung_decides(steps: list[int], pruned: bool) -> None:
    study = optuna.create_study(
        pruner=CohortHalvingPruner(reduction_factor=3), direction="maximize"
    )
    for value in (0.8, 0.9):
        other = study.ask()
        for step in (1, 2):
            other.report(value, step)
    trial = study.ask()
    for step in steps:
        trial.report(0.1, step)
    assert trial.should_prune() is pruned


def test_a_trial_is_judged_by_its_best_value_so_far() -> None:
    study = optuna.create_study(
        pruner=CohortHalvingPruner(reduction_factor=3), direction="maximize"
    )
    for values in ([0.1, 0.2, 0.5], [0.1, 0.2, 0.6]):
        other = study.ask()
        for step, value in enumerate(values, start=1):
            other.report(value, step)
    trial = study.ask()
    for step, value in enumerate([0.1, 0.9, 0.2], start=1):
        trial.report(value, step)
    assert not trial.should_prune()


def test_nan_is_pruned_at_the_next_rung_even_alone() -> None:
    study = optuna.create_study(pruner=CohortHalvingPruner(reduction_factor=3))
    trial = study.ask()
    trial.report(NAN, 1)
    assert trial.should_prune()
