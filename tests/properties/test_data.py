"""Any object, array and file is rejected by a one-line error, or read correctly."""

from __future__ import annotations

import csv
import io
from pathlib import Path
import re
from typing import Any

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pandas as pd
import torch
from torch import nn

from optuna_nnhp.data.frames import MISSING_MARKERS
from optuna_nnhp.data.frames import read_csv
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import DNNTemplate
from tests.properties.clear import outcome
from tests.properties.tables import Draw
from tests.properties.tables import odd
from tests.properties.tables import targets

ROWS = 12
NUMBERS = np.random.default_rng(0).normal(size=(ROWS, 2))
LABELS = ["no", "yes"] * (ROWS // 2)


def _structured() -> Any:
    return np.zeros(ROWS, dtype=[("a", float), ("b", int)])


DATA: list[Any] = [
    *(None, 5, 1.5, True, b"bytes", {}, {"a": [1]}, set(), range(ROWS), (), [], [[]], [[], []]),
    *(iter([[1]]), object(), int, [None], [[None]] * ROWS, [[1, 2]] * ROWS, [[1], [1, 2]]),
    *(["ab"] * ROWS, [["a", 1.5]] * ROWS, [[[1]]] * ROWS, [object()] * ROWS, [{"a": 1}] * ROWS),
    *(NUMBERS.tolist(), NUMBERS, NUMBERS.T, NUMBERS[:, 0], NUMBERS[None], NUMBERS[:0]),
    *(NUMBERS.astype(t) for t in ("float16", "float32", "longdouble", "complex", "int8", "U4")),
    *(NUMBERS.astype(t) for t in ("object", "S4", "bool", "uint64", ">f8")),
    *(np.array(3), np.array(["x"]), _structured(), _structured().view(np.recarray)),
    *(np.ma.masked_less(NUMBERS, 0), np.full((ROWS, 2), np.nan), np.full((ROWS, 2), np.inf)),
    *(np.zeros((ROWS, 0)), np.zeros((ROWS, 2), dtype="M8[s]"), np.zeros((ROWS, 2), "m8[s]")),
    *(np.asfortranarray(NUMBERS), NUMBERS[::-1], np.broadcast_to(NUMBERS[:1], (ROWS, 2))),
    *(pd.Series(NUMBERS[:, 0]), pd.Index(range(ROWS)), pd.DataFrame(), pd.DataFrame(index=[1])),
    *(torch.tensor(NUMBERS), torch.tensor(NUMBERS, requires_grad=True), torch.zeros(())),
    *(torch.tensor(NUMBERS).to(t) for t in (torch.bfloat16, torch.float16, torch.complex64)),
    *(torch.tensor(NUMBERS).to_sparse(), torch.zeros(ROWS, 2, dtype=torch.bool)),
    *(torch.zeros(ROWS, 2, device="meta"), torch.zeros(0, 2), torch.zeros(ROWS, 2, 2)),
    *("no such file", "x.csv", "", "\0", ".", "a\nb", "~", Path("."), Path("no.csv")),
]
data = st.sampled_from(DATA)


@given(data, st.one_of(st.just(LABELS), st.just(LABELS), data, targets(ROWS)))
def test_any_object_is_rejected_or_a_table(X: Any, y: Any) -> None:
    problem = outcome(lambda: DNNTemplate(X, y, device="cpu"))
    if problem is not None:
        assert np.isfinite(problem.data.train_X).all()
        assert len(problem.data.train_X) + len(problem.data.valid_X) == ROWS


@given(data, st.one_of(st.just(LABELS), data))
def test_any_object_is_rejected_or_an_array(X: Any, y: Any) -> None:
    def network(params: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(2, 2))

    problem = outcome(lambda: CustomNetworkTemplate(network, X, y, device="cpu"))
    if problem is not None:
        assert np.isfinite(problem.data.train_X).all()
        assert len(problem.data.train_X) + len(problem.data.valid_X) == ROWS


@given(
    st.one_of(
        data,
        odd,
        st.tuples(data, data),
        st.lists(data, max_size=3),
        st.tuples(st.just(NUMBERS), data),
        st.tuples(data, st.just(LABELS)),
    )
)
def test_any_validation_is_rejected_or_used(validation: Any) -> None:
    problem = outcome(lambda: DNNTemplate(NUMBERS, LABELS, validation=validation, device="cpu"))
    if problem is not None:
        assert np.isfinite(problem.data.valid_X).all() and len(problem.data.valid_X) > 0


# --- CSV files ---

CELLS = (
    *(
        "1",
        "2.5",
        "-3e5",
        "a",
        "b c",
        '"a,b"',
        '"a\nb"',
        '"a ""b"""',
        '"',
        '""',
        "'a'",
        " 1",
        "1 ",
    ),
    *(
        "",
        "?",
        "NA",
        "é",
        "\ufeff",
        "\0",
        "\r",
        "\t",
        "#",
        ";",
        '1"2',
        "2024-01-01",
        "true",
        "x" * 99,
    ),
    *("1,2", "\\", '\\"', "\x0b", "\x1a", "\u2028", "1_0", "0x1", "inf", "nan", '"a" b', '"\n"'),
)
ENDS = ("\n", "\n", "\n", "\r\n", "\r", "\n\n", "")


@st.composite
def files(draw: Draw) -> bytes:
    """The bytes of a CSV file that may be damaged."""
    cell = st.one_of(st.sampled_from(["1", "2", "a", "b"]), st.sampled_from(CELLS))
    header = draw(
        st.sampled_from(["a,b", "a,b", "a,y", "a, b", '"a","b"', "b", "a;b", "a,b,a", ""])
    )
    rows = draw(st.lists(st.lists(cell, min_size=2, max_size=2), min_size=0, max_size=12))
    lines = [header, *(",".join(row) for row in rows)]
    if draw(st.integers(0, 3)) == 0:  # a row of another length
        lines.insert(draw(st.integers(0, len(lines))), ",".join(draw(st.lists(cell, max_size=4))))
    text = draw(st.sampled_from(ENDS)).join(lines) + draw(st.sampled_from(["\n", ""]))
    start = draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\n"]))
    code = draw(st.sampled_from(["utf-8"] * 6 + ["latin-1", "utf-16", "utf-16-le"]))
    return start + text.encode(code, "replace")


def plain_rows(content: bytes) -> list[list[str]]:
    """What Python's own reader takes a file for; short rows are filled up."""
    text = content.decode("utf-8-sig")
    rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True))
    rows = [row for row in rows if row]
    return [row if is_blank(row) else row + [""] * (len(rows[0]) - len(row)) for row in rows]


