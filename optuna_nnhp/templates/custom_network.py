"""The template for a user's own networks: any function from parameters to a module."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
import math
import traceback
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
import pandas as pd
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from optuna_nnhp import rng
from optuna_nnhp.data.arrays import prepare_arrays
from optuna_nnhp.data.supervised import InputPreprocessor
from optuna_nnhp.data.supervised import SupervisedData
from optuna_nnhp.data.supervised import prepare_table
from optuna_nnhp.data.target import Target
from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import Hyperparameter
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.spec import is_in_distribution
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.stackability import StackabilityProbe
from optuna_nnhp.networks.stackability import StackabilityReport
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.templates.base import NetworkBuilder
from optuna_nnhp.templates.base import TrainedModel
from optuna_nnhp.templates.base import register
from optuna_nnhp.templates.custom_space import RecordingParams
from optuna_nnhp.templates.custom_space import boundary_values
from optuna_nnhp.templates.custom_space import custom_space
from optuna_nnhp.templates.custom_space import default_values
from optuna_nnhp.templates.predictor import Predictor
from optuna_nnhp.templates.supervised import SupervisedTemplate
from optuna_nnhp.templates.supervised import bounded_cohort_size
from optuna_nnhp.templates.supervised import check_fits_in_memory
from optuna_nnhp.templates.supervised import load_examples
from optuna_nnhp.templates.supervised import resolve_target_metric
from optuna_nnhp.training.cohort import Member

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# Tuned only if the user's function reads them; the function decides what they do.
STRUCTURAL_PARAMS = (
    *("weight_init", "hidden_layers", "width", "width_shape", "activation"),
    *("normalization", "dropout"),
)


class _UnknownParameterError(ValueError):
    """The user's function reads a parameter that is neither tuned nor fixed."""


