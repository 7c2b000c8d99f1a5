"""Presets have the published sizes, and can be shrunk for a CPU."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest

from optuna_nnhp.hyperparameters import CATALOGUE
from optuna_nnhp.templates import presets
from optuna_nnhp.templates.presets import PRESETS
from optuna_nnhp.templates.presets import SCALES
from optuna_nnhp.templates.presets import preset

# Millions, as the papers print them, for GPT-2 as its repository corrects them (openai/gpt-2),
# for nanoGPT as its log does (embeddings of positions left out there).
PUBLISHED = {
    "gpt1": 117,
    "gpt2": 124,
    "gpt2-medium": 355,
    "gpt2-large": 774,
    "gpt2-xl": 1558,
    "gpt3-small": 125,
    "gpt3-medium": 350,
    "gpt3-large": 760,
    "gpt3-xl": 1300,
    "gpt3-2.7b": 2700,
    "gpt3-6.7b": 6700,
    "gpt3-13b": 13000,
    "gpt3-175b": 175000,
    "nanogpt-cpu": 0.80,
    "nanogpt-gpu": 10.65,
}
WIDTHS = {  # as printed; of 5140 for gpt3-13b see its note
    "gpt1": 768,
    "gpt2": 768,
    "gpt2-medium": 1024,
    "gpt2-large": 1280,
    "gpt2-xl": 1600,
    "gpt3-small": 768,
    "gpt3-medium": 1024,
    "gpt3-large": 1536,
    "gpt3-xl": 2048,
    "gpt3-2.7b": 2560,
    "gpt3-6.7b": 4096,
    "gpt3-13b": 5120,
    "gpt3-175b": 12288,
    "nanogpt-cpu": 128,
    "nanogpt-gpu": 384,
}
# Brown et al. 2020, table 2.1: layers, width, heads, head size, millions of tokens a step, rate.
# Corrected are the heads of XL, printed as 24 of 128, and the width of 13B, printed as 5140.
TABLE = [
    ("gpt3-small", 12, 768, 12, 64, "0.5", 6.0e-4),
    ("gpt3-medium", 24, 1024, 16, 64, "0.5", 3.0e-4),
    ("gpt3-large", 24, 1536, 16, 96, "0.5", 2.5e-4),
    ("gpt3-xl", 24, 2048, 32, 64, "1", 2.0e-4),
    ("gpt3-2.7b", 32, 2560, 32, 80, "1", 1.6e-4),
    ("gpt3-6.7b", 32, 4096, 32, 128, "2", 1.2e-4),
    ("gpt3-13b", 40, 5120, 40, 128, "2", 1.0e-4),
    ("gpt3-175b", 96, 12288, 96, 128, "3.2", 0.6e-4),
]
CHOICES: dict[str, set[Any]] = {
    "positions": {"learned", "rotary"},
    "normalization": {"layer", "rms"},
    "feed_forward": {"gelu", "relu2", "swiglu"},
    "projection_init": {"scaled", "zero", "plain"},
    "optimizer": {"adamw", "muon"},
    "token_shift": {False, True},
    "qk_norm": {False, True},
    "tied_head": {False, True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_equal_the_published_ones(name: str) -> None:
    assert preset(name).parameters == pytest.approx(PUBLISHED[name] * 1e6, rel=0.02)
    assert preset(name).width == WIDTHS[name]


def test_all_presets_are_tested() -> None:
    assert list(PRESETS) == list(PUBLISHED)
    assert all(name == known.name for name, known in PRESETS.items())


@pytest.mark.parametrize("scale", [None, *SCALES])
@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_consistent(name: str, scale: str | None) -> None:
    found = preset(name, scale=scale)
    params: dict[str, Any] = found.params
    assert list(params) == list(preset("gpt2").params)
    assert found.width == params["heads"] * params["head_size"]
    assert params["head_size"] % 2 == 0  # rotary positions turn pairs
    assert params["batch_tokens"] % params["context"] == 0
    assert found.source and found.note
    for key, known in CHOICES.items():
        assert params[key] in known
    for record in CATALOGUE:
        if record.name in params:
            record.check(params[record.name])


@pytest.mark.parametrize("name", PRESETS)
def test_cpu_presets_are_small(name: str) -> None:
    full, small = preset(name), preset(name, scale="cpu")
    params: dict[str, Any] = small.params
    assert params["layers"] in (2, 3, 4) and small.width in (64, 96, 128)
    assert params["context"] <= (64 if small.width == 64 else 128)
    assert params["head_size"] == 32 and params["batch_tokens"] == 768
    assert params["iterations"] == 2000
    assert small.non_embedding_parameters <= full.non_embedding_parameters
    changed = {key for key, value in params.items() if value != full.params[key]}
    shape = {"layers", "heads", "head_size", "context", "batch_tokens"}
    assert changed <= shape | {"learning_rate", "iterations"}
    if name == "nanogpt-cpu":
        assert small == full
    else:
        assert params["learning_rate"] == {64: 6e-3, 96: 4e-3, 128: 3e-3}[small.width]
        assert "Shrunk" in small.note and small.note.endswith(full.note)


@pytest.mark.parametrize(
    "name, layers, width",
    [
        ("gpt2", 2, 128),
        ("gpt2-medium", 3, 128),  # 42.7 exactly, not the 48 of 2 layers of 96
        ("gpt2-xl", 2, 64),  # 33.3: of 64 / 2, 96 / 3 and 128 / 4 the smallest
        ("gpt3-175b", 2, 128),  # 128 is more than there is
    ],
)
def test_the_width_per_layer_is_kept(name: str, layers: int, width: int) -> None:
    small = preset(name, scale="cpu")
    assert (small.params["layers"], small.width) == (layers, width)


def test_quantities_equal_their_formulas() -> None:
    found = preset("gpt2")
    blocks = 12 * (12 * 768**2 + 2 * 768) + 768
    assert found.non_embedding_parameters == blocks
    assert found.parameters == blocks + (50257 + 1024) * 768
    assert found.flops_per_token == 6 * blocks + 12 * 12 * 768 * 1024 + 6 * 768 * 50257
    activations = 4 * 2**19 * (12 * 16 * 768 + 2 * 768 + 3 * 50257)
    assert found.memory == 16 * found.parameters + activations
    found.params.update(positions="rotary", tied_head=False)
    assert found.parameters == blocks + 2 * 50257 * 768


@pytest.mark.parametrize("name, layers, width, heads, head_size, millions, rate", TABLE)
def test_gpt3_sizes_equal_the_published_table(
    name: str, layers: int, width: int, heads: int, head_size: int, millions: str, rate: float
) -> None:
    found = preset(name)
    params: dict[str, Any] = found.params
    shape = params["layers"], found.width, params["heads"], params["head_size"]
    assert shape == (layers, width, heads, head_size)
    decimals = len(millions.partition(".")[2])
    assert f"{params['batch_tokens'] / 1e6:.{decimals}f}" == millions
    assert params["learning_rate"] == rate
    assert params["context"] == 2048


def test_the_published_table_is_complete() -> None:
    assert [row[0] for row in TABLE] == [name for name in PRESETS if name.startswith("gpt3")]


def test_gpt3_has_300e9_tokens() -> None:
    for name, known in PRESETS.items():
        if name.startswith("gpt3"):
            params: dict[str, Any] = known.params
            assert params["iterations"] * params["batch_tokens"] == pytest.approx(300e9, rel=1e-5)
            tokens = params["iterations"] * params["warmup"] * params["batch_tokens"]
            assert tokens == pytest.approx(375e6, rel=1e-5)


@pytest.mark.parametrize("name, printed", [("gpt3-xl", "24 heads"), ("gpt3-13b", "5140")])
def test_corrected_misprints_are_noted(name: str, printed: str) -> None:
    assert printed in preset(name).note and "corrected" in preset(name).note


@pytest.mark.parametrize("scale", [None, *SCALES])
@pytest.mark.parametrize("name", ["gpt2", "nanogpt-cpu"])
def test_presets_are_copies(name: str, scale: str | None) -> None:
    before = dict(PRESETS[name].params)
    found = preset(name, scale=scale, vocabulary=256)
    assert found.params["vocabulary"] == 256
    found.params["layers"] = 0
    assert PRESETS[name].params == before


def test_describe_is_readable() -> None:
    lines = preset("gpt1").describe().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("gpt1: 12 layers of width 768, 12 heads of 64; context 512")
    assert (
        "learning rate 0.00025" in lines[2]
        and "warm-up 0.07 %, cosine decay to 1e-07 %" in lines[2]
    )
    assert "end not given" in lines[2]
    assert "35 GiB to train" in lines[1]
    tiny = preset("nanogpt-cpu").describe()
    assert "2,000 iterations" in tiny and "38 MiB to train" in tiny


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "gpt-2"}, "'gpt-2' is not a preset; did you mean 'gpt2'"),
        ({"name": ["gpt2"]}, "Known: gpt1, gpt2, gpt2-medium"),
        ({"scale": "gpu"}, "'gpu' is not a scale; did you mean 'cpu'? Known: cpu."),
        ({"scale": ["cpu"]}, "is not a scale"),
        ({"vocabulary": 1}, "`vocabulary` must be a whole number of at least 2, but got 1."),
        ({"vocabulary": 65.0}, "but got 65.0."),
        ({"vocabulary": True}, "but got True."),
        ({"vocabulary": math.nan}, "but got nan."),
        ({"vocabulary": "65"}, "but got '65'."),
    ],
)
def test_unknown_presets_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        preset(**{"name": "gpt2", **settings})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_presets_do_not_import_torch() -> None:
    tree = ast.parse(Path(presets.__file__).read_text(encoding="utf-8"))
    imports = [
        ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert imports and not any("torch" in line for line in imports)
