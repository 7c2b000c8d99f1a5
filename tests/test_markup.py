"""Test that markup in names and values of users is shown as text and never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import html
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import pandas as pd
import pytest
from torch import nn

import optuna_nnhp
from optuna_nnhp import Result
from optuna_nnhp import optimize
from optuna_nnhp.inspect.dashboard import annotate
from optuna_nnhp.inspect.dashboard import study_note
from optuna_nnhp.inspect.dashboard import trial_note
from optuna_nnhp.inspect.figures import figures
from optuna_nnhp.inspect.html_page import index_html
from optuna_nnhp.inspect.html_page import save_html

ROOT = Path(optuna_nnhp.__file__).parents[1]
CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
SCRIPT = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(1)>"
LINK = "[x](javascript:alert(1))"
TABLE = "`a` | b\n\n# c"
QUOTE = "\"><svg onload=alert(1)>'"
FORMULA = "$x^2$ <a href='javascript:alert(1)'>y</a>"
END = "</script><script>alert(1)</script>"
EVIL = (SCRIPT, IMAGE, LINK, TABLE, QUOTE, FORMULA, END)


def network(params: Any) -> nn.Module:
    for name in (SCRIPT, FORMULA, END):
        params[name]
    return nn.Linear(params["inputs"], 2)


def metric(truth: Any, predicted: Any) -> float:
    return float((truth == predicted).mean())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Tune a study in which all names and texts are attacks; return result and journal."""
    source, rows = np.random.default_rng(0), 80
    X = pd.DataFrame({SCRIPT: source.normal(size=rows)})
    X[IMAGE], X[LINK] = source.choice(EVIL, rows), source.choice(EVIL[:2], rows)
    y = np.where(X[SCRIPT] > 0, SCRIPT, QUOTE)
    path = tmp_path_factory.mktemp("evil") / "s.journal"
    network.__qualname__, metric.__name__ = SCRIPT, IMAGE
    result = optimize(
        network=network,
        X=X,
        y=y,
        metric=metric,
        space={
            SCRIPT: CategoricalDistribution(EVIL),
            FORMULA: FloatDistribution(0, 1),
            END: CategoricalDistribution([True, *EVIL]),
        },
        fixed={"epochs": 2, "inputs": 10},
        n_trials=20,
        storage=path,
        study_name=TABLE + SCRIPT,
        pruner=optuna.pruners.NopPruner(),
        device="cpu",
    )
    study, best = result.study, result.best_trial
    study.set_user_attr(SCRIPT, IMAGE)
    study.set_user_attr("generated_text", {"trial": best.number, "text": "\n".join(EVIL)})
    attributes = {**best.user_attrs, SCRIPT: IMAGE, "cause": IMAGE}
    moved = [[0, best.params, False], [1, {**best.params, SCRIPT: QUOTE, FORMULA: 0.5}, True]]
    study.add_trial(
        optuna.trial.create_trial(
            value=best.value + 0.01 if best.value else 1.0,
            params=best.params,
            distributions=best.distributions,
            user_attrs={**attributes, "schedule": moved},
            intermediate_values={1: 0.5, 2: best.value},
        )
    )
    annotate(study)
    save_html(study, path.with_suffix(".figures"))
    return result, path


