"""Study templates: data, space, network and metric, said once each."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from torch import nn

from optuna_nnhp.errors import unknown_name
from optuna_nnhp.templates.custom_network import CustomNetworkTemplate as CustomNetworkTemplate
from optuna_nnhp.templates.dnn import DNNTemplate as DNNTemplate
from optuna_nnhp.templates.gpt import GPTTemplate as GPTTemplate
from optuna_nnhp.templates.language_model import LanguageModel as LanguageModel
from optuna_nnhp.templates.predictor import Predictor as Predictor
from optuna_nnhp.templates.presets import preset as preset
from optuna_nnhp.templates.supervised import Template as Template

TEMPLATES = ("dnn", "gpt")
# What only some templates take, and what each takes without it being given.
TABLES = {"y": None, "target": None, "task": None, "metric": None, "direction": None}
TEXTS = {"errors": "strict", "preset": None}
VALIDATION = {"dnn": 0.2, "gpt": 0.1}


def make_problem(
    template: str,
    network: Callable[[Mapping[str, Any]], nn.Module] | None,
    X: Any,
    timeout: float | None = None,
    **options: Any,
) -> Template:
    """What is tuned, of a template by its name or of a user's own network.

    Args:
        template:
            One of `TEMPLATES`.
        network:
            The user's function instead; see `CustomNetworkTemplate`.
        X:
            The examples, or the text.
        timeout:
            Seconds of the study.
        options:
            As the template takes them; what only others take must be as if it were not given.

    Raises:
        ValueError: If there is no such template, or two are named.

    Example:
        >>> make_problem("dnn", None, [[1.0], [2.0]] * 5, y=["no", "yes"] * 5).metric.name
        'accuracy'
    """
    if network is None and (not isinstance(template, str) or template not in TEMPLATES):
        raise unknown_name("a template", template, TEMPLATES)
    validation = options.pop("validation", None)
    default = VALIDATION[template] if network is None else VALIDATION["dnn"]
    options["validation"] = default if validation is None else validation
    if network is None and template == "gpt":
        return GPTTemplate(X, timeout=timeout, **_without(options, TABLES, "tables"))
    options = _without(options, TEXTS, "texts")
    if network is None:
        return DNNTemplate(X, **options)
    if not isinstance(template, str) or template != "dnn":
        raise ValueError(
            "`template` must not be given with `network`: optimize(network=network, X=X, y=y)."
        )
    return CustomNetworkTemplate(network, X, **options)


def _without(options: Mapping[str, Any], others: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Options without those that are for another kind of data."""
    for name, default in others.items():
        given = options.get(name, default)
        if given is not default and not (isinstance(given, str) and given == default):
            raise ValueError(f"`{name}` must not be given here: it is for {kind}.")
    return {name: value for name, value in options.items() if name not in others}
