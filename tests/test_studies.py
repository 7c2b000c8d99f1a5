"""Every script in studies/ runs, explains itself with --help, and reports errors clearly."""

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
    tables = ["compare_methods", "compare_with_optuna", "dnn_csv", "dnn_digits"]
    assert [*tables, "gpt_text", "gpt_transfer", "own_network"] == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_the_script(
    script: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(900)))
    return path


def test_gpt_text(run: Run, sums: Path, tmp_path: Path) -> None:
    line = ("gpt_text", str(sums), "--timeout", "8", "--seconds", "1", "--n-trials", "2")
    code, output, errors = run(*line, "--prompt", "12 and")
    assert code == 0, errors
    assert output.startswith("12 and") and "perplexity" in output and "tokens per second" in output
    assert "dashboards/serve.py sums.journal" in output.splitlines()[-1]
    assert optuna_nnhp.load(tmp_path / "sums-model").generate("12", tokens=3).startswith("12")


def test_report_is_printed_if_the_prompt_is_invalid(run: Run, sums: Path) -> None:
    line = ("gpt_text", str(sums), "--timeout", "4", "--seconds", "0.3", "--n-trials", "1")
    code, output, errors = run(*line, "--prompt", "Ünd")
    assert code == 2 and "`--prompt` cannot be continued" in errors
    assert "dashboards/serve.py sums.journal" in output.splitlines()[-1]


def test_gpt_transfer(run: Run, sums: Path) -> None:
    sizes = ("--narrow", "16", "--wide", "32", "--train-tokens", "8000", "--final-tokens", "8000")
    code, output, errors = run("gpt_transfer", str(sums), "--timeout", "4", *sizes)
    assert code == 0, errors
    assert "tuned at width   16" in output and "tuned at width   32" in output


def test_missing_text_file_is_an_error(run: Run) -> None:
    code, _, errors = run("gpt_text", "missing.txt", "--timeout", "1")
    assert code == 2 and "missing.txt" in errors


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


def test_compare_methods(run: Run, tmp_path: Path) -> None:
    line = ("--seconds", "0.5", "--seeds", "1", "--epochs", "2", "--data", "friedman")
    code, output, errors = run("compare_methods", *line, "--methods", "random,zoom,population")
    assert code == 0, errors
    assert output.count("cannot be said") == 3  # one seed: nothing is known of the noise
    assert "within 2% of the best rate's" in output and "beats the best fixed" in output
    table = pd.read_csv(tmp_path / "compare_methods.csv")
    assert list(table["method"]) == ["random", "zoom", "population"]
    assert table["best"][0] > 0 and table["model-epochs"][0] > 0
    assert len(pd.read_csv(tmp_path / "compare_methods_gradient.csv")) == 4
    sides = pd.read_csv(tmp_path / "compare_methods_population.csv")
    assert sides["model-epochs"].tolist() == [32, 32]  # 16 networks of 2 epochs on both sides
    assert "plotly" in (tmp_path / "compare_methods.html").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--methods", "random,zom"), "'zom'"),
        (("--parts", "all"), "methods, gradient, population"),
        (("--seeds", "0"), "at least 1"),
        (("--timeout", "-1"), "more than 0 seconds"),
    ],
)
def test_compare_methods_prints_errors_on_one_line(
    argv: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    code, output, errors = run("compare_methods", *argv)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (code, output, len(lines)) == (2, "", 1) and message in lines[0]
    assert not list(tmp_path.iterdir())


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
def test_dnn_csv_prints_errors_on_one_line(
    argv: tuple[str, ...], message: str, run: Run, adult: Path, tmp_path: Path
) -> None:
    code, output, errors = run("dnn_csv", *argv)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (code, output, len(lines)) == (2, "", 1)
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["adult.csv"]
