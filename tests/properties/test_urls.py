"""Any text is a storage or is rejected, and no error shows a password."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from hypothesis import assume
from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.open_storage import safe_file_name
from optuna_nnhp.storages.open_storage import safe_join
from optuna_nnhp.storages.open_storage import sibling_path
from tests.properties.clear import outcome

# None of these reaches another machine.
SCHEMES = ("sqlite", "sqlite+pysqlite", "postgresql", "mysql", "foo", "", "postgresql+none", "a b")
PLACES = ("localhost:1", "localhost:x", "127.0.0.1:1", "[::1]:1", "", "/")
ENDS = ("", "/", "/db", "/none/s.db", "/../s.db", "/\0", "/?", "/s.db?timeout=x", "?a=b&c", "#x")
marks = st.sampled_from([*":/@?#&=%+ '\"\\", "%40", "%2F", "%zz", "é", "***", "{0}", "$"])
# A beginning and an end that occur nowhere else, and anything between.
passwords = st.lists(marks, max_size=4).map(lambda found: f"Qx7{''.join(found)}Zk9")


@given(
    scheme=st.sampled_from(SCHEMES),
    user=st.sampled_from(["", "me", "me@site"]),
    password=passwords,
    place=st.sampled_from(PLACES),
    end=st.sampled_from(ENDS),
    encoded=st.booleans(),
)
@example(
    scheme="postgresql",
    user="me",
    password="Qx7@/Zk9",
    place="localhost:1",
    end="/db",
    encoded=False,
)
def test_passwords_are_always_hidden(
    scheme: str, user: str, password: str, place: str, end: str, encoded: bool, folder: Path
) -> None:
    written = quote(password, safe="") if encoded else password
    url = f"{scheme}://{user}:{written}@{place}{end}"
    assume(scheme not in ("sqlite", "sqlite+pysqlite") or place in ("localhost:1", "localhost:x"))
    hidden = hide_passwords(url, url)
    assert "Qx7" not in hidden and "Zk9" not in hidden
    try:
        open_storage(url)
    except ValueError as error:
        found: BaseException | None = error
        while found is not None:
            assert "Qx7" not in str(found) and "Zk9" not in str(found), str(found)
            found = found.__cause__ or found.__context__


@given(text=st.text(), password=passwords)
def test_hiding_twice_changes_nothing_more(text: str, password: str) -> None:
    url = f"postgresql://me:{quote(password, safe='')}@host/db"
    once = hide_passwords(f"{text} {url}", url)
    assert "Qx7" not in once and "Zk9" not in once
    assert hide_passwords(once, url) == once
    assert "@host/db" in once


@given(
    text=st.one_of(
        st.text(max_size=20),
        st.sampled_from([".", "..", "/", "", "~", "\0", "a/b/c", "none/s.journal", "x" * 300]),
        st.sampled_from(
            ["sqlite://", "sqlite:///", "sqlite:///.", "sqlite:///a\0", "://", "a://"]
        ),
        st.sampled_from(["con", "s.journal", "é.journal", "\ud800", "a\nb", "/proc/x", "*"]),
    )
)
def test_any_text_is_a_storage_or_rejected(text: str, folder: Path) -> None:
    assume(not Path(text.partition("\0")[0] or "x").is_absolute() or text in ("/", "/proc/x"))
    assume(".." not in text or text == "..")
    storage = outcome(lambda: open_storage(text))
    if storage is not None:
        assert storage.get_all_studies() is not None
        sibling_path(text, ".models")


@given(name=st.text())
@example(name="..")
@example(name="x" * 400)
def test_any_text_becomes_a_file_name(name: str, folder: Path) -> None:
    found = safe_join(folder, safe_file_name(name))
    found.touch()
    assert found.parent == folder and found.resolve().parent == folder.resolve()
    found.unlink()
