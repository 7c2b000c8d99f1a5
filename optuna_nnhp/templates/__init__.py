"""Study templates: data, space, network and metric, said once each."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from torch import nn

from optuna_nnhp.messages import unknown
from optuna_nnhp.templates.common import Template as Template
from optuna_nnhp.templates.dnn import DNN as DNN
from optuna_nnhp.templates.own import OwnNetwork as OwnNetwork
from optuna_nnhp.templates.predictor import Predictor as Predictor

TEMPLATES = {"dnn": DNN}


def make_problem(
    template: str,
    network: Callable[[Mapping[str, Any]], nn.Module] | None,
    X: Any,
    y: Any,
    **options: Any,
) -> Template:
    """What is tuned, of a template by its name or of a user's own network.

    Args:
        template:
            One of `TEMPLATES`.
        network:
            The user's function instead; see `OwnNetwork`.
        X:
            The examples.
        y:
            What to predict.
        options:
            As the template takes them.

    Raises:
        ValueError: If there is no such template, or two are named.

    Example:
        >>> make_problem("dnn", None, [[1.0], [2.0]] * 5, ["no", "yes"] * 5).metric.name
        'accuracy'
    """
    if network is None:
        if not isinstance(template, str) or template not in TEMPLATES:
            raise unknown("a template", template, TEMPLATES)
        return TEMPLATES[template](X, y, **options)
    if not isinstance(template, str) or template != "dnn":
        raise ValueError(
            "`template` must not be given with `network`: optimize(network=network, X=X, y=y)."
        )
    return OwnNetwork(network, X, y, **options)