def texts(value: Any) -> Iterator[str]:
    """Return all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def test_figures_escape_all_texts(tuned: tuple[Result, Path]) -> None:
    drawn = figures(tuned[0].study)
    assert {"schedules", "slice", "parallel_coordinate", "param_importances"} <= set(drawn)
    allowed = re.compile(r"</?b>|<br>|<extra></extra>|</?span[^<>]*>")
    seen = set[str]()
    for figure in drawn.values():
        for text in texts(json.loads(figure.to_json())):
            seen.add(text)
            assert not re.search(r"<\s*[^\s\d]", allowed.sub("", text)), text
    assert any(html.escape(SCRIPT, quote=False) in text for text in seen)


def test_notes_escape_all_texts(tuned: tuple[Result, Path]) -> None:
    study = tuned[0].study
    note = study_note(study) + "\n" + trial_note(study, study.best_trial)
    assert "Generated text" not in trial_note(study, study.best_trial)
    for line in note.splitlines():
        if not line.startswith("    "):  # a code block
            bare = re.sub(r"\\[\\`*_\[\]<>|$~&#!]", "", line).replace("&emsp;", "")
            assert not re.search(r"[<>$\[\]]", bare), line
            # Rows of a table have two cells, whatever they contain.
            assert not line.startswith("|") or bare.count("|") == 3, line
    assert r"\<script\>alert(1)\</script\>" in note and r"\[x\](javascript:alert(1))" in note


def test_html_page_escapes_names_of_figures() -> None:
    study = optuna.create_study(study_name=SCRIPT)
    study.set_user_attr("fixed", {IMAGE: QUOTE})
    page = index_html(study, {QUOTE: figures(study)["learning_rate"]})
    for evil in (SCRIPT, IMAGE, QUOTE):
        assert evil not in page
    assert html.escape(IMAGE) in page


@contextmanager
def watched() -> Iterator[tuple[Any, list[str]]]:
    """Open a page in headless Chromium, and collect dialogs and errors."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium is not None, "The test needs Chromium, but it is not installed."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(30_000)
        events: list[str] = []

        def dialog(found: Any) -> None:
            events.append(f"dialog: {found.message}")
            found.dismiss()

        page.on("dialog", dialog)
        page.on("pageerror", lambda error: events.append(str(error)))
        yield page, events
        browser.close()


# What the attacks would have made of themselves.
INJECTED = """
[...document.querySelectorAll('script')].filter(s => s.textContent.trim() == 'alert(1)').length
+ document.querySelectorAll('img[src="x"], svg[onload], [onerror]').length
+ [...document.querySelectorAll('a')].filter(
    a => (a.getAttribute('href') || a.getAttribute('xlink:href') || '').startsWith('javascript:')
  ).length
"""
HOVER = """
for (const plot of document.querySelectorAll('.js-plotly-plot'))
  plot.data.forEach((trace, i) => {
    if (trace.type == 'scatter' && (trace.x || []).length)
      try { Plotly.Fx.hover(plot, [{curveNumber: i, pointNumber: 0}]); } catch (error) {}
  });
"""


@pytest.mark.browser
def test_html_pages_run_no_code_from_names(tuned: tuple[Result, Path]) -> None:
    folder = tuned[1].with_suffix(".figures")
    with watched() as (page, events):
        for path in sorted(folder.glob("*.html")):
            page.goto(path.as_uri())
            page.wait_for_function("document.querySelector('.js-plotly-plot .main-svg') != null")
            assert events == []
            page.evaluate(
                HOVER
            )  # of points of hidden panels too, which plotly.js has no texts for
            page.wait_for_timeout(200)
            assert page.evaluate(INJECTED) == 0, path.name
            if path.name == "index.html":
                assert page.locator("h1").inner_text() == "`a` | b # c" + SCRIPT
                assert page.get_by_text(IMAGE).count() > 0
            assert [event for event in events if event.startswith("dialog")] == []
            events.clear()


def visited(url: str) -> list[str]:
    """Return the dialogs and errors on the pages of the dashboard."""
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)
    with watched() as (page, events):
        for place, seen in (
            ("", SCRIPT),
            ("studies/0", "Learning curves: " + IMAGE),
            ("studies/0/note", "Best so far"),
            ("studies/0/analytics", "Slice"),
            ("studies/0/trials?numbers=20", "Best trial"),
        ):
            page.goto(url + place)
            expect(page.get_by_text(seen).first).to_be_visible()
            page.wait_for_timeout(500)
            assert page.evaluate(INJECTED) == 0, place
            if place.endswith("note"):
                expect(page.get_by_role("cell", name=SCRIPT).first).to_be_visible()
                expect(page.get_by_role("cell", name=LINK).first).to_be_visible()
        return events


@pytest.mark.browser
def test_dashboard_runs_no_code_from_names(tuned: tuple[Result, Path]) -> None:
    command = [sys.executable, str(ROOT / "dashboards/serve.py"), str(tuned[1]), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            events = visited(process.stdout.readline().strip())
        finally:
            process.kill()
    assert [event for event in events if event.startswith("dialog")] == []
