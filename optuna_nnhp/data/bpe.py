"""Byte-level byte-pair encoding with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
import re
from types import ModuleType
from typing import Any
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from optuna_nnhp.data.utf8_text import N_BYTE_VALUES
from optuna_nnhp.data.utf8_text import encode_utf8
from optuna_nnhp.data.utf8_text import validate_token_ids

DEFAULT_BPE_VOCABULARY = 1024  # for the few hundred kilobytes that a small study reads
# The `tokenizers` library takes time quadratic in the longest word to train on, and hundreds of
# bytes of memory for each token to encode.
_TRAINING_CHARACTERS, _ENCODING_CHARACTERS = 4096, 100_000
# Byte-level BPE never merges bytes on both sides of such a line end.
_SAFE_SPLIT = re.compile(r"(?<=\S)\n(?=\S)")
_ROUND_TRIP_TEXT = "It's  1 Ä\r\n\te\u0301\u00a0中 🙂 \n\n x "


@dataclass(frozen=True)
class BpeTokenizer:
    """A tokenizer with a token for each byte and for frequent byte sequences; takes any text.

    Needs the ``tokenizers`` library.

    Args:
        state:
            The text that the library's ``Tokenizer.to_str()`` returns.

    Raises:
        ModuleNotFoundError:
            If the library is not installed.
        ValueError:
            If the state is not that of a byte-level BPE.

    Example:
        >>> tokenizer = BpeTokenizer.train("the cat, the hat, the rat, " * 9, vocabulary=260)
        >>> len(tokenizer.encode("the bat 🙂")), tokenizer.decode(tokenizer.encode("the bat 🙂"))
        (9, 'the bat 🙂')

    TextSource:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), by
        https://huggingface.co/docs/tokenizers.
    """

    state: str
    kind: ClassVar[str] = "bpe"

    def __post_init__(self) -> None:
        values = self._model.get_vocab()
        alphabet = _import_tokenizers().pre_tokenizers.ByteLevel.alphabet()
        # A test text, because a state from elsewhere may have normalizers that change texts.
        if (
            sorted(values.values()) != list(range(len(values)))
            or not set(alphabet) <= set(values)
            or self.decode(self.encode(_ROUND_TRIP_TEXT)) != _ROUND_TRIP_TEXT
        ):
            raise ValueError("The state of a BPE tokenizer must be lossless for any text.")

    @classmethod
    def train(cls, text: str, vocabulary: int = DEFAULT_BPE_VOCABULARY) -> BpeTokenizer:
        """Learn which byte sequences are frequent.

        Args:
            text:
                The training part of the text.
            vocabulary:
                The number of different tokens, including the 256 bytes.

        Raises:
            ModuleNotFoundError:
                If the ``tokenizers`` library is not installed.
            ValueError:
                If the vocabulary is below 257, or too few pairs of tokens occur twice.
        """
        if not isinstance(vocabulary, int) or vocabulary <= N_BYTE_VALUES:
            raise ValueError(
                f"`vocabulary` must be at least {N_BYTE_VALUES + 1} (the bytes and one merge), "
                f"but got {vocabulary}."
            )
        library, length = _import_tokenizers(), len(encode_utf8(text))
        level = library.pre_tokenizers.ByteLevel
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = level(add_prefix_space=False)
        model.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            # The library allocates memory for the whole vocabulary that it is asked for.
            vocab_size=min(vocabulary, N_BYTE_VALUES + length),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=level.alphabet(),
        )
        starts = range(0, len(text), _TRAINING_CHARACTERS)
        model.train_from_iterator((text[i : i + _TRAINING_CHARACTERS] for i in starts), trainer)
        if model.get_vocab_size() < vocabulary:
            raise ValueError(
                f"`vocabulary` must be at most {model.get_vocab_size():,} for a training part "
                f"of {length:,} bytes like this, but got {vocabulary:,}."
            )
        return cls(model.to_str())

    @property
    def size(self) -> int:
        """The number of different tokens."""
        return int(self._model.get_vocab_size())

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, **shape** (tokens,)."""
        encode_utf8(text)
        pieces = [
            np.array(encoding.ids, dtype=np.int32)
            for piece in _split_for_encoding(text)
            for encoding in self._model.encode_batch_fast([piece], add_special_tokens=False)
        ]
        return np.concatenate(pieces)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of any ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids:
                From 0 to ``size`` - 1, **shape** (tokens,).

        Raises:
            ValueError:
                If an id is outside this range.
        """
        plain = validate_token_ids(ids, self.size)
        return str(self._model.decode(plain, skip_special_tokens=False))

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON; ``tokenizer_from_json`` restores it."""
        return {"kind": self.kind, "tokenizer": self.state}

    @cached_property
    def _model(self) -> Any:
        """The tokenizer object of the library."""
        library = _import_tokenizers()
        try:
            return library.Tokenizer.from_str(self.state)
        except Exception as error:  # the library has no class of its own for this
            raise ValueError(
                f"The state of a BPE tokenizer must be that of `tokenizers`, but: {error}."
            ) from error


def _import_tokenizers() -> ModuleType:
    try:
        return import_module("tokenizers")
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise ModuleNotFoundError(
            "The kind 'bpe' requires the library tokenizers, which is not installed: "
            "pip install 'optuna_nnhp[bpe]'",
            name=error.name,
        ) from error


def _split_for_encoding(text: str) -> Iterator[str]:
    """Yield pieces of a text whose tokens, concatenated, are those of the whole text."""
    start = 0
    while split_at := _SAFE_SPLIT.search(text, start + _ENCODING_CHARACTERS):
        yield text[start : split_at.end()]
        start = split_at.end()
    yield text[start:]
