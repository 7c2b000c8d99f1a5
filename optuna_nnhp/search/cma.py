"""Optuna's CMA-ES, whose state in a study's storage cannot run code."""

from __future__ import annotations

import io
import pickle
from typing import Any

import optuna
from optuna.samplers import CmaEsSampler
from optuna.trial import FrozenTrial

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# What the state of an optimizer is made of: numbers and arrays.
ALLOWED_GLOBALS = {
    ("cmaes._cma", "CMA"),
    *((module, "_reconstruct") for module in ("numpy._core.multiarray", "numpy.core.multiarray")),
    *((module, "scalar") for module in ("numpy._core.multiarray", "numpy.core.multiarray")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
}


class SafeCmaEsSampler(CmaEsSampler):
    """`optuna.samplers.CmaEsSampler`, which reads no other pickle than one of its own.

    Optuna keeps the optimizer as a pickle among a trial's attributes, and whoever can write to
    the storage could have every process that goes on with the study run any code.

    Source:
        https://docs.python.org/3/library/pickle.html#restricting-globals
    """

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """The optimizer that a trial keeps, the latest first; None if there is none."""
        import cmaes  # slow to import

        for trial in reversed(completed_trials):
            names = [n for n in trial.system_attrs if n.startswith(self._attr_key_optimizer)]
            if not names:
                continue
            try:
                text = self._concat_optimizer_attrs({n: trial.system_attrs[n] for n in names})
                found = _RestrictedUnpickler(io.BytesIO(bytes.fromhex(text))).load()
                if isinstance(found, cmaes.CMA):
                    return found
                raise TypeError(f"it is of the type {type(found).__name__}")
            except Exception as error:  # what is no such pickle can raise anything
                kind = type(error).__name__
                _logger.warning(
                    f"The state of CMA-ES in trial {trial.number} must be what Optuna wrote, but "
                    f"it cannot be read ({kind}: {error}): an earlier one is taken."
                )
        return None


class _RestrictedUnpickler(pickle.Unpickler):
    """Makes optimizers of numbers and arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of this name, if it is one of those."""
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an optimizer")
        return super().find_class(module, name)
