"""Replay a trial: score its stored weights, retrain it, and compare with the recorded values."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
import math
import os
from pathlib import Path
import time
from typing import Any
from typing import NamedTuple

import optuna
from optuna import Study
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import torch
from torch import nn

from optuna_nnhp.engine.library import single_threaded_blas
from optuna_nnhp.errors import unknown_name
from optuna_nnhp.storages._optuna_internals import journal_file
from optuna_nnhp.storages._optuna_internals import journal_path
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.open_storage import check_storage_exists
from optuna_nnhp.storages.open_storage import models_folder
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.open_storage import safe_join
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study.environment import BY_COMPILER
from optuna_nnhp.study.environment import SEED
from optuna_nnhp.study.environment import Environment
from optuna_nnhp.study.environment import describe_environment
from optuna_nnhp.study.environment import differences
from optuna_nnhp.study.environment import trial_environments
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.study.running import params_for_retraining
from optuna_nnhp.study.running import schedule_of
from optuna_nnhp.templates.base import Template
from optuna_nnhp.templates.base import template_of_study
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.cohort import NUMERICS_CONTEXT_KEY
from optuna_nnhp.training.device import resolve_device
from optuna_nnhp.training.retrain import RetrainResult
from optuna_nnhp.training.retrain import Segment
from optuna_nnhp.training.retrain import evaluate_network
from optuna_nnhp.training.retrain import retrain
from optuna_nnhp.training.torch_compile import check_compile
from optuna_nnhp.training.weight_files import BestWeights

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# Largest accepted difference from a recorded value. Other machines and versions round sums
# differently. Relative to the value, absolute for values near 0, and in examples of the
# validation part for metrics that count examples.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE, EXAMPLE_TOLERANCE = 1e-3, 1e-6, 2


class Deviation(NamedTuple):
    """The first step at which two learning curves differ.

    Args:
        step:
            Optuna's step.
        recorded:
            Value in the study.
        retrained:
            Value of the retrained network.
    """

    step: int
    recorded: float
    retrained: float


@dataclass(frozen=True)
class Replay:
    """The result of replaying a trial.

    Args:
        number:
            Number of the trial.
        best_value:
            Value recorded in the study; None if the trial has no value.
        stored_value:
            Value of the stored weights; None if there are none.
        retrained_value:
            Value of the retrained network at the same step; NaN if it has none.
        tolerance:
            Largest accepted difference of the retrained value: 0.1 % of the value, and for
            metrics that count examples at least two examples.
        is_exact:
            Whether the stored weights have the recorded value to the last bit; without stored
            weights, whether the retrained network has.
        is_reproduced:
            Whether the retrained network has the recorded value within the tolerance.
        first_difference:
            First step at which the learning curves differ; None if all values are equal.
        differences:
            Differences between the environment of the trial and this one.
        steps:
            Number of compared values of the learning curve.
        seconds:
            Duration of the replay in seconds.

    Example:
        >>> print(Replay(3, 0.9, 0.9, 0.9, 9e-4, True, True, None, [], 12, 0.5))
        Trial 3 has the value 0.9.
        Stored weights: 0.9, exactly.
        Retrained: 0.9, exactly; all 12 values of the learning curve are equal (0.5 s).
        Environment: the same versions and machine.
    """

    number: int
    best_value: float | None
    stored_value: float | None
    retrained_value: float
    tolerance: float
    is_exact: bool
    is_reproduced: bool
    first_difference: Deviation | None
    differences: list[str]
    steps: int
    seconds: float

    def __str__(self) -> str:
        """Summarize the replay in four lines."""
        value = "no value" if self.best_value is None else f"the value {self.best_value:.7g}"
        stored, environment = "none", "the same versions and machine"
        if self.stored_value is not None:
            stored = f"{self.stored_value:.7g}, {'' if self.is_exact else 'NOT '}exactly"
        if self.differences:
            environment = f"{'; '.join(self.differences)}. Values may differ"
        return (
            f"Trial {self.number} has {value}.\n"
            f"Stored weights: {stored}.\n"
            f"Retrained: {self._retrained_text()}; {self._curve_text()} ({self.seconds:.1f} s).\n"
            f"Environment: {environment}."
        )

    def _retrained_text(self) -> str:
        """Describe the value of the retrained network."""
        if self.best_value is None:
            return "again no value" if self.is_reproduced else f"{self.retrained_value:.7g}"
        if self.retrained_value == self.best_value:
            return f"{self.retrained_value:.7g}, exactly"
        within = "within" if self.is_reproduced else "NOT within"
        return f"{self.retrained_value:.7g}, {within} {self.tolerance:.2g}"

    def _curve_text(self) -> str:
        """Describe where the learning curves differ."""
        if self.first_difference is None:
            return f"all {self.steps} values of the learning curve are equal"
        step, recorded, retrained = self.first_difference
        distance = f"{abs(recorded - retrained):.1e}"
        return (
            f"the learning curve differs from step {step} on, where {recorded:.7g} is {distance} "
            "away"
        )


def replay(
    study: Study | tuple[str | Path | BaseStorage, str],
    trial_number: int,
    data: Any = None,
    *,
    network: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    validation: Any = None,
    metric: Callable[[Any, Any], float] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Replay:
    """Score the stored weights of a finished trial, retrain it alone, and compare the values.

    The trial may be complete, pruned, diverged or stopped, as long as it has been trained. It is
    retrained up to its last evaluation.

    Args:
        study:
            A study that `optimize` created, or its storage (a path, URL or Optuna storage) and
            name.
        trial_number:
            Number of the trial.
        data:
            The study's data: a text (or its path), ``(X, y)``, or the path of a CSV file. None if
            the study was given a path that still exists.
        network:
            The function that builds networks, if it was your own.
        validation:
            The validation part, if it was given as data.
        metric:
            The metric, if it was a function.
        weights:
            Folder of the study's weights, ``trial-<number>.safetensors``; searched beside the
            storage if None.
        device:
            Device to train on; that of the trial if None.

    Raises:
        ValueError: If the data are not the study's, the trial does not exist or was not trained,
            or a file is damaged.
        FileNotFoundError: If a file or folder does not exist.

    Example:
        >>> from optuna_nnhp import optimize
        >>> X, y = [[float(i)] for i in range(40)], [i > 9 for i in range(40)]
        >>> result = optimize("dnn", X, y, n_trials=2, storage=None, fixed={"epochs": 2})
        >>> replayed = replay(result.study, 1, (X, y))
        >>> replayed.is_reproduced, replayed.differences
        (True, [])
    """
    study = study if isinstance(study, Study) else _load_study(*study)
    trial = get_trained_trial(study, trial_number)
    X, y = _split_data(data, template_of_study(study))
    options = _device_and_compile(trial_environments(study, trial), device)
    problem = ProblemSpec.from_study(
        study, X, y, network=network, validation=validation, metric=metric, **options
    ).problem()
    folder = _weights_folder(study) if weights is None else Path(weights)
    if weights is not None and not Path(weights).is_dir():
        raise FileNotFoundError(f"`weights` must be an existing folder, but got {weights}")
    return replay_trial(study, problem, BestWeights(folder), trial_number)


def replay_trial(study: Study, problem: Template, weights: BestWeights, number: int) -> Replay:
    """Replay a trial whose problem and weights are already loaded.

    Args:
        study:
            The study.
        problem:
            The study's problem, with the data.
        weights:
            The weights of the best trials.
        number:
            Number of the trial.

    Raises:
        ValueError: If the trial does not exist, was not trained, or its weights are damaged.
    """
    started, trial = time.monotonic(), get_trained_trial(study, number)
    problem, curve = with_trial_seed(study, problem, trial), trial.intermediate_values
    environments, recorded = trial_environments(study, trial), recorded_value(trial)
    with _threads_of_trial(environments), single_threaded_blas:
        stored = _score_stored_weights(problem, trial, weights) if number in weights else None
        result = retrain_trial(problem, trial, _last_round(problem, trial), curve)
        here = describe_environment(problem)
    # The study evaluated the best trials alone, and others together with their cohort.
    in_cohort = result.values.get(_scored_round(problem, trial), math.nan)
    is_alone = result.value == recorded or math.isnan(in_cohort)
    retrained = result.value if is_alone else in_cohort
    tolerance = _tolerance(problem, recorded)
    if recorded is None:
        is_reproduced = is_exact = not math.isfinite(retrained)
    else:
        is_reproduced = abs(retrained - recorded) <= tolerance
        is_exact = recorded == (retrained if stored is None else stored)
    return Replay(
        number=number,
        best_value=recorded,
        stored_value=stored,
        retrained_value=retrained,
        tolerance=tolerance,
        is_exact=is_exact,
        is_reproduced=is_reproduced,
        first_difference=_first_difference(curve, result.values),
        differences=_environment_differences(environments, here),
        steps=len(curve),
        seconds=time.monotonic() - started,
    )


def get_trained_trial(study: Study, number: int) -> FrozenTrial:
    """Return a trial that can be retrained.

    Args:
        study:
            The study.
        number:
            Number of the trial.

    Raises:
        ValueError: If the trial does not exist, has not finished, or was not trained.

    Example:
        >>> get_trained_trial(optuna.create_study(), 0)
        Traceback (most recent call last):
        ValueError: The trial number must be below 0, the number of trials, but got 0.
    """
    trials = study.get_trials(deepcopy=False)
    if isinstance(number, bool) or number not in range(len(trials)):
        raise ValueError(
            f"The trial number must be below {len(trials)}, the number of trials, but got "
            f"{number!r}."
        )
    trial = trials[number]
    if not trial.state.is_finished():
        raise ValueError(
            f"A trial must be finished to be retrained, but trial {number} is {trial.state.name}."
        )
    if not trial.intermediate_values and not trial.user_attrs.get("epochs"):
        reason = trial.user_attrs.get("error") or trial.user_attrs.get("cause", "unknown")
        raise ValueError(
            f"A trial must have been trained to be retrained, but trial {number} was not: "
            f"{trial.state.name}, {reason}."
        )
    return trial


def with_trial_seed(study: Study, problem: Template, trial: FrozenTrial) -> Template:
    """Return the problem with the seed of a trial: a study can be resumed with another seed."""
    seed = trial.user_attrs.get(SEED, study.user_attrs.get(SEED, problem.seed))
    return problem if seed == problem.seed else problem.with_seed(seed)


def recorded_value(trial: FrozenTrial) -> float | None:
    """Return the best value of a trial; None if it has none.

    Optuna's value of a pruned trial is its last one. It is returned only if the trial was never
    evaluated on the whole validation part.
    """
    if trial.state == TrialState.COMPLETE:
        return trial.value
    value = trial.user_attrs.get("best_value", trial.value)
    return None if value is None else float(value)


def retrain_trial(
    problem: Template, trial: FrozenTrial, rounds: int, evaluation_rounds: Iterable[int] = ()
) -> RetrainResult:
    """Retrain a trial alone, with the same parameters, seed and hyperparameter schedule.

    Args:
        problem:
            The study's problem, with the data and the trial's seed.
        trial:
            The trial.
        rounds:
            Number of rounds to train.
        evaluation_rounds:
            Rounds after which the trial was evaluated, if its parameters changed during training.
    """
    return retrain(
        problem.cohort,
        _schedule_segments(problem, trial),
        rounds,
        best_round(problem, trial),
        trial.user_attrs.get(NUMERICS_CONTEXT_KEY, ()),
        evaluation_rounds if schedule_of(problem, trial) else None,
    )


def best_round(problem: Template, trial: FrozenTrial) -> int:
    """Return the round of a trial's best value; 0 if it has none."""
    return _to_rounds(problem, trial.user_attrs.get("best_epoch", 0))


