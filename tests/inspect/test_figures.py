"""Test the figures of a study and the HTML page that shows them."""

from __future__ import annotations

from html import unescape
import json
from pathlib import Path
from typing import Any
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from optuna.trial import create_trial
import plotly.graph_objects as go
import pytest

from optuna_nnhp.inspect.figures import figures
from optuna_nnhp.inspect.figures import plot_learning_curves
from optuna_nnhp.inspect.figures import plot_learning_rate
from optuna_nnhp.inspect.html_page import save_html
from optuna_nnhp.inspect.plot_style import robust_range
from optuna_nnhp.inspect.summary import best_value
from tests.inspect.synthetic_study import make_study

Direction = Literal["maximize", "minimize"]
RATE: dict[str, BaseDistribution] = {"learning_rate": FloatDistribution(1e-6, 10.0, log=True)}


def make_rate_study(values: dict[float, float], direction: Direction = "minimize") -> optuna.Study:
    """Make a study with one complete trial per learning rate, from a mapping to values."""
    study = optuna.create_study(direction=direction)
    for rate, value in values.items():
        params = {"learning_rate": rate}
        study.add_trial(create_trial(params=params, distributions=RATE, value=value))
    return study


def traces_named(figure: go.Figure, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_curves_show_the_best_trials_and_their_best_epochs(direction: Direction) -> None:
    study = make_study(12, 20, direction=direction)
    figure = plot_learning_curves(study, n_best=3, n_pruned=4)
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    complete.sort(key=lambda t: t.value or 0.0, reverse=direction == "maximize")
    names = [trace.name for trace in figure.data if trace.name.startswith("trial")]
    # The best trial is plotted last.
    assert [int(name.split()[1][:-1]) for name in names] == [t.number for t in complete[2::-1]]
    assert len(traces_named(figure, "pruned")) == 4
    (stars,) = traces_named(figure, "best epoch")
    assert list(stars.x) == [t.user_attrs["best_epoch"] for t in complete[:3]]
    assert np.allclose(stars.y, [t.user_attrs["best_value"] for t in complete[:3]], rtol=1e-4)
    (best,) = [trace for trace in figure.data if trace.name == names[-1]]
    assert list(best.x) == list(complete[0].intermediate_values)
    assert np.allclose(best.y, list(complete[0].intermediate_values.values()), rtol=1e-4)
    assert f"trial {complete[0].number}" in best.text and "learning_rate: " in best.text
    low, high = figure.layout.yaxis.range
    assert low < float(complete[0].value or 0.0) < high


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_curves_show_the_pruned_trials_with_the_best_values(direction: Direction) -> None:
    study = make_study(2, 30, direction=direction)
    sign = 1.0 if direction == "maximize" else -1.0
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    pruned.sort(key=lambda t: -sign * t.user_attrs["best_value"])
    shown = [
        trace.text.split("<br>")[0]
        for trace in traces_named(plot_learning_curves(study), "pruned")
    ]
    assert shown == [f"<b>trial {t.number}</b>, pruned" for t in pruned[19::-1]]


def test_curves_leave_out_values_that_are_not_finite() -> None:
    study = optuna.create_study()
    values = {1: 1.0, 2: float("nan"), 3: 0.5, 4: float("inf")}
    study.add_trial(create_trial(value=0.5, intermediate_values=values))
    trace = plot_learning_curves(study).data[0]
    assert (list(trace.x), list(trace.y)) == ([1, 3], [1.0, 0.5])


def test_long_curves_are_thinned_and_keep_their_best_epoch() -> None:
    values = {epoch: abs(epoch - 777) + 1.0 for epoch in range(1, 2001)}
    study = optuna.create_study()
    study.add_trial(create_trial(value=1.0, intermediate_values=values))
    trace = plot_learning_curves(study, max_points=50).data[0]
    assert len(trace.x) <= 51 and {1, 777, 2000} <= set(trace.x)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n_best": -1}, "`n_best` must be at least 0, but got -1."),
        ({"n_pruned": -2}, "`n_pruned` must be at least 0, but got -2."),
        ({"max_points": 1}, "`max_points` must be at least 2, but got 1."),
    ],
)
def test_learning_curves_reject_numbers_out_of_range(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plot_learning_curves(make_study(1, 1), **arguments)


def test_learning_rate_figure_shows_every_trial() -> None:
    study = make_study(15, 25, failed=3)
    figure = plot_learning_rate(study)
    plotted = {
        (state, rate)
        for trace in figure.data
        for rate in trace.x
        if trace.name != "diverged"
        for state in ["pruned" if "open" in str(trace.marker.symbol) else "complete"]
    }
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(states=states)
    expected = {(t.state.name.lower(), float(f"{t.params['learning_rate']:.5g}")) for t in trials}
    assert plotted == expected
    assert {t.name for t in figure.data} == {t.params["optimizer"] for t in trials} | {"diverged"}
    assert len(traces_named(figure, "diverged")[0].x) == 3
    assert figure.layout.xaxis.type == "log"
    shown = [trace.legendgroup for trace in figure.data if trace.legendgroup and trace.showlegend]
    assert sorted(shown) == sorted({t.params["optimizer"] for t in trials})


def test_learning_rate_figure_shows_the_best_value_of_pruned_trials() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            params={"learning_rate": 0.1},
            distributions=RATE,
            user_attrs={"best_value": 0.8},
            intermediate_values={1: 0.8, 2: 0.3},
        )
    )
    assert best_value(study.trials[0], maximized=True) == 0.8
    figure = plot_learning_rate(study)
    assert list(figure.data[0].y) == [0.8]
    assert "no trial has completed yet" in figure.layout.title.text


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
def test_outliers_do_not_stretch_the_y_axis(direction: Direction, sign: float) -> None:
    values = {0.01 * k: sign * (1.0 + 0.1 * k) for k in range(1, 10)} | {1.0: sign * 1e6}
    figure = plot_learning_rate(make_rate_study(values, direction))
    low, high = figure.layout.yaxis.range
    assert high - low < 10.0
    (trace,) = figure.data
    assert sum(symbol.startswith("triangle") for symbol in trace.marker.symbol) == 1
    assert all(low <= y <= high for y in trace.y)
    assert any("1e+06" in text for text in trace.text)
    assert "1 outside the axis" in figure.layout.title.text


