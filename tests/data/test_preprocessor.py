from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.preprocessing import OneHotEncoder
from sklearn.preprocessing import StandardScaler

from optuna_nnhp.data import columns
from optuna_nnhp.data import preprocessor as module
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.scaling import soft_clip


def mixed(n: int, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": random.normal(40, 10, n),
            "tail": random.standard_cauchy(n),
            "count": random.integers(0, 9, n),
            "text number": random.integers(0, 9, n).astype(str),
            "flag": random.choice(np.array([True, False, None], dtype=object), n),
            "town": random.choice(["Ulm", "Rome", "Oslo"], n),
            "kind": pd.Categorical(random.choice(["a", "b"], n)),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(random.integers(0, 999, n), "h"),
            "written": pd.Series(random.integers(10, 29, n)).map("2024-01-{}".format),
            "same": 5,
        }
    )
    for name in ("age", "town", "day", "written"):
        frame.loc[random.random(n) < 0.1, name] = None
    return frame


def restored(preprocessor: Preprocessor) -> Preprocessor:
    return Preprocessor.from_json(json.loads(json.dumps(preprocessor.to_json(), allow_nan=False)))


@pytest.mark.parametrize("limit", [4, 20])
def test_features_equal_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(columns, "MAX_CATEGORIES", limit)
    random = np.random.default_rng(0)
    numbers = [f"n{i}" for i in range(3)]
    frame = pd.DataFrame(random.normal(10, 3, (400, 3)), columns=pd.Index(numbers))
    frame = frame.mask(random.random(frame.shape) < [0.1, 0.0, 0.3])
    # Counts fall steadily, so that no tie decides which categories are frequent.
    frame["c"] = np.repeat(list("hgfedcba"), [92, 78, 64, 52, 42, 32, 24, 16])
    frame["d"] = random.choice(["x", "y", "z"], 400)
    train, other = frame.iloc[::2], frame.iloc[1::2].copy()
    other.iloc[0, 3:] = ["unseen", "unseen"]
    oracle = ColumnTransformer(
        [
            (
                "n",
                make_pipeline(
                    SimpleImputer(strategy="median"),
                    StandardScaler(),
                    FunctionTransformer(soft_clip),
                ),
                numbers,
            ),
            ("m", MissingIndicator(), numbers),
            (
                "c",
                OneHotEncoder(
                    handle_unknown="infrequent_if_exist",
                    max_categories=limit,
                    sparse_output=False,
                ),
                ["c", "d"],
            ),
        ]
    )
    expected = oracle.fit(train).transform(other).astype(np.float32)
    preprocessor = Preprocessor.fit(train)
    assert len(preprocessor.feature_names) == expected.shape[1]
    np.testing.assert_array_equal(preprocessor.transform(other), expected)


def test_feature_names_match_columns() -> None:
    frame = mixed(500, seed=0)
    preprocessor = Preprocessor.fit(frame)
    features = preprocessor.transform(frame)
    assert features.dtype == np.float32
    assert features.flags.c_contiguous
    assert np.isfinite(features).all()
    assert features.shape == (500, len(preprocessor.feature_names))
    assert preprocessor.describe() == (
        "10 columns: 4 numeric, 1 boolean, 2 categorical, 2 date, 1 constant "
        f"-> {features.shape[1]} features"
    )
    names = preprocessor.feature_names
    assert len(set(names)) == len(names)
    assert {"age", "age=<missing>", "flag=<missing>", "town=Rome", "town=<missing>"} < set(names)
    assert {"day.month", "day.hour", "day.days", "written.day", "day=<missing>"} < set(names)
    assert not {"same", "day.year", "written.month", "count=<missing>"} & set(names)
    missing = features[:, names.index("age=<missing>")]
    np.testing.assert_array_equal(missing, frame["age"].isna())
    np.testing.assert_array_equal(features[:, names.index("town=Ulm")], frame["town"] == "Ulm")


def test_restored_preprocessor_gives_the_same_bits() -> None:
    preprocessor = Preprocessor.fit(mixed(500, seed=0))
    again = restored(preprocessor)
    other = mixed(300, seed=1)
    assert again.feature_names == preprocessor.feature_names
    assert again.transform(other).tobytes() == preprocessor.transform(other).tobytes()
    assert again.to_json() == preprocessor.to_json()


def test_features_of_a_row_do_not_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessor = Preprocessor.fit(mixed(500, seed=0))
    other = mixed(50, seed=1)
    together = preprocessor.transform(other)
    alone = [preprocessor.transform(other.iloc[[i]]) for i in range(50)]
    np.testing.assert_array_equal(np.concatenate(alone), together)
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    np.testing.assert_array_equal(preprocessor.transform(other), together)