def _scored_round(problem: Template, trial: FrozenTrial) -> int:
    """Return the round of `recorded_value`; 0 if there is none."""
    return best_round(problem, trial) or max(trial.intermediate_values, default=0)


def _last_round(problem: Template, trial: FrozenTrial) -> int:
    """Return the round of a trial's last evaluation."""
    done = _to_rounds(problem, trial.user_attrs.get("epochs", 0))
    return max(done, *trial.intermediate_values, 0)


def _to_rounds(problem: Template, epochs: float) -> int:
    """Convert epochs to rounds."""
    return round(epochs * problem.rounds_per_epoch)


def _score_stored_weights(problem: Template, trial: FrozenTrial, weights: BestWeights) -> float:
    """Return the metric of a trial's stored weights, computed as the study did."""
    end = max(best_round(problem, trial), 1)
    segments = _schedule_segments(problem, trial)
    segment = [segment for segment in segments if segment.begin < end][-1]
    network = weights.load_into(trial.number, problem.network(segment.member))
    return evaluate_network(problem.cohort, segment.member, network)


def _schedule_segments(problem: Template, trial: FrozenTrial) -> list[Segment]:
    """Return the segments of a trial's schedule; one if its parameters did not change."""
    segments = schedule_of(problem, trial)
    return segments or [Segment(0, problem.member(trial.number, params_for_retraining(trial)))]


