"""The catalogue: each file holds the specification and the effect of one hyperparameter."""

from optuna_nnhp.hyperparameters.catalogue import CATALOGUE as CATALOGUE
from optuna_nnhp.hyperparameters.catalogue import catalogue as catalogue
from optuna_nnhp.hyperparameters.catalogue import default_params as default_params
from optuna_nnhp.hyperparameters.catalogue import effective_params as effective_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space as resolve_space
from optuna_nnhp.hyperparameters.catalogue import specs as specs
from optuna_nnhp.hyperparameters.spec import Hyperparameter as Hyperparameter
