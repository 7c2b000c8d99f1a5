from __future__ import annotations

from collections.abc import Callable
import json
import sys
from typing import Any

import numpy as np
import pytest

from optuna_nnhp.data import bpe
from optuna_nnhp.data.tokenizers import TOKENIZER_KINDS
from optuna_nnhp.data.tokenizers import ByteTokenizer
from optuna_nnhp.data.tokenizers import CharTokenizer
from optuna_nnhp.data.tokenizers import Tokenizer
from optuna_nnhp.data.tokenizers import fit_tokenizer
from optuna_nnhp.data.tokenizers import tokenizer_from_json

AWKWARD = (
    "It's\r\na\ttab,  two spaces \n\n\nÄ e\u0301 \u00a0 中文 🙂🏳️‍🌈 \ufeff\x00\x7f\U0010ffff end \n"
)
TEXTS = ["", "a", " ", "\n", "\r\n", "\t\t", "🙂", AWKWARD, AWKWARD[::-1]]
TRAIN = AWKWARD * 20


def made(kind: str, train: str = TRAIN, valid: str = "", vocabulary: int = 280) -> Tokenizer:
    if kind != "bpe":
        return fit_tokenizer(kind, train, valid)
    pytest.importorskip("tokenizers")
    return fit_tokenizer(kind, train, valid, vocabulary)


