"""Strategies for tables and labels, most of which are unusual in one way."""

from __future__ import annotations

from collections.abc import Callable
import datetime
from typing import Any

from hypothesis import strategies as st
import numpy as np
import pandas as pd

Series = pd.Series  # whose type parameter exists for type checkers only
Draw = Callable[[st.SearchStrategy[Any]], Any]

ODD_TEXTS = (
    *("", " ", "?", "NA", "nan", "None", "inf", "-inf", "1e400", "1e-400", "0x10", "1_000"),
    *("True", "false", "1", "0", "1,5", "2024-02-30", "2024-02-29", "31.12.2024", "9999-12-31"),
    *("0001-01-01", "12:30", "2024-01-01T00:00:00+01:00", "\ud800", "\x00", "a\nb", "<b>", "²"),
    *("9" * 25, "١٢", "1e5", "Infinity", "3.0", "03", "+3", "--3", "x" * 300, "é", "10:00", "t"),
)
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=4), st.sampled_from("abc"))
words = st.one_of(
    st.sampled_from([t for t in ODD_TEXTS if t != "\ud800"]), st.text("abé ", max_size=3)
)
HUGE = (0.0, -0.0, 1e308, -1e308, 5e-324, 1e-300, 1e30, 1e38, 3.5e38, 1e100, 1e154, np.nan)
floats = st.one_of(st.floats(-3, 3), st.sampled_from(HUGE), st.floats())
whole = st.one_of(st.integers(-3, 3), st.integers(), st.integers(-(2**63), 2**64))
maybe = st.one_of(st.none(), st.integers(0, 3))
days = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2250, 1, 1))
spans = st.timedeltas(datetime.timedelta(-9999), datetime.timedelta(9999))
odd = st.one_of(
    st.sampled_from([None, pd.NA, pd.NaT, np.nan, int, object(), pd.Series([1, 2])]),
    st.sampled_from([[], [1, 2], {}, {"a": 1}, (), (0,), {1}, b"", b"a", range(2), 1j]),
    st.sampled_from([np.array([1]), np.array([1, 2]), np.str_("a"), np.datetime64("2024-01-01")]),
    st.sampled_from([pd.Period("2024-01"), pd.Interval(0, 1), pd.Timedelta(1), np.bool_(True)]),
    st.sampled_from(
        [np.float32(0.1), np.int8(3), np.float16(1), pd.Timestamp(0), np.timedelta64(1, "D")]
    ),
    st.one_of(
        st.decimals(), st.fractions(), st.uuids(), st.complex_numbers(), st.binary(max_size=2)
    ),
    st.one_of(
        st.datetimes(timezones=st.sampled_from([None, datetime.UTC])), st.dates(), st.times()
    ),
    st.one_of(st.timedeltas(), st.booleans(), whole, floats, texts),
)


def _objects(values: list[Any]) -> Series[Any]:
    """Cells as they are, whatever they hold."""
    series = pd.Series([None] * len(values), dtype=object)
    for i, value in enumerate(values):
        series.iat[i] = value
    return series


def _of(dtype: Any) -> Callable[[list[Any]], Series[Any]]:
    return lambda values: pd.Series(values, dtype=dtype)


def _intervals(values: list[Any]) -> Series[Any]:
    return pd.Series(pd.arrays.IntervalArray.from_tuples([(v, v + 1) for v in values]))


def _unused(values: list[Any]) -> Series[Any]:
    return pd.Series(pd.Categorical(values, categories=[3, 2, 1, 0, 9.5, "x"], ordered=True))


