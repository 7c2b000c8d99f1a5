"""Tuning methods by name."""

from __future__ import annotations

from collections.abc import Callable
import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler

from optuna_nnhp.messages import unknown
from optuna_nnhp.search.history import HistorySampler

# Trials before Bayesian search learns: Optuna's own number, and one where trials are so long that
# there are few. Those after the first then lie around it, and it is a good one.
STARTUP, STARTUP_OF_FEW = 10, 1

METHODS: dict[str, Callable[[int | None], BaseSampler]] = {
    "bayes": lambda seed: HistorySampler(seed=seed),
    "bayes-gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed: RandomSampler(seed=seed),
    "quasi-random": lambda seed: _sobol(seed),
}


def _sobol(seed: int | None) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # a user cannot do anything about it
        return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def make_sampler(method: str, seed: int | None, *, few: bool = False) -> BaseSampler:
    """The Optuna sampler of a method.

    Args:
        method:
            ``"bayes"`` (Optuna's TPE, of a bounded number of trials), ``"bayes-gp"`` (its
            Gaussian process), ``"random"`` or ``"quasi-random"`` (scrambled Sobol points).
        seed:
            Seed of the sampler.
        few:
            Whether trials are long, so that there will be few; ``"bayes"`` then learns from the
            first on.

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> type(make_sampler("bayes", seed=0)).__name__
        'HistorySampler'
    """
    if method not in METHODS:
        raise unknown("a method", method, METHODS)
    if method == "bayes":
        return HistorySampler(seed=seed, n_startup_trials=STARTUP_OF_FEW if few else STARTUP)
    return METHODS[method](seed)
