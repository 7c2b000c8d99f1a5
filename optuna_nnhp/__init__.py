"""Optuna plugin and study templates for tuning PyTorch neural networks."""

from importlib import import_module
from typing import TYPE_CHECKING
from typing import Any

from optuna_nnhp import errors as errors
from optuna_nnhp import samplers as samplers
from optuna_nnhp.hyperparameters.catalogue import catalogue as catalogue
from optuna_nnhp.inspect.replay import replay as replay
from optuna_nnhp.inspect.result import Result as Result
from optuna_nnhp.objective import Objective as Objective
from optuna_nnhp.optimize import optimize as optimize
from optuna_nnhp.search.halving import CohortHalvingPruner as CohortHalvingPruner
from optuna_nnhp.search.methods import METHODS as METHODS
from optuna_nnhp.search.zoomed_space import zoom as zoom
from optuna_nnhp.storages.open_storage import open_existing_storage as open_existing_storage
from optuna_nnhp.study.autotune import clear_autotune_cache as clear_autotune_cache
from optuna_nnhp.templates.model_files import load as load
from optuna_nnhp.templates.presets import PRESETS as PRESETS
from optuna_nnhp.templates.presets import preset as preset
from optuna_nnhp.training.metrics import METRICS as METRICS
from optuna_nnhp.version import __version__ as __version__

if TYPE_CHECKING:
    from optuna_nnhp import cli as cli
    from optuna_nnhp.inspect.dashboard import annotate as annotate
    from optuna_nnhp.inspect.report import closing_report as closing_report

__all__ = [
    "METHODS",
    "METRICS",
    "PRESETS",
    "CohortHalvingPruner",
    "Objective",
    "Result",
    "__version__",
    "annotate",
    "catalogue",
    "clear_autotune_cache",
    "cli",
    "closing_report",
    "errors",
    "load",
    "open_existing_storage",
    "optimize",
    "preset",
    "replay",
    "samplers",
    "zoom",
]

# What few programs need, and what imports plotly: imported when it is first used.
_LAZY = {
    "annotate": "optuna_nnhp.inspect.dashboard",
    "closing_report": "optuna_nnhp.inspect.report",
}


def __getattr__(name: str) -> Any:
    if name == "cli":
        return import_module("optuna_nnhp.cli")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
