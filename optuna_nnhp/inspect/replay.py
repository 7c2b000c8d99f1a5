"""Whether a trial gives its value again: from its stored weights, and trained anew."""

from __future__ import annotations

from collections.abc import Callable
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
from optuna.storages import JournalStorage
import torch
from torch import nn

from optuna_nnhp.engine.threads import single_threaded_blas
from optuna_nnhp.errors import unknown_name
from optuna_nnhp.inspect.retraining import get_trained_trial
from optuna_nnhp.inspect.retraining import last_round
from optuna_nnhp.inspect.retraining import recorded_value
from optuna_nnhp.inspect.retraining import retrain_trial
from optuna_nnhp.inspect.retraining import scored_round
from optuna_nnhp.inspect.retraining import stored_value
from optuna_nnhp.inspect.retraining import with_trial_seed
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.paths import check_storage_exists
from optuna_nnhp.storages.paths import models_folder
from optuna_nnhp.storages.paths import safe_join
from optuna_nnhp.study.environment import BY_COMPILER
from optuna_nnhp.study.environment import Environment
from optuna_nnhp.study.environment import describe_environment
from optuna_nnhp.study.environment import differences
from optuna_nnhp.study.environment import trial_environments
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.templates.supervised import SupervisedTemplate
from optuna_nnhp.templates.supervised import Template
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.training.device import resolve_device
from optuna_nnhp.training.torch_compile import check_compile

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# How far a value may be from the recorded one where sums are rounded otherwise, on other machines
# or by other versions: a share of the value; and where examples are counted, so many of them.
RELATIVE_TOLERANCE, EXAMPLE_TOLERANCE = 1e-3, 2
ABSOLUTE_TOLERANCE = 1e-6  # of values near 0
CLASS_TASKS, METRICS_WITHOUT_COUNTS = (
    ("binary", "multiclass"),
    ("log_loss",),
)  # tasks that count; and what does not


class Deviation(NamedTuple):
    """Where a curve leaves another one.

    Args:
        step:
            Optuna's step.
        recorded:
            Value in the study.
        retrained:
            Value now.
    """

    step: int
    recorded: float
    retrained: float


