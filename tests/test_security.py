"""Test security: addresses, passwords, file names, markup, and data read from files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
import importlib
import importlib.util
import json
import logging
import os
from pathlib import Path
import socket
import subprocess
import sys
from types import ModuleType
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request
from urllib.request import urlopen

import optuna
import pandas as pd
import pytest

import optuna_nnhp
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.inspect.dashboard import annotate
from optuna_nnhp.inspect.dashboard import study_note
from optuna_nnhp.inspect.dashboard import trial_note
from optuna_nnhp.inspect.report import closing_report
from optuna_nnhp.storages.open_storage import models_folder
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.open_storage import safe_file_name
from optuna_nnhp.storages.open_storage import safe_join
from optuna_nnhp.study.open_study import MODELS
from tests.tiny import classes
from tests.tiny import tune

ROOT = Path(optuna_nnhp.__file__).parents[1]
DASHBOARDS = sorted((ROOT / "dashboards").glob("[!_]*.py"))
PACKAGE = sorted((ROOT / "optuna_nnhp").rglob("*.py"))


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Addresses ---


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("options", "host", "is_warned"),
    [
        ([], "127.0.0.1", False),
        (["--host", "localhost"], "localhost", False),
        (["--host", "0.0.0.0"], "0.0.0.0", True),
        (["--host", "192.0.2.1"], "192.0.2.1", True),
        (["--host", ""], "", True),
    ],
)
def test_dashboard_listens_on_localhost_by_default(
    path: Path,
    options: list[str],
    host: str,
    is_warned: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune(storage="optuna_nnhp.journal", n_trials=1)
    module, asked = script(path), []

    def refuse(app: Any, host: str, port: int) -> None:
        asked.append(host)
        raise OSError("enough")

    monkeypatch.setattr(module, "start", refuse)
    assert module.main(["optuna_nnhp.journal", "--port", "0", *options]) == 2
    assert asked == [host]
    warned = "can read, change and delete these studies" in capsys.readouterr().err
    assert warned == is_warned


@contextmanager
def served(path: Path, *options: str) -> Iterator[str]:
    """Start a dashboard for a journal and yield its address."""
    command = [sys.executable, str(ROOT / "dashboards/serve.py"), str(path), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def answer(url: str, name: str) -> int:
    try:
        with urlopen(Request(url, headers={"Host": name}), timeout=20) as found:
            return int(found.status)
    except HTTPError as error:
        return error.code


def test_dashboard_rejects_requests_from_other_sites(folder: Path) -> None:
    tune(storage="s.journal", n_trials=1)
    with served(folder / "s.journal", "--allow", "Tuner.example:8080") as url:
        api = url.replace("/dashboard/", "/api/studies")
        port = url.split(":")[2].split("/")[0]
        for name in (f"127.0.0.1:{port}", "localhost:9999", "[::1]:80", "tuner.example"):
            assert answer(api, name) == 200
        for name in (f"evil.example:{port}", "127.0.0.1.evil.example", "[::1", "0.0.0.0"):
            assert answer(api, name) == 403
        # This machine's other addresses, if it has any, do not answer.
        others = {entry[4][0] for entry in addresses() if not str(entry[4][0]).startswith("127.")}
        for other in others:
            with pytest.raises(OSError):
                socket.create_connection((str(other), int(port)), timeout=2).close()


def addresses() -> list[Any]:
    try:
        return socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        return []


# --- Passwords ---

PASSWORDS = (
    *("hunter2", "hunt:er2", "hunt@er2", "hunt/er2", "hunt?er2", "hunt#er2"),
    *("hunt%40er2", "hunt er2", "hünter2", "hunt'er2", "hunt&er2"),
)
PIECES = ("hunt", "hünt", "er2")


def messages(error: BaseException | None) -> Iterator[str]:
    """Return the messages of an error and of its causes."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:{}@localhost:1/db",
        "postgresql://me@site:{}@localhost:1/db",
        "postgresql+psycopg2://:{}@localhost:1/db?sslmode=require",
        "mysql+pymysql://me:{}@localhost:1/db",
        "foo://me:{}@host:5o/db",
        "postgresql://me:{}",
        "postgresql:///db?host=localhost&port=1&password={}",
        "postgresql://localhost:1/db?sslpassword={}&connect_timeout=9",
        "mssql+pyodbc:///?odbc_connect=SERVER%3Dx%3BPWD%3D{}",
    ],
)
def test_storage_errors_do_not_contain_the_password(url: str, password: str) -> None:
    for written in {password, quote(password, safe="")}:
        # Without an @ before it, one in it is where the host begins; an & ends a query's entry.
        if (url.endswith("me:{}") and "@" in written) or ("=" in url and "&" in written):
            continue
        with pytest.raises(ValueError, match="must be one that can be written") as caught:
            open_storage(url.format(written))
        assert "\n" not in str(caught.value)
        for text in messages(caught.value):
            assert not any(piece in text for piece in PIECES), text


