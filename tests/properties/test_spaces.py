"""Any search space is rejected by a one-line error, or trials keep to it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from fractions import Fraction
import json
import math
from typing import Any
import warnings

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.distributions import distribution_to_json
import pytest
from torch import nn

from optuna_nnhp import optimize
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import is_in_distribution
from optuna_nnhp.search.methods import METHODS
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.study.tuner import Tuner
from optuna_nnhp.templates import CustomNetworkTemplate
from optuna_nnhp.templates import DNNTemplate
from optuna_nnhp.templates import GPTTemplate
from tests.properties.clear import outcome
from tests.properties.tables import Draw
from tests.properties.tables import odd
from tests.tiny import classes
from tests.tiny import numbers

X, LABELS = classes()
TEXT = "to be or not to be\n" * 99
MAX_WEIGHTS = 50_000  # weights of a network that is trained here
TABLE, LANGUAGE = [*specs("binary")], [*specs("language")]
numerals = st.one_of(
    st.sampled_from([0, 1, 2, 3, 16, 64, 1.0, 0.5, 1e-3, 0.1, 16.0, -1, 1e9, 10**400, 2**63]),
    st.sampled_from([math.inf, -math.inf, math.nan, True, np.int64(8), np.float32(0.1), 1e-320]),
    st.sampled_from([Fraction(1, 3), Fraction(10) ** 400, np.bool_(True), 10**5000, 1e308]),
)
words = st.sampled_from(
    ["relu", "adamw", "mse", "focal", "none", "batch", "bpe", "char", "rotary", "", "ReLU", None]
)
values = st.one_of(numerals, numerals, words, odd)


@st.composite
def distributions(draw: Draw) -> Any:
    """Draw a distribution of Optuna, or something else."""
    kind = draw(st.sampled_from(["float", "int", "choices", "choices", "other"]))
    if kind == "other":
        return draw(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, on choices of odd types and steps
        try:
            if kind == "choices":
                return CategoricalDistribution(draw(st.lists(values, max_size=3)))
            low, high, step = draw(numerals), draw(numerals), draw(st.sampled_from([None, 1, 2]))
            log = draw(st.booleans())
            if kind == "float":
                return FloatDistribution(low, high, log=log, step=step)
            return IntDistribution(low, high, log=log, step=step or 1)
        except Exception:  # Optuna itself rejects it
            return FloatDistribution(0.0, 0.5)


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda draw: other if draw == 9 else usual)


def names(known: list[str]) -> st.SearchStrategy[Any]:
    return mostly(
        st.sampled_from(known),
        st.sampled_from(["lerning_rate", "", "<script>", 3, None, ("a",), "own", "\n"]),
    )


def space_and_fixed(known: list[str]) -> st.SearchStrategy[Any]:
    """Draw the arguments `space` and `fixed`."""
    spaces = st.dictionaries(names(known), distributions(), max_size=2)
    pins = st.dictionaries(names(known), values, max_size=2)
    return st.tuples(mostly(spaces, odd), mostly(pins, odd))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Choices for a categorical distribution")
        yield


def check_problem(problem: Any, space: Any, fixed: Any) -> None:
    """Check that trials have all parameters, keep to `space` and `fixed`, and can be trained."""
    for name, value in (fixed or {}).items():
        assert problem.fixed[name] == value and name not in problem.space
    for name, distribution in (space or {}).items():
        assert problem.space[name] == distribution and name not in problem.fixed
    kept = {name: distribution_to_json(d) for name, d in problem.space.items()}
    json.dumps([kept, problem.fixed])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    proposed = [study.ask(problem.space).params for _ in range(3)]
    defaults = problem.defaults()
    assert all(is_in_distribution(problem.space[name], value) for name, value in defaults.items())
    if defaults.keys() == problem.space.keys():
        proposed = [defaults, *problem.portfolio(), *proposed]
    for number, params in enumerate(proposed):
        member = problem.member(number, params)
        assert set(member.params) >= set(problem.space) | set(problem.fixed)
        with contextlib.suppress(TrialError):
            problem.signature(member)
            if problem.count_weights(member) < MAX_WEIGHTS and problem.cohort_size(member) > 0:
                cohort = problem.cohort([member])
                assert cohort.train_round() is not None


@given(space_and_fixed=space_and_fixed(TABLE), regression=st.booleans())
def test_any_space_for_tables_is_rejected_or_used(space_and_fixed: Any, regression: bool) -> None:
    space, fixed = space_and_fixed
    y = numbers()[1] if regression else LABELS
    problem = outcome(lambda: DNNTemplate(X, y, space=space, fixed=fixed, device="cpu"))
    if problem is not None:
        check_problem(problem, space, fixed)


@given(space_and_fixed=space_and_fixed(TABLE))
def test_any_space_for_own_networks_is_rejected_or_used(space_and_fixed: Any) -> None:
    space, fixed = space_and_fixed

    def network(params: Any) -> nn.Module:
        for name in {*(space or {}), *(fixed or {})}:
            params[name]
        return nn.Linear(3, 2)

    problem = outcome(lambda: CustomNetworkTemplate(network, X, LABELS, space=space, fixed=fixed))
    if problem is not None:
        check_problem(problem, space, fixed)


@given(
    space_and_fixed=space_and_fixed(LANGUAGE),
    budget=st.sampled_from([{}, {"iterations": 9}, {"train_tokens": 5000}, {"seconds": 0.1}]),
)
def test_any_space_for_texts_is_rejected_or_used(space_and_fixed: Any, budget: Any) -> None:
    space, fixed = space_and_fixed
    if isinstance(fixed, dict):
        fixed = {**budget, **fixed}
    problem = outcome(lambda: GPTTemplate(TEXT, space=space, fixed=fixed, device="cpu"))
    if problem is not None:
        check_problem_of_texts(problem, space, fixed)


def check_problem_of_texts(problem: GPTTemplate, space: Any, fixed: Any) -> None:
    for name, value in (fixed or {}).items():
        assert name == "width" or problem.fixed[name] == value
    for name, distribution in (space or {}).items():
        assert problem.space[name] == distribution
    defaults = problem.defaults()
    assert all(is_in_distribution(problem.space[name], value) for name, value in defaults.items())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(3):
        member = problem.member(number, study.ask(problem.space).params)
        with contextlib.suppress(TrialError):
            assert problem.memory(member) > 0
            problem.signature(member)
            assert problem.count_weights(member) > 0


# --- The call ---

some_number = st.one_of(numerals, odd)
option_names = st.sampled_from(
    [name for m in METHODS.values() for name in (*m.options, *m.loop_options)] + ["size ", "", 3]
)
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    **{name: some_number for name in ("n_trials", "timeout", "seed", "cohort_size", "replicates")},
    "method": st.one_of(st.sampled_from([*METHODS]), odd),
    "method_options": st.one_of(st.dictionaries(option_names, some_number, max_size=2), odd),
    "levels": st.one_of(
        st.dictionaries(names(TABLE), st.one_of(st.lists(values, max_size=3), values), max_size=2),
        odd,
    ),
    "sampler": st.one_of(
        st.sampled_from([optuna.samplers.RandomSampler(), optuna.samplers.TPESampler]),
        st.builds(
            optuna.samplers.GridSampler,
            st.dictionaries(st.sampled_from(TABLE[:3]), st.just([1, 2]), max_size=2),
        ),
        odd,
    ),
    "pruner": st.one_of(st.just(optuna.pruners.MedianPruner()), odd),
    "task": st.one_of(st.sampled_from(["binary", "regression", "multiclass", "language"]), odd),
    "metric": st.one_of(st.sampled_from(["accuracy", "f1", "rmse", "log_loss", len]), odd),
    "direction": st.one_of(st.sampled_from(["maximize", "minimize", "up"]), odd),
    "device": st.one_of(st.sampled_from(["cpu", "cuda", "cpu:7", "meta", "", "gpu"]), odd),
    "compile": odd,
    "template": st.one_of(st.sampled_from(["dnn", "gpt", "mlp"]), odd),
    "network": odd,
    "preset": st.one_of(st.sampled_from(["gpt2", "gpt5"]), odd),
    "errors": st.one_of(st.sampled_from(["strict", "replace", "none"]), odd),
    "study_name": st.one_of(st.text(), odd),
    "target": odd,
    "callbacks": st.one_of(odd, st.lists(odd, max_size=1)),
    "show_progress_bar": odd,
}


@given(
    wanted=st.lists(st.sampled_from([*ARGUMENTS]), min_size=1, max_size=2, unique=True),
    data=st.data(),
)
def test_any_arguments_are_rejected_or_used(wanted: list[str], data: st.DataObject) -> None:
    given_values = {name: data.draw(ARGUMENTS[name]) for name in wanted}
    arguments: dict[str, Any] = {"n_trials": 3, "storage": None, "device": "cpu", **given_values}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "run", lambda self: None)
        result = outcome(lambda: optimize(X=X, y=LABELS, **arguments))
    if result is not None:
        assert isinstance(result.study, optuna.Study)


@given(
    levels=ARGUMENTS["levels"], space=st.dictionaries(names(TABLE), distributions(), max_size=2)
)
def test_any_grid_levels_are_rejected_or_visited(
    levels: Any, space: dict[Any, BaseDistribution]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "run", lambda self: None)
        outcome(
            lambda: optimize(
                X=X,
                y=LABELS,
                method="grid",
                levels=levels,
                space=space,
                method_options={"partial": True},
                n_trials=3,
                storage=None,
            )
        )
