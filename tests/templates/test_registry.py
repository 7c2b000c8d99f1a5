"""A registered template works with `optimize` and everything else, without other changes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest

import optuna_nnhp
from optuna_nnhp import Objective
from optuna_nnhp import load
from optuna_nnhp import optimize
from optuna_nnhp.inspect.summary import summary
from optuna_nnhp.templates import TEMPLATES
from optuna_nnhp.templates import Template
from optuna_nnhp.templates import find_template
from optuna_nnhp.templates import register
from optuna_nnhp.templates import template_of_study
from optuna_nnhp.templates.problem_spec import ProblemSpec

PACKAGE = Path(optuna_nnhp.__file__).parent
FIXED = {"epochs": 8, "batch_size": 16, "optimizer": "adam", "patience": 8}
X = np.random.default_rng(0).normal(size=(120, 3))
Y = np.where(X @ [2.0, -1.0, 0.5] > 0, "up", "down")


@pytest.fixture(autouse=True)
def linear() -> Iterator[type[Template]]:
    """Register the toy template for one test."""
    before = dict(TEMPLATES)
    from tests.templates.toy_template import LinearTemplate

    yield register(LinearTemplate)
    TEMPLATES.clear()
    TEMPLATES.update(before)
    TEMPLATES.pop("linear", None)


def test_a_new_template_is_tuned_by_its_name(tmp_path: Path) -> None:
    result = optimize("linear", X, Y, n_trials=6, storage=None, fixed=FIXED)
    assert len(result.study.trials) == 6
    assert set(result.study.best_params) == {"learning_rate", "weight_decay"}
    assert result.best_value > 0.8
    assert result.score(X, Y) > 0.8
    again = load(result.save(tmp_path / "model"))
    assert again.predict(X).tolist() == result.predict(X).tolist()
    assert again.template == "linear"


def test_a_new_template_shows_in_reports() -> None:
    study = optimize("linear", X, Y, n_trials=1, storage=None, fixed=FIXED).study
    rows = summary(study)
    assert (rows["template"], rows["kind of model"]) == ("linear", "linear")
    assert template_of_study(study).step_title == "pass over the table"


def test_a_new_template_is_an_objective_of_plain_optuna() -> None:
    objective = Objective("linear", X, Y, fixed=FIXED)
    study = optuna.create_study(direction=objective.direction)
    study.optimize(objective, n_trials=2)
    assert objective.result(study).predict(X).shape == (120,)


def test_a_new_template_can_be_made_again_from_its_study() -> None:
    study = optimize("linear", X, Y, n_trials=1, storage=None, fixed=FIXED).study
    spec = ProblemSpec.from_study(study, X, Y, validation=0.25)
    assert spec.problem().fixed["epochs"] == 8


def test_an_option_that_a_template_does_not_have_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^`preset` must not be given here: it is for .*'gpt'"):
        optimize("linear", X, Y, n_trials=1, storage=None, preset="gpt2")
    with pytest.raises(ValueError, match=r"^`metric` must not be given here: it is for .*'dnn'"):
        optimize("gpt", "to be or not to be " * 99, n_trials=1, storage=None, metric="f1")
    with pytest.raises(TypeError, match=r"^`wisdom` must be an option of a template"):
        Objective("linear", X, Y, wisdom=3)


@pytest.mark.parametrize("name", ["lineal", "own", 3, None])
def test_an_unknown_template_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"template"):
        optimize(name, X, Y, n_trials=1, storage=None)


def test_a_template_without_its_methods_is_not_registered() -> None:
    class Half(Template):
        template_name = "half"

    with pytest.raises(TypeError, match=r"^A template must implement defaults, .*but Half does"):
        register(Half)
    assert "half" not in TEMPLATES


def test_templates_are_found_by_name() -> None:
    assert find_template("dnn").template_name == "dnn"
    assert template_of_study(optuna.create_study()) is Template


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in ("templates", "networks", "hyperparameters")
        and path.relative_to(PACKAGE).parts[0] != "engine"
    ),
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_no_other_module_names_a_template(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert not {"dnn", "gpt", "own"} & {text for text in texts if isinstance(text, str)}
    classes = {"DNNTemplate", "GPTTemplate", "CustomNetworkTemplate", "LanguageModel"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not classes & names
