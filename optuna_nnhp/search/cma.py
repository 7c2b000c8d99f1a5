"""Optuna's CMA-ES, without running code that a storage holds."""

from __future__ import annotations

import io
import pickle
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from optuna_nnhp.search._optuna_internals import CmaEsSamplerHooks

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# The classes and functions that the pickle of an optimizer may name: numbers and arrays.
ALLOWED_GLOBALS = {
    ("cmaes._cma", "CMA"),
    *((module, "_reconstruct") for module in ("numpy._core.multiarray", "numpy.core.multiarray")),
    *((module, "scalar") for module in ("numpy._core.multiarray", "numpy.core.multiarray")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
}


class SafeCmaEsSampler(CmaEsSamplerHooks):
    """`optuna.samplers.CmaEsSampler` that unpickles nothing but CMA-ES optimizers.

    Optuna stores the optimizer as a pickle among a trial's attributes. Anyone who can write to the
    storage could make every process that continues the study run any code.

    Source:
        https://docs.python.org/3/library/pickle.html#restricting-globals
    """

    def restore_optimizer(self, trials: list[FrozenTrial]) -> Any:
        """Return the optimizer of the latest trial with a valid one, or None."""
        import cmaes  # slow to import

        for trial in reversed(trials):
            try:
                state = self.stored_optimizer(trial)
                if state is None:
                    continue
                found = _RestrictedUnpickler(io.BytesIO(state)).load()
                if isinstance(found, cmaes.CMA):
                    return found
                raise TypeError(f"it is of the type {type(found).__name__}")
            except Exception as error:  # reading a damaged pickle can raise anything
                kind = type(error).__name__
                _logger.warning(
                    f"The state of CMA-ES in trial {trial.number} cannot be read ({kind}: "
                    f"{error}); an earlier state is used."
                )
        return None


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickle optimizers, numbers and arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class or function by name."""
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a part of an optimizer")
        return super().find_class(module, name)
