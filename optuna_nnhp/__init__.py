"""Optuna plugin and study templates for tuning PyTorch neural networks."""

from optuna_nnhp.hyperparameters.catalogue import catalogue as catalogue
from optuna_nnhp.inspect.replay import replay as replay
from optuna_nnhp.inspect.result import Result as Result
from optuna_nnhp.objective import Objective as Objective
from optuna_nnhp.optimize import optimize as optimize
from optuna_nnhp.search.halving import CohortHalvingPruner as CohortHalvingPruner
from optuna_nnhp.search.zoomed_space import zoom as zoom
from optuna_nnhp.templates.predictor import load as load
from optuna_nnhp.templates.presets import preset as preset
from optuna_nnhp.version import __version__ as __version__
