"""What a template must provide, and the registry of templates.

A template turns a user's data into a problem for the study: what is tuned, how networks are built
and trained, and what a trained network is for its user. `Template` documents all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import inspect
from pathlib import Path
from typing import Any
from typing import ClassVar
from typing import Protocol
from typing import TypeVar

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from torch import nn

from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.catalogue import mutable_names
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import Hyperparameter
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.metrics import Metric

NetworkBuilder = Callable[[Mapping[str, Any]], nn.Module]
NOT_SAVED = "not kept"  # key of the description of data and functions, which are not stored


class TrainedModel(Protocol):
    """A trained network together with what its user needs to apply it.

    Its class has the methods by which users apply it, such as ``predict`` or ``generate``.
    """

    @property
    def model(self) -> nn.Module:
        """The network, a plain module."""

    def save(self, folder: str | Path) -> Path:
        """Write the model to a folder, for `optuna_nnhp.load`."""


class Template(Problem):
    """The base class of all templates; the interface between a kind of data and the study.

    A template is a class with this base, decorated by `register`. Its constructor takes the data
    as ``X``, and those keyword arguments of `optimize` that concern it: always ``validation``,
    ``space``, ``fixed``, ``seed``, ``device`` and ``compile``; and any of ``y``, ``target``,
    ``task``, ``metric``, ``direction``, ``errors``, ``preset`` and ``timeout``. An argument that
    the constructor lacks is an error if a user gives it.

    It must set the attributes of `Problem`, and ``metric``, and implement the methods of `Problem`
    and `predictor`. The other methods have defaults.

    Attributes:
        template_name: The name by which `optimize` knows the template. ``description["template"]``
            must be the same.
        model_method: The method by which users apply a trained model; reports show it.
        step_title: What figures call the axis of a trial's steps.
        samples_text: Whether `sample_text` writes something that the study keeps.
        takes_network: Whether `optimize` selects the template by ``network``, not by its name.
        metric: The metric of the trials.
    """

    template_name: ClassVar[str]
    model_method: ClassVar[str] = "predict"
    step_title: ClassVar[str] = "epoch"
    samples_text: ClassVar[bool] = False
    takes_network: ClassVar[bool] = False

    metric: Metric
    sequential = False
    min_resource = 1

    # --- While the study runs ---

    def portfolio(self) -> list[dict[str, Value]]:
        """Return no more configurations than the defaults."""
        return []

    def mutable_names(self) -> frozenset[str]:
        """Return the tuned parameters that the catalogue allows to change during training."""
        return mutable_names() & self.space.keys()

    def is_stackable(self, leader: Member) -> bool:
        """Return that all trials can be stacked."""
        return True

    def attributes(self, member: Member) -> dict[str, Any]:
        """Return no attributes besides those of all trials."""
        return {}

    def specs(self) -> dict[str, Hyperparameter]:
        """Return the catalogue's entries for the task."""
        return specs(self.description["task"])

    def uses_compiled_engine(self) -> bool:
        """Return that torch trains the networks."""
        return False

    # --- After the study ---

    def count_scored_examples(self) -> int:
        """Return on how many examples the metric counts hits; 0 if it is a continuous one.

        A retrained network may decide an example or two differently on another machine.
        """
        return 0

    def predictor(
        self, network: nn.Module, member: Member, best_params: dict[str, Any], best_value: float
    ) -> TrainedModel:
        """Return a trained network as a model for users.

        Args:
            network:
                The network, with its trained weights.
            member:
                The trial.
            best_params:
                The trial's parameters as proposed.
            best_value:
                The trial's metric.
        """
        raise NotImplementedError

    @classmethod
    def restore_model(cls, metadata: Mapping[str, Any]) -> TrainedModel:
        """Return the model that `TrainedModel.save` wrote; its weights are loaded afterwards.

        Args:
            metadata:
                The contents of its JSON file.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If an entry is damaged.
        """
        raise NotImplementedError

    @classmethod
    def with_user_network(
        cls, model: TrainedModel, network: NetworkBuilder | None
    ) -> TrainedModel:
        """Return a restored model with the network that a user's function makes.

        Args:
            model:
                What `restore_model` returned.
            network:
                The function that `optuna_nnhp.load` got; templates that need none ignore it.
        """
        return model

    def sample_text(self, model: TrainedModel) -> str:
        """Return text that a model writes; called only if `samples_text` is true."""
        raise NotImplementedError

    @classmethod
    def trial_rows(cls, trial: FrozenTrial) -> dict[str, str]:
        """Return what reports say of a trial besides what they say of all, by label."""
        return {}

    # --- For other processes ---

    @classmethod
    def describe_source(cls, source: Any) -> Any:
        """Return what a study stores of its data, as JSON: a path, or else a few words.

        Args:
            source:
                ``X`` or ``validation`` as the user gave it; None if the user gave nothing.
        """
        if source is None:
            return None
        return str(source) if isinstance(source, str | Path) else {NOT_SAVED: _describe(source)}

    @classmethod
    def fixed_by_user(
        cls, fixed: Mapping[str, Value], space: Mapping[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Return a study's fixed values without those that have no effect.

        Users may not give those, so the template can be made again from the rest.

        Example:
            >>> Template.fixed_by_user({"epochs": 50, "iterations": 300}, {})
            {'iterations': 300}
        """
        without = {"epochs"} if fixed.get("iterations") or "iterations" in space else set[str]()
        return {name: value for name, value in fixed.items() if name not in without}

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return the keyword arguments of the constructor, with their defaults."""
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


TEMPLATES: dict[str, type[Template]] = {}
_AnyTemplate = TypeVar("_AnyTemplate", bound=type[Template])
_REQUIRED = (
    *(
        "defaults",
        "member",
        "signature",
        "pin_to_leader",
        "cohort_size",
        "memory",
        "cohort",
        "with_seed",
    ),
    *("count_weights", "network", "predictor"),
)


def register(template: _AnyTemplate) -> _AnyTemplate:
    """Add a template to those that `optimize` knows by name; a class decorator.

    Args:
        template:
            The class, with a `Template.template_name`.

    Raises:
        TypeError: If it lacks a method that templates must implement.
    """
    missing = [
        name
        for name in _REQUIRED
        if getattr(template, name) in (getattr(Problem, name, None), getattr(Template, name))
    ]
    if missing:
        names = ", ".join(missing)
        raise TypeError(f"A template must implement {names}, but {template.__name__} does not.")
    TEMPLATES[template.template_name] = template
    return template


def find_template(name: object) -> type[Template]:
    """Return a registered template by its name.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(name, str) or name not in TEMPLATES:
        raise unknown_name("a template", name, TEMPLATES)
    return TEMPLATES[name]


def template_of_study(study: Study) -> type[Template]:
    """Return the template of a study; `Template` itself, with its defaults, for other studies.

    Example:
        >>> import optuna
        >>> template_of_study(optuna.create_study()).step_title
        'epoch'
    """
    return TEMPLATES.get(str(study.user_attrs.get("template")), Template)


def _describe(data: Any) -> str:
    """Return a few words on data, none of which are from the data."""
    if hasattr(data, "shape"):
        return f"{type(data).__name__} of {' x '.join(map(str, data.shape))}"
    return f"{type(data).__name__} of {len(data)}"