# A column's cells, and what makes a column of them.
COLUMN_KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[list[Any]], Series[Any]]]] = {
    "numbers": (st.floats(-9, 9), pd.Series),
    "floats": (floats, pd.Series),
    "texts": (texts, _of(object)),
    "words": (words, _of("str")),
    "objects": (odd, _objects),
    "booleans": (st.booleans(), pd.Series),
    **{t: (st.integers(-3, 3), _of(t)) for t in ("int8", "int64", "float16", "float32")},
    **{t: (maybe, _of(t)) for t in ("Int8", "Int64", "Float64", "UInt64", "Float32", "category")},
    "uint64": (st.integers(0, 2**64 - 1), _of("uint64")),
    "boolean": (st.sampled_from([None, True, False]), _of("boolean")),
    "string": (st.sampled_from([None, "a", "b"]), _of("string")),
    **{t: (days, _of(t)) for t in ("datetime64[ns]", "M8[s]", "datetime64[ns, Europe/Berlin]")},
    "timedelta": (spans, _of("timedelta64[ns]")),
    "period": (st.sampled_from(["2024-01", "2025-02", None]), _of("period[M]")),
    "sparse floats": (st.sampled_from([0.0, 1.0, np.nan]), _of(pd.SparseDtype("float64"))),
    "sparse integers": (st.integers(0, 1), _of(pd.SparseDtype("int64"))),
    "complex": (st.complex_numbers(), _of(complex)),
    "intervals": (st.integers(0, 2), _intervals),
    "unused levels": (maybe, _unused),
    "missing": (st.sampled_from([None, np.nan, pd.NaT, pd.NA, "?"]), _objects),
    "constant": (st.just(1.5), pd.Series),
}
POOLS = {
    kind: st.lists(cells, min_size=1, max_size=6) for kind, (cells, _) in COLUMN_KINDS.items()
}
names = st.one_of(
    st.sampled_from(["a", "b", "", " a", "<script>", "a\nb", "x0", "0", "\x00", "\ud800"]),
    st.one_of(st.integers(0, 2), st.floats(), st.none(), st.booleans(), st.dates()),
    st.one_of(st.tuples(st.sampled_from("ab"), st.integers(0, 1)), st.binary(max_size=2)),
)


@st.composite
def columns(draw: Draw, rows: int, kind: str | None = None) -> Series[Any]:
    """Draw a column of any pandas type with repeated values."""
    kind = kind or draw(st.sampled_from([*COLUMN_KINDS]))
    pool = draw(POOLS[kind])
    places = np.random.default_rng(draw(st.integers(0, 9))).integers(len(pool), size=rows)
    return COLUMN_KINDS[kind][1]([pool[place] for place in places])


@st.composite
def frames(draw: Draw, rows: int | None = None) -> pd.DataFrame:
    """Draw a table, usually with a numeric column."""
    if rows is None:
        rows = draw(st.sampled_from([12, 24, 16, 12, 20, 24, 8, 5, 3, 2, 1, 0]))
    kinds = draw(st.sampled_from([["numbers"], ["numbers"], ["numbers", "words"], []]))
    made = [draw(columns(rows, kind)) for kind in kinds]
    made += [draw(columns(rows)) for _ in range(draw(st.integers(0, 2)))]
    frame = pd.DataFrame(dict(enumerate(made)), index=range(rows))
    frame.columns = pd.Index(list("abcdef"[: len(made)]), dtype=object)
    change = draw(
        st.sampled_from([*["none"] * 8, "names", "rows", "columns", "repeated", "dates"])
    )
    if change == "names":
        labels = draw(st.lists(names, min_size=len(made), max_size=len(made)))
        frame.columns = pd.Index(labels, dtype=object, tupleize_cols=False)
    elif change == "rows":
        frame.index = pd.MultiIndex.from_arrays([range(rows), ["r"] * rows])
    elif change == "columns" and made:
        frame.columns = pd.MultiIndex.from_arrays([range(len(made)), ["c"] * len(made)])
    elif change == "repeated":
        frame.index = pd.Index([0] * rows)
    elif change == "dates":
        frame.index = pd.date_range("2024", periods=rows)
    return frame


def learnable(rows: int) -> list[Any]:
    """Return strategies for labels that most tables can be trained with."""
    return [
        [i % 2 for i in range(rows)],
        ["no" if i % 3 else "yes" for i in range(rows)],
        np.arange(rows) ** 1.5,
        np.arange(rows) % 4 == 0,
        pd.Series(np.arange(rows) % 3).astype("category"),
        pd.Series(np.arange(rows) % 2, dtype="Int64"),
        pd.Series(["no" if i % 2 else "yes" for i in range(rows)], dtype="string").to_frame(),
    ]


@st.composite
def targets(draw: Draw, rows: int) -> Any:
    """Draw labels, usually trainable ones."""
    if draw(st.integers(0, 3)):
        return draw(st.sampled_from(learnable(rows)))
    made = draw(columns(rows))
    return draw(st.sampled_from([made, made.to_frame(), list(made), made.to_numpy()]))


@st.composite
def tables(draw: Draw) -> tuple[pd.DataFrame, Any]:
    """Draw a table and its labels, rarely of different lengths."""
    frame = draw(frames())
    rows = draw(st.sampled_from([len(frame)] * 19 + [len(frame) + 1]))
    return frame, draw(targets(rows))
