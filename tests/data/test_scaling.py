from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray
import pytest
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.preprocessing import RobustScaler
from sklearn.preprocessing import StandardScaler

from optuna_nnhp.data.scaling import SOFT_CLIP_BOUND
from optuna_nnhp.data.scaling import Scaler
from optuna_nnhp.data.scaling import soft_clip


def holes(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    chosen = np.random.default_rng(seed).random(values.shape) < 0.1
    return np.where(chosen, np.nan, values)


def test_light_tails_equal_scikit_learn() -> None:
    random = np.random.default_rng(0)
    train = holes(random.normal([0, 50, -1e6], [1e-9, 3, 1e4], (500, 3)), 1)
    other = holes(random.normal([0, 50, -1e6], [1e-9, 3, 1e4], (100, 3)), 2)
    pipeline = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()).fit(train)
    scaler = Scaler.fit(train)
    assert not scaler.heavy.any()
    np.testing.assert_array_equal(scaler.transform(other), soft_clip(pipeline.transform(other)))


def test_heavy_tails_equal_scikit_learn() -> None:
    train = holes(np.random.default_rng(0).standard_cauchy((500, 2)) * [1, 1e5], 1)
    pipeline = make_pipeline(
        SimpleImputer(strategy="median"),
        RobustScaler(),
        FunctionTransformer(np.arcsinh),
        StandardScaler(),
    ).fit(train)
    scaler = Scaler.fit(train)
    assert scaler.heavy.all()
    np.testing.assert_array_equal(scaler.transform(train), soft_clip(pipeline.transform(train)))


def test_one_outlier_does_not_compress_other_values() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(1000, 1))
    values[0] = 1e12
    scaled = Scaler.fit(values).transform(values)
    assert np.std(scaled[1:]) > 0.2
    assert np.abs(scaled).max() <= SOFT_CLIP_BOUND


def test_soft_clip_is_linear_around_zero_and_bounded() -> None:
    values = np.array([0.0, 1e-3, 3.0, -3.0, 1e9, -1e300])
    expected = [
        0.0,
        1e-3,
        SOFT_CLIP_BOUND / 2**0.5,
        -SOFT_CLIP_BOUND / 2**0.5,
        SOFT_CLIP_BOUND,
        -SOFT_CLIP_BOUND,
    ]
    np.testing.assert_allclose(soft_clip(values), expected, rtol=1e-6)


@pytest.mark.parametrize("wild", [1e100, -1e100, 1e-100, 0.0])
def test_extremes_stay_within_bounds(wild: float) -> None:
    train = np.array([[1e-30, 0.0], [2e-30, 0.0], [3e-30, 1.0], [1e100, 0.0], [-1e100, 0.0]])
    scaler = Scaler.fit(train)
    scaled = scaler.transform(np.array([[wild, wild], [np.nan, np.nan]]))
    assert np.isfinite(scaled).all()
    assert np.abs(scaled).max() <= SOFT_CLIP_BOUND


def test_rare_large_values_are_compressed() -> None:
    gain = np.zeros((1000, 1))
    gain[:80, 0] = np.geomspace(100, 99999, 80)
    scaled = Scaler.fit(gain).transform(gain)
    assert len(np.unique(scaled)) == 81
    assert scaled.max() < SOFT_CLIP_BOUND


@pytest.mark.parametrize("heavy", [False, True])
def test_scaler_is_restored_from_json(heavy: bool) -> None:
    random = np.random.default_rng(0)
    values = random.standard_cauchy((300, 4)) if heavy else random.normal(size=(300, 4))
    values = holes(values / 3, 1)
    scaler = Scaler.fit(values)
    assert scaler.heavy.any() == heavy
    again = Scaler.from_json(json.loads(json.dumps(scaler.to_json())))
    np.testing.assert_array_equal(again.transform(values), scaler.transform(values))
    assert again.to_json() == scaler.to_json()