def test_order_and_extra_columns_do_not_matter() -> None:
    frame = mixed(100, seed=0)
    preprocessor = Preprocessor.fit(frame)
    shuffled = frame[frame.columns[::-1]].assign(extra=1).drop(columns="same")
    np.testing.assert_array_equal(preprocessor.transform(shuffled), preprocessor.transform(frame))


def test_arrays_are_matched_by_position() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 5.0]})
    preprocessor = Preprocessor.fit(frame)
    expected = preprocessor.transform(frame)
    np.testing.assert_array_equal(preprocessor.transform(frame.to_numpy()), expected)
    with pytest.raises(ValueError, match="X must have 2 columns, but has 3"):
        preprocessor.transform(np.zeros((2, 3)))


def test_missing_and_unseen_cells_are_transformed() -> None:
    frame = mixed(300, seed=0).dropna()
    preprocessor = Preprocessor.fit(frame)
    empty = pd.DataFrame({name: [None, np.nan] for name in frame.columns})
    assert np.isfinite(preprocessor.transform(empty)).all()
    strange = pd.DataFrame({name: ["never", "seen"] for name in frame.columns})
    features = preprocessor.transform(strange)
    np.testing.assert_array_equal(features, preprocessor.transform(empty))
    towns = [i for i, name in enumerate(preprocessor.feature_names) if name.startswith("town=")]
    assert (features[:, towns] == 0).all()


def test_missing_booleans_become_the_more_frequent_value() -> None:
    flags = pd.DataFrame({"b": [True, True, False, None]})
    preprocessor = Preprocessor.fit(flags)
    features = preprocessor.transform(flags)
    assert preprocessor.feature_names == ["b", "b=<missing>"]
    assert features[:, 1].tolist() == [0, 0, 0, 1]
    assert features[3, 0] == features[0, 0] > features[2, 0]


def test_constant_columns_are_dropped(log: pytest.LogCaptureFixture) -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [7, 7, 7], "c": ["x", "x", "x"]})
    preprocessor = Preprocessor.fit(frame)
    assert preprocessor.feature_names == ["a"]
    assert log.messages == ["Dropped columns that do not vary in the training part: 'b', 'c'."]


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ({"a": [1, 2], "b": [None, None]}, "Every column of X .* these have none: 'b'"),
        ({"a": [1, np.inf]}, "column 'a' of X has 1 infinite, the first in row 1"),
        ({"a": [1, 1], "b": ["x", "x"]}, "must vary .* but none of 'a', 'b' does"),
        ({"a": [[1], [2]]}, "'a' holds list"),
    ],
)
def test_fit_rejects_invalid_tables(X: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessor.fit(pd.DataFrame(X))


def test_transform_rejects_invalid_tables() -> None:
    preprocessor = Preprocessor.fit(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    with pytest.raises(ValueError, match=r"X must have .* but lacks 'b'"):
        preprocessor.transform(pd.DataFrame({"a": [1]}))
    with pytest.raises(ValueError, match="column 'a' of X_new has 1 infinite"):
        preprocessor.transform(pd.DataFrame({"a": [np.inf], "b": ["x"]}), "X_new")


@pytest.mark.parametrize("distinct", [1_000_000, 300_000])
def test_number_of_categories_is_bounded(log: pytest.LogCaptureFixture, distinct: int) -> None:
    n = 1_000_000
    numbers = np.random.default_rng(0).permutation(n) % distinct
    frame = pd.DataFrame({"id": [f"row {i}" for i in numbers], "v": np.arange(n)})
    start = time.perf_counter()
    preprocessor = Preprocessor.fit(frame)
    spent = time.perf_counter() - start
    width = len(preprocessor.feature_names)
    assert preprocessor.transform(frame.iloc[:1000]).shape == (1000, width)
    assert width == (1 if distinct == n else columns.MAX_CATEGORIES + 1)
    assert len(json.dumps(preprocessor.to_json())) < 5000
    warnings = [record for record in log.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"'id' has {distinct:,} distinct texts" in warnings[0].getMessage()
    # About 1.5 s where it was measured; the bound is for slower machines.
    assert spent < 10


def test_large_tables_are_fast() -> None:
    n = 48842
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.integers(0, 90, (n, 6)), columns=pd.Index(list("abcdef")))
    for i, size in enumerate([9, 16, 7, 15, 6, 5, 2, 42]):
        frame[f"c{i}"] = random.choice([f"value {j}" for j in range(size)], n)
    start = time.perf_counter()
    preprocessor = Preprocessor.fit(frame)
    features = preprocessor.transform(frame)
    # About 0.3 s where it was measured.
    assert time.perf_counter() - start < 5
    assert features.shape == (n, 6 + 102)
    tracemalloc.start()
    preprocessor.transform(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * features.nbytes