def _first_difference(
    recorded: Mapping[int, float], retrained: Mapping[int, float]
) -> Deviation | None:
    """Return the first step at which two learning curves differ; None if there is none."""
    for step, value in sorted(recorded.items()):
        if (new_value := retrained.get(step, math.nan)) != value:
            return Deviation(step, value, new_value)
    return None


def _environment_differences(environments: Sequence[Environment], here: Environment) -> list[str]:
    """Return the differences between this environment and those in which a trial was trained."""
    if not environments:
        return ["the trial's environment is unknown"]
    return list(dict.fromkeys(text for then in environments for text in differences(then, here)))


def _tolerance(problem: Template, value: float | None) -> float:
    """Return the largest accepted difference from a recorded value."""
    if value is None:
        return 0.0
    tolerance = max(RELATIVE_TOLERANCE * abs(value), ABSOLUTE_TOLERANCE)
    if examples := problem.count_scored_examples():
        tolerance = max(tolerance, EXAMPLE_TOLERANCE / examples)
    return tolerance


@contextmanager
def _threads_of_trial(environments: Sequence[Environment]) -> Iterator[None]:
    """Set torch's number of threads to that of a trial, if this machine has enough cores.

    The number of threads decides in which order torch adds numbers.
    """
    before = torch.get_num_threads()
    threads = int(environments[0].get("threads", 0)) if environments else 0
    if 0 < threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_study(storage: str | Path | BaseStorage, name: str) -> Study:
    """Load a study by its storage and name."""
    if not isinstance(storage, BaseStorage):
        check_storage_exists(storage)
    opened = open_storage(storage)
    names = optuna.get_all_study_names(opened)
    if name not in names:
        raise unknown_name("a study of this storage", name, names)
    return optuna.load_study(study_name=name, storage=opened)


