"""Read texts and split them into a training and a validation part."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import cached_property
from hashlib import blake2b
from importlib import import_module
import os
from pathlib import Path
import re
from typing import Any
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
import optuna

from optuna_nnhp.data.bpe import DEFAULT_BPE_VOCABULARY
from optuna_nnhp.data.frames import format_list
from optuna_nnhp.data.tokenizers import Tokenizer
from optuna_nnhp.data.tokenizers import fit_tokenizer
from optuna_nnhp.data.utf8_text import encode_utf8
from optuna_nnhp.errors import unknown_name

StrPath: TypeAlias = str | os.PathLike[str]
TextSource: TypeAlias = StrPath | Sequence[StrPath]

DEFAULT_TEXT_MODULE = "pydoc_data.topics"  # Python's own documentation
DECODE_ERRORS = ("strict", "replace", "ignore")
MAX_PATH_LENGTH = 4096
MAX_CHAR_ALPHABET = 256  # with larger alphabets, bytes are the default tokens
# Files that are read from a folder: prose, marked-up text, data and source code.
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".srt", ".log"),
    *(".html", ".htm", ".xml", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".toml"),
    *(".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java"),
    *(".js", ".ts", ".css", ".rb", ".r", ".jl", ".sql", ".sh"),
)
_UTF8_BOM = b"\xef\xbb\xbf"

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """Both parts of a text as token ids.

    Args:
        tokenizer:
            The tokenizer.
        train:
            Read-only, **shape** (training tokens,).
        valid:
            Read-only, **shape** (validation tokens,).
        valid_bytes:
            Length of the validation part in UTF-8. The sum of its tokens' losses in nats, divided
            by this and by ln 2, is bits per byte, which can be compared between tokenizers.

    Example:
        >>> tokens = prepare_text("to be or not\\n" * 8).tokenize("char")
        >>> tokens.tokenizer.size, tokens.train.shape, tokens.valid.shape, tokens.valid_bytes
        (8, (93,), (11,), 11)
    """

    tokenizer: Tokenizer
    train: NDArray[np.int32]
    valid: NDArray[np.int32]
    valid_bytes: int

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            view = getattr(self, name).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)


@dataclass(frozen=True)
class TextData:
    """A text in two parts.

    Args:
        train:
            The training part.
        valid:
            The validation part.
        fingerprint:
            Eight hexadecimal digits that depend on both parts.

    Example:
        >>> data = prepare_text("to be or not\\n" * 8)
        >>> len(data.train), len(data.valid), data.default_tokenizer
        (93, 11, 'char')
    """

    train: str = field(repr=False)
    valid: str = field(repr=False)
    fingerprint: str
    _tokens: dict[tuple[str, int | None], TokenizedText] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def valid_bytes(self) -> int:
        """The length of the validation part in UTF-8."""
        return len(encode_utf8(self.valid))

    @cached_property
    def alphabet_size(self) -> int:
        """The number of different characters in both parts."""
        return len({*self.train, *self.valid})

    @property
    def default_tokenizer(self) -> str:
        """``"char"`` if the alphabet has at most 256 characters, else ``"byte"``."""
        return "char" if self.alphabet_size <= MAX_CHAR_ALPHABET else "byte"

    def tokenize(self, kind: str, vocabulary: int | None = None) -> TokenizedText:
        """Return both parts as token ids; results are cached.

        Args:
            kind:
                ``"char"``, ``"byte"`` or ``"bpe"``.
            vocabulary:
                The number of different tokens, only for ``"bpe"``; None is
                ``DEFAULT_BPE_VOCABULARY``.

        Raises:
            ModuleNotFoundError:
                If ``"bpe"`` is asked for without the ``tokenizers`` library.
            ValueError:
                If the kind is unknown, or the vocabulary is too small or too large.
        """
        key = kind, DEFAULT_BPE_VOCABULARY if kind == "bpe" and vocabulary is None else vocabulary
        if key not in self._tokens:
            tokenizer = fit_tokenizer(kind, self.train, self.valid, vocabulary)
            parts = tokenizer.encode(self.train), tokenizer.encode(self.valid)
            self._tokens[key] = TokenizedText(tokenizer, *parts, self.valid_bytes)
        return self._tokens[key]

    def describe(self) -> dict[str, Any]:
        """Return the sizes of the text, as plain JSON.

        Example:
            >>> prepare_text("to be or not\\n" * 8).describe()  # doctest: +NORMALIZE_WHITESPACE
            {'characters': 104, 'bytes': 104, 'alphabet': 8, 'train_characters': 93,
             'valid_characters': 11, 'valid_bytes': 11}
        """
        return {
            "characters": len(self.train) + len(self.valid),
            "bytes": len(encode_utf8(self.train)) + self.valid_bytes,
            "alphabet": self.alphabet_size,
            "train_characters": len(self.train),
            "valid_characters": len(self.valid),
            "valid_bytes": self.valid_bytes,
        }


def prepare_text(
    source: TextSource, *, validation: float | TextSource = 0.1, errors: str = "strict"
) -> TextData:
    """Read a text and split it.

    Args:
        source:
            As for `read_text`.
        validation:
            The share of the characters for validation, at the end of the text; or another source
            as the validation part.
        errors:
            As for `read_text`.

    Raises:
        FileNotFoundError:
            If a path does not exist.
        ValueError:
            If a source cannot be read, a part would be empty, or the training part has fewer
            than two different characters.

    Example:
        >>> data = prepare_text("abcd\\n" * 4, validation="abba\\n")
        >>> data.valid
        'abba\\n'

    TextSource:
        nanoGPT's ``data/shakespeare_char/prepare.py`` for the split
        (https://github.com/karpathy/nanoGPT).
    """
    share = _validation_fraction(validation)
    text = read_text(source, errors)
    if share is None:
        train, valid = text, read_text(validation, errors, "validation")  # type: ignore[arg-type]
    else:
        cut = int((1 - share) * len(text))
        train, valid = text[:cut], text[cut:]
    if not train or not valid:
        raise ValueError(
            f"Each part must have at least one character, but `validation`={share} of "
            f"{len(text):,} gives {len(train):,} for training and {len(valid):,} for validation."
        )
    if len(set(train)) < 2:
        raise ValueError(
            "The training part must have at least two different characters, but has only "
            f"{train[0]!r}."
        )
    return TextData(train, valid, fingerprint(train, valid))


def _validation_fraction(validation: object) -> float | None:
    """Return the fraction of the text, or None for another source."""
    if isinstance(validation, int | float | np.integer | np.floating) and not isinstance(
        validation, bool
    ):
        if not 0 < validation < 1:
            raise ValueError(f"`validation` must be between 0 and 1, but got {validation}.")
        return float(validation)
    if isinstance(validation, str | os.PathLike | Sequence):
        return None
    raise ValueError(
        "`validation` must be a share of the text, or a path or text as `source` may be, "
        f"but got {type(validation).__name__}."
    )


def fingerprint(train: str, valid: str) -> str:
    """Return a short hash of both parts.

    Args:
        train:
            The training part.
        valid:
            The validation part.

    Returns:
        Eight hexadecimal digits (BLAKE2b over lengths and content).

    Example:
        >>> fingerprint("ab", "c") == fingerprint("a", "bc")
        False
    """
    digest = blake2b(f"{len(train)} {len(valid)} ".encode(), digest_size=4)
    for part in (train, valid):
        digest.update(encode_utf8(part))
    return digest.hexdigest()


def check_context_fits(tokens: TokenizedText, context: int) -> None:
    """Raise ValueError unless each part has a window of ``context`` tokens and the next one.

    Args:
        tokenize:
            The text's parts as tokens.
        context:
            Length of the model's context in tokens, at least 1.

    Example:
        >>> tokens = prepare_text("to be or not\\n" * 8).tokenize("char")
        >>> check_context_fits(tokens, context=8)
        >>> check_context_fits(tokens, context=16)
        Traceback (most recent call last):
        ValueError: Each part must have at least 17 tokens for a `context` of 16, but of 104 \
tokens 93 are for training and 11 for validation; `context` can be at most 10.
    """
    if context < 1:
        raise ValueError(f"`context` must be at least 1, but got {context}.")
    train, valid = len(tokens.train), len(tokens.valid)
    max_context = min(train, valid) - 1
    if context > max_context:
        advice = (
            f"`context` can be at most {max_context:,}"
            if max_context > 0
            else "give a longer text"
        )
        raise ValueError(
            f"Each part must have at least {context + 1:,} tokens for a `context` of "
            f"{context:,}, but of {train + valid:,} tokens {train:,} are for training and "
            f"{valid:,} for validation; {advice}."
        )


def bundled_text() -> str:
    """Return Python's own documentation: half a megabyte of English that needs no download.

    The topics of ``help()``, sorted by name. They differ between versions of Python.

    Raises:
        ModuleNotFoundError:
            If this Python installation does not have them.

    Example:
        >>> len(bundled_text()) > 100_000
        True
    """
    try:
        topics: dict[str, str] = import_module(DEFAULT_TEXT_MODULE).topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The default text is Python's documentation, module {DEFAULT_TEXT_MODULE}, "
            f"which this "
            "Python was installed without: give a text or file of your own.",
            name=error.name,
        ) from error
    return _join_with_newlines(topics[name] for name in sorted(topics))


def read_text(source: TextSource, errors: str = "strict", name: str = "source") -> str:
    """Read a text from files, a folder, or the argument itself.

    Line ends are not changed, because bits per byte count every byte. Files are joined with a
    line end between them if there is none.

    Args:
        source:
            The path of a file, or of a folder, of which all files with one of ``TEXT_SUFFIXES``
            are read, also in folders within, sorted by path, without hidden ones; a list of such
            paths; or text itself. A str with a line's end or of more than 4096 characters is
            text, and so is any other str that is not an existing path and does not look like one.
        errors:
            How bytes that are not UTF-8 are handled: ``"strict"`` raises an error, ``"replace"``
            replaces them by U+FFFD, ``"ignore"`` drops them.
        name:
            Name of the source in error messages.

    Raises:
        FileNotFoundError:
            If a text looks like a path that does not exist.
        ValueError:
            If a file is binary or not UTF-8, a folder has no text, or there is no character.

    Example:
        >>> read_text("to be\\nor not")
        'to be\\nor not'
    """
    if errors not in DECODE_ERRORS:
        raise unknown_name("a way to treat bytes that are not UTF-8", errors, DECODE_ERRORS)
    if isinstance(source, str) and _is_text(source):
        encode_utf8(source, f"`{name}`")
        text = source
    else:
        text = _join_with_newlines(_read_file(file, errors) for file in _list_files(source, name))
    if not text:
        raise ValueError(f"`{name}` must have at least one character, but is empty.")
    return text


def _is_text(source: str) -> bool:
    """Return whether a str is text rather than a path."""
    if "\n" in source or len(source) > MAX_PATH_LENGTH:
        return True
    if os.path.exists(source):
        return False
    if Path(source).suffix.lower() in TEXT_SUFFIXES:
        return False
    return re.search(r"\s", source) is not None or not re.search(r"[/\\]|\.\w{1,8}$", source)


def _list_files(source: object, name: str) -> list[Path]:
    """Return all files of a source that is not text."""
    if isinstance(source, str | os.PathLike):
        return _list_files_at(Path(source), name)
    if not isinstance(source, Sequence) or not all(
        isinstance(path, str | os.PathLike) for path in source
    ):
        raise ValueError(
            f"`{name}` must be text, or the path of a file or folder, or a list of them, "
            f"but got {type(source).__name__}."
        )
    if not source:
        raise ValueError(f"`{name}` must have at least one file, but is an empty list.")
    return [file for path in source for file in _list_files_at(Path(path), name)]


def _list_files_at(path: Path, name: str) -> list[Path]:
    """Return the file, or the text files of the folder."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"`{name}` must be a file or folder that exists, or text with a line's end, "
            f"but got {str(path)!r}."
        )
    if not path.is_dir():
        return [path]
    found = {
        file.relative_to(path).as_posix(): file
        for file in path.rglob("*")
        if file.is_file() and not re.search(r"(^|/)\.", file.relative_to(path).as_posix())
    }
    texts = [key for key in sorted(found) if found[key].suffix.lower() in TEXT_SUFFIXES]
    others = sorted(set(found) - set(texts))
    if not texts:
        raise ValueError(
            f"A folder must have files with text suffixes such as .txt or .md, but "
            f"{str(path)!r} has {format_list(others) if others else 'no files'}."
        )
    if others:
        _logger.info(
            f"Read {len(texts):,} files of the folder {str(path)!r}, but not "
            f"{format_list(others)}."
        )
    return [found[key] for key in texts]


