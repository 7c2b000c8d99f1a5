"""The catalogue: one file for each hyperparameter of the field, its declaration and its effect."""

from optuna_nnhp.hyperparameters.catalogue import CATALOGUE as CATALOGUE
from optuna_nnhp.hyperparameters.catalogue import catalogue as catalogue
from optuna_nnhp.hyperparameters.catalogue import choose as choose
from optuna_nnhp.hyperparameters.catalogue import default_params as default_params
from optuna_nnhp.hyperparameters.catalogue import effective as effective
from optuna_nnhp.hyperparameters.catalogue import records as records
from optuna_nnhp.hyperparameters.record import Hyperparameter as Hyperparameter
