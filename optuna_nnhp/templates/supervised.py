"""The base of templates that learn labels or numbers, and what all templates share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
import hashlib
import json
from pathlib import Path
from typing import Any
from typing import Self

from optuna.distributions import BaseDistribution
from optuna.distributions import distribution_to_json
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.data.frames import read_csv
from optuna_nnhp.data.supervised import InputPreprocessor
from optuna_nnhp.data.supervised import SupervisedData
from optuna_nnhp.data.target import Target
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.hyperparameters.loss import RegressionLoss
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.networks.flat_parameters import param_column
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.study.problem import TrialTooLarge
from optuna_nnhp.templates.base import Template
from optuna_nnhp.templates.predictor import Predictor
from optuna_nnhp.templates.predictor import restore_predictor
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Task
from optuna_nnhp.training.device import free_memory
from optuna_nnhp.training.device import resolve_device
from optuna_nnhp.training.metrics import Metric
from optuna_nnhp.training.metrics import resolve_metric
from optuna_nnhp.training.metrics import to_target_units
from optuna_nnhp.training.torch_compile import check_compile

CONTINUOUS_METRICS = ("log_loss",)  # of those for classes
MAX_COHORT_SIZE = 128
# Fractions of the free memory: for a cohort (weights, gradients, optimizer state, activations),
# and for one trial.
COHORT_MEMORY_FRACTION, MAX_TRIAL_MEMORY_FRACTION = 0.5, 0.8
MAX_ROUND_FLOPS = 6e10  # of a cohort's round: a few seconds on two cores


class SupervisedTemplate(Template):
    """The base class of templates that learn labels or numbers from examples.

    Args:
        data:
            The prepared data.
        metric:
            The metric of the trials.
        space:
            The distributions of the tuned hyperparameters.
        fixed:
            The values of all other hyperparameters.
        more:
            Texts that distinguish the study from others, besides space and fixed values.
        seed:
            The study's seed.
        device:
            Where to train; CUDA if there is any, else the CPU, if None.
        compile:
            Whether `torch.compile` makes the networks' code.

    Attributes:
        builder: Name of the user's function that makes the networks; None if there is none.
    """

    builder: str | None = None

    def __init__(
        self,
        data: SupervisedData,
        metric: Metric,
        space: dict[str, BaseDistribution],
        fixed: dict[str, Value],
        *more: str,
        seed: int,
        device: str | torch.device | None,
        compile: bool = False,
    ) -> None:
        self.data, self.target, self.metric = data, data.target, metric
        self.maximize = metric.direction == "maximize"
        self.space, self.fixed = space, fixed
        self.seed, self.device = seed, resolve_device(device)
        mark = search_digest(space, fixed, *more)
        self.name = f"{self.template_name}-{metric.name}-{data.fingerprint}-{mark}"
        task = make_task(data, metric, self._build_stack, seed, self.device)
        self.compile = check_compile(compile, self.device)
        self._task = replace(task, compile=self.compile)
        self.rounds_per_epoch = self._task.rounds
        self.description: dict[str, Any] = {
            "template": self.template_name,
            "task": data.target.task,
            "metric": metric.name,
            "fingerprint": data.fingerprint,
            "data": data.describe(),
            "budget": describe_budget(space, fixed),
            "rounds_per_epoch": self.rounds_per_epoch,
        }

    def cohort(self, members: Sequence[Member]) -> Cohort:
        """Return a cohort of members with the same signature."""
        return Cohort(members, self._task)

    def with_seed(self, seed: int) -> Self:
        """Return the same problem with other first weights, batches and noise."""
        other = copy(self)
        other.seed = seed
        other._task = replace(self._task, build=other._build_stack, seed=seed)
        return other

    def count_scored_examples(self) -> int:
        """Return the size of the validation part for classes, 0 for continuous metrics."""
        is_counted = self.target.classes and self.metric.name not in CONTINUOUS_METRICS
        return len(self.data.valid_y) if is_counted else 0

    def predictor(
        self, network: nn.Module, member: Member, best_params: dict[str, Any], best_value: float
    ) -> Predictor:
        """Return a trained network as a model that predicts from a user's data."""
        return Predictor(
            model=network.cpu(),
            preprocessor=self.data.preprocessor,
            target=self.target,
            metric=self.metric,
            params=member.params,
            best_params=best_params,
            best_value=best_value,
            template=self.template_name,
            builder=self.builder,
        )

    @classmethod
    def restore_model(cls, metadata: Mapping[str, Any]) -> Predictor:
        """Return the predictor that `Predictor.save` wrote, its weights not yet loaded."""
        return restore_predictor(metadata, cls.rebuild_network)

    @classmethod
    @abstractmethod
    def rebuild_network(
        cls, params: Mapping[str, Any], preprocessor: InputPreprocessor, target: Target
    ) -> nn.Module:
        """Return the network of a saved model, its weights not yet loaded.

        Args:
            params:
                Hyperparameters of the network as trained.
            preprocessor:
                What makes its inputs.
            target:
                What its outputs mean.
        """
        raise NotImplementedError

    @abstractmethod
    def _build_stack(self, members: Sequence[Member]) -> StackedModule:
        """Return the stacked network of some members, on the device."""


def resolve_target_metric(
    metric: str | Callable[[Any, Any], float] | None, direction: str | None, target: Target
) -> Metric:
    """Resolve the metric that a user names; see `training.metrics.resolve_metric`."""
    return resolve_metric(
        metric, task=target.task, direction=direction, target_decode=target.decode
    )