@register
class CustomNetworkTemplate(SupervisedTemplate):
    """Networks made by the user's own function, on arrays or tables.

    The function gets all parameters of a trial, the catalogue's included, and returns a plain
    `nn.Module`. Trials whose networks have one structure (see `networks.structure`) are trained
    as one stack; a network that cannot be stacked trains alone, and a log line says why.

    Args:
        network:
            From parameters, a mapping, to a module. Its first weights are those it has then;
            torch's global random numbers follow from the study's seed and the trial's number.
        X:
            A numpy array or tensor of any number of dimensions, used as it is (float32, or int64
            where it holds whole numbers): standardize images yourself. Or a table, that is a
            pandas frame or the path of a CSV file: gaps are filled, categories encoded and
            numbers standardized, as for the DNN template.
        y:
            What to predict; with a CSV file, give ``target`` instead.
        target:
            Column of the CSV file that is to be predicted.
        task:
            As for `DNNTemplate`.
        validation:
            As for `DNNTemplate`.
        metric:
            As for `DNNTemplate`.
        direction:
            As for `DNNTemplate`.
        space:
            Distributions of the user's own parameters, and those that replace the catalogue's.
            The catalogue's hyperparameters of training are always there; those of structure
            (`STRUCTURAL_PARAMS`) only if ``network`` reads them.
        fixed:
            Values that are not tuned, of the user's parameters or the catalogue's.
        seed:
            Seed of the split, of batch order, noise and first weights.
        device:
            Where to train; CUDA if there is any, else the CPU, if None.
        compile:
            Whether `torch.compile` makes the networks' code, which takes seconds to minutes once
            for each shape; of no effect on what the compiled engine trains.

    Shape:
        - X: ``(rows, ...)``; y: ``(rows,)``.
        - Input of the module: ``(batch, ...)``; output: logits ``(batch, classes)``, or
          standardized numbers ``(batch, 1)`` or ``(batch,)``.

    Raises:
        ValueError: If the data or an argument is invalid, or the default configuration's network
            does not fit the data.
        Exception: Whatever ``network`` raises for the default configuration.

    Example:
        >>> def network(params):
        ...     width = params["units"]
        ...     return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        >>> from optuna.distributions import IntDistribution
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> problem = CustomNetworkTemplate(
        ...     network, X, X[:, 0] > 0, space={"units": IntDistribution(4, 64, log=True)}
        ... )
        >>> problem.defaults()["units"], "dropout" in problem.space, "l1" in problem.space
        (16, False, True)
    """

    template_name = "own"
    takes_network = True

    def __init__(
        self,
        network: NetworkBuilder,
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
        if isinstance(network, nn.Module) or not callable(network):
            kind = type(network).__name__
            raise ValueError(f"`network` must be a function that makes a module, but got {kind}.")
        self.seed = rng.check_seed(seed)
        data = _prepare_data(X, y, target, task=task, validation=validation, seed=seed)
        judge = resolve_target_metric(metric, direction, data.target)
        self._builder_function = network
        self.builder = str(getattr(network, "__qualname__", type(network).__qualname__))
        self._example = torch.from_numpy(data.train_X[:2])
        self._custom_names, chosen = custom_space(data.target.task, space, fixed)
        self._catalogue_defaults = {n: h.default for n, h in specs(data.target.task).items()}
        self._probes: dict[Hashable, StackabilityReport] = {}
        self.target, self._read_names = data.target, set[str]()
        chosen = self._drop_unread_parameters(*chosen, given={*(space or {}), *(fixed or {})})
        super().__init__(
            data, judge, *chosen, self.builder, seed=seed, device=device, compile=compile
        )
        self.description["network"] = self.builder
        self._examiner = StackabilityProbe(self._task.arrays.train_x)
        self._check_default()

    @classmethod
    def rebuild_network(
        cls, params: Mapping[str, Any], preprocessor: InputPreprocessor, target: Target
    ) -> nn.Module:
        """Return a placeholder; `with_user_network` makes the network."""
        return nn.Identity()

    @classmethod
    def with_user_network(
        cls, model: TrainedModel, network: NetworkBuilder | None
    ) -> TrainedModel:
        """Return a predictor with the network that the user's function makes.

        Raises:
            ValueError: If the function is missing.
        """
        assert isinstance(model, Predictor)
        if network is None:
            raise ValueError(
                f"This model was made by the function {model.builder!r}, which is not saved: "
                f"`load(folder, network={model.builder})`."
            )
        with rng.global_rng_from(rng.generator(0)):
            return replace(model, model=network(model.params))

    def specs(self) -> dict[str, Hyperparameter]:
        """Return the catalogue's entries; the user's function decides what a shape applies to."""
        known = super().specs()
        shape = replace(known["width_shape"], active_if={}, inactive_if={})
        return {**known, "width_shape": shape}

    def defaults(self) -> dict[str, Value]:
        """Return the catalogue's defaults and the midpoints of the user's ranges that fit."""
        return default_values(self.target.task, self.space)

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        """Return a trial; the study's seed and the trial's number determine its first weights."""
        return Member(number, number, self._complete_params({**self.fixed, **params}))

    def signature(self, member: Member) -> Hashable:
        """Return structure, batch size and iterations; unique for a network that trains alone."""
        check_fits_in_memory(self.memory(member), self.device)
        found = self._probe(member)
        alone = () if found.obstacle is None else (member.number,)
        return (found.structure, member.params["batch_size"], member.params["iterations"], *alone)

    def pin_to_leader(self, leader: Member) -> Callable[[str, Any], Any]:
        """Return a function that replaces values which change the structure by the leader's."""
        structure = self._probe(leader).structure

        def replace_by_leaders_value(name: str, value: Any) -> Any:
            if name not in ("batch_size", "iterations"):
                if name not in self._read_names:
                    return value
                changed = self._complete_params({**leader.params, name: value})
                try:
                    if self._probe(replace(leader, params=changed)).structure == structure:
                        return value
                except TrialError:  # such a network cannot be built; the leader's can
                    pass
            return self._to_space_value(name, leader.params[name], value)

        return replace_by_leaders_value

    def mutable_names(self) -> frozenset[str]:
        """Return what may change during training: what the user's function does not read.

        Its dropout may if it is that of layers which are there at any rate.
        """
        free = super().mutable_names()
        if "dropout" in self._read_names and not self._dropout_only_sets_rates():
            return free - self._read_names
        return free - (self._read_names - {"dropout"})

    def _dropout_only_sets_rates(self) -> bool:
        """Return whether the dropout rate only sets the rate of `nn.Dropout` layers."""
        networks = [
            self.network(self.member(0, {**self.defaults(), "dropout": rate}))
            for rate in (0.0, 0.3)
        ]
        off, on = ([type(m) for m in network.modules()] for network in networks)
        rates = [float(m.p) for m in networks[1].modules() if isinstance(m, nn.Dropout)]
        return off == on and 0.3 in rates

    def is_stackable(self, leader: Member) -> bool:
        """Return whether trials like this one can be trained as one stack."""
        return self._probe(leader).obstacle is None

    def cohort_size(self, leader: Member) -> int:
        """Return a size that fits in memory and keeps a round of the cohort short."""
        found, rows = self._probe(leader), len(self.data.train_X)
        if found.obstacle is not None:
            return 1
        flops_each = 3.0 * found.flops * rows / self.rounds_per_epoch
        return bounded_cohort_size(self.memory(leader), flops_each, self.device)

    def memory(self, member: Member) -> int:
        """Return the bytes of a trial.

        They hold weights, gradients, two optimizer states and the best weights; and each layer's
        output, its gradient and what autograd keeps. Evaluation holds one output of each layer.
        """
        found, rows = self._probe(member), len(self.data.train_X)
        batch, judged = min(int(member.params["batch_size"] or 1), rows), len(self.data.valid_X)
        numbers = 5 * found.weights + found.activations_per_example * max(4 * batch, judged)
        return 4 * numbers + 24 * judged * math.prod(found.outputs)

    def count_weights(self, member: Member) -> int:
        """Return the number of trained weights; 0 for a network that cannot be built."""
        try:
            return self._probe(member).weights
        except TrialError:
            return 0

    def network(self, member: Member) -> nn.Module:
        """Return a trial's network as a plain module, with its first weights."""
        return self._call_builder(member)[0]

    def _build_stack(self, members: Sequence[Member]) -> StackedModule:
        return self._examiner.stack([self.network(m).to(self.device) for m in members])

    def _probe(self, member: Member) -> StackabilityReport:
        """Return what a probe finds out about a trial's network; results are cached.

        Raises:
            TrialError: If the user's function, or its module, raises.
        """
        key = tuple((name, member.params[name]) for name in sorted(self._read_names))
        if key not in self._probes:
            try:
                network, reads = self._call_builder(member)
                found = self._examiner(network.to(self.device))
                self._check_outputs(found.outputs)
            except Exception as error:  # the user's code, whatever it raises
                line = traceback.format_exception_only(error)[-1].strip()
                raise TrialError(line) from error
            if not reads <= self._read_names:  # read for these values only
                self._read_names |= reads
                return self._probe(member)
            self._probes[key] = found
        return self._probes[key]

    def _call_builder(self, member: Member) -> tuple[nn.Module, set[str]]:
        """Return a trial's network, and the names of the parameters that the function read."""
        parameters = RecordingParams(member.params)
        source = rng.generator(self.seed, rng.INITIALIZATION, member.seed)
        with rng.global_rng_from(source):
            try:
                network: Any = self._builder_function(parameters)
            except KeyError as error:
                if error.args and error.args[0] in parameters.missing:
                    kind = "a parameter, but `network` reads it: name it in `space` or `fixed`"
                    raise _UnknownParameterError(
                        unknown_name(kind, error.args[0], member.params)
                    ) from error
                raise
            if not isinstance(network, nn.Module):
                kind = type(network).__name__
                raise ValueError(f"`network` must return a torch.nn.Module, but returned {kind}.")
            if any(is_lazy(parameter) for parameter in network.parameters()):
                with torch.no_grad():
                    network.eval()(self._example)
        return network.train(), parameters.names

    def _complete_params(self, values: Mapping[str, Any]) -> dict[str, Value]:
        """Return all parameters as training uses them."""
        known = {
            n: v
            for n, v in {**self._catalogue_defaults, **values}.items()
            if n in self._catalogue_defaults
        }
        return {**values, **effective_params(self.target.task, known)}

    def _to_space_value(self, name: str, wanted: Value, proposed: Any) -> Any:
        """Return a leader's value as the space has it, where training uses 0 for "off"."""
        distribution = self.space[name]
        if is_in_distribution(distribution, wanted):
            return wanted
        fitting = [
            e
            for e in boundary_values(distribution)
            if self._complete_params({name: e})[name] == wanted
        ]
        return fitting[0] if fitting else proposed

    def _drop_unread_parameters(
        self,
        space: dict[str, BaseDistribution],
        fixed: dict[str, Value],
        given: set[str],
    ) -> tuple[dict[str, BaseDistribution], dict[str, Value]]:
        """Remove the catalogue's structural parameters that the user's function does not read.

        It is called with the defaults, and with every end and choice of the user's own ranges,
        so that what it reads in some cases only is found too.
        """
        midpoint = {**fixed, **default_values(self.target.task, space)}
        self._read_names = self._call_builder(Member(0, 0, self._complete_params(midpoint)))[1]
        for name in self._custom_names & space.keys():
            for value in boundary_values(space[name]):
                try:
                    changed = self._complete_params({**midpoint, name: value})
                    self._read_names |= self._call_builder(Member(0, 0, changed))[1]
                except _UnknownParameterError:
                    raise
                except Exception as error:  # only trials that propose this value will fail
                    _logger.warning(f"`network` raises an error for {name}={value!r}: {error}")
        unread = {
            n for n in (*space, *fixed) if n in self._custom_names or n in STRUCTURAL_PARAMS
        } - self._read_names
        for name in unread & given:
            raise unknown_name("a parameter that `network` reads", name, sorted(self._read_names))
        return (
            {n: d for n, d in space.items() if n not in unread},
            {n: v for n, v in fixed.items() if n not in unread},
        )

    def _check_default(self) -> None:
        """Raise unless the default configuration's network fits data and target."""
        network = self.network(self.member(0, self.defaults())).to(self.device)
        x = self._task.arrays.train_x
        try:
            outputs = self._examiner(network).outputs
        except Exception as error:
            shape = ", ".join(["batch", *map(str, x.shape[1:])])
            raise ValueError(
                f"`network` must take X of shape ({shape}), {x.dtype}, but: {error}"
            ) from error
        self._check_outputs(outputs)

    def _check_outputs(self, outputs: tuple[int, ...]) -> None:
        classes = len(self.target.classes)
        wanted = [(classes,)] if classes else [(1,), ()]
        if outputs not in wanted:
            shape = ", ".join(["batch", *map(str, wanted[0])])
            given = ", ".join(["batch", *map(str, outputs)])
            what = "logits" if classes else "numbers"
            raise ValueError(f"`network` must give ({shape}) {what}, but gave ({given}).")


def _prepare_data(X: Any, y: Any, target: str | None, **options: Any) -> SupervisedData:
    """Prepare the data: arrays and tensors as they are, everything else as a table."""
    is_array = isinstance(X, np.ndarray | torch.Tensor)
    X, y = load_examples(X, y, target)
    if is_array:
        return prepare_arrays(X, y, **options)
    if not isinstance(X, pd.DataFrame):
        kind = type(X).__name__
        raise ValueError(f"`X` must be an array, a tensor, a frame or a CSV file, but got {kind}.")
    return prepare_table(X, y, **options)
