"""The arguments that a problem is made from; they can be sent to other processes and stored."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import json_to_distribution
import torch
from torch import nn

from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.study.open_study import IDENTITY
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.templates import DEFAULT_TEMPLATE
from optuna_nnhp.templates import TEMPLATES
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import NetworkBuilder
from optuna_nnhp.templates import Template
from optuna_nnhp.templates import find_template
from optuna_nnhp.templates.base import NOT_SAVED
from optuna_nnhp.training.device import claim_device
from optuna_nnhp.training.device import gpu_uuids

PROBLEM_SPEC = "problem_spec"  # study attribute: `ProblemSpec.attributes`
# Arguments that a study stores as they are.
SAVED_ARGUMENTS = ("target", "task", "direction", "errors", "preset")


@dataclass(frozen=True, eq=False)
class ProblemSpec:
    """All arguments that a problem is made from, as `optimize` takes them.

    It can be pickled if its data and functions can (with cloudpickle also functions of a script
    or notebook). A study stores its `attributes`, from which `from_study` makes another one. They
    have the paths of data, but neither data nor functions.

    Args:
        template:
            As in `optimize`, like all others that are not named here.
        X:
            As in `optimize`.
        y:
            As in `optimize`.
        network:
            As in `optimize`.
        target:
            As in `optimize`.
        task:
            As in `optimize`.
        validation:
            As in `optimize`.
        metric:
            As in `optimize`.
        direction:
            As in `optimize`.
        errors:
            As in `optimize`.
        preset:
            As in `optimize`.
        space:
            As in `optimize`.
        fixed:
            As in `optimize`.
        timeout:
            Seconds of the study: trials of language models that take longer are refused.
        seed:
            As in `optimize`.
        device:
            As in `optimize`.
        compile:
            As in `optimize`.
        identity:
            Attributes that the problem must have, by the names in `study.open_study.IDENTITY`.

    Example:
        >>> problem_spec = ProblemSpec("dnn", [[1.0], [2.0]] * 5, ["no", "yes"] * 5)
        >>> problem_spec.problem().metric.name, problem_spec.attributes()["data"]
        ('accuracy', {'not kept': 'list of 10'})
    """

    template: str = "dnn"
    X: Any = field(default=None, repr=False)
    y: Any = field(default=None, repr=False)
    network: Callable[[Mapping[str, Any]], nn.Module] | None = None
    target: str | None = None
    task: str | None = None
    validation: Any = field(default=None, repr=False)
    metric: str | Callable[[Any, Any], float] | None = None
    direction: str | None = None
    errors: str = "strict"
    preset: str | None = None
    space: Mapping[str, BaseDistribution] | None = None
    fixed: Mapping[str, Value] | None = None
    timeout: float | None = None
    seed: int = 0
    device: str | torch.device | None = None
    compile: bool = False
    identity: Mapping[str, Any] | None = None

    def problem(self) -> Template:
        """Make the problem: read and prepare the data.

        Raises:
            ValueError: If the data or an argument is invalid, or the data are not those of the
                study.
            FileNotFoundError: If there is no such file.
        """
        first = ("template", "network", "X", "identity")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in first}
        problem = make_problem(self.template, self.network, self.X, **options)
        for name, known in (self.identity or {}).items():
            found = problem.description.get(name)
            if found != known:
                what = "data" if name == "fingerprint" else name
                kind = "the fingerprint " if name == "fingerprint" else ""
                raise ValueError(
                    f"The {what} must be the study's, with {kind}{known!r}, but got {kind}"
                    f"{found!r}."
                )
        return problem

    def problem_without_gpu_claim(self) -> Template:
        """Make the problem before its study is open: on the CPU if any GPU would do."""
        has_free_choice = self.device is None and gpu_uuids()
        return (replace(self, device="cpu") if has_free_choice else self).problem()

    def problem_on_free_device(self, study: Study, problem: Template | None = None) -> Template:
        """Make the problem on a device that no other worker of its study uses.

        Args:
            study:
                The opened study.
            problem:
                The same problem, possibly on another device; it is reused if the device fits.
        """
        if self.device is not None or not gpu_uuids():
            return problem or self.problem()
        device = claim_device(study.user_attrs[MODELS])
        if problem is not None and problem.device == device:
            return problem
        return replace(self, device=device).problem()

    def attributes(self) -> dict[str, Any]:
        """Return what a study stores, as JSON: paths and names, but no data and no functions.

        Space, fixed values and seed have study attributes of their own.
        """
        template = CustomNetworkTemplate if self.network else find_template(self.template)
        return {
            "template": template.template_name,
            "data": template.describe_source(self.X),
            "validation": _as_fraction(self.validation)
            or template.describe_source(self.validation),
            "metric": _describe_function(self.metric),
            "network": _describe_function(self.network),
            **{name: getattr(self, name) for name in SAVED_ARGUMENTS},
        }

    @classmethod
    def from_study(
        cls,
        study: Study,
        X: Any = None,
        y: Any = None,
        *,
        target: str | None = None,
        network: Callable[[Mapping[str, Any]], nn.Module] | None = None,
        validation: Any = None,
        metric: Callable[[Any, Any], float] | None = None,
        device: str | torch.device | None = None,
        compile: bool = False,
    ) -> ProblemSpec:
        """Return the specification of a study that `optimize` made.

        Args:
            study:
                The study.
            X:
                The data or their path; if None, the path that the study stores.
            y:
                Target to predict, unless ``X`` is a CSV file.
            target:
                Column of the CSV file, if the study stores none.
            network:
                The user's function, which a study does not store.
            validation:
                The validation part, if it was given as data.
            metric:
                The user's metric, if it was a function.
            device:
                As in `optimize`.
            compile:
                As in `optimize`.

        Raises:
            ValueError: If `optimize` did not start the study, or an argument is missing.

        Example:
            >>> from optuna_nnhp import optimize
            >>> X, y = [[float(i)] for i in range(40)], [i > 9 for i in range(40)]
            >>> result = optimize("dnn", X, y, n_trials=1, storage=None, fixed={"epochs": 2})
            >>> ProblemSpec.from_study(result.study, X, y).problem().fixed["epochs"]
            2
            >>> ProblemSpec.from_study(
            ...     result.study, X[:20], y[:20]
            ... ).problem()  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ValueError: The data must be the study's, with the fingerprint ..., but got ...
        """
        attributes = study.user_attrs
        saved = attributes.get(PROBLEM_SPEC)
        if saved is None:
            raise ValueError(
                "The study must be one that `optimize` started, but "
                f"{study.study_name!r} is not: it stores no specification of its problem."
            )
        template = find_template(saved["template"])
        if (network is not None) != template.takes_network:
            raise ValueError(_network_error(saved))
        space = {name: json_to_distribution(d) for name, d in attributes["space"].items()}
        options = {name: saved[name] for name in SAVED_ARGUMENTS}
        if (
            "task" in template.option_defaults()
        ):  # the task that was inferred when the study started
            options["task"] = attributes["task"]
        if target is not None:
            options["target"] = target
        source = _given_or_saved("X", X, saved["data"])
        if not isinstance(source, str | Path):
            options["target"] = None
        return cls(
            template=DEFAULT_TEMPLATE if template.takes_network else saved["template"],
            X=source,
            y=y,
            network=network,
            validation=_given_or_saved("validation", validation, saved["validation"]),
            metric=_given_or_saved("metric", metric, saved["metric"]),
            space=space,
            fixed=template.fixed_by_user(attributes["fixed"], space),
            seed=attributes["seed"],
            device=device,
            compile=compile,
            identity={name: attributes.get(name) for name in IDENTITY},
            **options,
        )


def _network_error(saved: Mapping[str, Any]) -> str:
    if not find_template(saved["template"]).takes_network:
        return (
            "`network` must be given only for a study of custom networks, but the study's "
            f"template is {saved['template']!r}."
        )
    return (
        "`network` must be given: the study does not store the function that made its networks, "
        f"{saved['network'][NOT_SAVED]}."
    )


def _given_or_saved(name: str, value: Any, saved: Any) -> Any:
    """Return what the user gives, or what is stored; raise if that is only a description."""
    if value is not None:
        return value
    if isinstance(saved, dict):
        raise ValueError(
            f"`{name}` must be given: the study does not store it ({saved[NOT_SAVED]})."
        )
    return saved


def _as_fraction(validation: Any) -> float | None:
    """Return a fraction of the data, or None for anything else."""
    is_number = hasattr(validation, "__float__") and not hasattr(validation, "__len__")
    return float(validation) if is_number else None


def _describe_function(given: Any) -> Any:
    """Return a metric's name, or a description of a function."""
    if not callable(given):
        return given
    module, name = (getattr(given, key, "") for key in ("__module__", "__qualname__"))
    return {NOT_SAVED: f"{module}:{name}" if name else type(given).__qualname__}