@dataclass(frozen=True)
class Replay:
    """What came of a trial that was judged and trained again.

    Args:
        number:
            The trial's.
        best_value:
            What the study has recorded; None for a trial that has no value.
        stored_value:
            That of the stored weights; None if there are none.
        retrained_value:
            That of the network trained again, at the same step; NaN if it has none.
        tolerance:
            How far that may be away: a thousandth of the value, and two examples where a metric
            counts them.
        is_exact:
            Whether the stored weights have the recorded value to the last bit; where there are
            none, whether the retrained network has.
        is_reproduced:
            Whether the retrained network has it within the tolerance.
        first_difference:
            Where the curve leaves the recorded one, if it does; None if all values are equal.
        differences:
            What differs between where the trial was trained and here.
        steps:
            Values of the curve that were compared.
        seconds:
            How long it took.

    Example:
        >>> print(Replay(3, 0.9, 0.9, 0.9, 9e-4, True, True, None, [], 12, 0.5))
        Trial 3 has the value 0.9.
        Stored weights: 0.9, exactly.
        Trained again: 0.9, exactly; all 12 values of the curve are equal (0.5 s).
        Where it was trained: versions and machine as here.
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
        """A few lines for a person."""
        value = "no value" if self.best_value is None else f"the value {self.best_value:.7g}"
        stored, there = "none", "versions and machine as here"
        if self.stored_value is not None:
            stored = f"{self.stored_value:.7g}, {'' if self.is_exact else 'NOT '}exactly"
        if self.differences:
            there = f"{'; '.join(self.differences)}. Values may differ"
        return (
            f"Trial {self.number} has {value}.\n"
            f"Stored weights: {stored}.\n"
            f"Trained again: {self._retrained()}; {self._curve()} ({self.seconds:.1f} s).\n"
            f"Where it was trained: {there}."
        )

    def _retrained(self) -> str:
        if self.best_value is None:
            return "no value again" if self.is_reproduced else f"{self.retrained_value:.7g}"
        if self.retrained_value == self.best_value:
            return f"{self.retrained_value:.7g}, exactly"
        within = "within" if self.is_reproduced else "NOT within"
        return f"{self.retrained_value:.7g}, {within} {self.tolerance:.2g}"

    def _curve(self) -> str:
        if self.first_difference is None:
            return f"all {self.steps} values of the curve are equal"
        step, recorded, retrained = self.first_difference
        far = f"{abs(recorded - retrained):.1e}"
        return f"the curve differs from step {step} on, where {recorded:.7g} is {far} away"


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
    """Judge and train a finished trial again, alone, and compare with what its study recorded.

    Any trial that has been evaluated: complete, pruned, diverged or stopped. It is trained to the
    round that it reached.

    Args:
        study:
            A study that `optimize` made, or its storage (a path, URL or Optuna storage) and name.
        trial_number:
            The trial's number.
        data:
            The study's data: a text (or its path), ``(X, y)``, or the path of a CSV file; None
            if the study was given a path, where the same is still found.
        network:
            The function that makes networks, if it was your own.
        validation:
            The validation part, if it was given as data.
        metric:
            The metric, if it was a function.
        weights:
            The folder with the study's weights, ``trial-<number>.safetensors``; found beside the
            storage if None.
        device:
            Where to train; where the trial was, if None.

    Raises:
        ValueError: If the data are not the study's, there is no such trial, it was not trained, or
            a file is damaged.
        FileNotFoundError: If there is no such file or folder.

    Example:
        >>> from optuna_nnhp import optimize
        >>> X, y = [[float(i)] for i in range(40)], [i > 9 for i in range(40)]
        >>> result = optimize("dnn", X, y, n_trials=2, storage=None, fixed={"epochs": 2})
        >>> again = replay(result.study, 1, (X, y))
        >>> again.is_reproduced, again.differences
        (True, [])
    """
    study = study if isinstance(study, Study) else _load_study(*study)
    trial = get_trained_trial(study, trial_number)
    X, y = _split_data(data, study.user_attrs.get("template"))
    place = _device_and_compile(trial_environments(study, trial), device)
    problem = ProblemSpec.from_study(
        study, X, y, network=network, validation=validation, metric=metric, **place
    ).problem()
    folder = _weights_folder(study) if weights is None else Path(weights)
    if weights is not None and not Path(weights).is_dir():
        raise FileNotFoundError(f"`weights` must be a folder, but there is none: {weights}")
    return replay_trial(study, problem, BestWeights(folder), trial_number)


def replay_trial(study: Study, problem: Template, weights: BestWeights, number: int) -> Replay:
    """The same, of a trial whose problem and weights are at hand.

    Args:
        study:
            The study.
        problem:
            What was tuned, with the data.
        weights:
            The best trials' weights.
        number:
            The trial's number.

    Raises:
        ValueError: If there is no such trial, it was not trained, or its weights are damaged.
    """
    started, trial = time.monotonic(), get_trained_trial(study, number)
    problem, values = with_trial_seed(study, problem, trial), trial.intermediate_values
    known, recorded = trial_environments(study, trial), recorded_value(trial)
    with _threads_of_trial(known), single_threaded_blas:
        stored = stored_value(problem, trial, weights) if number in weights else None
        again = retrain_trial(problem, trial, last_round(problem, trial), values)
        here = describe_environment(problem)
    # The best trials' values were judged alone, those of others among their mates.
    among = again.values.get(scored_round(problem, trial), math.nan)
    retrained = again.value if again.value == recorded or math.isnan(among) else among
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
        first_difference=_first_difference(values, again.values),
        differences=_environment_differences(known, here),
        steps=len(values),
        seconds=time.monotonic() - started,
    )


def _first_difference(then: Mapping[int, float], now: Mapping[int, float]) -> Deviation | None:
    """Where two curves part; None if they do not."""
    for step, value in sorted(then.items()):
        if (again := now.get(step, math.nan)) != value:
            return Deviation(step, value, again)
    return None


def _environment_differences(known: Sequence[Environment], here: Environment) -> list[str]:
    """What differs between here and where a trial was, which may be several places."""
    if not known:
        return ["where it was trained is not known"]
    return list(dict.fromkeys(text for then in known for text in differences(then, here)))


def _tolerance(problem: Template, value: float | None) -> float:
    """How far a value may be away from the recorded one."""
    if value is None:
        return 0.0
    tolerance = max(RELATIVE_TOLERANCE * abs(value), ABSOLUTE_TOLERANCE)
    description = problem.description
    if description["task"] in CLASS_TASKS and description["metric"] not in METRICS_WITHOUT_COUNTS:
        assert isinstance(problem, SupervisedTemplate)
        tolerance = max(tolerance, EXAMPLE_TOLERANCE / len(problem.data.valid_y))
    return tolerance


@contextmanager
def _threads_of_trial(known: Sequence[Environment]) -> Iterator[None]:
    """Within, torch has as many threads as it had when a trial was trained, if there are so many
    cores: they decide in which order it sums."""
    before, then = torch.get_num_threads(), int(known[0].get("threads", 0)) if known else 0
    if 0 < then <= (os.cpu_count() or 1):
        torch.set_num_threads(then)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_study(storage: str | Path | BaseStorage, name: str) -> Study:
    """A study by its storage and name."""
    if not isinstance(storage, BaseStorage):
        check_storage_exists(storage)
    opened = open_storage(storage)
    names = optuna.get_all_study_names(opened)
    if name not in names:
        raise unknown_name("a study of this storage", name, names)
    return optuna.load_study(study_name=name, storage=opened)


def _weights_folder(study: Study) -> Path | None:
    """Where a study's best weights are, as far as its storage tells."""
    storage, name = study._storage, study.user_attrs.get(MODELS)
    if isinstance(storage, BufferedStorage):
        storage = storage.backend
    if name is None:
        return None
    folders = [models_folder(storage, None)]
    if isinstance(storage, JournalStorage):  # which a path was, or the user's own object
        path = getattr(storage._backend, "_file_path", None)
        folders.insert(0, models_folder(storage, path))
    found = [safe_join(folder, name) for folder in folders if folder is not None]
    return next((folder for folder in found if folder.is_dir()), None)


def _split_data(data: Any, template: str | None) -> tuple[Any, Any]:
    """The data as examples and what is to be predicted."""
    if template == "gpt" or data is None or isinstance(data, str | Path):
        return data, None
    if not isinstance(data, tuple) or len(data) != 2:
        kind = type(data).__name__
        raise ValueError(f"`data` must be (X, y), or the path of a CSV file, but got {kind}.")
    return data


def _device_and_compile(
    known: Sequence[Environment], device: str | torch.device | None
) -> dict[str, Any]:
    """Device and compiler: those that a trial had, where they are not said and can be had."""
    then = known[0] if known else {}
    if device is None:
        kind = str(then.get("device", "")).partition(":")[0]
        device = None if kind == "cuda" and not torch.cuda.is_available() else kind or None
    compiles = then.get("engine") == BY_COMPILER
    if compiles:
        try:
            check_compile(compiles, resolve_device(device))
        except ValueError as error:
            _logger.warning(f"The trial is trained without torch.compile: {error}")
            compiles = False
    return {"device": device, "compile": compiles}
