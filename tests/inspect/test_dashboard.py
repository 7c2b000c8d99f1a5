"""Test the notes and figures for optuna-dashboard, and `dashboards/serve.py`."""

from __future__ import annotations

from collections.abc import Iterator
import importlib.util
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
from threading import Event
from types import ModuleType
from typing import Literal
from urllib.request import urlopen

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import create_trial
import optuna_dashboard
import pytest

from optuna_nnhp.inspect.dashboard import annotate
from optuna_nnhp.inspect.dashboard import study_note
from optuna_nnhp.inspect.dashboard import trial_note
from optuna_nnhp.storages.open_storage import open_existing_storage
from optuna_nnhp.storages.open_storage import open_storage
from tests.inspect.synthetic_study import make_study

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "dashboards" / "serve.py"
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def journal(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def figure_texts(study: optuna.Study) -> dict[str, str]:
    """Return the stored figures by name, joined from their pieces."""
    attrs = study._storage.get_study_system_attrs(study._study_id)
    parts: dict[str, dict[int, str]] = {}
    for key, text in attrs.items():
        if key.startswith("dashboard:plot_data:"):
            name, number = key.removeprefix("dashboard:plot_data:").rsplit(":", 1)
            parts.setdefault(name, {})[int(number)] = text
    return {name: "".join(found[i] for i in sorted(found)) for name, found in parts.items()}


def note_of(study: optuna.Study, number: int) -> str:
    attrs = study._storage.get_study_system_attrs(study._study_id)
    prefix = f"dashboard:{study.trials[number]._trial_id}:note_str:"
    return "".join(text for key, text in sorted(attrs.items()) if key.startswith(prefix))


def load_serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_study_note_describes_data_parameters_and_best_trial() -> None:
    study = make_study(12, 20, failed=2)
    note = study_note(study)
    best = study.best_trial
    for text in (
        "## digits",
        "1437 training and 360 validation rows",
        "up to 50 epochs a trial, early stopping after 16 epochs",
        "- **seed**: 1",
        "| `learning_rate`&emsp; | 1e-05 to 1, logarithmic |",
        "| `activation`&emsp; | relu, gelu, tanh |",
        "| `loss`&emsp; | cross\\_entropy |",
        f"**accuracy {best.value:.4g}** in trial {best.number}",
        f"| `width`&emsp; | {best.params['width']} |",
        "34 in all: 20 pruned, 12 complete, 2 failed",
        "- **ended by**: 20 pruned, ",
        "2 diverged",
    ):
        assert text in note


def test_trial_note_describes_the_trial_and_how_to_load_it() -> None:
    study = make_study(12, 20)
    best = study.best_trial
    note = trial_note(study, best)
    for text in (
        f"accuracy {best.value:.4g}",
        f"- **best epoch**: {best.user_attrs['best_epoch']}",
        f"- **iterations**: {best.user_attrs['iterations']}",
        "- **weights**: 12345",
        f"| `optimizer`&emsp; | {best.params['optimizer']} |",
        "`result.model`",
        "`optuna_nnhp.load`",
    ):
        assert text in note


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("complete", [0, 12])
def test_annotate_writes_only_if_the_study_changed(
    tmp_path: Path, direction: Literal["maximize", "minimize"], complete: int
) -> None:
    path = tmp_path / "a.journal"
    study = make_study(complete, 10, direction=direction, storage=journal(path))
    assert annotate(study)
    assert optuna_dashboard.get_note(study).startswith("## digits")
    drawn = figure_texts(study)
    assert set(drawn) == {"learning_curves", "learning_rate"}
    assert all(json.loads(text)["layout"]["title"]["text"] for text in drawn.values())
    content = path.read_bytes()
    assert not annotate(study)
    # Another process sees that nothing changed as well.
    assert not annotate(optuna.load_study(study_name="digits", storage=journal(path)))
    assert path.read_bytes() == content


def test_figures_of_large_studies_are_small() -> None:
    study = make_study(200, 300)
    annotate(study)
    assert all(len(text) < 30_000 for text in figure_texts(study).values())


def test_note_moves_to_a_new_best_trial() -> None:
    study = make_study(5, 5)
    annotate(study)
    old = study.best_trial.number
    assert "Best trial: accuracy" in note_of(study, old)
    study.add_trial(create_trial(value=0.9999))
    assert annotate(study)
    assert "Best trial: accuracy 0.9999" in note_of(study, study.best_trial.number)
    assert note_of(study, old) == ""
    assert f"**accuracy 0.9999** in trial {study.best_trial.number}" in optuna_dashboard.get_note(
        study
    )


def test_text_below_the_line_is_kept() -> None:
    study = make_study(5, 5)
    optuna_dashboard.save_note(study, "written before")
    annotate(study)
    note = optuna_dashboard.get_note(study)
    assert note.startswith("## digits") and note.endswith("written before")
    optuna_dashboard.save_note(study, note + "\n\nwritten after")
    study.add_trial(create_trial(value=0.9999))
    annotate(study)
    note = optuna_dashboard.get_note(study)
    assert "0.9999" in note and note.endswith("written before\n\nwritten after")
    assert note.count("## digits") == 1


def test_markup_in_notes_is_escaped() -> None:
    study = make_study(3, 0, name="<script>x</script> | $y$ [a](b) __c__ `d` # e")
    head = study_note(study).splitlines()[0]
    expected = r"\<script\>x\</script\> \| \$y\$ \[a\](b) \_\_c\_\_ \`d\` \# e"
    assert head == f"## {expected}"


def test_notes_contain_the_generated_text_of_the_best_trial() -> None:
    study = make_study(3, 0)
    best = study.best_trial
    study.set_user_attr("generated_text", {"trial": best.number, "text": "ROMEO:\n<b>"})
    for note in (study_note(study), trial_note(study, best)):
        assert "### Generated text\n\n    ROMEO:\n    <b>" in note
    study.set_user_attr("generated_text", {"trial": best.number + 1, "text": "ROMEO:"})
    assert "Generated text" not in study_note(study) + trial_note(study, best)


def test_missing_optuna_dashboard_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'optuna-nnhp\[dashboard\]'"):
        annotate(make_study(1, 0))


def test_journal_with_an_incomplete_line_is_served(tmp_path: Path) -> None:
    path = tmp_path / "torn.journal"
    optuna.create_study(study_name="s", storage=open_storage(path))
    path.write_bytes(path.read_bytes() + b'{"op_code":0,"wor')
    storage = open_existing_storage(str(path))
    assert [study.study_name for study in storage.get_all_studies()] == ["s"]


@pytest.mark.parametrize(
    ("storage", "text"),
    [
        ("nothing.journal", "there is no file 'nothing.journal'"),
        ("sqlite:///nothing.db", "there is no file 'nothing.db'"),
        ("text.txt", "it is not a journal of Optuna"),
        ("empty.journal", "it holds no study yet"),
        ("study.db", "say sqlite:///study.db"),
        ("foo://me:secret@host/data", "Can't load plugin: sqlalchemy.dialects:foo"),
        ("foo://me:se%40cret@host:5o/data?password=secret", "'5o'"),
    ],
)
def test_storage_errors_are_one_line_without_passwords(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    storage: str,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no\njournal\n", encoding="utf-8")
    Path("empty.journal").touch()
    Path("study.db").write_bytes(b"SQLite format 3\x00")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert load_serve().main([storage]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert text in err and "secret" not in err and "se%40cret" not in err and "se@cret" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_missing_study_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.journal"
    make_study(1, 0, storage=journal(path))
    assert load_serve().main([str(path), "--study-name", "other"]) == 2
    assert "it holds no study 'other'; it has 'digits'" in capsys.readouterr().err


def test_port_in_use_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.journal"
    make_study(1, 0, storage=journal(path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert load_serve().main([str(path), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be opened" in capsys.readouterr().err


def test_studies_of_other_programs_are_not_annotated(tmp_path: Path) -> None:
    storage = journal(tmp_path / "a.journal")
    make_study(1, 0, storage=storage)
    optuna.create_study(study_name="other", storage=storage)
    assert [study.study_name for study in load_serve().our_studies(storage, None)] == ["digits"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the dashboard on a synthetic study; yield its address and process."""
    make_study(12, 20, storage=journal(tmp_path / "optuna_nnhp.journal"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(SERVE), "--port", "0", "--study-name", "digits"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process")
def test_requests_are_answered_in_parallel_until_ctrl_c(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    url, process = served
    assert url.startswith("http://127.0.0.1:") and url.endswith("/dashboard/studies/0")
    port = int(url.split(":")[2].split("/")[0])
    # A client that connects and sends nothing would block a server with one thread.
    api = f"http://127.0.0.1:{port}/api/studies"
    with socket.create_connection(("127.0.0.1", port)), urlopen(api, timeout=20) as answer:
        assert json.load(answer)["study_summaries"][0]["study_name"] == "digits"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert process.stdout is not None and process.stderr is not None
    assert process.stderr.read() == ""
    assert process.stdout.read() == "Open it in a browser; Ctrl-C ends it. Studies: 'digits'.\n"


@pytest.mark.browser
def test_dashboard_shows_trials_curves_notes_and_figures(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    from playwright.sync_api import expect
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium is not None, "The test needs Chromium, but it is not installed."
    expect.set_options(timeout=30_000)
    url = served[0]
    best = make_study(12, 20).best_trial.number
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url.removesuffix("studies/0"))
        expect(page.get_by_text("digits").first).to_be_visible()
        page.goto(url)
        for name, title in (
            ("learning_curves", "Learning curves: accuracy"),
            ("learning_rate", "Learning rate: accuracy"),
        ):
            figure = page.locator(f"[id='user-defined-plot:{name}']")
            expect(figure.locator(".gtitle")).to_contain_text(title)
            expect(figure.locator("path.point").first).to_be_attached()
        expect(page.get_by_text("Intermediate values")).to_be_visible()
        expect(page.locator("#graph-intermediate-values .js-line").first).to_be_attached()
        page.goto(f"{url}/trials?numbers={best}")
        expect(page.get_by_text("34 Trials")).to_be_visible()
        expect(page.get_by_role("heading", name=f"Trial {best} (")).to_be_visible()
        expect(page.get_by_role("heading", name="Best trial: accuracy")).to_be_visible()
        expect(page.get_by_text("optuna_nnhp.load")).to_be_visible()
        page.goto(f"{url}/note")
        expect(page.get_by_role("heading", name="Best so far")).to_be_visible()
        expect(page.get_by_text("1437 training and 360 validation rows")).to_be_visible()
        expect(page.get_by_role("cell", name="1e-05 to 1, logarithmic")).to_be_visible()
        assert errors == []
        browser.close()


def test_refresh_continues_after_an_error_and_logs_it_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = load_serve()
    study = make_study(2, 0)
    stop = Event()
    calls: list[str] = []

    def fail_twice(found: optuna.Study) -> bool:
        calls.append(found.study_name)
        if len(calls) <= 2:
            raise RuntimeError("database is locked at postgresql://me:secret@host/data\nmore")
        stop.set()
        return annotate(found)

    monkeypatch.setattr(serve, "annotate", fail_twice)
    monkeypatch.setattr(serve, "REFRESH_SECONDS", 0.001)
    serve.refresh(study._storage, None, "postgresql://me:secret@host/data", stop)
    assert calls == ["digits"] * 3
    expected = "database is locked at postgresql://me:***@host/data"
    assert capsys.readouterr().err == f"The notes could not be refreshed: {expected}\n"
    assert optuna_dashboard.get_note(study).startswith("## digits")
