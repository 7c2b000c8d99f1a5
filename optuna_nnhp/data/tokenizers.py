"""Convert text to token ids and back: characters, bytes, or byte-pair encoding.

Every tokenizer is lossless for both parts of its text: no character is dropped, and no two
characters share an id. So the bits per byte of different tokenizers can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from typing import ClassVar
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optuna_nnhp.data.bpe import DEFAULT_BPE_VOCABULARY
from optuna_nnhp.data.bpe import BpeTokenizer
from optuna_nnhp.data.frames import format_list
from optuna_nnhp.data.utf8_text import N_BYTE_VALUES
from optuna_nnhp.data.utf8_text import encode_utf8
from optuna_nnhp.data.utf8_text import validate_token_ids
from optuna_nnhp.errors import unknown_name

TOKENIZER_KINDS = ("char", "byte", "bpe")


class Tokenizer(Protocol):
    """Converts text to the ids that a network takes, and back."""

    @property
    def kind(self) -> str:
        """One of ``TOKENIZER_KINDS``."""

    @property
    def size(self) -> int:
        """The number of different tokens."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, **shape** (tokens,)."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of any ids; bytes that are not UTF-8 become U+FFFD."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON."""


@dataclass(frozen=True)
class CharTokenizer:
    """A tokenizer with a token for each character of the training part.

    A character that only the validation part has is encoded as its UTF-8 bytes, each of which is a
    token of its own ("byte fallback"). Only the bytes that this needs are tokens. They never occur
    in training, so they cost many bits. This is intended: one token for all unknown characters
    would not count the bits that identify the character. Any other character that is not in the
    alphabet, for example in a prompt, is an error.

    Args:
        alphabet:
            The characters, sorted; a token's id is its position.
        fallback:
            The bytes that are tokens, sorted; their ids follow the alphabet's.

    Raises:
        ValueError:
            If one of the two is not sorted, or the alphabet is empty.

    Example:
        >>> tokenizer = CharTokenizer.fit("hello", valid="hé")
        >>> tokenizer
        CharTokenizer(alphabet='ehlo', fallback=b'\\xa9\\xc3')
        >>> tokenizer.encode("hé").tolist(), tokenizer.decode([1, 5, 4])
        ([1, 5, 4], 'hé')

    TextSource:
        nanoGPT's ``data/shakespeare_char/prepare.py`` (https://github.com/karpathy/nanoGPT) for
        the alphabet; SentencePiece's ``byte_fallback`` for the rest.
    """

    alphabet: str
    fallback: bytes = b""
    kind: ClassVar[str] = "char"

    def __post_init__(self) -> None:
        encode_utf8(self.alphabet, "An alphabet")
        if not self.alphabet:
            raise ValueError("An alphabet must have at least one character, but is empty.")
        entries: dict[str, list[Any]] = {
            "An alphabet": list(self.alphabet),
            "The fallback": list(self.fallback),
        }
        for name, values in entries.items():
            if values != sorted(set(values)):
                raise ValueError(f"{name} must be sorted without repeats, but is not.")

    @classmethod
    def fit(cls, train: str, valid: str = "") -> CharTokenizer:
        """Learn the alphabet from a text.

        Args:
            train:
                The training part, whose characters are the alphabet.
            valid:
                The validation part, which must be encodable too.

        Raises:
            ValueError:
                If the training part is empty, or one of the parts is not Unicode text.
        """
        alphabet = "".join(sorted(set(train)))
        unseen = encode_utf8("".join(set(valid) - set(train)), "The validation part")
        return cls(alphabet, bytes(sorted(set(unseen))))

    @property
    def size(self) -> int:
        """The number of different tokens."""
        return len(self.alphabet) + len(self.fallback)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text.

        Args:
            text:
                Characters of the alphabet, or characters whose bytes are tokens.

        Returns:
            **Shape** (tokens,): one id per character, or one per byte of a character that is not
            in the alphabet.

        Raises:
            ValueError:
                If the text has other characters.
        """
        encode_utf8(text)
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        fallback_points = points[ids < 0]
        if not fallback_points.size:
            return ids
        # Reserve as many positions for a character as it has bytes in UTF-8.
        widths = np.ones(len(points), dtype=np.int64)
        widths[ids < 0] += np.digitize(fallback_points, (0x80, 0x800, 0x10000))
        ids = np.repeat(ids, widths)
        letters = fallback_points.tobytes().decode("utf-32-le")
        ids[ids < 0] = self._byte_ids[np.frombuffer(letters.encode(), np.uint8)]
        if ids.min() < 0:
            unknown_characters = [
                c for c in sorted(set(letters)) if not set(c.encode()) <= {*self.fallback}
            ]
            raise ValueError(
                f"Text must consist of the {len(self.alphabet):,} characters that the training "
                f"part has, but has {format_list(unknown_characters)}; the kinds 'byte' and "
                f"'bpe' take any."
            )
        return ids

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of any ids; fallback bytes that are not UTF-8 become U+FFFD.

        Args:
            ids:
                From 0 to ``size`` - 1, **shape** (tokens,).

        Raises:
            ValueError:
                If an id is outside this range.
        """
        pieces = self._token_bytes
        return b"".join([pieces[i] for i in validate_token_ids(ids, self.size)]).decode(
            errors="replace"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON; ``tokenizer_from_json`` restores it."""
        return {"kind": self.kind, "alphabet": self.alphabet, "fallback": list(self.fallback)}

    @cached_property
    def _ids(self) -> NDArray[np.int32]:
        """The id of each code point, or -1; the last entry is for all higher code points."""
        points = _code_points(self.alphabet)
        ids = np.full(int(points[-1]) + 2, -1, dtype=np.int32)
        ids[points] = np.arange(len(points))
        return ids

    @cached_property
    def _byte_ids(self) -> NDArray[np.int32]:
        """The id of each byte, or -1."""
        ids = np.full(N_BYTE_VALUES, -1, dtype=np.int32)
        ids[list(self.fallback)] = len(self.alphabet) + np.arange(len(self.fallback))
        return ids

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of each token."""
        return [c.encode() for c in self.alphabet] + [bytes([byte]) for byte in self.fallback]


@dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer with a token for each of the 256 bytes of UTF-8; takes any text.

    Example:
        >>> ByteTokenizer().encode("hé").tolist(), ByteTokenizer().decode([104, 195, 169, 255])
        ([104, 195, 169], 'hé\ufffd')
    """

    kind: ClassVar[str] = "byte"
    size: ClassVar[int] = N_BYTE_VALUES

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text: its bytes, **shape** (bytes,)."""
        return np.frombuffer(encode_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of any ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids:
                From 0 to 255, **shape** (tokens,).

        Raises:
            ValueError:
                If an id is outside this range.
        """
        return bytes(validate_token_ids(ids, self.size)).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON; ``tokenizer_from_json`` restores it."""
        return {"kind": self.kind}


def fit_tokenizer(
    kind: str, train: str, valid: str = "", vocabulary: int | None = None
) -> Tokenizer:
    """Fit a tokenizer of some kind to a text.

    Args:
        kind:
            One of ``TOKENIZER_KINDS``.
        train:
            The training part.
        valid:
            The validation part, which a character tokenizer must be able to encode too.
        vocabulary:
            The number of different tokens, only for ``"bpe"``; None is
            ``DEFAULT_BPE_VOCABULARY``.

    Raises:
        ModuleNotFoundError:
            If ``"bpe"`` is asked for without the ``tokenizers`` library.
        ValueError:
            If the kind is unknown, or the vocabulary is too small or too large.

    Example:
        >>> fit_tokenizer("char", "hello").size, fit_tokenizer("byte", "hello").size
        (4, 256)
    """
    if kind not in TOKENIZER_KINDS:
        raise unknown_name("a kind of tokenizer", kind, TOKENIZER_KINDS)
    if kind == "bpe":
        return BpeTokenizer.train(
            train, DEFAULT_BPE_VOCABULARY if vocabulary is None else vocabulary
        )
    if vocabulary is not None:
        raise ValueError(
            f"`vocabulary` must be None for the kind {kind!r}, whose size is given by the text, "
            f"but got {vocabulary}."
        )
    return CharTokenizer.fit(train, valid) if kind == "char" else ByteTokenizer()


def tokenizer_from_json(state: Mapping[str, Any]) -> Tokenizer:
    """Restore what ``to_json`` returned.

    Args:
        state:
            The dict that ``to_json`` returned.

    Raises:
        ModuleNotFoundError:
            If the kind is ``"bpe"`` and the ``tokenizers`` library is not installed.
        ValueError:
            If the state is damaged.

    Example:
        >>> tokenizer_from_json(CharTokenizer("abc").to_json())
        CharTokenizer(alphabet='abc', fallback=b'')
    """
    if not isinstance(state, Mapping) or "kind" not in state:
        raise ValueError(f"A tokenizer's state must have a 'kind', but is {format_list([state])}.")
    kind = state["kind"]
    if kind not in TOKENIZER_KINDS:
        raise unknown_name("a kind of tokenizer", kind, TOKENIZER_KINDS)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return BpeTokenizer(_typed_entry(state, "tokenizer", str))
    fallback_points = _typed_entry(state, "fallback", list)
    if not all(type(byte) is int and 0 <= byte < N_BYTE_VALUES for byte in fallback_points):
        raise ValueError(
            f"A tokenizer's 'fallback' must be bytes, but is {format_list(fallback_points)}."
        )
    return CharTokenizer(_typed_entry(state, "alphabet", str), bytes(fallback_points))


def _code_points(text: str) -> NDArray[np.uint32]:
    """Return code points, **shape** (characters,)."""
    return np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4")).astype(np.uint32)


def _typed_entry(state: Mapping[str, Any], name: str, wanted: type) -> Any:
    """Return an entry of the expected type, or raise ValueError."""
    value = state.get(name)
    if not isinstance(value, wanted):
        raise ValueError(
            f"A tokenizer's {name!r} must be a {wanted.__name__}, but is a {type(value).__name__}."
        )
    return value
