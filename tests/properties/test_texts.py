"""Any text is rejected by a one-line error, or kept byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st

from optuna_nnhp.data.text import prepare_text
from optuna_nnhp.data.tokenizers import tokenizer_from_json
from optuna_nnhp.templates import GPTTemplate
from tests.properties.clear import example_share
from tests.properties.clear import outcome
from tests.properties.tables import odd

letters = st.one_of(st.text("ab \n", max_size=200), st.text(max_size=200))
SHORT = {"context": 8, "iterations": 2, "width": 16, "layers": 1}


@given(text=letters, times=st.sampled_from([1, 1, 9, 300]), kind=st.sampled_from(["char", "byte"]))
@example("", 1, "char")
@example("a", 1, "char")
@example("a\ud800b\n", 9, "byte")
@example("x" * 100_000, 1, "char")
def test_decoded_tokens_equal_the_text(text: str, times: int, kind: str) -> None:
    whole = text * times + "\n"  # with a line's end it is text, and no path
    data = outcome(lambda: prepare_text(whole))
    if data is None:
        return
    tokens = data.tokenize(kind)
    again = tokenizer_from_json(tokens.tokenizer.to_json())
    for part, ids in ((data.train, tokens.train), (data.valid, tokens.valid)):
        assert tokens.tokenizer.decode(ids) == again.decode(ids) == part
    assert data.train + data.valid == whole
    assert tokens.valid_bytes == len(data.valid.encode())


@given(
    content=st.one_of(st.binary(max_size=200), letters.map(lambda t: t.encode("utf-8", "replace")))
)
@example(content=b"\xef\xbb\xbf")
@example(content=b"ab\0cd" * 9)
@example(content="ab\n".encode("utf-16") * 9)
def test_file_of_any_bytes_is_rejected_or_decoded(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    for errors in ("strict", "replace", "ignore"):
        data = outcome(lambda errors=errors: prepare_text(path, errors=errors))  # type: ignore[misc]
        if data is not None and errors == "strict":
            marked = content.removeprefix(b"\xef\xbb\xbf")
            assert (data.train + data.valid).encode() == marked


@given(source=st.one_of(odd, st.lists(odd, max_size=2)), validation=st.one_of(st.just(0.1), odd))
def test_any_object_is_rejected_or_a_text(source: Any, validation: Any) -> None:
    data = outcome(lambda: prepare_text(source, validation=validation))
    if data is not None:
        assert data.train and data.valid


@example_share(0.5)
@given(text=letters, times=st.sampled_from([1, 9, 99]))
def test_any_text_is_rejected_or_prepared_for_a_study(text: str, times: int) -> None:
    problem = outcome(lambda: GPTTemplate(text * times + "\n", fixed=SHORT, device="cpu"))
    if problem is not None:
        member = problem.member(0, problem.defaults())
        assert problem.count_weights(member) > 0