def _read_file(file: Path, errors: str) -> str:
    """Return a file's text, or raise ValueError with the position of what is not text."""
    data, name = file.read_bytes(), repr(str(file))
    if (position := data.find(b"\0")) >= 0:
        raise ValueError(
            f"A text file must have no zero bytes, but {name} has one at position {position:,}: "
            "it is binary, or UTF-16 instead of UTF-8."
        )
    start = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    try:
        return data[start:].decode("utf-8", errors)
    except UnicodeDecodeError as error:
        position = start + error.start
        raise ValueError(
            f"A text file must be UTF-8, but {name} has the byte 0x{data[position]:02x} at "
            f"position "
            f"{position:,}; pass errors='replace' to read it."
        ) from None


def _join_with_newlines(texts: Iterable[str]) -> str:
    """Join texts with a line end between them."""
    parts = [text for text in texts if text]
    for i, part in enumerate(parts[:-1]):
        if not part.endswith("\n"):
            parts[i] = part + "\n"
    return "".join(parts)


def text_paths(source: TextSource) -> str | list[str] | None:
    """Return the paths of a source that `read_text` has read; None if it is text itself.

    Example:
        >>> text_paths("to be\\nor not"), text_paths(["a.txt", Path("b.txt")])
        (None, ['a.txt', 'b.txt'])
    """
    if isinstance(source, str):
        is_path = "\n" not in source and len(source) <= MAX_PATH_LENGTH and os.path.exists(source)
        return source if is_path else None
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    return [os.fspath(path) for path in source]
