"""Published GPT configurations, as published or shrunk to a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
import math
from numbers import Integral
from typing import Any

from optuna_nnhp.errors import unknown_name
from optuna_nnhp.hyperparameters.spec import Value

SCALES = ("cpu",)

# The bounds of the scale "cpu". Two cores trained nanoGPT's CPU recipe (2,000 iterations of 768
# tokens, width 128, 4 layers, context 64) in 71 to 142 s. Only the context may be larger here.
CPU_LAYERS = (2, 3, 4)
CPU_WIDTHS = (64, 96, 128)
CPU_HEAD_SIZE = 32
CPU_CONTEXT, CPU_NARROW_CONTEXT = 128, 64  # the second one holds at the smallest width
CPU_BATCH_TOKENS = 768
CPU_ITERATIONS = 2_000
# The learning rate at width 64. At other widths it is inversely proportional to the width, like
# Adam's rate for matrices in muP (Yang et al. 2022, arXiv:2203.03466). It was measured with 2
# layers, beta2 0.95 and 2,000 iterations on the characters of tiny Shakespeare, one run each, in
# nats per character. Width 64: 1.94 at 3e-3, 1.85 at 6e-3. Width 128: 2.08 at 1e-3, 1.84 at 3e-3,
# 2.34 at 6e-3 (1.83 with a warm-up of 100 steps instead of 7; a preset keeps its own warm-up,
# which may be two steps here). The Step Law (arXiv:2503.04715), 1.797 * N^-0.713 * D^0.307, gives
# 3.9e-2 and 1.5e-2, but it was fitted on networks of at least 0.2e9 parameters.
CPU_LEARNING_RATE = 6e-3

GPT3_TOKENS = 300e9
ZERO_LR_RATIO = 1e-9  # the lowest `min_lr_ratio` of the catalogue
NO_CLIPPING = math.inf  # of `clip_norm`

# Hyperparameters of all presets, with the values of GPT-2's network and nanoGPT's training.
_BASE: dict[str, Value] = {
    "layers": 12,
    "heads": 12,
    "head_size": 64,
    "context": 1024,
    "batch_tokens": 512 * 1024,
    "vocabulary": 50_257,
    "positions": "learned",
    "normalization": "layer",
    "feed_forward": "gelu",
    "token_shift": False,
    "qk_norm": False,
    "tied_head": True,
    "projection_init": "scaled",
    "logit_cap": 0.0,
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "learning_rate_decay": "cosine",
    "warmup": 2_000 / 600_000,
    "min_lr_ratio": 0.1,
    "momentum": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "dropout": 0.0,
    "iterations": 0,
}


@dataclass(frozen=True)
class Preset:
    """A published configuration, and the sizes that follow from it.

    Args:
        name:
            Its name in `PRESETS`.
        params:
            Its hyperparameters: the catalogue's for language models, and ``vocabulary``.
            ``projection_init`` is ``"scaled"`` (GPT-2's ``1 / sqrt(2 * layers)``), ``"zero"`` or
            ``"plain"``. ``logit_cap`` 0 means no cap. ``iterations`` is 0 if the source gives no
            number.
        source:
            Paper or repository.
        note:
            Which values are from elsewhere, and which misprints were corrected.

    Example:
        >>> gpt2 = preset("gpt2")
        >>> gpt2.width, gpt2.parameters
        (768, 124337664)
    """

    name: str
    params: dict[str, Value]
    source: str
    note: str

    @property
    def width(self) -> int:
        """The width of the residual stream: heads times head size."""
        return self._param_as_int("heads") * self._param_as_int("head_size")

    @property
    def non_embedding_parameters(self) -> int:
        """The number of parameters without embeddings and without an untied head.

        A block has ``4 * width^2`` parameters in its attention, ``8 * width^2`` in its
        feed-forward part (also with swiglu, which has one more matrix and a narrower hidden
        layer), and two normalizations. Biases are not counted; in publications that have them
        they are about 0.1 % of the parameters.
        """
        layers, width = self._param_as_int("layers"), self.width
        return layers * (12 * width**2 + 2 * width) + width

    @property
    def parameters(self) -> int:
        """The number of all parameters: embeddings, blocks, head."""
        tables = (1 if self.params["tied_head"] else 2) * self._param_as_int("vocabulary")
        if self.params["positions"] == "learned":
            tables += self._param_as_int("context")
        return self.non_embedding_parameters + tables * self.width

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        The sum of ``6 * non_embedding_parameters``, of ``12 * layers * width * context`` for the
        products in attention (as if there were no mask), and of ``6 * width * vocabulary`` for
        the head. The sources leave out the head, but in a small network it is the largest part.

        Source:
            Kaplan et al. 2020 (arXiv:2001.08361), section 2.1; Chowdhery et al. 2022
            (arXiv:2204.02311), appendix B.
        """
        attention = 12 * self._param_as_int("layers") * self.width * self._param_as_int("context")
        head = 6 * self.width * self._param_as_int("vocabulary")
        return 6 * self.non_embedding_parameters + attention + head

    @property
    def memory(self) -> int:
        """Bytes of memory to train in float32 with Adam, all tokens of a step at once.

        The sum of 16 bytes for each parameter (weight, gradient, two states of Adam) and of 4
        bytes for each number that the backward pass needs:

        - ``16 * width`` numbers per token and layer: inputs of both normalizations (2), their
          outputs (2), queries, keys and values (3), output of attention (1), hidden units before
          and after the activation (8);
        - ``2 * width`` per token for the last normalization;
        - ``3 * vocabulary`` per token: logits, their logarithms, their gradient.

        The scores of attention are computed in blocks and not stored. Masks of dropout are not
        counted.

        Source:
            Korthikanti et al. 2022 (arXiv:2205.05198), section 4: the formula for activations,
            in single precision and without masks and scores.
        """
        per_token = (16 * self._param_as_int("layers") + 2) * self.width
        per_token += 3 * self._param_as_int("vocabulary")
        return 16 * self.parameters + 4 * self._param_as_int("batch_tokens") * per_token

    def describe(self) -> str:
        """Describe the configuration in a few lines.

        Example:
            >>> print(preset("nanogpt-cpu").describe().splitlines()[0])
            nanogpt-cpu: 4 layers of width 128, 4 heads of 32; context 64, vocabulary 65
        """
        p, number = self.params, self._param_as_int

        def percent(name: str) -> str:
            return f"{100 * float(p[name] or 0):.3g} %"

        gib, mib = self.memory / 2**30, self.memory / 2**20
        memory = f"{gib:,.0f} GiB" if gib >= 10 else f"{mib:,.0f} MiB"
        iterations = f"{number('iterations'):,} iterations" if p["iterations"] else "end not given"
        return "\n".join(
            (
                f"{self.name}: {p['layers']} layers of width {self.width:,}, {p['heads']} heads "
                f"of {p['head_size']}; context {number('context'):,}, vocabulary "
                f"{number('vocabulary'):,}",
                f"{self.parameters:,} parameters, {self.non_embedding_parameters:,} of them not "
                f"in embeddings; {self.flops_per_token:.2e} flops a token, "
                f"{memory} to train with all tokens of a step at once",
                f"{p['optimizer']}, learning rate {p['learning_rate']:g}, warm-up "
                f"{percent('warmup')}, {p['learning_rate_decay']} decay to "
                f"{percent('min_lr_ratio')}; {number('batch_tokens'):,} tokens a step, "
                f"{iterations}",
                f"Source: {self.source}",
                f"Note: {self.note}",
            )
        )

    def _param_as_int(self, name: str) -> int:
        return int(self.params[name] or 0)


def _size_params(
    layers: int, heads: int, head_size: int, context: int, sequences: int
) -> dict[str, Value]:
    """Return the hyperparameters of a network's size; a batch consists of whole sequences."""
    return {
        "layers": layers,
        "heads": heads,
        "head_size": head_size,
        "context": context,
        "batch_tokens": sequences * context,
    }


def _gpt1() -> Preset:
    params = _BASE | _size_params(12, 12, 64, context=512, sequences=64)
    params |= {"vocabulary": 40_478, "projection_init": "plain", "learning_rate": 2.5e-4}
    params |= {"warmup": 0.0007, "min_lr_ratio": ZERO_LR_RATIO, "beta2": 0.999}
    params |= {"weight_decay": 0.01, "clip_norm": NO_CLIPPING, "dropout": 0.1}
    return Preset(
        "gpt1",
        params,
        "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training.",
        "The paper gives 100 epochs but no tokens, and a warm-up of 2,000 updates: 0.07 % of some "
        "3 million, if its corpus had 1e9 tokens. Vocabulary and Adam's decays are those of the "
        "released model and code (openai/finetune-transformer-lm). Its blocks normalize after "
        "each sum, which the hyperparameters do not say. The rate ends at 0, here 1e-9 of its "
        "peak; there is no word on clipping.",
    )


def _gpt2(name: str, layers: int, heads: int, learning_rate: float, origin: str) -> Preset:
    shape = _size_params(layers, heads, 64, context=1024, sequences=512)
    return Preset(
        name,
        _BASE | shape | {"learning_rate": learning_rate},
        "Radford et al. 2019, Language Models are Unsupervised Multitask Learners.",
        f"The paper gives the network and 512 sequences a step; no learning rate: here {origin}. "
        "Betas, weight decay, clipping, warm-up (2,000 of 600,000 iterations), decay and no "
        "dropout are from karpathy/nanoGPT's train.py.",
    )


def _gpt3(
    size: str,
    layers: int,
    heads: int,
    head_size: int,
    sequences: int,
    learning_rate: float,
    correction: str = "",
) -> Preset:
    params = _BASE | _size_params(layers, heads, head_size, 2048, sequences)
    iterations = round(GPT3_TOKENS / (sequences * 2048))
    params |= {"learning_rate": learning_rate, "warmup": 375e6 / GPT3_TOKENS}
    return Preset(
        f"gpt3-{size}",
        params | {"iterations": iterations},
        "Brown et al. 2020, Language Models are Few-Shot Learners (arXiv:2005.14165), table 2.1 "
        "and appendix B.",
        correction + f"Batches are printed in rounded millions of tokens; here {sequences:,} "
        "sequences. Iterations are 300e9 tokens by that batch; the paper decays over 260e9 and "
        "then stays at 10 %, and starts with smaller batches. Every second layer has sparse "
        "attention there, dense here.",
    )


def _nanogpt(name: str, shape: Mapping[str, Value], dropout: float, iterations: int) -> Preset:
    params = _BASE | dict(shape) | {"vocabulary": 65, "learning_rate": 1e-3}
    params |= {"warmup": 100 / iterations, "beta2": 0.99}
    return Preset(
        name,
        params | {"dropout": dropout, "iterations": iterations},
        "karpathy/nanoGPT, config/train_shakespeare_char.py"
        + (" with the README's options for a CPU." if name.endswith("cpu") else "."),
        "For the characters of tiny Shakespeare. Linear layers and normalizations have no biases.",
    )


_NEAREST = "that of the nearest size of GPT-3's table, as in karpathy/llm.c"
_XL = (
    "The table prints 24 heads of 128 for a width of 2048; corrected to 32 of 64, as in "
    "facebookresearch/metaseq. "
)
_13B = (
    "The table prints a width of 5140 for 40 heads of 128; corrected to 5120, as in "
    "facebookresearch/metaseq. "
)
PRESETS: dict[str, Preset] = {
    known.name: known
    for known in (
        _gpt1(),
        _gpt2("gpt2", 12, 12, 6e-4, "that of karpathy/nanoGPT's train.py"),
        _gpt2("gpt2-medium", 24, 16, 3e-4, _NEAREST),
        _gpt2("gpt2-large", 36, 20, 2.5e-4, _NEAREST),
        _gpt2("gpt2-xl", 48, 25, 2e-4, "that of the nearest size of GPT-3's table"),
        _gpt3("small", 12, 12, 64, 256, 6e-4),
        _gpt3("medium", 24, 16, 64, 256, 3e-4),
        _gpt3("large", 24, 16, 96, 256, 2.5e-4),
        _gpt3("xl", 24, 32, 64, 512, 2e-4, _XL),
        _gpt3("2.7b", 32, 32, 80, 512, 1.6e-4),
        _gpt3("6.7b", 32, 32, 128, 1024, 1.2e-4),
        _gpt3("13b", 40, 40, 128, 1024, 1e-4, _13B),
        _gpt3("175b", 96, 96, 128, 1562, 0.6e-4),
        _nanogpt("nanogpt-cpu", _size_params(4, 4, 32, context=64, sequences=12), 0.0, 2_000),
        _nanogpt("nanogpt-gpu", _size_params(6, 6, 64, context=256, sequences=64), 0.2, 5_000),
    )
}


def preset(name: str, *, scale: str | None = None, vocabulary: int | None = None) -> Preset:
    """Return a published configuration, or a small version of it that trains in minutes.

    The scale ``"cpu"`` changes these hyperparameters and keeps all others:

    - Layers and width: 2, 3 or 4 layers of width 64, 96 or 128. The pair whose width per layer
      is nearest to the published one (by its logarithm) is chosen; of equally near pairs, the
      smallest.
    - Heads: of size 32, as many as the width needs.
    - Context: at most 128, at width 64 at most 64.
    - Tokens per step: at most 768, in whole sequences.
    - Iterations: at most 2,000; 2,000 if the source gives no number.
    - Learning rate: 6e-3 at width 64, and inversely proportional to the width (3e-3 at 128). The
      published rates are for large networks. See `CPU_LEARNING_RATE`.

    A configuration that is within these bounds already (nanogpt-cpu) is not changed.

    Args:
        name:
            One of `PRESETS`.
        scale:
            ``"cpu"``; as published if None.
        vocabulary:
            Size of the vocabulary of your data; the published one if None.

    Raises:
        ValueError: If there is no such preset or scale, or ``vocabulary`` is below 2.

    Example:
        >>> small = preset("gpt2", scale="cpu", vocabulary=65)
        >>> small.params["layers"], small.width, small.params["context"], small.parameters
        (2, 128, 128, 418560)
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("a preset", name, PRESETS)
    if scale is not None and scale not in SCALES:
        raise unknown_name("a scale", scale, SCALES)
    found = PRESETS[name]
    if scale is not None:
        found = _shrink_to_cpu(found)
    params = dict(found.params)  # a copy, which the caller may change
    if vocabulary is not None:
        params["vocabulary"] = _check_vocabulary_size(vocabulary)
    return replace(found, params=params)


def _check_vocabulary_size(vocabulary: Any) -> int:
    """Check the size of a vocabulary and return it."""
    number = isinstance(vocabulary, Integral) and not isinstance(vocabulary, bool)
    if not number or vocabulary < 2:
        raise ValueError(
            f"`vocabulary` must be a whole number of at least 2, but got {vocabulary!r}."
        )
    return int(vocabulary)


def _shrink_to_cpu(found: Preset) -> Preset:
    """Return a configuration at the scale "cpu"; see `preset`."""
    layers, context, tokens, iterations = (
        int(found.params[name] or 0)
        for name in ("layers", "context", "batch_tokens", "iterations")
    )
    large = layers > max(CPU_LAYERS) or found.width > max(CPU_WIDTHS) or context > CPU_CONTEXT
    if not (large or tokens > CPU_BATCH_TOKENS):
        return found
    fewer, width = _nearest_shape(found.width / layers)
    context = min(context, CPU_NARROW_CONTEXT if width == min(CPU_WIDTHS) else CPU_CONTEXT)
    sequences = max(1, min(tokens, CPU_BATCH_TOKENS) // context)
    shape = _size_params(fewer, width // CPU_HEAD_SIZE, CPU_HEAD_SIZE, context, sequences)
    shape |= {"learning_rate": CPU_LEARNING_RATE * min(CPU_WIDTHS) / width}
    shape |= {"iterations": min(iterations or CPU_ITERATIONS, CPU_ITERATIONS)}
    note = f"Shrunk from {layers} layers of width {found.width:,} to be trained on a CPU, with "
    note += f"a learning rate measured there. {found.note}"
    return replace(found, params=found.params | shape, note=note)


def _nearest_shape(aspect: float) -> tuple[int, int]:
    """Return the layers and width of the scale "cpu" for a width per layer."""

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        layers, width = shape
        # Rounded, so that 64 / 2 and 128 / 4 are equally near in spite of rounding errors.
        return round(abs(math.log(width / layers / aspect)), 9), layers * width**2

    return min(((n, width) for n in CPU_LAYERS for width in CPU_WIDTHS), key=distance)