def _weights_folder(study: Study) -> Path | None:
    """Return the folder of a study's best weights; None if it is not found."""
    storage, name = storage_of(study), study.user_attrs.get(MODELS)
    if isinstance(storage, BufferedStorage):
        storage = storage.backend
    if name is None:
        return None
    folders = [models_folder(storage, None)]
    if (file := journal_file(storage)) is not None:  # from a path, or an object of the user's
        folders.insert(0, models_folder(storage, journal_path(file)))
    candidates = [safe_join(folder, name) for folder in folders if folder is not None]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _split_data(data: Any, template: type[Template]) -> tuple[Any, Any]:
    """Split the data into examples and target, if the template takes a target."""
    if "y" not in template.option_defaults() or data is None or isinstance(data, str | Path):
        return data, None
    if not isinstance(data, tuple) or len(data) != 2:
        kind = type(data).__name__
        raise ValueError(f"`data` must be (X, y), or the path of a CSV file, but got {kind}.")
    return data


def _device_and_compile(
    environments: Sequence[Environment], device: str | torch.device | None
) -> dict[str, Any]:
    """Return the device and whether to compile: as the trial had it, where that is possible."""
    environment = environments[0] if environments else {}
    if device is None:
        kind = str(environment.get("device", "")).partition(":")[0]
        device = None if kind == "cuda" and not torch.cuda.is_available() else kind or None
    use_compile = environment.get("engine") == BY_COMPILER
    if use_compile:
        try:
            check_compile(use_compile, resolve_device(device))
        except ValueError as error:
            _logger.warning(f"Retraining without torch.compile: {error}")
            use_compile = False
    return {"device": device, "compile": use_compile}
