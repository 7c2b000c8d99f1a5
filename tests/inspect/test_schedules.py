"""Test the table and the figure of hyperparameter schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from optuna.trial import create_trial
import plotly.graph_objects as go
import pytest

from optuna_nnhp.inspect.dashboard import annotate
from optuna_nnhp.inspect.dashboard import study_note
from optuna_nnhp.inspect.dashboard import trial_note
from optuna_nnhp.inspect.figures import figures
from optuna_nnhp.inspect.html_page import save_html
from optuna_nnhp.inspect.schedule_figure import plot_schedules
from optuna_nnhp.inspect.schedules import schedule_dataframe
from optuna_nnhp.inspect.schedules import schedule_of
from optuna_nnhp.inspect.summary import summary
from tests.inspect.synthetic_study import make_study
from tests.inspect.test_dashboard import figure_texts
from tests.tiny import TINY
from tests.tiny import tune

SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-5, 1.0, log=True),
    "dropout": FloatDistribution(0.0, 0.9),
    "activation": CategoricalDistribution(["relu", "tanh"]),
}
Stages = list[tuple[int, float, float, bool]]  # round, learning rate, dropout, restarts


def add_trial(study: optuna.Study, value: float, stages: Stages, epochs: int = 9) -> None:
    schedule = [
        [at, {"learning_rate": rate, "dropout": drop}, new] for at, rate, drop, new in stages
    ]
    study.add_trial(
        create_trial(
            value=value,
            params={"activation": "relu", **dict(schedule[-1][1])},  # type: ignore[call-overload]
            distributions=SPACE,
            user_attrs={"schedule": schedule, "epochs": epochs},
        )
    )


@pytest.fixture
def study() -> optuna.Study:
    """Make a study with three trials, the last of them the best, and one without a schedule."""
    study = optuna.create_study(study_name="schedules")
    study.add_trial(create_trial(value=0.05))
    add_trial(study, 0.3, [(0, 0.1, 0.6, False)])
    add_trial(study, 0.2, [(0, 0.1, 0.5, False), (3, 0.01, 0.5, True), (6, 0.01, 0.4, False)])
    add_trial(study, 0.1, [(0, 0.2, 0.5, False), (4, 0.04, 0.5, False)], epochs=8)
    return study


def step_lines(figure: go.Figure) -> dict[tuple[str, str], go.Scatter]:
    """Return the step lines by panel and trial."""
    titles = {f"x{i or ''}".replace("x1", "x"): a.text for i, a in panels(figure)}
    return {
        (titles[trace.xaxis], trace.name): trace for trace in figure.data if trace.mode == "lines"
    }


def panels(figure: go.Figure) -> list[tuple[int, Any]]:
    return list(enumerate(figure.layout.annotations, start=1))


def test_changed_parameters_have_a_panel_with_a_line_per_trial(
    study: optuna.Study,
) -> None:
    figure = plot_schedules(study)
    assert [title.text for _, title in panels(figure)] == ["learning_rate", "dropout"]
    drawn = step_lines(figure)
    assert len(drawn) == 6
    rate = drawn["learning_rate", "trial 3: 0.1"]
    assert (list(rate.x), list(rate.y)) == ([0, 4, 8], [0.2, 0.04, 0.04])
    assert rate.line.shape == "hv"
    # Where nothing changes there is no point.
    drop = drawn["dropout", "trial 2: 0.2"]
    assert (list(drop.x), list(drop.y)) == ([0, 6, 9], [0.5, 0.4, 0.4])
    constant = drawn["dropout", "trial 3: 0.1"]
    assert (list(constant.x), list(constant.y)) == ([0, 8], [0.5, 0.5])


def test_best_trial_is_thick_on_top_and_first_in_the_legend(study: optuna.Study) -> None:
    drawn = [trace for trace in plot_schedules(study).data if trace.mode == "lines"]
    assert drawn[-1].name == "trial 3: 0.1"
    widths = {trace.name: trace.line.width for trace in drawn}
    assert max(widths, key=lambda name: widths[name]) == "trial 3: 0.1"
    shown = sorted((trace.legendrank, trace.name) for trace in drawn if trace.showlegend)
    assert [name for _, name in shown] == ["trial 3: 0.1", "trial 2: 0.2", "trial 1: 0.3"]


def test_axis_is_logarithmic_if_the_distribution_is(study: optuna.Study) -> None:
    layout = plot_schedules(study).layout
    assert (layout.yaxis.type, layout.yaxis2.type) == ("log", None)


def test_restarts_are_marked(study: optuna.Study) -> None:
    marks = [trace for trace in plot_schedules(study).data if trace.mode == "markers"]
    assert [(list(mark.x), list(mark.y)) for mark in marks] == [([3], [0.01]), ([3], [0.5])]
    assert {mark.legendgroup for mark in marks} == {"2"}
    assert "diamonds: restarts from its initial weights" in plot_schedules(study).layout.title.text
    assert "diamonds" not in plot_schedules(study, n_best=1).layout.title.text


def test_rounds_are_shown_as_epochs(study: optuna.Study) -> None:
    study.set_user_attr("rounds_per_epoch", 3)
    rate = step_lines(plot_schedules(study))["learning_rate", "trial 3: 0.1"]
    assert list(rate.x) == [0, pytest.approx(4 / 3, abs=1e-3), 8]
    assert schedule_of(study, study.trials[2]).restarts == [1]
    assert schedule_dataframe(study, study.trials[2])["epoch"].tolist() == [0, 1, 2]


def test_schedule_that_begins_a_better_one_is_left_out() -> None:
    study = optuna.create_study()
    stages: Stages = [(0, 0.2, 0.5, False), (4, 0.04, 0.5, False)]
    add_trial(study, 0.3, stages[:1])
    add_trial(study, 0.2, [*stages, (6, 0.02, 0.5, False)])
    add_trial(study, 0.1, stages)
    add_trial(study, 0.4, stages)
    names = {trace.name for trace in plot_schedules(study).data}
    assert names == {"trial 2: 0.1", "trial 1: 0.2"}


def test_n_best_limits_the_trials(study: optuna.Study) -> None:
    assert {trace.name for trace in plot_schedules(study, n_best=1).data} == {"trial 3: 0.1"}
    with pytest.raises(ValueError, match=r"`n_best` must be at least 1, but got 0\."):
        plot_schedules(study, n_best=0)


def test_panels_show_only_trials_with_the_parameter() -> None:
    study = optuna.create_study()
    add_trial(study, 0.2, [(0, 0.1, 0.5, False), (3, 0.01, 0.5, False)])
    schedule = [[0, {"l1": 0.1}, False], [2, {"l1": 0.2}, True]]
    study.add_trial(create_trial(value=0.1, user_attrs={"schedule": schedule, "epochs": 4}))
    drawn = step_lines(plot_schedules(study))
    assert set(drawn) == {("l1", "trial 1: 0.1"), ("learning_rate", "trial 0: 0.2")}


def test_parameters_of_any_type_and_name_are_drawn() -> None:
    study = optuna.create_study()
    schedule = [[0, {"<b>": "<i>", "on": True}, False], [1, {"<b>": "relu", "on": False}, False]]
    study.add_trial(create_trial(value=0.1, user_attrs={"schedule": schedule, "epochs": 2}))
    drawn = step_lines(plot_schedules(study))
    assert list(drawn["&lt;b&gt;", "trial 0: 0.1"].y) == ["&lt;i&gt;", "relu", "relu"]
    assert list(drawn["on", "trial 0: 0.1"].y) == ["True", "False", "False"]


def test_axis_of_language_models_is_the_share_of_the_budget(study: optuna.Study) -> None:
    assert plot_schedules(study).layout.xaxis.title.text == "epoch"
    study.set_user_attr("template", "gpt")
    assert plot_schedules(study).layout.xaxis.title.text == "share of the budget"


@pytest.mark.parametrize(
    ("count", "with_title"),
    [(1, {0}), (2, {0, 1}), (3, {0, 1, 2}), (5, {2, 3, 4}), (9, {6, 7, 8})],
)
def test_lowest_panel_of_each_column_has_the_axis_title(count: int, with_title: set[int]) -> None:
    study = optuna.create_study()
    schedule = [[at, {f"p{i}": at for i in range(count)}, False] for at in (0, 1)]
    study.add_trial(create_trial(value=0.1, user_attrs={"schedule": schedule, "epochs": 2}))
    for small in (False, True):
        layout = plot_schedules(study, compact=small).layout
        axes = [layout[f"xaxis{i + 1 if i else ''}"] for i in range(count)]
        assert {i for i, axis in enumerate(axes) if axis.title.text} == with_title
        labelled = {i for i, axis in enumerate(axes) if axis.showticklabels is not False}
        assert labelled == (with_title if small else set(range(count)))
    assert layout.height == 450


@pytest.mark.parametrize("stages", [[], [[0, {"dropout": 0.1}, False]]])
def test_figure_without_changes_is_empty(stages: list[Any]) -> None:
    study = make_study(3, 3)
    for state in (TrialState.COMPLETE, TrialState.PRUNED):
        moved = [[0, {"dropout": 0.1}, False], [1, {"dropout": 0.2}, False]]
        schedule = stages if state == TrialState.COMPLETE else moved
        attributes = {"schedule": schedule} if schedule else {}
        study.add_trial(create_trial(state=state, value=0.99, user_attrs=attributes))
    figure = plot_schedules(study)
    assert not figure.data and "no values changed" in figure.layout.title.text
    assert "schedules" not in figures(study)
    annotate(study)
    assert "schedules" not in figure_texts(study)
    assert "best trial's values" not in summary(study)


def test_summary_notes_and_figures_show_changes(study: optuna.Study, tmp_path: Path) -> None:
    add_trial(study, 0.01, [(0, 0.1, 0.1, False), (1, 0.2, 0.1, False), (2, 0.3, 0.1, False)])
    words = "changed 2 times during training"
    assert summary(study)["best trial's values"].startswith(words)
    assert words in study_note(study)
    assert words in trial_note(study, study.best_trial)
    assert "during training" not in trial_note(study, study.trials[0])
    assert "schedules" in figures(study)
    index, *paths = save_html(study, tmp_path)
    assert "schedules.html" in [path.name for path in paths]
    text = index.read_text(encoding="utf-8")
    assert '<figure id="schedules">' in text and words in text
    annotate(study)
    assert "Hyperparameter schedules: value" in figure_texts(study)["schedules"]


def test_compact_figure_is_small() -> None:
    study = make_study(3, 0)
    for trial in range(5):
        wave = [[1 + math.sin(i * (trial + at) / 7) / 2 for i in range(8)] for at in range(50)]
        schedule = [[at, {f"p{i}": v for i, v in enumerate(wave[at])}, False] for at in range(50)]
        study.add_trial(create_trial(value=0.99, user_attrs={"schedule": schedule, "epochs": 50}))
    annotate(study)
    assert len(figure_texts(study)["schedules"]) < 30_000


@pytest.mark.parametrize(("method", "row"), [("population", -1), ("gradient", 0)])
def test_schedule_dataframe_has_one_row_per_segment(method: str, row: int) -> None:
    result = tune(method=method, n_trials=8, fixed=TINY | {"epochs": 6})
    trial = next(t for t in result.study.trials if len(t.user_attrs["schedule"]) > 1)
    frame = schedule_dataframe(result.study, trial)
    assert frame.drop(columns="epoch").iloc[row].to_dict() == trial.params
    assert frame["epoch"].tolist() == [at for at, _, _ in trial.user_attrs["schedule"]]
    assert frame["learning_rate"].nunique() > 1
    best = schedule_dataframe(result.study, result.best_trial)
    assert result.schedule.equals(best)


def test_schedule_of_constant_parameters_has_one_row() -> None:
    result = tune(n_trials=2, method="random")
    (row,) = result.schedule.to_dict("records")
    assert row == {"epoch": 0, **result.best_params}
