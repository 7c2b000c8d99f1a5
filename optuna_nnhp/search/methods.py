"""Tuning methods by name."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler
from optuna.samplers import QMCSampler
from optuna.samplers import RandomSampler

from optuna_nnhp.errors import unknown_name
from optuna_nnhp.search.bounded_tpe import BoundedTPESampler
from optuna_nnhp.search.evolution import EvolutionSampler
from optuna_nnhp.search.zoom import ZoomSampler

# Finished trials before Bayesian search learns from them: Optuna's own number, and 1 if trials are
# so long that there are few. Later trials then lie around the first one, which is a good one.
N_STARTUP, N_STARTUP_IF_FEW = 10, 1


@dataclass(frozen=True)
class Method:
    """A tuning method: its sampler and its options.

    Args:
        sampler:
            Makes the sampler from the seed and its options. If the method's policy proposes
            values too (points of a grid, children of a population, steps along a gradient), the
            sampler proposes the other values.
        options:
            Names of the sampler's options in `method_options`.
        loop_options:
            Names of the policy's options in `method_options`.
    """

    sampler: Callable[..., BaseSampler]
    options: tuple[str, ...] = ()
    loop_options: tuple[str, ...] = ()


def _make_sobol_sampler(seed: int | None) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


# docs/guides/methods.md describes each method.
METHODS: dict[str, Method] = {
    # Each combination of the catalogue's grid values, or of the user's, once.
    "grid": Method(RandomSampler, loop_options=("partial",)),
    "random": Method(RandomSampler),
    "quasi-random": Method(_make_sobol_sampler),
    "zoom": Method(ZoomSampler, ("round_size", "patience")),
    "bayes": Method(BoundedTPESampler, ("n_startup_trials",)),
    "bayes-gp": Method(lambda seed: GPSampler(seed=seed, warn_independent_sampling=False)),
    # Learning rates and regularization follow the gradient of the validation loss; TPE proposes
    # the other values.
    "gradient": Method(BoundedTPESampler, loop_options=("starts", "rate")),
    "evolution": Method(EvolutionSampler, ("population_size",)),
    # Bad networks are replaced by copies of good ones; the first generation is random.
    "population": Method(RandomSampler, loop_options=("size", "generations")),
}


def make_sampler(
    method: str, seed: int | None, *, few: bool = False, options: Mapping[str, Any] | None = None
) -> BaseSampler:
    """Return the sampler of a method.

    Args:
        method:
            A key of `METHODS`.
        seed:
            Seed of the sampler.
        few:
            Whether trials are so long that there will be few; ``"bayes"`` then learns from the
            first trial on.
        options:
            Options of the sampler.

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> type(make_sampler("bayes", seed=0)).__name__
        'BoundedTPESampler'
    """
    if not isinstance(method, str) or method not in METHODS:
        raise unknown_name("a method", method, METHODS)
    given = dict(options or {})
    if METHODS[method].sampler is BoundedTPESampler:
        given.setdefault("n_startup_trials", N_STARTUP_IF_FEW if few else N_STARTUP)
    return METHODS[method].sampler(seed=seed, **given)


def split_options(
    method: str, options: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a method's options into those of its sampler and those of its policy.

    Raises:
        ValueError: If there is no such method, or it has no such option.

    Example:
        >>> split_options("population", {"size": 8})
        ({}, {'size': 8})
    """
    if not isinstance(method, str) or method not in METHODS:
        raise unknown_name("a method", method, METHODS)
    known = METHODS[method]
    given = dict(options or {})
    for name in given:
        if name not in (*known.options, *known.loop_options):
            raise unknown_name(
                f"an option of the method {method!r}", name, (*known.options, *known.loop_options)
            )
    mine = {n: v for n, v in given.items() if n in known.options}
    return mine, {n: v for n, v in given.items() if n not in mine}
