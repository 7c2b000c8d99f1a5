"""The template for texts tunes language models in budgets of steps, tokens or seconds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
import math
from pathlib import Path
import re
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pytest
import torch

from optuna_nnhp import Objective
from optuna_nnhp import Result
from optuna_nnhp import load
from optuna_nnhp import optimize
from optuna_nnhp import preset
from optuna_nnhp.data.text import bundled_text
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.templates import gpt as template
from optuna_nnhp.templates import supervised
from optuna_nnhp.templates.gpt import GPTTemplate
from optuna_nnhp.templates.language_model import LanguageModel
from optuna_nnhp.templates.presets import PRESETS
from optuna_nnhp.training.weight_files import BestWeights

TEXT = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(400))
SMALL: dict[str, Any] = {"width": 16, "layers": 1, "context": 16, "batch_tokens": 64}


def tune(**settings: Any) -> Any:
    defaults = {"storage": None, "n_trials": 2, "fixed": SMALL | {"iterations": 18}}
    return optimize("gpt", settings.pop("X", TEXT), **{**defaults, **settings})


def test_a_study_finds_saves_and_loads_a_model(tmp_path: Path) -> None:
    result = tune()
    assert result.study.trials[0].state == TrialState.COMPLETE
    assert len(result.study.trials) == 2
    written = result.generate("12 and", tokens=20, seed=3)
    assert written.startswith("12 and")
    assert len(written) == 26
    folder = result.save(tmp_path / "model")
    model = load(folder)
    assert isinstance(model, LanguageModel)
    assert model.generate("12 and", tokens=20, seed=3) == written
    valid = GPTTemplate(TEXT).text.valid
    assert model.bits_per_byte(valid) == pytest.approx(result.best_value, rel=1e-6)
    assert model.best_params == result.best_params


def bits_per_character_by_counting(train: str, valid: str, length: int) -> float:
    """Return the bits per character of a model that counts what follows ``length`` characters."""
    pieces = [Counter(train[i : i + n] for i in range(len(train))) for n in (length, length + 1)]
    bits, places = 0.0, range(length, len(valid))
    for i in places:
        before = valid[i - length : i]
        seen, followed = pieces[0][before], pieces[1][before + valid[i]]
        bits -= math.log2((followed + 1) / (seen + len(set(train))))
    return bits / len(places)


def test_training_lowers_bits_per_byte() -> None:
    result = tune(n_trials=1, fixed=SMALL | {"iterations": 300})
    text = GPTTemplate(TEXT).text
    counted = min(
        bits_per_character_by_counting(text.train, text.valid, length) for length in range(5)
    )
    assert 0.5 < result.best_value < 0.85 * counted  # three digits of ten can be no surprise
    written = result.generate("12 and", tokens=60, temperature=0)  # far beyond the context
    lines = written.split("\n")[:-1]
    assert len(lines) >= 2
    assert all(re.fullmatch(r"\d+ and \d+ make \d+\.", line) for line in lines), written


def test_the_same_seed_gives_the_same_study() -> None:
    values = [[t.value for t in tune(seed=5).study.trials] for _ in range(2)]
    assert values[0] == values[1]
    assert values[0] != [t.value for t in tune(seed=6).study.trials]


def test_the_same_call_continues_the_study(tmp_path: Path) -> None:
    storage = str(tmp_path / "text.journal")
    first = tune(storage=storage)
    again = tune(storage=storage, n_trials=3)
    assert len(again.study.trials) == 3
    assert again.study.study_name == first.study.study_name
    assert again.study.user_attrs["generated_text"]["text"]


def test_tokenizers_are_compared_in_bits_per_byte() -> None:
    pytest.importorskip("tokenizers")
    space = {"tokens": CategoricalDistribution(("char", "byte", "bpe"))}
    fixed = SMALL | {"iterations": 9, "vocabulary": 300}
    # The size of cohorts is measured otherwise, and followers take their leader's tokenizer: which
    # tokenizers are tried would depend on the machine's load.
    result = tune(space=space, fixed=fixed, n_trials=8, method="random", cohort_size=2)
    kinds = {t.params["tokens"]: t for t in result.study.trials}
    assert len(kinds) == 3
    for kind, trial in kinds.items():
        untrained = {"char": 4.4, "byte": 8.0, "bpe": 8.3}[kind]  # bits of a token, about
        assert trial.value is not None
        assert 0.5 < trial.value < untrained


def test_a_budget_in_tokens_is_converted_to_steps() -> None:
    result = tune(n_trials=1, fixed=SMALL | {"train_tokens": 1000})
    assert result.best_trial.user_attrs["iterations"] == 16
    assert result.best_trial.user_attrs["tokens_per_step"] == 64


def test_a_budget_in_seconds_is_converted_to_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "measure_seconds_per_step", lambda key, make: 0.01)
    problem = GPTTemplate(TEXT, fixed=SMALL | {"seconds": 0.5})
    assert problem._iterations(problem.member(0, problem.defaults())) == 50


def test_without_a_budget_a_trial_gets_a_tenth_of_the_timeout() -> None:
    assert GPTTemplate(TEXT, timeout=80.0).fixed["seconds"] == 8.0
    assert GPTTemplate(TEXT).fixed["seconds"] == 30.0


def test_the_default_configuration_depends_on_text_and_budget() -> None:
    short, long = (GPTTemplate(bundled_text(), timeout=t).defaults() for t in (20.0, 900.0))
    assert short["layers"] < long["layers"]
    assert short["context"] < long["context"]
    little, much = (GPTTemplate(TEXT * n, fixed={"seconds": 30.0}).defaults() for n in (1, 90))
    assert little["dropout"] > much["dropout"]


def test_a_preset_is_the_first_trial() -> None:
    problem = GPTTemplate(bundled_text(), preset="gpt2", fixed={"iterations": 9})
    member = problem.member(0, problem.defaults())
    wanted = {"positions": "learned", "normalization": "layer-gain", "feed_forward": "gelu"}
    assert {name: member.params[name] for name in wanted} == wanted
    assert member.params["optimizer"] == "adamw"


def test_trials_larger_than_memory_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = GPTTemplate(TEXT, fixed=SMALL | {"iterations": 9})
    member = problem.member(0, problem.defaults())
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "free_memory", lambda device: 1000)
        with pytest.raises(TrialError, match=r"must fit into 0\.0 GiB .* needs about"):
            problem.signature(member)
    patched = GPTTemplate(TEXT, fixed=SMALL | {"iterations": 1000}, timeout=2.0)
    monkeypatch.setattr(template, "measure_seconds_per_step", lambda key, make: 0.5)
    with pytest.raises(TrialError, match=r"timeout of 2 s.*1,000 steps would take about 500 s"):
        patched.signature(patched.member(0, patched.defaults()))


def test_the_default_pruner_waits_for_a_third_of_the_budget() -> None:
    result = tune(n_trials=12, method="random")
    pruned = [t for t in result.study.trials if t.state == TrialState.PRUNED]
    assert pruned
    assert all(max(t.intermediate_values) >= 3 for t in pruned)


def test_trials_are_sequential() -> None:
    result = tune(n_trials=4)
    times = [(t.datetime_start, t.datetime_complete) for t in result.study.trials]
    assert all(end <= start for (_, end), (start, _) in pairwise(times))


@pytest.mark.parametrize(
    ("X", "settings", "message"),
    [
        ("", {}, "at least one character"),
        ("abc", {}, "at least"),
        ("aaaa\n".replace("\n", "") * 50, {}, "two different characters"),
        (TEXT, {"fixed": {"context": 100_000, "iterations": 9}}, "`context` can be at most"),
        (TEXT, {"fixed": {"width": 17}}, "`width` must be a multiple of `head_size`"),
        (TEXT, {"fixed": {"head_size": 5}}, "`head_size` must be even"),
        (TEXT, {"fixed": {"seconds": 3.0, "iterations": 5}}, "one budget"),
        (TEXT, {"fixed": {"hidden_layers": 3}}, "a hyperparameter of language networks"),
        (TEXT, {"preset": "gpt5"}, "a preset"),
        (TEXT, {"fixed": {"tokens": "words"}}, "a choice of `tokens`"),
        (TEXT, {"errors": "guess"}, "UTF-8"),
        (TEXT, {"y": [1]}, "`y` must not be given here"),
        (TEXT, {"metric": "accuracy"}, "`metric` must not be given here"),
        (TEXT, {"space": {"learning_rate": FloatDistribution(-1, 1)}}, "`learning_rate`"),
        (TEXT, {"validation": 2.0}, "`validation`"),
    ],
)
def test_invalid_arguments_are_rejected_before_training(
    X: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(X=X, **settings)


def test_a_vocabulary_larger_than_the_text_supports_is_rejected() -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="vocabulary"):
        tune(fixed=SMALL | {"tokens": "bpe", "vocabulary": 50_000, "iterations": 9})


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"fixed": {"vocabulary": 300}}, "300 with 'char'"),
        ({"fixed": {"vocabulary": 300, "tokens": "byte"}}, "300 with 'byte'"),
        ({"space": {"vocabulary": IntDistribution(300, 400)}}, r"IntDistribution\(.*with 'char'"),
        (
            {
                "fixed": {"vocabulary": 300},
                "space": {"tokens": CategoricalDistribution(("char", "byte"))},
            },
            "300 with 'char' or 'byte'",
        ),
    ],
)
def test_vocabulary_is_rejected_without_bpe(settings: dict[str, Any], value: str) -> None:
    message = rf"^`vocabulary` must be given only where `tokens` can be 'bpe', but got {value}\.$"
    with pytest.raises(ValueError, match=message):
        tune(**{"fixed": {}, **settings})


def test_text_options_are_rejected_for_tables() -> None:
    with pytest.raises(ValueError, match="`preset` must not be given here"):
        optimize("dnn", [[1.0]], [1.0], n_trials=1, storage=None, preset="gpt2")


def test_language_models_do_not_predict_and_tables_do_not_generate() -> None:
    with pytest.raises(TypeError, match=r"^`predict` must be called for a model that has it"):
        tune(n_trials=1).predict([[1.0]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "`prompt`"),
        ({"prompt": "é"}, "é"),
        ({"tokens": -1}, "`tokens`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"top_k": 0}, "`top_k`"),
    ],
)
def test_invalid_generate_arguments_are_rejected(settings: dict[str, Any], message: str) -> None:
    result = _MODEL.setdefault("result", tune(n_trials=1))
    with pytest.raises(ValueError, match=message):
        result.generate(**settings)


_MODEL: dict[str, Any] = {}


def test_damaged_metadata_is_rejected(tmp_path: Path) -> None:
    folder = tune(n_trials=1).save(tmp_path / "model")
    record = folder / "model.json"
    record.write_text(record.read_text().replace('"alphabet"', '"alphabets"'))
    with pytest.raises(ValueError, match=r"model\.json must be one that `save` wrote"):
        load(folder)


def test_stored_weights_are_those_of_the_best_value() -> None:
    result = tune(n_trials=1)
    assert isinstance(result.model, torch.nn.Module)
    logits = result.model(torch.zeros(1, 4, dtype=torch.long))
    assert logits.shape == (1, 4, GPTTemplate(TEXT).text.alphabet_size)


def test_a_text_without_line_ends_has_a_generated_sample() -> None:
    result = tune(X="to be or not to be " * 99, n_trials=1)
    assert result.study.user_attrs["generated_text"]["text"]
    with pytest.raises(
        ValueError, match=r"`tokens` must be a whole number of at least 0, but got 1\.5"
    ):
        result.generate(tokens=1.5)


def test_trials_longer_than_the_timeout_are_rejected() -> None:
    with pytest.raises(ValueError, match="`seconds` must be at most the timeout of 5, but got 9"):
        GPTTemplate(TEXT, fixed={"seconds": 9.0}, timeout=5.0)
    with pytest.raises(ValueError, match=r"trials in a row must be possible.*steps would take"):
        tune(n_trials=None, timeout=20.0, fixed=SMALL | {"iterations": 10**8})


@pytest.mark.parametrize("name", PRESETS)
def test_a_study_starts_with_all_values_of_a_preset(name: str) -> None:
    problem, wanted = GPTTemplate(bundled_text(), preset=name), preset(name, scale="cpu").params
    begun = problem.member(0, problem.defaults()).params
    assert problem.defaults().keys() == problem.space.keys()
    left_out = ("iterations", "vocabulary", "normalization", "tokens", "context")
    differ = {n for n, v in wanted.items() if n not in left_out and begun[n] != v}
    assert differ <= {"min_lr_ratio"}  # the range ends at a thousandth


def test_a_fixed_width_overrides_that_of_a_preset() -> None:
    problem = GPTTemplate(bundled_text(), preset="gpt2", fixed={"width": 64})
    params = problem.member(0, problem.defaults()).params
    assert int(params["heads"] or 0) * int(params["head_size"] or 0) == 64


def test_the_default_context_fits_a_short_text() -> None:
    problem = GPTTemplate("to be or not to be\n" * 53)  # a hundred characters of it judge
    assert problem.defaults()["context"] == 64
    problem.signature(problem.member(0, problem.defaults()))


def test_objectives_reject_trials_larger_than_memory() -> None:
    objective = Objective("gpt", "to be or not to be\n" * 53, fixed={"iterations": 9})
    study = optuna.create_study(direction=objective.direction)
    study.enqueue_trial(objective.defaults | {"context": 256})
    with pytest.raises(TrialError, match="context"):
        study.optimize(objective, n_trials=1)


def test_trials_at_different_steps_are_not_evaluated_together() -> None:
    problem = GPTTemplate(TEXT, fixed=SMALL | {"seconds": 0.1})
    assert not problem.cohort([problem.member(0, problem.defaults())]).can_append


def test_retraining_takes_as_many_steps_as_the_trial() -> None:
    result = tune(n_trials=1, fixed=SMALL | {"seconds": 0.05, "dropout": 0.3})
    elsewhere = GPTTemplate(TEXT, fixed=SMALL | {"seconds": 9.0, "dropout": 0.3})
    again = Result(result.study, elsewhere, BestWeights(None))
    some = TEXT[-200:]
    assert again.predictor.bits_per_byte(some) == pytest.approx(
        result.predictor.bits_per_byte(some), rel=1e-4
    )
