"""The Parzen estimator of Optuna's TPE, computed on whole arrays."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch

from optuna_nnhp.search._optuna_internals import ParzenEstimator
from optuna_nnhp.search._optuna_internals import is_categorical_kernel
from optuna_nnhp.search._optuna_internals import kernels_of

Array = NDArray[Any]


class VectorizedParzenEstimator(ParzenEstimator):
    """Optuna's mixture of one kernel for each known trial, computed with scipy's functions.

    Optuna's own class calls a Python function for every bound of every kernel of an integer. This
    one is fitted by Optuna, draws the same numbers (to 1e-8, the precision of Optuna's quantiles)
    and has the same densities, 15 times as fast.

    Shape:
        - One kernel for each of n observations and one for the prior, d numerical and c
          categorical parameters, s samples.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._weights, by_name = kernels_of(self)  # (n + 1,)
        self._names = list(by_name)
        self._choice_weights = {
            name: kernels.weights  # (n + 1, choices)
            for name, kernels in by_name.items()
            if is_categorical_kernel(kernels)
        }
        self._numerical = [name for name in by_name if name not in self._choice_weights]
        kernels = [by_name[name] for name in self._numerical]
        self._is_log = np.array([k.is_log for k in kernels], dtype=bool)  # (d,)
        self._step = np.array([k.step for k in kernels])
        self._bounds = np.array([(k.low, k.high) for k in kernels]).reshape(-1, 2).T  # (2, d)
        self._low = np.array([k.adapted_low for k in kernels])
        self._high = np.array([k.adapted_high for k in kernels])
        shape = (len(kernels), len(self._weights))
        self._mu = np.array([k.mu for k in kernels]).reshape(shape).T  # (n + 1, d)
        self._sigma = np.array([k.sigma for k in kernels]).reshape(shape).T
        # Log masses of integers, by parameter and value: a density serves several proposals.
        self._log_mass_cache: dict[int, dict[float, Array]] = defaultdict(dict)

    def sample(self, rng: np.random.RandomState, size: int) -> dict[str, Array]:
        """Draw samples from the mixture.

        Args:
            rng:
                Source of random numbers, which are drawn in Optuna's order.
            size:
                The number of samples.

        Returns:
            Internal values, by parameter name.

        Shape:
            - Of each value: ``(size,)``.
        """
        kernel = rng.choice(len(self._weights), p=self._weights, size=size)
        drawn: dict[str, Array] = {}
        for name, weights in self._choice_weights.items():
            uniform = rng.rand(size)
            shares = weights[kernel].cumsum(axis=1)
            shares[:, -1] = 1.0  # without rounding error
            drawn[name] = (shares < uniform[:, None]).sum(axis=1).astype(float)
        if self._numerical:
            uniform = rng.uniform(size=(len(self._numerical), size)).T
            numbers = self._truncated_normal_quantiles(
                self._mu[kernel], self._sigma[kernel], uniform
            )
            drawn |= dict(zip(self._numerical, numbers.T, strict=True))
        return {name: drawn[name] for name in self._names}

    def _truncated_normal_quantiles(self, mu: Array, sigma: Array, uniform: Array) -> Array:
        """Return quantiles of truncated normal distributions, rounded to steps of the range."""
        from scipy.special import log_ndtr  # type: ignore[import-untyped]  # slow to import
        from scipy.special import ndtri_exp

        left, right = (self._low - mu) / sigma, (self._high - mu) / sigma
        flip = left > 0  # the left tail is computed without loss of digits
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
        """Return the logarithm of the density at samples.

        Args:
            samples_dict:
                Internal values, by parameter name.

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
        """Return every kernel's log density, summed over numerical parameters: ``(s, n + 1)``."""
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
        # Kernels far away need not be exact beside the prior, unless all kernels are far away.
        is_near = bool(((mu >= self._low) & (mu <= self._high)).all())
        log_mass = _fast_log_normal_mass if is_near else _log_normal_mass
        for i in np.flatnonzero(stepped).tolist():
            values, inverse = np.unique(x[:, i], return_inverse=True)
            known = self._log_mass_cache[i]
            new = np.array([value for value in values.tolist() if value not in known])
            half = self._step[i] / 2
            ends = np.array([new - half, new + half])
            ends = np.log(ends) if self._is_log[i] else ends
            left, right = (ends[:, :, None] - mu[:, i]) / sigma[:, i]
            known.update(zip(new.tolist(), log_mass(left, right), strict=True))
            total += np.array([known[value] for value in values.tolist()])[inverse]
        return total


def _squared_distances(x: Array, mu: Array, sigma: Array) -> Array:
    """Return the sum over d of ((x - mu) / sigma)²: ``(s, d), (n, d), (n, d) -> (s, n)``."""
    center = mu.mean(axis=0) if len(mu) else 0.0  # reduces cancellation in the products
    x, mu, precision = x - center, mu - center, sigma**-2.0
    products: Array = x**2 @ precision.T - 2 * x @ (mu * precision).T
    products += (mu**2 * precision).sum(axis=1)
    return np.maximum(products, 0.0)


def _normal_mass(left: Array, right: Array) -> Array:
    """Return the standard normal's mass between bounds; torch's erfc is 7 times scipy's speed."""
    flip = right < 0  # the right tail is computed without loss of digits
    bounds = np.array([np.where(flip, -right, left), np.where(flip, -left, right)]) / np.sqrt(2)
    low, high = torch.special.erfc(torch.from_numpy(bounds)).numpy()
    mass: Array = 0.5 * (low - high)
    return mass


def _fast_log_normal_mass(left: Array, right: Array) -> Array:
    """Return `_log_normal_mass`, but minus infinity where the mass is below 1e-300."""
    with np.errstate(divide="ignore"):
        logarithm: Array = np.log(_normal_mass(left, right))
    return logarithm


def _log_normal_mass(left: Array, right: Array) -> Array:
    """Return the log of the standard normal's mass between bounds, however far out they are.

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
