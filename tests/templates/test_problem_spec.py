"""A problem can be made again in another process or from a study."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
import pandas as pd
import pytest
from torch import nn

from optuna_nnhp import optimize
from optuna_nnhp import zoom
from optuna_nnhp.study.open_study import open_study
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.problem_spec import PROBLEM_SPEC
from optuna_nnhp.templates.problem_spec import ProblemSpec
from tests.tiny import TINY
from tests.tiny import classes
from tests.tiny import numbers
from tests.tiny import tune

X, Y = classes()
TEXT = "to be or not to be, that is the question\n" * 60


def build(params: Mapping[str, Any]) -> nn.Module:
    width = params["units"]
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def error_rate(y_true: Any, y_pred: Any) -> float:
    return float(np.mean(np.asarray(y_true) != np.asarray(y_pred)))


UNITS = {"units": IntDistribution(4, 8)}
SHORT = {"iterations": 20, "context": 16}
# Those that bring trouble: what may not be given together, but is fixed together.
CASES: dict[str, dict[str, Any]] = {
    "table": {"X": X, "y": Y},
    "seed": {"X": X, "y": Y, "seed": 7, "fixed": {"dropout": 0.25, "epochs": 3}},
    "iterations": {"X": X, "y": Y, "fixed": {"iterations": 50}},
    "tuned iterations": {"X": X, "y": Y, "space": {"iterations": IntDistribution(9, 99)}},
    "numbers": {"X": numbers()[0], "y": numbers()[1], "metric": "mae", "validation": 0.5},
    "named task": {"X": X, "y": (X[:, 0] > 0).astype(int), "task": "regression"},
    "text": {"template": "gpt", "X": TEXT, "fixed": SHORT},
    "seconds": {"template": "gpt", "X": TEXT, "timeout": 30.0, "fixed": {"context": 16}},
    "width": {"template": "gpt", "X": TEXT, "fixed": {**SHORT, "width": 32}},
    "preset": {"template": "gpt", "X": TEXT, "preset": "gpt2", "fixed": {"context": 16}},
    "pieces": {
        "template": "gpt",
        "X": TEXT,
        "fixed": {**SHORT, "tokens": "bpe", "vocabulary": 280},
    },
    "tokens": {
        "template": "gpt",
        "X": TEXT,
        "fixed": SHORT,
        "space": {"tokens": CategoricalDistribution(("char", "byte"))},
    },
    "own": {"X": X, "y": Y, "network": build, "space": UNITS},
    "own and metric": {
        **{"X": X, "y": Y, "network": build, "space": UNITS, "metric": error_rate},
        **{"direction": "minimize", "fixed": {"iterations": 40}},
    },
}


def open_study_with_problem(problem_spec: ProblemSpec) -> tuple[optuna.Study, Template]:
    """Return a study as `optimize` opens it, and its problem."""
    problem = problem_spec.problem()
    study = open_study(
        problem,
        optuna.storages.RDBStorage("sqlite://"),  # whatever is noted goes through JSON
        None,
        optuna.samplers.RandomSampler(),
        optuna.pruners.NopPruner(),
    )
    study.set_user_attr(PROBLEM_SPEC, problem_spec.attributes())
    return study, problem


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("case", CASES)
def test_from_study_makes_the_same_problem(case: str) -> None:
    settings = CASES[case]
    study, problem = open_study_with_problem(ProblemSpec(**settings))
    needed = {n: settings[n] for n in ("X", "y", "network", "validation") if n in settings}
    if callable(settings.get("metric")):
        needed["metric"] = settings["metric"]
    again = ProblemSpec.from_study(study, **needed).problem()
    for name in ("name", "space", "fixed", "seed", "maximize", "description"):
        assert getattr(again, name) == getattr(problem, name)
    if case != "seconds":  # the first trial's, which follow from the timeout too
        assert again.defaults() == problem.defaults()


def test_attributes_contain_no_data_and_no_code() -> None:
    problem_spec = ProblemSpec(**CASES["own and metric"], validation=(X, Y))
    attributes = problem_spec.attributes()
    assert json.loads(json.dumps(attributes)) == attributes
    assert attributes["data"] == {"not kept": "ndarray of 80 x 3"}
    assert attributes["validation"] == {"not kept": "tuple of 2"}
    assert attributes["metric"] == {"not kept": f"{__name__}:error_rate"}
    assert attributes["network"] == {"not kept": f"{__name__}:build"}
    secret = ProblemSpec("gpt", "my secret\n" * 99, validation="other secret\n" * 9).attributes()
    assert "secret" not in json.dumps(secret)
    assert secret["data"] == {"not kept": "text of 990 characters"}


def test_paths_are_stored(folder: Path) -> None:
    frame = pd.DataFrame(X, columns=list("abc")).assign(label=Y)
    frame.to_csv("data.csv", index=False)
    study, problem = open_study_with_problem(ProblemSpec(X="data.csv", target="label", fixed=TINY))
    assert ProblemSpec.from_study(study).problem().name == problem.name
    (folder / "data.csv").rename("moved.csv")
    with pytest.raises(FileNotFoundError, match=r"data\.csv"):
        ProblemSpec.from_study(study).problem()
    assert ProblemSpec.from_study(study, Path("moved.csv")).problem().name == problem.name
    read = pd.read_csv("moved.csv")
    in_memory = ProblemSpec.from_study(study, read.drop(columns="label"), read["label"]).problem()
    assert in_memory.name == problem.name
    for name in ("one.txt", "two.txt"):
        Path(name).write_text(TEXT)
    for source in ("one.txt", Path("one.txt"), ["one.txt", Path("two.txt")]):
        study, problem = open_study_with_problem(
            ProblemSpec("gpt", source, validation="two.txt", fixed=SHORT)
        )
        assert ProblemSpec.from_study(study).problem().name == problem.name


def test_the_default_text_needs_no_path() -> None:
    problem_spec = ProblemSpec("gpt", fixed=SHORT)
    assert (problem_spec.attributes()["data"], problem_spec.attributes()["validation"]) == (
        None,
        None,
    )


def test_other_data_are_rejected() -> None:
    study, _ = open_study_with_problem(ProblemSpec(X=X, y=Y))
    with pytest.raises(ValueError, match=r"The data must be the study's, with the fingerprint "):
        ProblemSpec.from_study(study, X + 1, Y).problem()
    with pytest.raises(ValueError, match=r"must have 2 classes for the task .binary."):
        ProblemSpec.from_study(study, X, X[:, 0]).problem()
    study, _ = open_study_with_problem(ProblemSpec(**CASES["own and metric"]))
    with pytest.raises(ValueError, match="The metric must be the study's, with 'error_rate'"):
        ProblemSpec.from_study(study, X, Y, network=build, metric=lambda y, p: 0.0).problem()


def test_arguments_that_are_not_stored_must_be_given() -> None:
    study, _ = open_study_with_problem(ProblemSpec(**CASES["own and metric"], validation=(X, Y)))
    given = {"X": X, "y": Y, "network": build, "metric": error_rate, "validation": (X, Y)}
    ProblemSpec.from_study(study, **given).problem()
    for name in ("X", "network", "metric", "validation"):
        less: dict[str, Any] = {n: value for n, value in given.items() if n != name}
        with pytest.raises(ValueError, match=f"^`{name}` must be given: the study does not"):
            ProblemSpec.from_study(study, **less)
    study, _ = open_study_with_problem(ProblemSpec(X=X, y=Y))
    with pytest.raises(ValueError, match=r"`network` must be given only for .* 'dnn'"):
        ProblemSpec.from_study(study, X, Y, network=build)
    with pytest.raises(ValueError, match="`X` and `y` must both be given"):
        ProblemSpec.from_study(study, X).problem()


def test_studies_of_plain_optuna_are_rejected() -> None:
    study = optuna.create_study(study_name="theirs")
    with pytest.raises(
        ValueError, match=r"must be one that `optimize` started, .* 'theirs' is not"
    ):
        ProblemSpec.from_study(study, X, Y)


def test_specifications_can_be_pickled() -> None:
    first = tune(X, Y, n_trials=10, fixed=TINY | {"epochs": 1})
    for problem_spec in (
        ProblemSpec(X=X, y=Y, fixed=TINY, device="cpu"),
        ProblemSpec(**CASES["own"]),
        ProblemSpec(X=X, y=Y, space=zoom(first.study)),
    ):
        again = pickle.loads(pickle.dumps(problem_spec))
        assert again.problem().name == problem_spec.problem().name
        assert type(again.space) is type(problem_spec.space)


def test_optimize_stores_the_specification() -> None:
    result = tune(X, Y, n_trials=1)
    assert result.study.user_attrs[PROBLEM_SPEC] == ProblemSpec(X=X, y=Y).attributes()
    own = optimize(network=build, X=X, y=Y, space=UNITS, fixed={"epochs": 1}, n_trials=1,
                   storage=None)  # fmt: skip
    assert own.study.user_attrs[PROBLEM_SPEC]["template"] == "own"
