"""The densities of Optuna's TPE, computed on whole arrays."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedCategoricalDistributions
import torch

Array = NDArray[Any]


class VectorizedParzenEstimator(_ParzenEstimator):
    """Optuna's mixture of one kernel for each known trial, with scipy's special functions.

    Optuna fits it, and calls a Python function for every bound of every kernel of an integer;
    this one draws the same numbers (to 1e-8: Optuna's quantiles are not more precise) and gives
    the same densities, 15 times as fast.

    Shape:
        - One kernel for each of n observations and one for the prior, d numerical and c
          categorical parameters, s samples.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        mixture = self._mixture_distribution
        self._weights = mixture.weights  # (n + 1,)
        pairs = list(zip(self._search_space, mixture.distributions, strict=True))
        self._choice_weights = {
            name: kernels.weights  # (n + 1, choices)
            for name, kernels in pairs
            if isinstance(kernels, _BatchedCategoricalDistributions)
        }
        numerical: list[tuple[str, Any]] = [p for p in pairs if p[0] not in self._choice_weights]
        self._numerical = [name for name, _ in numerical]
        kernels = [kernels for _, kernels in numerical]
        self._is_log = np.array([k.is_log for k in kernels], dtype=bool)  # (d,)
        self._step = np.array([k.step for k in kernels])
        self._bounds = np.array([(k.low, k.high) for k in kernels]).reshape(-1, 2).T  # (2, d)
        self._low = np.array([k.adapted_low for k in kernels])
        self._high = np.array([k.adapted_high for k in kernels])
        shape = (len(kernels), len(self._weights))
        self._mu = np.array([k.mu for k in kernels]).reshape(shape).T  # (n + 1, d)
        self._sigma = np.array([k.sigma for k in kernels]).reshape(shape).T
        # Of integers, by parameter and value: a density serves for several proposals.
        self._log_mass_cache: dict[int, dict[float, Array]] = defaultdict(dict)

    def sample(self, rng: np.random.RandomState, size: int) -> dict[str, Array]:
        """Draw from the mixture.

        Args:
            rng:
                Random numbers, used in the order in which Optuna uses them.
            size:
                Samples.

        Returns:
            Internal values, by name.

        Shape:
            - Of each value: ``(size,)``.
        """
        kernel = rng.choice(len(self._weights), p=self._weights, size=size)
        drawn: dict[str, Array] = {}
        for name, weights in self._choice_weights.items():
            uniform = rng.rand(size)
            shares = weights[kernel].cumsum(axis=1)
            shares[:, -1] = 1.0  # not 1 - 1e-16
            drawn[name] = (shares < uniform[:, None]).sum(axis=1).astype(float)
        if self._numerical:
            uniform = rng.uniform(size=(len(self._numerical), size)).T
            numbers = self._truncated_normal_quantiles(
                self._mu[kernel], self._sigma[kernel], uniform
            )
            drawn |= dict(zip(self._numerical, numbers.T, strict=True))
        return {name: drawn[name] for name in self._search_space}

    def _truncated_normal_quantiles(self, mu: Array, sigma: Array, uniform: Array) -> Array:
        """Quantiles of truncated normal distributions, on the grid of those that have a step."""
        from scipy.special import log_ndtr  # type: ignore[import-untyped]  # slow to import
        from scipy.special import ndtri_exp

        left, right = (self._low - mu) / sigma, (self._high - mu) / sigma
        flip = left > 0  # the left tail has all the digits
        lowest = np.where(flip, -right, left)
        share = np.log(np.where(flip, 1.0 - uniform, uniform))
        normal = ndtri_exp(np.logaddexp(log_ndtr(lowest), share + _log_normal_mass(left, right)))
        numbers: Array = np.clip(
            np.where(flip, -normal, normal) * sigma + mu, self._low, self._high
        )
        numbers[:, self._is_log] = np.exp(numbers[:, self._is_log])
        low, high = self._bounds
        step = np.where(self._step > 0, self._step, 1.0)
        grid = np.clip(low + np.round((numbers - low) / step) * step, low, high)
        numbers[:, self._step > 0] = grid[:, self._step > 0]
        return numbers

    def log_pdf(self, samples_dict: dict[str, Array]) -> Array:
        """Logarithm of the density at samples.

        Args:
            samples_dict:
                Internal values, by name.

        Shape:
            - Of each value and of the result: ``(s,)``.
        """
        size = len(next(iter(samples_dict.values())))
        total = np.tile(np.log(self._weights), (size, 1))  # (s, n + 1)
        for name, weights in self._choice_weights.items():
            total += np.log(weights).T[samples_dict[name].astype(int)]
        if self._numerical:
            x = np.array([samples_dict[name] for name in self._numerical]).T  # (s, d)
            total += self._log_pdf_numerical(x)
        most = total.max(axis=1, keepdims=True)
        most[np.isneginf(most)] = 0.0
        with np.errstate(divide="ignore"):
            logarithm: Array = np.log(np.exp(total - most).sum(axis=1)) + most[:, 0]
        return logarithm

    def _log_pdf_numerical(self, x: Array) -> Array:
        """Sum over the numerical parameters of every kernel's log density: ``(s, n + 1)``."""
        mu, sigma, stepped = self._mu, self._sigma, self._step > 0
        constant = -_log_normal_mass((self._low - mu) / sigma, (self._high - mu) / sigma).sum(
            axis=1
        )
        smooth = ~stepped
        constant -= np.log(sigma[:, smooth] * np.sqrt(2 * np.pi)).sum(axis=1)
        logs = np.where(self._is_log, np.log(np.where(self._is_log, x, 1.0)), x)
        total: Array = constant - 0.5 * _squared_distances(
            logs[:, smooth], mu[:, smooth], sigma[:, smooth]
        )
        # What is too far away to count beside the prior need not be exact, unless all is far.
        is_near = bool(((mu >= self._low) & (mu <= self._high)).all())
        log_mass = _fast_log_normal_mass if is_near else _log_normal_mass
        for place in np.flatnonzero(stepped).tolist():
            values, inverse = np.unique(x[:, place], return_inverse=True)
            known = self._log_mass_cache[place]
            new = np.array([value for value in values.tolist() if value not in known])
            half = self._step[place] / 2
            ends = np.array([new - half, new + half])
            ends = np.log(ends) if self._is_log[place] else ends
            left, right = (ends[:, :, None] - mu[:, place]) / sigma[:, place]
            known.update(zip(new.tolist(), log_mass(left, right), strict=True))
            total += np.array([known[value] for value in values.tolist()])[inverse]
        return total


def _squared_distances(x: Array, mu: Array, sigma: Array) -> Array:
    """Sum over d of ((x - mu) / sigma)²: ``(s, d), (n, d), (n, d) -> (s, n)``."""
    center = mu.mean(axis=0) if len(mu) else 0.0  # so that little cancels in the products
    x, mu, precision = x - center, mu - center, sigma**-2.0
    products: Array = x**2 @ precision.T - 2 * x @ (mu * precision).T
    products += (mu**2 * precision).sum(axis=1)
    return np.maximum(products, 0.0)


def _normal_mass(left: Array, right: Array) -> Array:
    """The standard normal's mass between bounds; torch's erfc is 7 times as fast as scipy's."""
    flip = right < 0  # the tails have all the digits on the right
    bounds = np.array([np.where(flip, -right, left), np.where(flip, -left, right)]) / np.sqrt(2)
    low, high = torch.special.erfc(torch.from_numpy(bounds)).numpy()
    mass: Array = 0.5 * (low - high)
    return mass


def _fast_log_normal_mass(left: Array, right: Array) -> Array:
    """As `_log_normal_mass`, but minus infinity where the mass is under 1e-300."""
    with np.errstate(divide="ignore"):
        logarithm: Array = np.log(_normal_mass(left, right))
    return logarithm


def _log_normal_mass(left: Array, right: Array) -> Array:
    """Logarithm of the standard normal's mass between bounds, however far they are.

    Example:
        >>> _log_normal_mass(np.array([-1.0, 40.0]), np.array([1.0, 41.0])).round(4).tolist()
        [-0.3817, -804.6084]
    """
    mass = _normal_mass(left, right)
    tiny = mass < 1e-290
    mass[tiny] = 1.0
    logarithm: Array = np.log(mass)
    if tiny.any():
        from scipy.special import log_ndtr  # slow to import

        flip = left[tiny] > 0
        low = log_ndtr(np.where(flip, -right[tiny], left[tiny]))
        high = log_ndtr(np.where(flip, -left[tiny], right[tiny]))
        logarithm[tiny] = high + np.log1p(-np.exp(low - high))
    return logarithm
