"""Study templates: each states the data, the search space, the network and the metric once.

To add a template, write one file and one line. The file holds a class that is derived from
`Template`, which documents what it must provide, and decorated by `register`::

    @register
    class SurvivalTemplate(Template):
        template_name = "survival"
        ...

For labels and numbers `SupervisedTemplate` implements most of it: such a template only describes
its network. The line is an import below. Then ``optimize("survival", X, y, ...)``, `Objective`,
`load`, reports, workers and the command line know the template. A package of your own may register
a template the same way; it must be imported before the template is used.
"""

from __future__ import annotations

from typing import Any

from optuna_nnhp.errors import unknown_name
from optuna_nnhp.templates.base import TEMPLATES as TEMPLATES
from optuna_nnhp.templates.base import NetworkBuilder as NetworkBuilder
from optuna_nnhp.templates.base import Template as Template
from optuna_nnhp.templates.base import TrainedModel as TrainedModel
from optuna_nnhp.templates.base import find_template as find_template
from optuna_nnhp.templates.base import register as register
from optuna_nnhp.templates.base import template_of_study as template_of_study
from optuna_nnhp.templates.custom_network import CustomNetworkTemplate as CustomNetworkTemplate
from optuna_nnhp.templates.dnn import DNNTemplate as DNNTemplate
from optuna_nnhp.templates.gpt import GPTTemplate as GPTTemplate
from optuna_nnhp.templates.language_model import LanguageModel as LanguageModel
from optuna_nnhp.templates.predictor import Predictor as Predictor
from optuna_nnhp.templates.presets import preset as preset
from optuna_nnhp.templates.supervised import SupervisedTemplate as SupervisedTemplate

DEFAULT_TEMPLATE = "dnn"


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
        return found(X, **_options_of(found, options))  # type: ignore[no-any-return]
    if not isinstance(template, str) or template != DEFAULT_TEMPLATE:
        raise ValueError(
            "`template` must not be given with `network`: optimize(network=network, X=X, y=y)."
        )
    return CustomNetworkTemplate(network, X, **_options_of(CustomNetworkTemplate, options))


def _options_of(template: type[Template], options: dict[str, Any]) -> dict[str, Any]:
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
