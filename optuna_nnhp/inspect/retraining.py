"""Training a trial again from what its study has recorded, and judging its stored weights."""

from __future__ import annotations

from collections.abc import Iterable

from optuna import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.study.environment import SEED
from optuna_nnhp.study.running_trial import params_for_retraining
from optuna_nnhp.study.running_trial import schedule_of
from optuna_nnhp.templates.supervised import Template
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.training.numerics_context import NUMERICS_CONTEXT_KEY
from optuna_nnhp.training.retrain import RetrainResult
from optuna_nnhp.training.retrain import evaluate_network
from optuna_nnhp.training.retrain import retrain
from optuna_nnhp.training.segments import Segment


def get_trained_trial(study: Study, number: int) -> FrozenTrial:
    """A trial that can be trained again.

    Args:
        study:
            Its study.
        number:
            Its number.

    Raises:
        ValueError: If there is none with this number, it has not finished, or it was not trained.

    Example:
        >>> import optuna
        >>> get_trained_trial(optuna.create_study(), 0)
        Traceback (most recent call last):
        ValueError: A trial must be one of the study's 0, numbered from 0 on, but got 0.
    """
    trials = study.get_trials(deepcopy=False)
    if isinstance(number, bool) or number not in range(len(trials)):
        raise ValueError(
            f"A trial must be one of the study's {len(trials)}, numbered from 0 on, but got "
            f"{number!r}."
        )
    trial = trials[number]
    if not trial.state.is_finished():
        raise ValueError(
            f"A trial must have finished to be trained again, but trial {number} is "
            f"{trial.state.name}."
        )
    if not trial.intermediate_values and not trial.user_attrs.get("epochs"):
        why = trial.user_attrs.get("error") or trial.user_attrs.get("cause", "unknown")
        raise ValueError(
            f"A trial must have been trained to be trained again, but trial {number} was not: "
            f"{trial.state.name}, {why}."
        )
    return trial


def with_trial_seed(study: Study, problem: Template, trial: FrozenTrial) -> Template:
    """The problem with the seed that a trial had: a study may be continued with another one."""
    seed = trial.user_attrs.get(SEED, study.user_attrs.get(SEED, problem.seed))
    return problem if seed == problem.seed else problem.with_seed(seed)


def recorded_value(trial: FrozenTrial) -> float | None:
    """A trial's best value, None if it has none.

    Of a pruned one Optuna has the last value; so has this one where no evaluation was of all data.
    """
    if trial.state == TrialState.COMPLETE:
        return trial.value
    value = trial.user_attrs.get("best_value", trial.value)
    return None if value is None else float(value)


def best_round(problem: Template, trial: FrozenTrial) -> int:
    """The round of a trial's best value, 0 if it has none."""
    return _rounds(problem, trial.user_attrs.get("best_epoch", 0))


def scored_round(problem: Template, trial: FrozenTrial) -> int:
    """The round of `recorded_value`, 0 if there is none."""
    return best_round(problem, trial) or max(trial.intermediate_values, default=0)


def last_round(problem: Template, trial: FrozenTrial) -> int:
    """The round of a trial's last evaluation."""
    done = _rounds(problem, trial.user_attrs.get("epochs", 0))
    return max(done, *trial.intermediate_values, 0)


def _rounds(problem: Template, epochs: float) -> int:
    return round(epochs * problem.rounds_per_epoch)


def retrain_trial(
    problem: Template, trial: FrozenTrial, until: int, ends: Iterable[int] = ()
) -> RetrainResult:
    """A trial trained again, alone: same parameters, same seeds, same course.

    Args:
        problem:
            What was tuned, with the data and the trial's seed.
        trial:
            The trial.
        until:
            Rounds to train.
        ends:
            After which rounds it is evaluated, if its values changed while it trained.
    """
    return retrain(
        problem.cohort,
        _course(problem, trial),
        until,
        best_round(problem, trial),
        trial.user_attrs.get(NUMERICS_CONTEXT_KEY, ()),
        ends if schedule_of(problem, trial) else None,
    )


def stored_value(problem: Template, trial: FrozenTrial, weights: BestWeights) -> float:
    """The metric of a trial's stored weights, as the study came to it.

    Args:
        problem:
            What was tuned, with the data.
        trial:
            The trial.
        weights:
            The best trials' weights; its are among them.

    Raises:
        ValueError: If they are damaged.
    """
    best = best_round(problem, trial)
    stage = [stage for stage in _course(problem, trial) if stage.begin < max(best, 1)][-1]
    network = weights.load_into(trial.number, problem.network(stage.member))
    return evaluate_network(problem.cohort, stage.member, network)


def _course(problem: Template, trial: FrozenTrial) -> list[Segment]:
    """The stages of a trial; one, if its values did not change."""
    stages = schedule_of(problem, trial)
    return stages or [Segment(0, problem.member(trial.number, params_for_retraining(trial)))]
