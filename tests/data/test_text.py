from __future__ import annotations

from collections import Counter
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
import pytest

from optuna_nnhp.data import text as module
from optuna_nnhp.data.text import TextData
from optuna_nnhp.data.text import TokenizedText
from optuna_nnhp.data.text import bundled_text
from optuna_nnhp.data.text import check_context_fits
from optuna_nnhp.data.text import fingerprint
from optuna_nnhp.data.text import prepare_text
from optuna_nnhp.data.text import read_text
from optuna_nnhp.data.tokenizers import TOKENIZER_KINDS

AWKWARD = "It's\r\na\ttab,  two \n\n\nÄ e\u0301 中文 🙂\r\n"
VOCABULARY = {"char": None, "byte": None, "bpe": 270}


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with texts at two depths, hidden ones, and others."""
    shelf = tmp_path / "shelf"
    for name in ("sub", ".git", "sub/.cache"):
        (shelf / name).mkdir(parents=True)
    for name, content in {
        "b.txt": b"b\n",
        "a.md": b"a",
        "sub/c.TXT": b"c",
        "sub/d.py": b"",
        "z.png": b"\x89PNG\x00",
        "noname": b"n",
        ".hidden.txt": b"h",
        ".git/e.txt": b"e",
        "sub/.cache/f.txt": b"f",
    }.items():
        (shelf / name).write_bytes(content)
    return shelf


@pytest.mark.parametrize("path", [str, Path])
def test_a_text_file_is_read(tmp_path: Path, path: type) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(AWKWARD.encode())
    assert read_text(path(file)) == AWKWARD


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert read_text(file) == "a\ufeff"


def test_text_files_of_a_folder_are_joined(shelf: Path, log: pytest.LogCaptureFixture) -> None:
    assert read_text(shelf) == read_text(str(shelf)) == "a\nb\nc"
    assert "shelf', but not 'noname', 'z.png'." in log.text


def test_folders_below_hidden_ones_are_read(tmp_path: Path) -> None:
    folder = tmp_path / ".books"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert read_text(folder) == "a"


def test_folder_without_text_files_is_rejected(shelf: Path, tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/d.py"):
        (shelf / name).unlink()
    with pytest.raises(ValueError, match=r"such as .txt .*shelf' has 'noname', 'z.png'\.$"):
        read_text(shelf)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' has no files\."):
        read_text(tmp_path / "empty")


def test_several_files_are_joined(shelf: Path) -> None:
    # In the order given, whatever their suffix.
    assert read_text([shelf / "noname", str(shelf / "b.txt"), shelf / "a.md"]) == "n\nb\na"
    assert read_text((shelf / "sub", shelf / "a.md")) == "c\na"


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        "no.such/file\n",
        "a/b.txt" * 1000,
        "some words/more",
        "word",
        "x" * 300 + " a",
        "e.g.",
    ],
)
def test_text_itself_is_accepted(text: str) -> None:
    assert read_text(text) == text


def test_existing_paths_are_read(folder: Path) -> None:
    Path("two words").write_text("content")
    assert read_text("two words") == "content"


@pytest.mark.parametrize(
    "path",
    ["no.txt", "my novel.txt", "no/such/folder", "no\\such", "corpus.dat", "a" * 300 + ".txt"],
)
def test_missing_paths_are_reported(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="`source` must be a file or folder that exists"):
        read_text(path)


def test_lists_hold_paths_only(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="but got 'some words'"):
        read_text(["some words"])
    with pytest.raises(FileNotFoundError, match=r"but got '.*no'"):
        read_text(tmp_path / "no")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\xff", r"must be UTF-8, but '.*t.txt' has the byte 0xff at position 2; pass errors="),
        (b"\xef\xbb\xbfab\xe9 ", "has the byte 0xe9 at position 5"),
        (b"ab\x00c\xff", r"no zero bytes, but '.*t.txt' has one at position 2: it is binary"),
        ("ab".encode("utf-16"), "UTF-16"),
        (b"", "`source` must have at least one character"),
        (b"\xef\xbb\xbf", "`source` must have at least one character"),
    ],
)
def test_files_that_are_not_text_are_rejected(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prepare_text(file)
    assert "\n" not in str(error.value)


def test_invalid_bytes_are_replaced_or_ignored(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"a\xff\xc3\xa9")
    assert read_text(file, errors="replace") == "a\ufffdé"
    assert read_text(file, errors="ignore") == "aé"
    with pytest.raises(ValueError, match=r"'replac' is not .* did you mean 'replace'\?"):
        read_text(file, errors="replac")
    file.write_bytes(b"a\xff\x00")
    with pytest.raises(ValueError, match="zero bytes"):
        read_text(file, errors="replace")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "`source` must have at least one character"),
        ([], "`source` must have at least one file, but is an empty list"),
        (5, "`source` must be text, or the path of .* but got int"),
        (None, "but got NoneType"),
        (b"some bytes", "but got bytes"),
        ([1, 2], "but got list"),
        ("a\n\ud83d", r"`source` must be Unicode .* U\+D83D at character 2"),
    ],
)
def test_invalid_sources_are_rejected(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_text(source)


@pytest.mark.parametrize(
    ("validation", "length", "train"), [(0.1, 1003, 902), (0.5, 5, 2), (np.float32(0.25), 8, 6)]
)
def test_the_last_part_is_for_validation(validation: Any, length: int, train: int) -> None:
    text = ("\n0123456789" * length)[:length]
    data = prepare_text(text, validation=validation)
    assert (data.train, data.valid) == (text[:train], text[train:])


def test_default_split_equals_nanogpt() -> None:
    text = bundled_text()
    assert prepare_text(text).train == text[: int(0.9 * len(text))]


def test_validation_text_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("cab")
    text = "abc\n" * 9
    for validation in (tmp_path / "v.txt", str(tmp_path / "v.txt"), [tmp_path / "v.txt"]):
        data = prepare_text(text, validation=validation)
        assert (data.train, data.valid) == (text, "cab")
    assert prepare_text(text, validation="a\n").valid == "a\n"
    (tmp_path / "v.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        prepare_text(text, validation=tmp_path / "v.txt")
    assert prepare_text(text, validation=tmp_path / "v.txt", errors="ignore").valid == "a"


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (0, "`validation` must be between 0 and 1, but got 0"),
        (1.0, r"between 0 and 1, but got 1\.0"),
        (-0.1, "between 0 and 1"),
        (float("nan"), "between 0 and 1, but got nan"),
        (True, "`validation` must be a share of the text, .* but got bool"),
        (None, "but got NoneType"),
        ("", "`validation` must have at least one character"),
        ([], "`validation` must have at least one file"),
        ("a\n\ud83d", "`validation` must be Unicode"),
        (1e-17, "`validation`=1e-17 of 40 gives 40 for training and 0"),
        (0.99, "of 40 gives 0 for training and 40 for validation"),
    ],
)
def test_invalid_validation_is_rejected(validation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_text("abc\n" * 10, validation=validation)


def test_missing_validation_file_is_reported() -> None:
    with pytest.raises(FileNotFoundError, match="`validation` must be a file or folder"):
        prepare_text("abc\n" * 10, validation="no.txt")


def test_text_of_one_character_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"two different characters, but has only 'a'\."):
        prepare_text("a" * 5000)
    with pytest.raises(ValueError, match="two different characters"):
        prepare_text("a" * 90 + "b" * 10 + " ", validation=0.2)
    with pytest.raises(ValueError, match=r"but has only '\\n'"):
        prepare_text("\n" * 10, validation="abc\n")


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_tokenize_returns_both_parts(kind: str) -> None:
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    data = prepare_text(AWKWARD * 40, validation=f"unseen: é🙂 {AWKWARD}")
    tokens = data.tokenize(kind, VOCABULARY[kind])
    assert isinstance(tokens, TokenizedText)
    assert tokens.tokenizer.kind == kind
    assert tokens.tokenizer.decode(tokens.train) == data.train
    assert tokens.tokenizer.decode(tokens.valid) == data.valid
    assert tokens.valid_bytes == data.valid_bytes == len(data.valid.encode())
    for array in (tokens.train, tokens.valid):
        assert array.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_callers_arrays_stay_writable() -> None:
    ids = np.arange(3, dtype=np.int32)
    tokens = prepare_text("abc\n" * 10).tokenize("byte")
    made = TokenizedText(tokens.tokenizer, ids, ids, 3)
    ids[0] = 5
    assert ids.flags.writeable
    assert not made.train.flags.writeable


def test_tokenized_text_is_cached() -> None:
    pytest.importorskip("tokenizers")
    data, other = prepare_text(AWKWARD * 40), prepare_text(AWKWARD * 40)
    assert data.tokenize("char") is data.tokenize("char")
    assert data.tokenize("char") is not data.tokenize("byte")
    assert data.tokenize("bpe", 270) is data.tokenize("bpe", 270)
    assert data.tokenize("bpe", 270).tokenizer.size == 270
    assert data.tokenize("bpe", 265).tokenizer.size == 265
    assert data.tokenize("char") is not other.tokenize("char")
    assert data == other


def test_default_vocabulary_size_is_used() -> None:
    pytest.importorskip("tokenizers")
    data = prepare_text(bundled_text())
    assert data.tokenize("bpe") is data.tokenize("bpe", 1024)
    assert data.tokenize("bpe").tokenizer.size == 1024


def test_bpe_ignores_the_validation_part() -> None:
    pytest.importorskip("tokenizers")
    text = "the cat\n" * 50
    tokenizers = [
        prepare_text(text, validation=valid).tokenize("bpe", 260).tokenizer
        for valid in ("the cat\n", "dog dog\n" * 500)
    ]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    ("kind", "vocabulary", "message"),
    [
        ("word", None, "'word' is not a kind of tokenizer. Known: char, byte, bpe"),
        ("byte", 256, "`vocabulary` must be None for the kind 'byte'"),
    ],
)
def test_invalid_tokenizers_are_rejected(kind: str, vocabulary: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_text("abc\n" * 10).tokenize(kind, vocabulary)


def test_describe_returns_the_sizes() -> None:
    data = prepare_text("aé\n" * 10, validation="b🙂")
    assert json.loads(json.dumps(data.describe())) == {
        "characters": 32,
        "bytes": 45,
        "alphabet": 5,
        "train_characters": 30,
        "valid_characters": 2,
        "valid_bytes": 5,
    }


def test_default_tokenizer_depends_on_the_alphabet() -> None:
    for size, kind in ((256, "char"), (257, "byte")):
        text = "".join(chr(0x400 + i) for i in range(size))
        assert prepare_text(text * 2, validation=0.5).default_tokenizer == kind
    # Those of the validation part count.
    assert prepare_text(text[:256], validation=text[256:] + "\n").default_tokenizer == "byte"


def test_repr_does_not_hold_the_text() -> None:
    data = prepare_text("abc\n" * 10)
    assert repr(data) == f"TextData(fingerprint={data.fingerprint!r})"


def test_fingerprint_changes_with_either_part() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("ab", "d"), ("ac", "c"), ("é", "c"), ("ab", "c\n")]
    marks = [fingerprint(*part) for part in parts]
    assert Counter(map(len, marks)) == {8: len(parts)}
    assert len(set(marks)) == len(parts)
    data = prepare_text("ab", validation="c\n")
    assert data.fingerprint == fingerprint("ab", "c\n") == marks[-1]


def lengths(train: int, valid: int) -> TokenizedText:
    tokenizer = prepare_text("abc\n" * 10).tokenize("byte").tokenizer
    return TokenizedText(tokenizer, np.zeros(train, np.int32), np.zeros(valid, np.int32), valid)


def test_too_long_contexts_are_rejected() -> None:
    check_context_fits(lengths(9, 9), 8)
    with pytest.raises(
        ValueError,
        match=r"at least 101 tokens for a `context` of 100, but of 1,100 tokens 1,000 are for "
        r"training and 100 for validation; `context` can be at most 99\.",
    ):
        check_context_fits(lengths(1000, 100), 100)
    with pytest.raises(ValueError, match=r"8 are for training and 9 for .* at most 7"):
        check_context_fits(lengths(8, 9), 8)
    with pytest.raises(ValueError, match=r"9 are for training and 1 for .* give a longer text\."):
        check_context_fits(lengths(9, 1), 8)
    with pytest.raises(ValueError, match="`context` must be at least 1, but got 0"):
        check_context_fits(lengths(9, 9), 0)


def test_bundled_text_is_english() -> None:
    text = bundled_text()
    assert "assert" in text and len(text) > 100_000
    assert text.index('The "assert" statement') < text.index('The "while" statement')
    data = prepare_text(text)
    assert isinstance(data, TextData)
    assert data.default_tokenizer == "char"


def test_missing_bundled_text_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module.DEFAULT_TEXT_MODULE, None)
    with pytest.raises(ModuleNotFoundError, match=r"pydoc_data\.topics, .*give a text or file"):
        bundled_text()
