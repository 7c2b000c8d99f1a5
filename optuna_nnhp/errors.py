"""Format error messages: short values, similar names, and no passwords."""

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

MAX_REPR_LENGTH = 100  # characters of a value in an error message
PASSWORD_MASK = "***"
# Names of secrets in the queries of URLs and in the messages of database drivers.
_SECRET_NAME = r"[\w.-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|api_?key|odbc_connect)"
_SECRET_NAME_PATTERN = re.compile(_SECRET_NAME, re.IGNORECASE)
_NAMED_SECRET_PATTERN = re.compile(
    rf"""(\b{_SECRET_NAME}(?:["']\s*:|["']?\s*=)\s*)("[^"]*"|'[^']*'|[^\s&;,"'()]+)""",
    re.IGNORECASE,
)
# A password may itself contain `:/@`, so in a text it extends to the last @ before a space.
_PASSWORD_BEFORE_HOST_PATTERN = re.compile(r"(\w://[^:/\s]*):\S*@")
# Without an @ the password stands where the port should be; a port has only digits.
_PASSWORD_AS_PORT_PATTERN = re.compile(r"""(\w://[^:/\s\[]*):(?!\d*(?:[/?\s"'),.;*]|$))[^\s"']+""")
MAX_SHORT_SECRET_LENGTH = 3  # shorter secrets are only hidden as whole words


def unknown_name(kind: str, name: object, known: Iterable[object]) -> ValueError:
    """Make an error for a name that does not exist, with similar names and the full list.

    Args:
        kind:
            What the name should be, with an article: ``"a metric"``.
        name:
            The name that was given.
        known:
            The names that exist.

    Example:
        >>> unknown_name("a metric", "acuracy", ["accuracy", "f1"])
        ValueError("'acuracy' is not a metric; did you mean 'accuracy'? Known: accuracy, f1.")
    """
    names = [str(known_name) for known_name in known]
    can_compare = isinstance(name, str) and len(name) < MAX_REPR_LENGTH
    similar = get_close_matches(str(name), names, n=3) if can_compare else []
    hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "."
    return ValueError(f"{short_repr(name)} is not {kind}{hint} Known: {', '.join(names)}.")


def short_repr(value: object) -> str:
    """Format a value with ``repr`` on one line of at most `MAX_REPR_LENGTH` characters.

    Args:
        value:
            Any value that a user may have passed.

    Example:
        >>> short_repr("a\\nb"), short_repr(10**5000), short_repr(list(range(99)))[-12:]
        ("'a\\\\nb'", 'an int', '4, 25, 26...')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a broken __repr__ must not hide the error that is being reported
        kind = type(value).__name__
        text = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
    return text if len(text) <= MAX_REPR_LENGTH else f"{text[: MAX_REPR_LENGTH - 3]}..."


def hide_passwords(text: object, url: object = "") -> str:
    """Replace the passwords of all URLs in a text by ``***``.

    Args:
        text:
            A URL, or a text that may contain one, such as the error of a database driver.
        url:
            The storage's URL, if it is known. Its password is then also hidden where it appears
            without the URL: as written, decoded, or in the parts left by a parser that split it.

    Example:
        >>> hide_passwords("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
        >>> hide_passwords("there is no host 'hard@host'", "postgresql://me:very@hard@host/db")
        "there is no host '***@host'"
    """
    hidden, address = str(text), str(url)
    for secret in sorted(_secret_spellings(address), key=len, reverse=True):
        pattern = re.escape(secret)
        if len(secret) <= MAX_SHORT_SECRET_LENGTH:
            pattern = rf"(?<![\w*]){pattern}(?![\w*])"
        hidden = re.sub(pattern, PASSWORD_MASK, hidden)
    hidden = _PASSWORD_BEFORE_HOST_PATTERN.sub(rf"\1:{PASSWORD_MASK}@", hidden)
    hidden = _PASSWORD_AS_PORT_PATTERN.sub(rf"\1:{PASSWORD_MASK}", hidden)
    return _NAMED_SECRET_PATTERN.sub(rf"\1{PASSWORD_MASK}", hidden)


def first_line(error: object, url: object = "") -> str:
    """Return the first line of an error's message, without passwords.

    Args:
        error:
            The error, or its message.
        url:
            The storage's URL, if it is known.

    Returns:
        The line; the name of the error's class if the message is empty.

    Example:
        >>> first_line(OSError("cannot open mysql://me:secret@host/db.\\nCheck the host."))
        'cannot open mysql://me:***@host/db.'
        >>> first_line(KeyboardInterrupt())
        'KeyboardInterrupt'
    """
    lines = hide_passwords(error, url).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def contains_password(error: BaseException | None, url: object = "") -> bool:
    """Return whether an error, or one of its causes, contains the password of a URL.

    Args:
        error:
            The error.
        url:
            The storage's URL, if it is known.

    Example:
        >>> contains_password(ValueError("cannot reach postgresql://me:secret@host/db"))
        True
    """
    return any(hide_passwords(cause, url) != str(cause) for cause in exception_chain(error))


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause's cause, and so on.

    Example:
        >>> outer = ValueError("outer")
        >>> outer.__cause__ = KeyError("inner")
        >>> [type(error).__name__ for error in exception_chain(outer)]
        ['ValueError', 'KeyError']
    """
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _secret_spellings(url: str) -> set[str]:
    """Return the secrets of a URL in every spelling that a driver may print."""
    found = set[str]()
    for raw in _secrets_in_url(url):
        plain = unquote(raw)
        found |= {raw, plain, unquote_plus(raw), quote(plain, safe=""), quote_plus(plain)}
        found |= {repr(plain)[1:-1], json.dumps(plain)[1:-1]}
        # A parser may end the password at one of these characters and print the rest.
        found |= {part for part in re.split(r"[:@/?#]", raw) if len(part) > 1}
    return found - {""}


def _secrets_in_url(url: str) -> Iterator[str]:
    """Yield the password of a URL and the secrets in its query, as written."""
    _, separator, rest = url.partition("://")
    if not separator:
        return
    for entry in re.split("[?&]", rest):
        name, _, value = entry.partition("=")
        if _SECRET_NAME_PATTERN.fullmatch(name):
            yield value
    if rest.startswith(("/", "[")):  # a file, or a host given as an IPv6 address
        return
    user, at, _ = rest.rpartition("@")
    if at:
        yield user.partition(":")[2]
    else:
        port = rest.partition(":")[2]
        yield "" if re.match(r"\d*([/?]|$)", port) else port
