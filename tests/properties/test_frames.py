"""Any table is rejected by a one-line error, or encoded correctly."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pandas as pd

from optuna_nnhp import optimize
from optuna_nnhp.data.columns import numeric_features
from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.target import Target
from optuna_nnhp.templates import DNNTemplate
from tests.properties.clear import example_share
from tests.properties.clear import outcome
from tests.properties.tables import frames
from tests.properties.tables import tables

TINY = {"epochs": 1, "width": 16}


def check_prepared(frame: pd.DataFrame, problem: DNNTemplate) -> None:
    """What the network is given is the table's, finite, and does not hang on other rows."""
    data = problem.data
    assert len(data.train_X) + len(data.valid_X) == len(frame)
    for array in (data.train_X, data.valid_X):
        assert array.dtype == np.float32 and np.isfinite(array).all()
        assert np.abs(array).max(initial=0) <= 3.0 + 1e-6
    assert np.isfinite(data.train_y).all() and np.isfinite(data.valid_y).all()
    assert (data.train_X.min(axis=0) != data.train_X.max(axis=0)).all()
    whole = data.preprocessor.transform(frame)
    parts = np.concatenate([data.train_X, data.valid_X])
    assert sorted(map(bytes, whole)) == sorted(map(bytes, parts))
    for row in {0, len(frame) // 2, len(frame) - 1}:
        one = data.preprocessor.transform(frame.iloc[[row]])
        np.testing.assert_array_equal(one[0], whole[row])
    text = json.dumps(data.preprocessor.to_json(), allow_nan=False)
    again = Preprocessor.from_json(json.loads(text))
    np.testing.assert_array_equal(again.transform(frame), whole)
    text = json.dumps(data.target.to_json(), allow_nan=False)
    assert Target.from_json(json.loads(text)) == data.target
    json.dumps(problem.description, allow_nan=False)


def check_meaning(frame: pd.DataFrame, preprocessor: Preprocessor) -> None:
    """Numbers keep their order, and categories are told apart."""
    features = preprocessor.transform(frame)
    for column in preprocessor.columns:
        if column.kind == "numeric" and column.parts and column.name in preprocessor.feature_names:
            values, absent = numeric_features(column, frame[column.name])
            feature = features[~absent[:, 0] if absent.ndim > 1 else ~absent]
            place = preprocessor.feature_names.index(column.name)
            order = np.argsort(values[~absent][:, 0], kind="stable")
            assert (np.diff(feature[order, place]) >= 0).all()
        elif column.kind == "categorical":
            places = [
                i
                for i, name in enumerate(preprocessor.feature_names)
                if name in {f"{column.name}={c}" for c in column.categories}
            ]
            assert set(np.unique(features[:, places])) <= {0.0, 1.0}


@given(tables())
def test_any_table_is_rejected_or_encoded_correctly(table: tuple[pd.DataFrame, Any]) -> None:
    frame, y = table
    problem = outcome(lambda: DNNTemplate(frame, y, device="cpu"))
    if problem is not None:
        check_prepared(frame, problem)


@given(tables())
def test_order_of_rows_has_no_effect(table: tuple[pd.DataFrame, Any]) -> None:
    frame = outcome(lambda: as_frame(table[0]))
    if frame is None:
        return
    one = outcome(lambda: Preprocessor.fit(frame))
    two = outcome(lambda: Preprocessor.fit(frame[::-1]))
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        assert one.columns == two.columns
        np.testing.assert_allclose(one.transform(frame), two.transform(frame), atol=1e-5)


@given(tables())
def test_numbers_keep_their_order_and_texts_stay_distinct(
    table: tuple[pd.DataFrame, Any],
) -> None:
    frame = outcome(lambda: as_frame(table[0]))
    preprocessor = None if frame is None else outcome(lambda: Preprocessor.fit(frame))
    if preprocessor is not None and frame is not None:
        check_meaning(frame, preprocessor)


@example_share(0.15)
@given(tables())
def test_network_trains_on_any_accepted_table(table: tuple[pd.DataFrame, Any]) -> None:
    frame, y = table
    result = outcome(
        lambda: optimize("dnn", frame, y, n_trials=1, storage=None, fixed=TINY, device="cpu")
    )
    if result is None:
        return
    assert np.isfinite(result.best_value)
    predicted = result.predict(frame)
    assert predicted.shape == (len(frame),)
    if result.predictor.target.task == "regression":
        assert np.isfinite(predicted).all()
    else:
        assert set(predicted.tolist()) <= set(result.predictor.classes)
        np.testing.assert_allclose(result.predict_proba(frame).sum(axis=1), 1.0)


@given(tables(), st.data())
def test_model_predicts_from_any_other_table_or_rejects_it(
    table: tuple[pd.DataFrame, Any], data: st.DataObject
) -> None:
    frame = outcome(lambda: as_frame(table[0]))
    preprocessor = None if frame is None else outcome(lambda: Preprocessor.fit(frame))
    if preprocessor is None or frame is None:
        return
    other = data.draw(frames())
    other.columns = [*frame.columns, *"wxyz"][: len(other.columns)]
    features = outcome(lambda: preprocessor.transform(other))
    if features is not None:
        assert features.shape == (len(other), len(preprocessor.feature_names))
        assert np.isfinite(features).all()
