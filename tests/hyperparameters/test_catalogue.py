from __future__ import annotations

from typing import Any
import warnings

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import pytest

from optuna_nnhp.hyperparameters.catalogue import CATALOGUE
from optuna_nnhp.hyperparameters.catalogue import catalogue
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.spec import Hyperparameter

TASKS = ["binary", "multiclass", "regression"]
INF = float("inf")

# What the field tunes; numbers: low, high and log of the least that the range must reach.
CHOICES: list[tuple[str, str, set[Any]]] = [
    (
        "binary",
        "weight_init",
        {
            "normal",
            "uniform",
            "xavier_normal",
            "xavier_uniform",
            "he_normal",
            "he_uniform",
            "orthogonal",
        },
    ),
    ("binary", "width_shape", {"constant", "funnel"}),
    (
        "binary",
        "activation",
        {"relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "gelu", "silu", "mish"},
    ),
    ("binary", "loss", {"cross_entropy", "focal"}),
    ("multiclass", "loss", {"cross_entropy", "focal"}),
    ("regression", "loss", {"mse", "mae", "huber"}),
    ("binary", "optimizer", {"sgd", "nesterov", "adam", "adamw", "rmsprop"}),
    (
        "binary",
        "learning_rate_decay",
        {"constant", "step", "exponential", "linear", "cosine", "one_cycle"},
    ),
    ("binary", "batch_size", {16, 32, 64, 128, 256, 512, 1024}),
    ("binary", "normalization", {"none", "batch", "layer"}),
    ("language", "head_size", {8, 16, 32, 64, 80, 96, 128}),
    ("language", "context", {32, 64, 128, 256}),
    ("language", "tokens", {"char", "byte", "bpe"}),
    ("language", "positions", {"rotary", "learned"}),
    ("language", "normalization", {"layer", "layer-gain", "rms"}),
    ("language", "qk_norm", {False, True}),
    ("language", "feed_forward", {"relu2", "gelu", "swiglu"}),
    ("language", "token_shift", {False, True}),
    ("language", "tied_head", {False, True}),
    ("language", "weight_init", {"fan-in", "gpt2"}),
    ("language", "projection_init", {"zero", "scaled", "plain"}),
    ("language", "parametrization", {"standard", "mup"}),
    ("language", "optimizer", {"muon", "adamw"}),
]
RANGES: list[tuple[str, str, float, float, bool]] = [
    ("binary", "hidden_layers", 1, 8, False),
    ("binary", "width", 16, 1024, True),
    ("binary", "focal_gamma", 0.5, 5.0, False),
    ("regression", "huber_delta", 0.1, 10.0, True),
    ("binary", "momentum", 0.5, 0.99, False),
    ("binary", "beta2", 0.9, 0.999, False),
    ("binary", "learning_rate", 0.001, 0.1, True),
    ("binary", "warmup", 0.0, 0.3, False),
    ("binary", "min_lr_ratio", 0.001, 1.0, True),
    ("binary", "epochs", 1, 100, True),
    ("binary", "iterations", 0, 10000, False),
    ("binary", "dropout", 0.01, 0.5, True),
    ("binary", "weight_decay", 1e-6, 0.1, True),
    ("binary", "l1", 1e-7, 1e-3, True),
    ("binary", "label_smoothing", 0.005, 0.2, True),
    ("binary", "clip_norm", 0.1, 10.0, True),
    ("binary", "patience", 1, 50, True),
    ("binary", "min_improvement", 0.0, 0.01, False),
    ("language", "layers", 1, 6, False),
    ("language", "heads", 2, 8, False),
    ("language", "batch_tokens", 512, 4096, True),
    ("language", "vocabulary", 512, 8192, True),
    ("language", "logit_cap", 0.0, 30.0, False),
    ("language", "base_width", 64, 256, True),
    ("language", "seconds", 0.0, 3600.0, False),
    ("language", "train_tokens", 0, 10_000_000, False),
    ("language", "learning_rate", 1e-3, 2e-2, True),
    ("language", "muon_learning_rate", 7e-3, 0.04, True),
    ("language", "embedding_rate", 1.0, 10.0, True),
]


@pytest.mark.parametrize("task, name, expected", CHOICES)
def test_choices(task: str, name: str, expected: set[Any]) -> None:
    distribution = specs(task)[name].distribution
    assert isinstance(distribution, CategoricalDistribution)
    assert set(distribution.choices) == expected


@pytest.mark.parametrize("task, name, low, high, log", RANGES)
def test_ranges(task: str, name: str, low: float, high: float, log: bool) -> None:
    distribution = specs(task)[name].distribution
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    assert distribution.low <= low and high <= distribution.high
    assert distribution.log == log


def test_nothing_is_left_untested() -> None:
    named = {row[1] for row in CHOICES} | {row[1] for row in RANGES}
    assert {h.name for h in CATALOGUE} == named
    language = {row[1] for row in (*CHOICES, *RANGES) if row[0] == "language"}
    assert {h.name for h in CATALOGUE if h.task == "language"} == language


@pytest.mark.parametrize(
    "name, levels",
    [
        ("epochs", {1, 10, 50, 100}),
        ("learning_rate", {0.1, 0.01, 0.001}),
        ("batch_size", {16, 32, 64, 128, 256, 512, 1024}),
        ("dropout", {0.005, 0.5}),
        ("normalization", {"none", "batch", "layer"}),
    ],
)
def test_levels(name: str, levels: set[Any]) -> None:
    assert levels <= set(specs("binary")[name].grid_values)


@pytest.mark.parametrize("task", [*TASKS, "language"])
def test_names_are_unique(task: str) -> None:
    kinds = {"regression": ("table", "regression"), "language": ("language",)}
    kind = kinds.get(task, ("table", "classification"))
    names = [h.name for h in CATALOGUE if h.task in ("any", *kind)]
    assert len(set(names)) == len(names)
    assert list(specs(task)) == names


@pytest.mark.parametrize(
    "task, absent",
    [
        ("regression", {"focal_gamma", "label_smoothing"}),
        ("binary", {"huber_delta"}),
        ("multiclass", {"huber_delta"}),
    ],
)
def test_a_task_has_no_hyperparameter_of_another(task: str, absent: set[str]) -> None:
    assert absent.isdisjoint(specs(task))


@pytest.mark.parametrize("h", CATALOGUE, ids=lambda h: f"{h.name}-{h.task}")
def test_record(h: Hyperparameter) -> None:
    for value in (h.default, *h.grid_values):
        h.check(value)
    h.check_distribution(h.distribution)
    assert len(set(h.grid_values)) == len(h.grid_values) >= 2
    assert h.help.endswith(".") and len(h.help) > 30
    assert h.task in ("any", "table", "classification", "regression", "language")
    # The first trial of a study is the default, so a default space must hold it.
    assert h.distribution._contains(h.distribution.to_internal_repr(h.default))
    if h.zero_below is not None:
        assert isinstance(h.distribution, FloatDistribution)
        assert h.distribution.low < h.zero_below < h.distribution.high
        h.check(0.0)
    if h.infinite_above is not None:
        assert isinstance(h.distribution, FloatDistribution)
        assert h.distribution.low < h.infinite_above < h.distribution.high
        h.check(h.distribution.high)


def test_static_are_those_that_fix_shapes_or_the_graph() -> None:
    static = {h.name for h in CATALOGUE if h.static and h.task != "language"}
    assert static == {"hidden_layers", "batch_size", "iterations", "normalization"}


def test_table() -> None:
    table = catalogue()
    assert list(table.columns) == [
        "name",
        "task",
        "range",
        "default",
        "grid_values",
        "static",
        "mutable",
        "tuned",
        "help",
    ]
    assert list(table["name"]) == [h.name for h in CATALOGUE]
    assert not table.isna().any().any()
    for column in ("name", "task", "range", "default", "grid_values", "help"):
        assert (table[column].str.len() > 0).all()


@pytest.mark.parametrize(
    "name, column, expected",
    [
        ("learning_rate", "range", "3e-05 to 0.5, log"),
        ("learning_rate", "grid_values", "0.1, 0.01, 0.001"),
        ("dropout", "range", "0.005 to 0.6, log; off below 0.04"),
        ("clip_norm", "range", "0.1 to 100, log; off above 30"),
        ("clip_norm", "grid_values", "1, off"),
        ("l1", "default", "off"),
        ("dropout", "grid_values", "off, 0.2, 0.5"),
        ("width_shape", "range", "constant, funnel"),
        ("epochs", "default", "50"),
        ("epochs", "tuned", False),
        ("hidden_layers", "static", True),
        ("learning_rate", "static", False),
    ],
)
def test_cells(name: str, column: str, expected: object) -> None:
    table = catalogue()
    assert table[table["task"] != "language"].set_index("name").loc[name, column] == expected


@pytest.mark.parametrize("task", TASKS)
def test_by_default_everything_is_named_once(task: str) -> None:
    space, fixed = resolve_space(task)
    assert set(space).isdisjoint(fixed) and {*space, *fixed} == set(specs(task))
    assert fixed == {"epochs": 50, "iterations": 0, "patience": 16, "min_improvement": 0.0}
    assert space == {n: h.distribution for n, h in specs(task).items() if h.tuned}


@pytest.mark.parametrize(
    "space, fixed, tuned, pinned",
    [
        ({"width": IntDistribution(8, 16)}, {}, {"width": IntDistribution(8, 16)}, {}),
        ({"epochs": IntDistribution(1, 9)}, {}, {"epochs": IntDistribution(1, 9)}, {}),
        ({"batch_size": IntDistribution(1, 99)}, {}, {"batch_size": IntDistribution(1, 99)}, {}),
        (
            {"width": CategoricalDistribution((30, 60))},
            {},
            {"width": CategoricalDistribution((30, 60))},
            {},
        ),
        ({}, {"width": 48, "activation": "mish"}, {}, {"width": 48, "activation": "mish"}),
        ({}, {"dropout": 0.0, "l1": 0, "weight_decay": 0}, {}, {"dropout": 0, "l1": 0}),
        ({}, {"dropout": 0.001}, {}, {"dropout": 0.001}),  # outside the range, not the domain
        ({}, {"iterations": 100}, {}, {"iterations": 100, "epochs": 50}),
        ({}, {"epochs": 5, "iterations": 0}, {}, {"iterations": 0, "epochs": 5}),
        (
            {"patience": IntDistribution(1, 9)},
            {"width": 64.0},
            {"patience": IntDistribution(1, 9)},
            {"width": 64},
        ),
    ],
)
def test_choose(
    space: dict[str, BaseDistribution],
    fixed: dict[str, Any],
    tuned: dict[str, BaseDistribution],
    pinned: dict[str, Any],
) -> None:
    found, rest = resolve_space("binary", space, fixed)
    assert {name: found[name] for name in tuned} == tuned
    assert {name: rest[name] for name in pinned} == pinned
    assert set(found).isdisjoint(rest) and {*found, *rest} == set(specs("binary"))
    untouched = set(found) - set(space)
    assert all(found[name] == specs("binary")[name].distribution for name in untouched)


def test_choose_leaves_its_arguments_alone() -> None:
    space: dict[str, BaseDistribution] = {"width": IntDistribution(8, 16)}
    fixed: dict[str, Any] = {"batch_size": 16}
    resolve_space("binary", space, fixed)
    assert space == {"width": IntDistribution(8, 16)} and fixed == {"batch_size": 16}


@pytest.mark.parametrize(
    "space, fixed, message",
    [
        (
            {},
            {"learn_rate": 0.1},
            "^'learn_rate' is not a hyperparameter of binary networks; did you mean "
            "'learning_rate'.*Known: weight_init, hidden_layers, .*min_improvement",
        ),
        ({"zzz": IntDistribution(1, 2)}, {}, r"^'zzz' is not .* networks\. Known: weight_init"),
        ({}, {"huber_delta": 1.0}, "^'huber_delta' is not a hyperparameter of binary networks"),
        (
            {"width": IntDistribution(8, 16)},
            {"width": 8},
            "^`width` must be in `space` or in `fixed`, but is in both",
        ),
        ({"width": (8, 16)}, {}, r"^`space\['width'\]` must be an Optuna dist.*got \(8, 16\)"),
        ({"width": 8}, {}, r"^`space\['width'\]` must be an Optuna distribution .*got 8"),
        ({"width": IntDistribution(0, 16)}, {}, "^`width` must be a .*1 and 65536, but got 0"),
        ({"dropout": FloatDistribution(0, 1)}, {}, r"^`dropout` .* 0 and 0\.95, but got 1\.0"),
        ({"width": FloatDistribution(8, 16)}, {}, "^`width` must be a whole .*FloatDistribution"),
        ({"width": FloatDistribution(8.5, 16)}, {}, "^`width` must be a whole number, .*8.5"),
        ({"width": CategoricalDistribution((8, 8.5))}, {}, "^`width` must be a whole number"),
        ({"width": CategoricalDistribution((8, "a"))}, {}, "^`width` must be a number .* 'a'"),
        ({"width": CategoricalDistribution((8, None))}, {}, "^`width` must be a number .* None"),
        (
            {"activation": CategoricalDistribution(("relu", "rellu"))},
            {},
            "^'rellu' is not a choice of `activation`; did you mean 'relu'",
        ),
        ({"activation": IntDistribution(0, 3)}, {}, "^0 is not a choice of `activation`"),
        ({}, {"width": 0}, "^`width` must be a number between 1 and 65536, but got 0"),
        ({}, {"width": 64.5}, r"^`width` must be a whole number, but got 64\.5"),
        ({}, {"width": True}, "^`width` must be a number between 1 and 65536, but got True"),
        ({}, {"width": None}, "^`width` must be a number between 1 and 65536, but got None"),
        ({}, {"width": "64"}, "^`width` must be a number between 1 and 65536, but got '64'"),
        ({}, {"learning_rate": float("nan")}, "^`learning_rate` must be a number .*got nan"),
        ({}, {"learning_rate": INF}, "^`learning_rate` must be a number .*got inf"),
        ({}, {"learning_rate": -0.1}, r"^`learning_rate` must be a number .*got -0\.1"),
        ({}, {"momentum": 1.0}, r"^`momentum` must be a number .*got 1\.0"),
        ({}, {"batch_size": 0}, "^`batch_size` must be a number between 1 and .*got 0"),
        ({}, {"epochs": 0}, "^`epochs` must be a number between 1 and 1e[+]06, but got 0"),
        ({}, {"loss": "mse"}, "^'mse' is not a choice of `loss`.* Known: cross_entropy, focal"),
        ({}, {"normalization": None}, "^None is not a choice of `normalization`"),
        (
            {},
            {"epochs": 5, "iterations": 7},
            "^The budget must be `epochs` or `iterations`, but both are given[.]$",
        ),
    ],
)
def test_mistakes(space: Any, fixed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolve_space("binary", space, fixed)
    assert "\n" not in str(error.value)


def test_a_mistaken_range_of_another_kind_is_named_with_its_own_task() -> None:
    with pytest.raises(ValueError, match=r"^'focal_gamma' is not .* of regression networks"):
        resolve_space("regression", fixed={"focal_gamma": 1.0})


@pytest.mark.parametrize(
    "params, expected",
    [
        ({"dropout": 0.0399}, {"dropout": 0.0}),
        ({"dropout": 0.04}, {"dropout": 0.04}),
        ({"dropout": 0}, {"dropout": 0.0}),
        ({"weight_decay": 9e-6, "l1": 9e-7}, {"weight_decay": 0.0, "l1": 0.0}),
        ({"weight_decay": 1e-5, "l1": 1e-6}, {"weight_decay": 1e-5, "l1": 1e-6}),
        ({"label_smoothing": 0.009}, {"label_smoothing": 0.0}),
        ({"clip_norm": 30.0}, {"clip_norm": 30.0}),
        ({"clip_norm": 30.1}, {"clip_norm": INF}),
        ({"warmup": 0.001, "momentum": 0.0}, {"warmup": 0.001, "momentum": 0.0}),
        ({"activation": "relu", "width": 8}, {"activation": "relu", "width": 8}),
        ({}, {}),
    ],
)
def test_effective(params: dict[str, Any], expected: dict[str, Any]) -> None:
    assert effective_params("binary", params) == expected


@pytest.mark.parametrize("task", TASKS)
def test_the_defaults_are_those_of_the_catalogue(task: str) -> None:
    space, _ = resolve_space(task)
    assert default_params(task, space) == {name: specs(task)[name].default for name in space}


@pytest.mark.parametrize(
    "name, distribution, expected",
    [
        ("learning_rate", FloatDistribution(0.01, 0.1), 0.01),
        ("learning_rate", FloatDistribution(1e-5, 1e-4), 1e-4),
        ("learning_rate", FloatDistribution(1e-4, 0.1, log=True), 2e-3),
        ("width", IntDistribution(8, 16), 16),
        ("width", CategoricalDistribution((64, 256)), 256),
        ("batch_size", IntDistribution(100, 200), 100),
        ("activation", CategoricalDistribution(("tanh", "relu")), "relu"),
    ],
)
def test_a_default_moves_into_the_range(
    name: str, distribution: BaseDistribution, expected: object
) -> None:
    assert default_params("binary", {name: distribution}) == {name: expected}


@pytest.mark.parametrize(
    "name, choices", [("activation", ("tanh", "mish")), ("width", (10, 20)), ("l1", (0.0, 1.0))]
)
def test_a_default_that_is_no_choice_is_left_to_the_sampler(
    name: str, choices: tuple[Any, ...]
) -> None:
    assert default_params("binary", {name: CategoricalDistribution(choices)}) == {}


@pytest.mark.parametrize(
    "name, distribution",
    [
        ("width", IntDistribution(100, 1000, step=100)),
        ("width", IntDistribution(5, 95, step=10)),
        ("warmup", FloatDistribution(0.0, 0.3, step=0.1)),
        ("momentum", FloatDistribution(0.0, 0.98, step=0.49)),
        ("batch_size", IntDistribution(48, 480, step=48)),
    ],
)
def test_a_default_lies_on_the_grid_of_a_range_with_steps(
    name: str, distribution: BaseDistribution
) -> None:
    space = {name: distribution}
    study = optuna.create_study()
    study.enqueue_trial(default_params("binary", space))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of an enqueued value out of range
        trial = study.ask(space)
    assert trial.params == default_params("binary", space)