def make_problem(
    template: str, network: NetworkBuilder | None, X: Any, **options: Any
) -> Template:
    """Make the problem of a template, or of a user's own network.

    Args:
        template:
            Name of a registered template.
        network:
            The user's function instead; see `CustomNetworkTemplate`.
        X:
            The examples, or the text.
        options:
            Keyword arguments of `optimize`. Those that the template's constructor lacks must have
            their defaults.

    Raises:
        ValueError: If there is no such template, two are named, or an option is for another one.

    Example:
        >>> make_problem("dnn", None, [[1.0], [2.0]] * 5, y=["no", "yes"] * 5).metric.name
        'accuracy'
    """
    if network is None:
        names = [name for name, known in TEMPLATES.items() if not known.takes_network]
        if not isinstance(template, str) or template not in names:
            raise unknown_name("a template", template, names)
        found: Any = TEMPLATES[template]
        return found(X, **_given_options(found, options))  # type: ignore[no-any-return]
    if not isinstance(template, str) or template != DEFAULT_TEMPLATE:
        raise ValueError(
            "`template` must not be given with `network`: optimize(network=network, X=X, y=y)."
        )
    return CustomNetworkTemplate(network, X, **_given_options(CustomNetworkTemplate, options))


def _given_options(template: type[Template], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a template takes, without those that have no value."""
    known = template.option_defaults()
    for name, value in options.items():
        if name in known:
            continue
        others = {n: t.option_defaults() for n, t in TEMPLATES.items()}
        takers = [other for other, defaults in others.items() if name in defaults]
        if not takers:
            raise TypeError(f"`{name}` must be an option of a template, but none has it.")
        default = others[takers[0]][name]
        is_given = value is not default and not (isinstance(value, str) and value == default)
        if is_given and name != "timeout":  # of the study, which only some templates need
            raise ValueError(
                f"`{name}` must not be given here: it is for the template "
                f"{' or '.join(map(repr, takers))}."
            )
    return {
        n: v for n, v in options.items() if n in known and not (n == "validation" and v is None)
    }
