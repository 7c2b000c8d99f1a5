"""Every prepared study runs, teaches with --help, and says clearly what is wrong."""

from __future__ import annotations

from collections.abc import Callable
import importlib
from pathlib import Path
import re

import numpy as np
import pandas as pd
import pytest

import optuna_nnhp

SCRIPTS = sorted(path.stem for path in (Path(__file__).parent.parent / "studies").glob("[!_]*.py"))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a script's main in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = importlib.import_module(f"studies.{script}").main([*argv])
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


@pytest.fixture
def adult(tmp_path: Path) -> Path:
    """Mixed columns with gaps, like the census data of the same name."""
    source, rows = np.random.default_rng(0), 300
    frame = pd.DataFrame(
        {
            "age": source.integers(17, 90, rows).astype(float),
            "workclass": source.choice(["Private", "State-gov", None], rows),
            "hours per week": source.normal(40, 10, rows),
            "married": source.choice([True, False], rows),
            "since": pd.Timestamp("2001-01-01")
            + pd.to_timedelta(source.integers(0, 999, rows), "D"),
        }
    )
    frame.loc[::7, "age"] = np.nan
    frame["income"] = np.where(source.random(rows) < 0.3, ">50K", "<=50K")
    path = tmp_path / "adult.csv"
    frame.to_csv(path, index=False)
    return path


def test_every_script_is_tested() -> None:
    assert SCRIPTS == ["compare_with_optuna", "dnn_csv", "dnn_digits", "own_network"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(script, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--timeout" in text and "seconds" in text and len(text.splitlines()) > 12


def test_dnn_digits(run: Run, tmp_path: Path) -> None:
    code, output, _ = run("dnn_digits", "--timeout", "3")
    assert code == 0
    assert "dashboards/serve.py dnn_digits.journal" in output.splitlines()[-1]
    assert (tmp_path / "dnn_digits.journal").exists()
    assert (tmp_path / "dnn_digits.figures" / "index.html").exists()


def test_own_network(run: Run, tmp_path: Path) -> None:
    code, output, _ = run("own_network", "--n-trials", "3", "--timeout", "4")
    assert code == 0 and "digits put aside" in output
    assert "dashboards/serve.py own_network.journal" in output.splitlines()[-1]
    assert (tmp_path / "own_network.figures" / "index.html").exists()


def test_dnn_csv(run: Run, adult: Path, tmp_path: Path) -> None:
    line = ("dnn_csv", str(adult), "--target", "income", "--n-trials", "3", "--metric", "roc_auc")
    code, output, _ = run(*line)
    assert code == 0 and "roc_auc" in output
    predictions = optuna_nnhp.load(tmp_path / "adult-model").predict(pd.read_csv(adult))
    assert set(predictions) <= {">50K", "<=50K"}
    code, again, _ = run(*line)
    assert code == 0 and re.search(r"trials: +3 in all", again)  # continued, and already complete


def test_compare_with_optuna(run: Run) -> None:
    code, output, _ = run("compare_with_optuna", "--timeout", "3")
    assert code == 0
    assert "plain Optuna" in output.splitlines()[0] and "trials" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nothing.csv", "--target", "income"), "nothing.csv"),
        (("adult.csv", "--target", "incom"), "'income'"),
        (("adult.csv", "--target", "income", "--metric", "acuracy"), "'accuracy'"),
        (("adult.csv", "--target", "income", "--method", "byes"), "'bayes'"),
        (("adult.csv", "--target", "income", "--n-trials", "0"), "at least 1"),
    ],
)
def test_dnn_csv_says_in_one_line_what_is_wrong(
    argv: tuple[str, ...], message: str, run: Run, adult: Path, tmp_path: Path
) -> None:
    code, output, errors = run("dnn_csv", *argv)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (code, output, len(lines)) == (2, "", 1)
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["adult.csv"]