@pytest.mark.parametrize(
    ("values", "maximized", "bounds"),
    [
        ([0.5, 0.6, 0.9], True, (0.48, 0.92)),
        ([1.0, 2.0, 3.0, 900.0], False, (0.7, 7.3)),
        ([2.0, 2.0], False, (1.9, 2.1)),
        ([0.0], True, (-0.05, 0.05)),
    ],
)
def test_robust_range_excludes_outliers_only(
    values: list[float], maximized: bool, bounds: tuple[float, float]
) -> None:
    assert robust_range(values, maximized) == pytest.approx(bounds)


def test_thinned_trials_include_the_best() -> None:
    study = make_rate_study({1e-5 * k: float(k) for k in range(1, 301)})
    (trace,) = plot_learning_rate(study, max_trials=20, details=False).data
    assert len(trace.x) == 20 and min(trace.y) == 1.0


def test_title_states_a_fixed_learning_rate() -> None:
    study = optuna.create_study()
    study.set_user_attr("fixed", {"learning_rate": 0.01})
    study.add_trial(create_trial(value=1.0))
    assert "fixed at 0.01" in plot_learning_rate(study).layout.title.text


@pytest.mark.parametrize(
    ("complete", "pruned", "names"),
    [
        (0, 0, {"learning_curves", "learning_rate"}),
        (0, 8, {"learning_curves", "learning_rate"}),
        (1, 0, {"learning_curves", "learning_rate", "optimization_history"}),
        (
            19,
            2,
            {
                "learning_curves",
                "learning_rate",
                "optimization_history",
                "slice",
                "parallel_coordinate",
            },
        ),
    ],
)
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_figures_depend_on_the_number_of_complete_trials(
    complete: int, pruned: int, names: set[str], direction: Direction
) -> None:
    plotted = figures(make_study(complete, pruned, direction=direction))
    assert set(plotted) == names
    empty = "no trial has completed yet"
    for name in ("learning_curves", "learning_rate"):
        assert (empty in plotted[name].layout.title.text) == (complete == 0)


def test_large_studies_have_all_figures_in_the_common_style() -> None:
    plotted = figures(make_study(40, 10))
    assert set(plotted) == {
        "learning_curves",
        "learning_rate",
        "optimization_history",
        "param_importances",
        "slice",
        "parallel_coordinate",
    }
    assert {figure.layout.template.layout.plot_bgcolor for figure in plotted.values()} == {"white"}
    assert all(figure.layout.title.text.startswith("<b>") for figure in plotted.values())


def test_figures_do_not_change_the_study() -> None:
    study = make_study(20, 5)
    before = [repr(trial) for trial in study.trials], study.user_attrs
    figures(study)
    assert ([repr(trial) for trial in study.trials], study.user_attrs) == before


MARKUP = "<script>alert('x')</script>"


def study_with_markup(complete: int = 20) -> optuna.Study:
    space: dict[str, BaseDistribution] = {
        MARKUP: CategoricalDistribution([MARKUP, "<b>bold</b>", "a & b"]),
        "optimizer": CategoricalDistribution(["<i>adam</i>", "sgd"]),
        **RATE,
    }
    study = make_study(complete, 5, name=MARKUP, space=space)
    study.set_user_attr("metric", "<u>accuracy</u>")
    return study


def texts(value: object) -> list[str]:
    """Return all strings in the JSON of a figure."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    return [value] if isinstance(value, str) else []


def test_markup_in_names_is_escaped_in_every_figure() -> None:
    seen = set()
    for name, figure in figures(study_with_markup()).items():
        for text in texts(json.loads(figure.to_json())):
            for tag in ("<script", "<b>bold", "<i>adam", "<u>"):
                assert tag not in text, (name, text)
                seen |= {tag} if tag in unescape(text) else set()
    assert len(seen) == 4


def test_saved_pages_are_escaped_and_work_offline(tmp_path: Path) -> None:
    paths = save_html(study_with_markup(), tmp_path / "new" / "folder")
    index = paths[0].read_text(encoding="utf-8")
    assert paths[0].name == "index.html" and len(paths) == 7
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in index
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<b>bold" not in text and "<u>acc" not in text
        assert 'src="plotly.min.js"' in text and "https://cdn" not in text
        assert path.stat().st_size < 500_000
    assert [path.name for path in paths[0].parent.glob("*.js")] == ["plotly.min.js"]
    assert all(f'href="{path.name}"' in index for path in paths[1:])


def test_save_html_rejects_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="`folder` must be a folder"):
        save_html(make_study(1, 0), tmp_path / "file")