def is_blank(row: list[str]) -> bool:
    return len(row) == 1 and not row[0].strip()


def same_cell(ours: Any, theirs: str) -> bool:
    if pd.isna(ours):
        return theirs.strip() in MISSING_MARKERS
    if isinstance(ours, bool | np.bool_):
        return theirs.strip().lower() == str(bool(ours)).lower()
    if isinstance(ours, str):
        ends = re.compile("\r\n?")
        return ends.sub("\n", ours) == ends.sub("\n", theirs)
    return float(ours) == float(theirs)


@given(content=files())
@example(content=b"a,b\n1,x\n2,y\0z\n")
@example(content=b'a,b\n1,"x\n2,y\n')
@example(content=b"a,b\n1\n2,y\n3,x\n")
def test_any_file_is_rejected_or_read_unchanged(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    found = outcome(lambda: read_csv(path, "b"))
    if found is None:
        return
    X, y = found
    frame = X.assign(b=y)
    head, *rows = plain_rows(content)
    if any(map(is_blank, [head, *rows])):
        return  # an empty line, or a cell with nothing in it: nobody can tell
    assert sorted(name.strip() for name in head) == sorted(frame.columns)
    assert len(rows) == len(frame)
    for name in frame:
        place = [label.strip() for label in head].index(str(name))
        for ours, row in zip(frame[name], rows, strict=True):
            assert same_cell(ours, row[place]), (name, ours, row)


@given(content=files())
def test_any_file_is_rejected_or_prepared_for_a_study(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    problem = outcome(lambda: DNNTemplate(path, target="b", device="cpu"))
    if problem is not None:
        assert np.isfinite(problem.data.train_X).all()
