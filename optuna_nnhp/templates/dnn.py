"""The DNN template: multilayer perceptrons on tables."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import product
from typing import Any

from optuna.distributions import BaseDistribution
import torch
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.supervised import InputPreprocessor
from optuna_nnhp.data.supervised import prepare_table
from optuna_nnhp.data.target import Target
from optuna_nnhp.engine import mlp
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.spec import is_in_distribution
from optuna_nnhp.hyperparameters.width import padded_width
from optuna_nnhp.hyperparameters.width import scale_width_to_octave
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.mlp import build_mlp
from optuna_nnhp.networks.mlp import count_weights
from optuna_nnhp.networks.mlp import mlp_signature
from optuna_nnhp.templates.base import register
from optuna_nnhp.templates.supervised import SupervisedTemplate
from optuna_nnhp.templates.supervised import bounded_cohort_size
from optuna_nnhp.templates.supervised import check_fits_in_memory
from optuna_nnhp.templates.supervised import load_examples
from optuna_nnhp.templates.supervised import resolve_target_metric
from optuna_nnhp.training.cohort import Member

# Cheap configurations that are often better than the default: one wide hidden layer at high rates,
# by width and dropout. On 13 data sets with two seeds each the best of the four beat the default
# in 22 of 26 (tests/benchmarks/LOG.md, 2026-11-25). A wide table makes them dear: then they are
# left out.
MAX_PORTFOLIO_WEIGHTS_RATIO = 0.5  # of the default's weights, that one of them has at most
ARCHITECTURE_PARAMS = ("hidden_layers", "width", "width_shape", "activation", "normalization")
SHALLOW_PARAMS: dict[str, Value] = {"hidden_layers": 1, "batch_size": 64, "label_smoothing": 0.1}
SHALLOW_WIDTHS, SHALLOW_LEARNING_RATES = {256: 0.1, 512: 0.05}, (6e-3, 1.2e-2)


@register
class DNNTemplate(SupervisedTemplate):
    """Multilayer perceptrons on a table: data, search space, network and metric.

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
        compile:
            Whether `torch.compile` makes the networks' code, which takes seconds to minutes once
            for each shape; of no effect on what the compiled engine trains.

    Shape:
        - X: ``(rows, columns)``; y: ``(rows,)``.

    Raises:
        ValueError: If the data or an argument is invalid.
        FileNotFoundError: If there is no such file.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> problem = DNNTemplate(X, X[:, 0] > 0, fixed={"epochs": 2})
        >>> problem.description["task"], problem.maximize
        ('binary', True)
    """

    template_name = "dnn"

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
        compile: bool = False,
    ) -> None:
        rng.check_seed(seed)
        X, y = load_examples(X, y, target)
        data = prepare_table(X, y, task=task, validation=validation, seed=seed)
        judge = resolve_target_metric(metric, direction, data.target)
        chosen = resolve_space(data.target.task, space, fixed)
        self.inputs: int = data.train_X.shape[1]
        self.outputs = max(1, len(data.target.classes))
        super().__init__(data, judge, *chosen, seed=seed, device=device, compile=compile)

    def uses_compiled_engine(self) -> bool:
        """Return whether the compiled engine trains the networks on this device."""
        return self.device.type == "cpu" and mlp.load_library() is not None

    @classmethod
    def rebuild_network(
        cls, params: Mapping[str, Any], preprocessor: InputPreprocessor, target: Target
    ) -> nn.Module:
        """Return the network of a saved model, its weights not yet loaded."""
        for name in ARCHITECTURE_PARAMS:
            specs(target.task)[name].check(params[name])
        assert isinstance(preprocessor, Preprocessor)
        return build_mlp(params, len(preprocessor.feature_names), max(1, len(target.classes)))

    def defaults(self) -> dict[str, Value]:
        """Return the catalogue's defaults, as far as they lie in the space."""
        defaults = default_params(self.target.task, self.space)
        return {
            n: value for n, value in defaults.items() if is_in_distribution(self.space[n], value)
        }

    def portfolio(self) -> list[dict[str, Value]]:
        """Return cheap shallow networks at high learning rates, as far as the space has them."""
        portfolio = list[dict[str, Value]]()
        defaults = self.defaults()
        if not (self.space.keys() <= defaults.keys()):
            return []  # some parameter has no default, so their cost cannot be compared
        max_weights = MAX_PORTFOLIO_WEIGHTS_RATIO * self.count_weights(self.member(0, defaults))
        for (width, dropout), rate in product(SHALLOW_WIDTHS.items(), SHALLOW_LEARNING_RATES):
            wanted = {**SHALLOW_PARAMS, "width": width, "dropout": dropout, "learning_rate": rate}
            tuned = {name: value for name, value in wanted.items() if name in self.space}
            has_shape = {"hidden_layers", "width"} <= tuned.keys()
            if not has_shape or not all(
                is_in_distribution(self.space[n], v) for n, v in tuned.items()
            ):
                continue
            params = {**defaults, **tuned}
            is_cheap = self.count_weights(self.member(0, params)) <= max_weights
            if is_cheap and params not in portfolio:
                portfolio.append(params)
        return portfolio

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        """Return a trial; the study's seed and the trial's number determine its first weights."""
        values = effective_params(self.target.task, {**self.fixed, **params})
        return Member(number, number, values)

    def signature(self, member: Member) -> Hashable:
        """Return depth, padded width, normalization, batch size, and iterations."""
        check_fits_in_memory(self.memory(member), self.device)
        params = member.params
        return (mlp_signature(params), params["batch_size"], params["iterations"])

    def pin_to_leader(self, leader: Member) -> Callable[[str, Any], Any]:
        """Return a function that sets static values to the leader's, the width to its octave."""
        padded = padded_width(int(leader.params["width"] or 1))

        def replace_by_leaders_value(name: str, value: Any) -> Any:
            if name in ("hidden_layers", "normalization", "batch_size", "iterations"):
                return leader.params[name]
            if name != "width":
                return value
            folded = scale_width_to_octave(value, padded)
            known = is_in_distribution(self.space["width"], folded)
            return folded if known else leader.params["width"]

        return replace_by_leaders_value

    def cohort_size(self, leader: Member) -> int:
        """Return a size that fits in memory and keeps a round of the cohort short."""
        flops = 6.0 * self._count_padded_weights(leader) * len(self.data.train_X)
        return bounded_cohort_size(self.memory(leader), flops / self.rounds_per_epoch, self.device)

    def memory(self, member: Member) -> int:
        """Return the bytes of a trial.

        They hold weights, gradients, two optimizer states and the best weights; five tensors of
        each layer; and the outputs on the validation part: float32, logarithms, float64 in the
        metric.
        """
        params = member.params
        padded, depth = padded_width(int(params["width"] or 1)), int(params["hidden_layers"] or 1)
        batch = min(int(params["batch_size"] or 1), len(self.data.train_X))
        bytes_each = 4 * (5 * self._count_padded_weights(member) + 5 * depth * padded * batch)
        return bytes_each + 24 * len(self.data.valid_X) * self.outputs

    def _count_padded_weights(self, member: Member) -> int:
        padded = padded_width(int(member.params["width"] or 1))
        depth = int(member.params["hidden_layers"] or 1)
        return (self.inputs + (depth - 1) * padded + self.outputs) * padded

    def count_weights(self, member: Member) -> int:
        """Return the number of trained weights."""
        return count_weights(member.params, self.inputs, self.outputs)

    def network(self, member: Member) -> nn.Module:
        """Return a trial's network as a plain module, its weights not yet loaded."""
        return build_mlp(member.params, self.inputs, self.outputs)

    def _build_stack(self, members: Sequence[Member]) -> StackedMLP:
        generators = [rng.generator(self.seed, rng.INITIALIZATION, m.seed) for m in members]
        stack = StackedMLP([m.params for m in members], self.inputs, self.outputs, generators)
        return stack.to(self.device)
