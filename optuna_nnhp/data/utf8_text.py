"""Encode text as UTF-8, and check token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import cast

import numpy as np
from numpy.typing import NDArray

N_BYTE_VALUES = 256  # different ones


def encode_utf8(text: str, name: str = "Text") -> bytes:
    """Encode a text as UTF-8.

    Args:
        text:
            Any text.
        name:
            Its name in error messages.

    Raises:
        ValueError:
            If it has half of a surrogate pair, which UTF-8 cannot encode.

    Example:
        >>> encode_utf8("é")
        b'\\xc3\\xa9'
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode that UTF-8 can write, but has the lone surrogate "
            f"U+{ord(text[error.start]):04X} at character {error.start:,}."
        ) from None


def validate_token_ids(ids: Sequence[int] | NDArray[Any], size: int) -> list[int]:
    """Check token ids and return them as a list.

    Args:
        ids:
            Whole numbers, **shape** (tokens,).
        size:
            The number of different tokens.

    Raises:
        ValueError:
            If an id is outside 0 to ``size`` - 1, or is not a whole number.

    Example:
        >>> validate_token_ids(np.array([0, 2]), size=3)
        [0, 2]
    """
    array = np.asarray(ids)
    if not array.size:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"Token ids must be whole numbers of shape (tokens,), but are {array.dtype} "
            f"of shape {array.shape}."
        )
    wild = array[(array < 0) | (array >= size)]
    if wild.size:
        raise ValueError(f"Token ids must be from 0 to {size - 1:,}, but got {wild[0]:,}.")
    return cast(list[int], array.tolist())
