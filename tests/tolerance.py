"""Tolerances of comparisons."""

from __future__ import annotations

from typing import Any

import torch

FLOAT64 = {"rtol": 1e-7, "atol": 1e-9}  # tens of steps in float64; sums in another order
FLOAT32 = {"rtol": 2e-3, "atol": 2e-3}  # the same in float32, as studies train
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}  # one function in float32
EXACT = {"rtol": 0.0, "atol": 0.0}


def assert_close(actual: Any, expected: Any, tolerance: dict[str, float]) -> None:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, check_dtype=False, **tolerance)
