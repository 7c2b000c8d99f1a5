"""Texts that errors of every room share."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from difflib import get_close_matches
import json
import re
from urllib.parse import quote
from urllib.parse import quote_plus
from urllib.parse import unquote
from urllib.parse import unquote_plus

MAX_REPR_LENGTH = 100  # characters of a value in an error
PASSWORD_MASK = "***"
# What must not be shown is called so in the queries of URLs and in the drivers' own texts.
_SECRET_NAME = r"[\w.-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|api_?key|odbc_connect)"
_SECRET_NAME_PATTERN = re.compile(_SECRET_NAME, re.IGNORECASE)
_NAMED_SECRET_PATTERN = re.compile(
    rf"""(\b{_SECRET_NAME}(?:["']\s*:|["']?\s*=)\s*)("[^"]*"|'[^']*'|[^\s&;,"'()]+)""",
    re.IGNORECASE,
)
# A password may hold any of `:/@` itself: in a text it ends at the last @ before a blank.
_PASSWORD_BEFORE_HOST_PATTERN = re.compile(r"(\w://[^:/\s]*):\S*@")
# Where the @ was forgotten it stands in the port's place; a port is a number.
_PASSWORD_AS_PORT_PATTERN = re.compile(r"""(\w://[^:/\s\[]*):(?!\d*(?:[/?\s"'),.;*]|$))[^\s"']+""")
SHORT_SECRET_LENGTH = 3  # letters that may well be part of another word


def unknown_name(kind: str, name: object, known: Iterable[object]) -> ValueError:
    """An error for a name that does not exist, with the near ones and the list.

    Args:
        kind:
            What is named, with its article: ``"a metric"``.
        name:
            The name that was given.
        known:
            The names that exist.

    Example:
        >>> unknown_name("a metric", "acuracy", ["accuracy", "f1"])
        ValueError("'acuracy' is not a metric; did you mean 'accuracy'? Known: accuracy, f1.")
    """
    names = [str(one) for one in known]
    is_near = isinstance(name, str) and len(name) < MAX_REPR_LENGTH
    near = get_close_matches(str(name), names, n=3) if is_near else []
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return ValueError(f"{short_repr(name)} is not {kind}{hint} Known: {', '.join(names)}.")


def short_repr(value: object) -> str:
    """A value as Python writes it, on one line and not long, for an error.

    Args:
        value:
            Anything that a user may have given.

    Example:
        >>> short_repr("a\\nb"), short_repr(10**5000), short_repr(list(range(99)))[-12:]
        ("'a\\\\nb'", 'an int', '4, 25, 26...')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its text is not what is wrong with it
        kind = type(value).__name__
        text = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
    return text if len(text) <= MAX_REPR_LENGTH else f"{text[: MAX_REPR_LENGTH - 3]}..."


def hide_passwords(text: object, url: object = "") -> str:
    """A text with the passwords of the URLs in it hidden.

    Args:
        text:
            A URL, or what may hold one, such as the error of a database's driver.
        url:
            The storage's URL, if it is known: its password is then hidden also where it stands
            alone, as it was written or decoded, and in parts where it was cut at an ``@``.

    Example:
        >>> hide_passwords("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
        >>> hide_passwords("there is no host 'hard@host'", "postgresql://me:very@hard@host/db")
        "there is no host '***@host'"
    """
    hidden, address = str(text), str(url)
    for secret in sorted(_secret_spellings(address), key=len, reverse=True):
        pattern = re.escape(secret)
        if len(secret) <= SHORT_SECRET_LENGTH:
            pattern = rf"(?<![\w*]){pattern}(?![\w*])"
        hidden = re.sub(pattern, PASSWORD_MASK, hidden)
    hidden = _PASSWORD_BEFORE_HOST_PATTERN.sub(rf"\1:{PASSWORD_MASK}@", hidden)
    hidden = _PASSWORD_AS_PORT_PATTERN.sub(rf"\1:{PASSWORD_MASK}", hidden)
    return _NAMED_SECRET_PATTERN.sub(rf"\1{PASSWORD_MASK}", hidden)


def first_line(error: object, url: object = "") -> str:
    """What an error says first, without passwords; the name of its type if it says nothing.

    Args:
        error:
            The error, or its text.
        url:
            The storage's URL, if it is known.

    Example:
        >>> first_line(OSError("cannot open mysql://me:secret@host/db.\\nCheck the host."))
        'cannot open mysql://me:***@host/db.'
        >>> first_line(KeyboardInterrupt())
        'KeyboardInterrupt'
    """
    lines = hide_passwords(error, url).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def contains_password(error: BaseException | None, url: object = "") -> bool:
    """Whether an error, or one that it came from, says the password of a URL.

    Args:
        error:
            The error.
        url:
            The storage's URL, if it is known.

    Example:
        >>> contains_password(ValueError("cannot reach postgresql://me:secret@host/db"))
        True
    """
    return any(hide_passwords(one, url) != str(one) for one in exception_chain(error))


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from.

    Example:
        >>> outer = ValueError("outer")
        >>> outer.__cause__ = KeyError("inner")
        >>> [type(one).__name__ for one in exception_chain(outer)]
        ['ValueError', 'KeyError']
    """
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _secret_spellings(url: str) -> set[str]:
    """The passwords of a URL, in all ways in which a driver may write them."""
    found = set[str]()
    for raw in _secrets_in_url(url):
        plain = unquote(raw)
        found |= {raw, plain, unquote_plus(raw), quote(plain, safe=""), quote_plus(plain)}
        found |= {repr(plain)[1:-1], json.dumps(plain)[1:-1]}
        # What is left of it where a parser takes one of these for its end.
        found |= {part for part in re.split(r"[:@/?#]", raw) if len(part) > 1}
    return found - {""}


def _secrets_in_url(url: str) -> Iterator[str]:
    """The password of a URL, and what its query has of that kind."""
    _, mark, rest = url.partition("://")
    if not mark:
        return
    for entry in re.split("[?&]", rest):
        name, _, value = entry.partition("=")
        if _SECRET_NAME_PATTERN.fullmatch(name):
            yield value
    if rest.startswith(("/", "[")):  # a file, or a host that is a number
        return
    user, at, _ = rest.rpartition("@")
    if at:
        yield user.partition(":")[2]
    else:
        port = rest.partition(":")[2]
        yield "" if re.match(r"\d*([/?]|$)", port) else port
