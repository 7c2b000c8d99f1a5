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