def load_examples(X: Any, y: Any, target: str | None) -> tuple[Any, Any]:
    """Return the examples and the target; read a CSV file.

    Args:
        X:
            Any data, or the path of a CSV file.
        y:
            What to predict; None with a CSV file.
        target:
            Column of the CSV file that is to be predicted.

    Raises:
        ValueError: If an argument is missing or superfluous.

    Example:
        >>> load_examples([[1.0]], [2.0], None)
        ([[1.0]], [2.0])
    """
    if not isinstance(X, str | Path):
        if target is not None:
            raise ValueError(
                f"`target` must come with the path of a CSV file, but got {target!r}."
            )
        if X is None or y is None:
            raise ValueError("`X` and `y` must both be given, or a CSV file and its `target`.")
        return X, y
    if y is not None:
        raise ValueError("`y` must not be given with a CSV file; name its column as `target`.")
    if target is None:
        raise ValueError("`target` must name the column of the CSV file that is to be predicted.")
    return read_csv(X, target)


def make_task(
    data: SupervisedData,
    metric: Metric,
    build: Callable[[Sequence[Member]], StackedModule],
    seed: int,
    device: torch.device,
) -> Task:
    """Return the task of training from data and metric.

    Args:
        data:
            The prepared data.
        metric:
            The metric of the trials.
        build:
            Function that makes the stacked network of members.
        seed:
            The study's seed.
        device:
            The device.
    """

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(array).to(device)

    def compute(outputs: Tensor) -> Tensor:
        return metric.compute(*to_target_units(data.target, outputs, arrays.valid_y))

    def loss(members: Sequence[Member]) -> Loss:
        return make_loss(data.target.task, members, device)

    arrays = Arrays(
        tensor(data.train_X), tensor(data.train_y), tensor(data.valid_X), tensor(data.valid_y)
    )
    return Task(
        arrays,
        build,
        loss,
        compute,
        metric.direction == "maximize",
        seed,
        validation_loss=_comparison_loss(data.target.task, device),
    )


def make_loss(task: str, members: Sequence[Member], device: torch.device) -> Loss:
    """Return the loss of some members, each with its own hyperparameters.

    Args:
        task:
            ``"binary"``, ``"multiclass"`` or ``"regression"``.
        members:
            The members.
        device:
            The device.
    """

    def tensor(name: str) -> Tensor:
        return torch.tensor(param_column([m.params for m in members], name), device=device)

    def has(loss: str) -> Tensor:
        return torch.tensor([m.params["loss"] == loss for m in members], device=device)

    if task == "regression":
        return RegressionLoss(tensor("huber_delta"), has("mse"), has("mae"))
    return ClassificationLoss(tensor("focal_gamma") * has("focal"), tensor("label_smoothing"))


def _comparison_loss(task: str, device: torch.device) -> Loss:
    """Return cross-entropy or squared error, by which all trials can be compared."""
    zero, yes = torch.zeros(1, device=device), torch.ones(1, dtype=torch.bool, device=device)
    if task == "regression":
        return RegressionLoss(zero, yes, ~yes)
    return ClassificationLoss(zero, zero)


def bounded_cohort_size(bytes_each: int, flops_each: float, device: torch.device) -> int:
    """Return how many trials to train at once, limited by memory and by a round's length.

    Args:
        bytes_each:
            The bytes of one trial.
        flops_each:
            The floating-point operations of its round.
        device:
            The device.

    Example:
        >>> [bounded_cohort_size(2**10, flops, torch.device("cpu")) for flops in (1.0, 1e10, 1e15)]
        [128, 6, 1]
    """
    free = COHORT_MEMORY_FRACTION * free_memory(device)
    size = min(int(free / bytes_each), int(MAX_ROUND_FLOPS / flops_each))
    return max(1, min(MAX_COHORT_SIZE, size))


def check_fits_in_memory(needed: int, device: torch.device) -> None:
    """Raise if one trial needs more memory than is free.

    Args:
        needed:
            The bytes of the trial.
        device:
            The device.

    Raises:
        TooLarge: Both numbers.

    Example:
        >>> check_fits_in_memory(2**20, torch.device("cpu"))
    """
    free = MAX_TRIAL_MEMORY_FRACTION * free_memory(device)
    if needed > free:
        raise TrialTooLarge(
            f"A trial must fit into {free / 2**30:.1f} GiB of memory, but this one needs "
            f"about {needed / 2**30:.1f} GiB."
        )


def search_digest(
    space: Mapping[str, BaseDistribution], fixed: Mapping[str, Value], *more: str
) -> str:
    """Return six hexadecimal digits of what is tuned and fixed, for the study's name.

    Example:
        >>> search_digest({}, {"epochs": 1}) == search_digest({}, {"epochs": 2})
        False
    """
    ranges = {name: distribution_to_json(d) for name, d in space.items()}
    text = json.dumps([ranges, dict(fixed), *more], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def describe_budget(space: Mapping[str, BaseDistribution], fixed: Mapping[str, Value]) -> str:
    """Describe in words how long a trial may train.

    Example:
        >>> describe_budget({}, {"epochs": 9, "patience": 3})
        'up to 9 epochs a trial, early stopping after 3 epochs without improvement'
    """

    def describe_limit(name: str) -> str:
        return str(fixed[name]) if name in fixed else f"a tuned number of {name}:"

    if "iterations" in space or fixed.get("iterations"):
        longest = f"{describe_limit('iterations')} iterations a trial"
    else:
        longest = f"{describe_limit('epochs')} epochs a trial"
    patience = describe_limit("patience")
    return f"up to {longest}, early stopping after {patience} epochs without improvement"
