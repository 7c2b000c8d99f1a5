"""The DNN template: multilayer perceptrons on tables."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import json
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import distribution_to_json
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp import seeds
from optuna_nnhp.data.frames import read_csv
from optuna_nnhp.data.tabular import prepare
from optuna_nnhp.hyperparameters.catalogue import choose
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import effective
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.hyperparameters.loss import RegressionLoss
from optuna_nnhp.hyperparameters.record import Value
from optuna_nnhp.hyperparameters.record import holds
from optuna_nnhp.hyperparameters.width import fold_width
from optuna_nnhp.hyperparameters.width import padded_width
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.mlp import build_mlp
from optuna_nnhp.networks.mlp import count_weights
from optuna_nnhp.networks.mlp import mlp_signature
from optuna_nnhp.templates.predictor import TabularPredictor
from optuna_nnhp.templates.predictor import to_units
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import Task
from optuna_nnhp.training.machine import to_device
from optuna_nnhp.training.metrics import resolve_metric

LARGEST_COHORT = 32
COHORT_BYTES = 2**30  # of weights, gradients, optimizer state and activations
COHORT_ROUND_FLOPS = 6e10  # a cohort's round: a few seconds on two cores


class DNN:
    """Multilayer perceptrons on a table: the data, the space, the network and the metric.

    Args:
        X:
            A table: numpy array, pandas frame, torch tensor, or the path of a CSV file.
        y:
            What to predict; with a CSV file, give ``target`` instead.
        target:
            Column of the CSV file that is to be predicted.
        task:
            ``"classification"``, ``"binary"``, ``"multiclass"`` or ``"regression"``; inferred
            from the target if None.
        validation:
            Share of the rows that judges trials (stratified for classes), or ``(X, y)``.
        metric:
            Name of a metric, or a function ``f(y_true, y_pred)`` whose greater value is better
            unless ``direction="minimize"``; accuracy or rmse if None.
        direction:
            ``"maximize"`` or ``"minimize"``; follows from the metric if None.
        space:
            Distributions that replace the catalogue's.
        fixed:
            Values that are not tuned.
        seed:
            Seed of the split, of batch order, noise and first weights.
        device:
            Where to train; CUDA if there is any, else the CPU, if None.

    Shape:
        - X: ``(rows, columns)``; y: ``(rows,)``.

    Raises:
        ValueError: If anything in the data or the wishes makes no sense.
        FileNotFoundError: If there is no such file.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> problem = DNN(X, X[:, 0] > 0, fixed={"epochs": 2})
        >>> problem.description["task"], problem.maximize
        ('binary', True)
    """

    def __init__(
        self,
        X: Any = None,
        y: Any = None,
        *,
        target: str | None = None,
        task: str | None = None,
        validation: float | tuple[Any, Any] = 0.2,
        metric: str | Callable[[Any, Any], float] | None = None,
        direction: str | None = None,
        space: Mapping[str, BaseDistribution] | None = None,
        fixed: Mapping[str, Value] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        self.seed = seeds.check_seed(seed)
        self.device = to_device(device)
        X, y = _table(X, y, target)
        self.data = prepare(X, y, task=task, validation=validation, seed=seed)
        self.target = self.data.target
        self.metric = resolve_metric(
            metric,
            task=self.target.task,
            direction=direction,
            target_decode=self.target.decode,
        )
        self.maximize = self.metric.direction == "maximize"
        self.space, self.fixed = choose(self.target.task, space, fixed)
        self.inputs: int = self.data.train_X.shape[1]
        self.outputs = max(1, len(self.target.classes))
        self.name = f"dnn-{self.metric.name}-{self.data.fingerprint}-{self._digest()}"
        self.description: dict[str, Any] = {
            "template": "dnn",
            "task": self.target.task,
            "metric": self.metric.name,
            "fingerprint": self.data.fingerprint,
            "data": self.data.describe(),
            "budget": self._describe_budget(),
        }
        self._task = self._make_task()
        self.rounds_per_epoch = self._task.rounds
        self.description["rounds_per_epoch"] = self.rounds_per_epoch

    def defaults(self) -> dict[str, Value]:
        """The catalogue's defaults, as far as they lie in the space."""
        defaults = default_params(self.target.task, self.space)
        return {n: value for n, value in defaults.items() if holds(self.space[n], value)}

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        """A trial; its first weights follow from the study's seed and its number."""
        values = effective(self.target.task, {**self.fixed, **params})
        return Member(number, number, values)

    def signature(self, member: Member) -> Hashable:
        """Depth, padded width, normalization, batch size, and the budget if in iterations."""
        params = member.params
        return (mlp_signature(params), params["batch_size"], params["iterations"])

    def pin(self, leader: Member) -> Callable[[str, Any], Any]:
        """Static values become the leader's; the width moves to the leader's octave."""
        padded = padded_width(int(leader.params["width"] or 1))

        def pin(name: str, value: Any) -> Any:
            if name in ("hidden_layers", "normalization", "batch_size", "iterations"):
                return leader.params[name]
            if name != "width":
                return value
            folded = fold_width(value, padded)
            known = holds(self.space["width"], folded)
            return folded if known else leader.params["width"]

        return pin

    def cohort_size(self, leader: Member) -> int:
        """As many as memory allows, and as keep a round of the whole cohort short."""
        padded = padded_width(int(leader.params["width"] or 1))
        depth, batch = (
            int(leader.params["hidden_layers"] or 1),
            int(leader.params["batch_size"] or 1),
        )
        weights = (self.inputs + (depth - 1) * padded + self.outputs) * padded
        rows = len(self.data.train_X)
        # Weights, gradients, two optimizer states, the best weights; five tensors a layer.
        bytes_each = 4 * (5 * weights + 5 * depth * padded * min(batch, rows))
        # Outputs on the validation part: float32, their logarithms, float64 in the metric.
        bytes_each += 24 * len(self.data.valid_X) * self.outputs
        flops_each = 6.0 * weights * rows / self.rounds_per_epoch
        size = min(COHORT_BYTES // bytes_each, int(COHORT_ROUND_FLOPS / flops_each))
        return max(1, min(LARGEST_COHORT, size))

    def cohort(self, members: Sequence[Member]) -> Cohort:
        """A cohort ready to train."""
        return Cohort(members, self._task)

    def count_weights(self, member: Member) -> int:
        """Number of trained weights."""
        return count_weights(member.params, self.inputs, self.outputs)

    def network(self, member: Member) -> nn.Module:
        """A trial's network as a plain module, weights not yet loaded."""
        return build_mlp(member.params, self.inputs, self.outputs)

    def predictor(
        self, network: nn.Module, member: Member, best_params: dict[str, Any], best_value: float
    ) -> TabularPredictor:
        """A trained network as something that predicts from tables."""
        return TabularPredictor(
            model=network.cpu(),
            preprocessor=self.data.preprocessor,
            target=self.target,
            metric=self.metric,
            params=member.params,
            best_params=best_params,
            best_value=best_value,
        )

    def _digest(self) -> str:
        """Six digits of what is tuned and what is fixed: another search is another study."""
        space = {name: distribution_to_json(d) for name, d in self.space.items()}
        text = json.dumps([space, self.fixed], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()

    def _make_task(self) -> Task:
        def tensor(array: Any) -> Tensor:
            return torch.as_tensor(array, device=self.device)

        data = self.data
        arrays = Arrays(
            tensor(data.train_X), tensor(data.train_y), tensor(data.valid_X), tensor(data.valid_y)
        )
        return Task(
            arrays=arrays,
            build=self._build,
            loss=self._loss,
            metric=lambda outputs: self.metric.compute(
                *to_units(self.target, outputs, arrays.valid_y)
            ),
            maximize=self.maximize,
            seed=self.seed,
        )

    def _build(self, members: Sequence[Member]) -> StackedMLP:
        generators = [seeds.generator(self.seed, seeds.INITIALIZATION, m.seed) for m in members]
        stack = StackedMLP([m.params for m in members], self.inputs, self.outputs, generators)
        return stack.to(self.device)

    def _loss(self, members: Sequence[Member]) -> Loss:
        def column(name: str) -> Tensor:
            return torch.tensor([float(m.params[name] or 0) for m in members], device=self.device)

        def has(loss: str) -> Tensor:
            return torch.tensor([m.params["loss"] == loss for m in members], device=self.device)

        if self.target.task == "regression":
            return RegressionLoss(column("huber_delta"), has("mse"), has("mae"))
        return ClassificationLoss(column("focal_gamma") * has("focal"), column("label_smoothing"))

    def _describe_budget(self) -> str:
        def words(name: str) -> str:
            return str(self.fixed[name]) if name in self.fixed else f"a tuned number of {name}:"

        if "iterations" in self.space or self.fixed.get("iterations"):
            budget = f"{words('iterations')} iterations a trial"
        else:
            budget = f"{words('epochs')} epochs a trial"
        return (
            f"up to {budget}, early stopping after {words('patience')} epochs without improvement"
        )


def _table(X: Any, y: Any, target: str | None) -> tuple[Any, Any]:
    """The data as given, a CSV file read."""
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