@pytest.mark.parametrize(
    ("text", "url", "expected"),
    [
        ("postgresql://me@site:hunter2@host/s", "", "postgresql://me@site:***@host/s"),
        ("at postgresql://u:hunt@er2@h/d now", "", "at postgresql://u:***@h/d now"),
        ("at redis://:hunter2@h:6379/0", "", "at redis://:***@h:6379/0"),
        ("mysql:///d?user=me&passwd=hunter2&x=1", "", "mysql:///d?user=me&passwd=***&x=1"),
        ("invalid dsn: host=h password='hunt er2'", "", "invalid dsn: host=h password=***"),
        (
            "connect({'password': 'hunter2', 'port': 1})",
            "",
            "connect({'password': ***, 'port': 1})",
        ),
        ("FATAL: no entry for hunt@er2", "pg://me:hunt%40er2@h/d", "FATAL: no entry for ***"),
        ("no host 'er2@h'", "pg://me:hunt@er2@h/d", "no host '***@h'"),
        ("a word", "pg://me:a@h/d", "*** word"),
        # Nothing of these is secret.
        ("sqlite:////a:b@c.db", "sqlite:////a:b@c.db", "sqlite:////a:b@c.db"),
        ("pg://[::1]:5432/d", "pg://[::1]:5432/d", "pg://[::1]:5432/d"),
        ("pg://host:5432/d", "pg://host:5432/d", "pg://host:5432/d"),
        ("denied (using password: YES)", "", "denied (using password: YES)"),
        (
            "`tokens` must be 'bpe' for train_tokens=9",
            "",
            "`tokens` must be 'bpe' for train_tokens=9",
        ),
        ("study.journal", "study.journal", "study.journal"),
    ],
)
def test_passwords_are_hidden_in_texts(text: str, url: str, expected: str) -> None:
    assert hide_passwords(text, url) == expected
    assert hide_passwords(expected, url) == expected


SECRET_URL = "sqlite:///file:s.db?uri=true&password=hunter2"  # which SQLite does not read