@pytest.fixture(scope="module")
def large() -> str:
    """A megabyte of words and indented lines."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeé"), rng.integers(1, 9))) for _ in range(500)]
    marks = rng.choice([" ", "\n", "\n\n", "\n  ", ", ", " \n"], 200_000)
    return "".join(
        words[i] + mark for i, mark in zip(rng.integers(0, 500, 200_000), marks, strict=True)
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_decode_restores_the_text(kind: str, text: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.kind == kind
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_tokenizers_are_restored_from_json(kind: str) -> None:
    tokenizer = made(kind, "abcabcabc" * 20, "é", 260)
    state = json.loads(json.dumps(tokenizer.to_json(), allow_nan=False))
    assert state["kind"] == kind
    again = tokenizer_from_json(state)
    assert again == tokenizer and again.size == tokenizer.size
    assert again.encode("abécab").tolist() == tokenizer.encode("abécab").tolist()
    assert again.decode(again.encode("abécab")) == "abécab"


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([-1], "must be from 0 to .*, but got -1"),
        ([10**6], "must be from 0 to .*, but got 1,000,000"),
        ([[0, 1]], r"whole numbers of shape \(tokens,\), but are int64 of shape \(1, 2\)"),
        ([0.5], "whole numbers .* but are float64"),
        (["a"], "whole numbers"),
    ],
)
def test_unknown_ids_are_rejected(kind: str, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Token ids must be .*{message}|{message}"):
        made(kind).decode(ids)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_no_ids_decode_to_empty_text(kind: str) -> None:
    assert made(kind).decode([]) == ""


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_lone_surrogates_are_rejected(kind: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 1\."):
        made(kind).encode("a\ud83d")


def test_each_character_has_a_token() -> None:
    tokenizer = CharTokenizer.fit("hello world")
    assert tokenizer == CharTokenizer(" dehlorw")
    assert tokenizer.size == 8
    assert tokenizer.encode("hello").tolist() == [3, 2, 4, 4, 5]


@pytest.mark.parametrize("strange", ["é", "z", "🙂", "\U0010ffff", "\x00"])
def test_unknown_characters_are_reported(strange: str) -> None:
    with pytest.raises(ValueError, match=r"of the 2 characters that .* but has '.+'; the kinds"):
        CharTokenizer.fit("abab").encode(f"ab{strange}ab")


def test_characters_only_in_the_validation_part_become_bytes() -> None:
    tokenizer = CharTokenizer.fit("aby", valid="aé🙂bé~")
    assert tokenizer.alphabet == "aby"
    assert tokenizer.fallback == bytes(sorted(set("é🙂~".encode())))
    assert tokenizer.size == 3 + 7
    ids = tokenizer.encode("aé🙂bé~y")
    spelled = ["aé🙂bé~y".encode()[i : i + 1] for i in range(len("aé🙂bé~y".encode()))]
    plain = {b"a": 0, b"b": 1, b"y": 2}
    codes = [plain.get(s, 3 + tokenizer.fallback.find(s)) for s in spelled]
    assert ids.tolist() == codes
    assert tokenizer.decode(ids) == "aé🙂bé~y"
    # Half a character, as a network may write it.
    assert tokenizer.decode(ids[1:2]) == "\ufffd"
    assert tokenizer.decode([0, ids[1], 1]) == "a\ufffdb"


def test_characters_with_an_unknown_byte_are_rejected() -> None:
    tokenizer = CharTokenizer.fit("ab", valid="é")
    with pytest.raises(ValueError, match="but has 'è'; the"):
        tokenizer.encode("aéè")


def test_fallback_is_empty_if_all_characters_are_known() -> None:
    assert CharTokenizer.fit("abc", valid="cab").fallback == b""


def test_each_byte_has_a_token() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.size == 256
    assert tokenizer.encode("aé").tolist() == [97, 195, 169]
    assert tokenizer.decode(np.arange(256)).startswith("\x00\x01")
    assert tokenizer.decode([195, 97]) == "\ufffda"


def test_bpe_decodes_partial_characters() -> None:
    tokenizer = made("bpe", "abcabc" * 50, vocabulary=260)
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_bpe_merges_frequent_sequences() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = bpe.BpeTokenizer.train("the cat the hat " * 30, 264)
    assert tokenizer.size == 264
    assert len(tokenizer.encode("the the")) < 7
    assert tokenizer == bpe.BpeTokenizer.train("the cat the hat " * 30, 264)


def test_bpe_ignores_the_validation_part() -> None:
    assert made("bpe", TRAIN, "") == made("bpe", TRAIN, "zzzz" * 1000)


def test_bpe_of_pieces_equals_bpe_of_the_whole_text(
    large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made("bpe", large[:100_000])
    pieces = tokenizer.encode(large)
    assert len(list(bpe._split_for_encoding(large))) > 5
    assert "".join(bpe._split_for_encoding(large)) == large
    monkeypatch.setattr(bpe, "_ENCODING_CHARACTERS", len(large))
    assert len(list(bpe._split_for_encoding(large))) == 1
    np.testing.assert_array_equal(pieces, tokenizer.encode(large))
    assert tokenizer.decode(pieces) == large


def test_a_text_without_line_ends_is_one_piece() -> None:
    assert list(bpe._split_for_encoding("x" * 300_000)) == ["x" * 300_000]


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_large_texts_are_fast(kind: str, large: str) -> None:
    tokenizer = made(kind, large)
    assert tokenizer.decode(tokenizer.encode(large)) == large


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (256, r"`vocabulary` must be at least 257 \(.*\), but got 256"),
        (-1, "must be at least 257 .* but got -1"),
        (300.0, r"must be at least 257 .* but got 300\.0"),
        (5000, r"`vocabulary` must be at most 260 for .* 24 bytes .*, but got 5,000"),
        (10**15, r"must be at most 260 .* but got 1,000,000,000,000,000"),
    ],
)
def test_invalid_vocabulary_sizes_are_rejected(vocabulary: Any, message: str) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        fit_tokenizer("bpe", "ab cd " * 4, vocabulary=vocabulary)


def test_vocabulary_is_rejected_for_other_tokenizers() -> None:
    with pytest.raises(ValueError, match=r"must be None for the kind 'char', .* but got 300"):
        fit_tokenizer("char", "abc", vocabulary=300)


def test_unknown_tokenizers_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"'chars' is not a kind .* 'char'\? Known: char, byte"):
        fit_tokenizer("chars", "abc")


def test_bpe_without_its_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'optuna_nnhp\[bpe\]'"):
        fit_tokenizer("bpe", TRAIN)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'optuna_nnhp\[bpe\]'"):
        tokenizer_from_json({"kind": "bpe", "tokenizer": "{}"})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "must have a 'kind', but is None"),
        ([], "must have a 'kind'"),
        ({}, "must have a 'kind', but is {}"),
        ({"kind": "word"}, r"'word' is not a kind of tokenizer. Known: char, byte, bpe"),
        ({"kind": ["char"]}, "is not a kind of tokenizer"),
        ({"kind": "char", "fallback": []}, "'alphabet' must be a str, but is a NoneType"),
        ({"kind": "char", "alphabet": "ab"}, "'fallback' must be a list, but is a NoneType"),
        ({"kind": "char", "alphabet": "", "fallback": []}, "at least one character"),
        ({"kind": "char", "alphabet": "ba", "fallback": []}, "alphabet must be sorted"),
        ({"kind": "char", "alphabet": "aab", "fallback": []}, "sorted without repeats"),
        ({"kind": "char", "alphabet": "a\ud800", "fallback": []}, "alphabet .* surrogate"),
        ({"kind": "char", "alphabet": "ab", "fallback": [256]}, "must be bytes, but is 256"),
        ({"kind": "char", "alphabet": "ab", "fallback": ["a"]}, "must be bytes, but is 'a'"),
        ({"kind": "char", "alphabet": "ab", "fallback": [2, 1]}, "fallback must be sorted"),
    ],
)
def test_damaged_states_are_rejected(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_json(state)
    assert "\n" not in str(error.value)


def without_a_byte(state: dict[str, Any]) -> None:
    vocabulary = state["model"]["vocab"]
    vocabulary["new"] = vocabulary.pop("Ā")
    merges = state["model"]["merges"]
    state["model"]["merges"] = [pair for pair in merges if "Ā" not in "".join(pair)]


def with_lower_case(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "Lowercase"}


def without_decoder(state: dict[str, Any]) -> None:
    state["decoder"] = None


@pytest.mark.parametrize("damage", [without_a_byte, with_lower_case, without_decoder])
def test_lossy_bpe_states_are_rejected(damage: Callable[[dict[str, Any]], None]) -> None:
    state = made("bpe").to_json()
    inner = json.loads(state["tokenizer"])
    damage(inner)
    with pytest.raises(ValueError, match="must be lossless for any text"):
        tokenizer_from_json({**state, "tokenizer": json.dumps(inner)})


@pytest.mark.parametrize("inner", ["", "{}", "no JSON", '{"model": {"type": "BPE"}}', None])
def test_damaged_bpe_states_are_rejected(inner: Any) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"must be that of `tokenizers`|must be a str"):
        tokenizer_from_json({"kind": "bpe", "tokenizer": inner})


def test_bpe_trains_on_one_long_word() -> None:
    # With a piece as long as the text this takes half a minute.
    tokenizer = made("bpe", "ab" * 5000 + "abcdefghijklmnop" * 20_000)
    assert tokenizer.decode(tokenizer.encode("abab" * 100)) == "abab" * 100