def test_passwords_are_neither_stored_nor_logged(
    folder: Path, log: pytest.LogCaptureFixture
) -> None:
    log.set_level(logging.DEBUG, logger="optuna")
    secret = tune(storage=SECRET_URL, n_trials=2)
    study, storage = secret.study, secret.study._storage
    annotate(study)
    note = study_note(study) + trial_note(study, study.best_trial)
    trials = study.get_trials(deepcopy=False)
    kept = [study.user_attrs, storage.get_study_system_attrs(study._study_id)]
    kept += [attributes for t in trials for attributes in (t.user_attrs, t.system_attrs)]
    printed = closing_report(secret, SECRET_URL)
    page = (folder / "s.figures" / "index.html").read_text(encoding="utf-8")
    secret.save("model")
    record = Path("model/model.json").read_text(encoding="utf-8")
    for text in (note, json.dumps(kept), printed, page, record, log.text):
        assert "hunter2" not in text
    assert "password=***" in printed and "password=***" in log.text
    assert not any(b"hunter2" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert models_folder(storage, SECRET_URL) == Path("s.models")


SCRIPTS = ("dnn_csv", "dnn_digits", "gpt_text", "own_network")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_do_not_print_passwords(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.csv").write_text("a,b\n" + "1,x\n2,y\n" * 9)
    (folder / "t.txt").write_text("to be or not\n" * 99)
    first = {"dnn_csv": ["t.csv", "--target", "b"], "gpt_text": ["t.txt"]}.get(name, [])
    storage = ["--storage", "postgresql://me:hunt/er2@localhost:1/db", "--timeout", "1"]
    assert importlib.import_module(f"studies.{name}").main([*first, *storage]) == 2
    output = "".join(capsys.readouterr())
    assert "postgresql://me:***@localhost:1/db" in output
    assert not any(piece in output for piece in PIECES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_hide_passwords_in_errors_of_drivers(
    name: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*args: Any, **options: Any) -> None:
        raise optuna.exceptions.StorageInternalError("no answer from hunt@er2@localhost")

    module = importlib.import_module(f"studies.{name}")
    monkeypatch.setattr(module, "optimize", lost)
    first = {"dnn_csv": ["t.csv", "--target", "b"], "gpt_text": ["t.txt"]}.get(name, [])
    assert module.main([*first, "--storage", "postgresql://me:hunt%40er2@localhost/d"]) == 2
    assert capsys.readouterr().err == "error: no answer from ***@localhost\n"


def test_dashboard_does_not_print_passwords(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = script(ROOT / "dashboards/serve.py")
    assert serve.main(["postgresql://me:hunt/er2@localhost:1/db?sslpassword=hunter2"]) == 2
    output = "".join(capsys.readouterr())
    assert "postgresql://me:***@localhost:1/db?sslpassword=*** cannot be opened" in output
    assert not any(piece in output for piece in PIECES)


# --- Names of files ---

NAMES = (
    *(
        "../../up",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "a\\b",
        "C:\\x",
        "nul\0l",
        "x" * 400,
        "ü" * 300,
    ),
    *("con", "a:b*?<>|", "\n", " ", "-rf", "~", "$HOME", "%2e%2e%2f", "\u202egpj", "\ud800"),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_text_becomes_a_file_name_inside_a_folder(name: str, tmp_path: Path) -> None:
    found = safe_join(tmp_path, safe_file_name(name))
    found.mkdir()
    assert found.resolve().parent == tmp_path.resolve()
    assert [path.name for path in tmp_path.iterdir()] == [found.name]
    (found / "trial-1234567.safetensors.1234567.tmp").touch()


@pytest.mark.parametrize("name", [*NAMES[:8], "", None, 3, ["a"], "a b", "a\n"], ids=ascii)
def test_stored_folder_name_cannot_leave_its_folder(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A folder that a study names must be of letters"):
        safe_join(tmp_path, name)


@pytest.mark.parametrize("name", ["../../up", "/up", "x" * 400, "ü" * 300, "..", "a\0b", "a/b\\c"])
def test_study_with_any_name_keeps_its_files_in_one_folder(name: str, folder: Path) -> None:
    home = folder / "in" / "here"
    home.mkdir(parents=True)
    result = tune(storage=home / "s.journal", study_name=name, n_trials=1)
    assert result.study.study_name == name
    closing_report(result, str(home / "s.journal"))
    annotate(result.study)
    assert [path.name for path in folder.rglob("*.safetensors")] == ["trial-0.safetensors"]
    assert {path.name for path in home.iterdir()} == {"s.journal", "s.models", "s.figures"}
    assert [path.name for path in folder.iterdir()] == ["in"]


def test_study_with_a_changed_folder_name_is_rejected(folder: Path) -> None:
    tune(storage="s.journal", study_name="s", n_trials=1)
    study = optuna.load_study(study_name="s", storage=open_storage("s.journal"))
    study.set_user_attr(MODELS, "../../up")
    with pytest.raises(ValueError, match="A folder that a study names must be of letters"):
        tune(storage="s.journal", study_name="s", n_trials=2)


def test_column_names_are_not_used_as_file_names(folder: Path) -> None:
    X, y = classes()
    frame = pd.DataFrame(X, columns=["../a", "/b", "c\0"])
    result = tune(frame, y, storage="s.journal", n_trials=2)
    closing_report(result, "s.journal")
    result.save("model")
    assert optuna_nnhp.load("model").predict(frame).tolist() == result.predict(frame).tolist()
    names = {path.name for path in folder.iterdir()}
    assert names == {"s.journal", "s.models", "s.figures", "model"}


# --- What is read from files ---

CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads"),
    *("shelve.open", "torch.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "pandas.read_pickle"),
    *("pd.read_pickle", "np.load", "numpy.load", "runpy.run_path", "imp.load_source"),
}

# What a process sends to its own workers, and the check that an error can be sent: no files.
MESSAGES = {
    "optuna_nnhp/workers/config.py": ["cloudpickle.loads"],
    "optuna_nnhp/workers/worker.py": ["cloudpickle.loads"],
}


def code_from_files(source: str) -> list[str]:
    """Return the calls and imports that run code from a file or text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & LOADERS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") == "False":
                continue
            if name in CALLS or name in LOADERS or name.endswith(".unpickle"):
                found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle\npickle.load(file)", ["pickle.load"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("torch.load(path, weights_only=True)", ["torch.load"]),
        ("x = eval(text)", ["eval"]),
        ("yaml.load(text)\nyaml.safe_load(text)", ["yaml.load"]),
        ("np.load(path)", ["np.load"]),
        ("np.load(path, allow_pickle=False)", []),
        ("re.compile('x'); model.eval(); json.load(file)", []),
    ],
)
def test_checker_finds_calls_that_run_code(source: str, expected: list[str]) -> None:
    assert code_from_files(source) == expected


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_package_does_not_run_code_from_files(path: Path) -> None:
    passed = MESSAGES.get(path.relative_to(ROOT).as_posix(), [])
    assert code_from_files(path.read_text(encoding="utf-8")) == passed


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_pickle_in_place_of_a_model_is_rejected(name: str, folder: Path) -> None:
    result = tune(n_trials=1)
    result.save("model")
    file = Path("model", name)
    # Opcodes that would make a folder when unpickled.
    file.write_bytes(b"cos\nmkdir\n(S'owned'\ntR.")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        optuna_nnhp.load("model")
    assert not Path("owned").exists()
