"""Hyperparameters of GPT-style language models: size, tokenization, architecture and budget."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_nnhp.hyperparameters.spec import Hyperparameter

_YES_NO = CategoricalDistribution((False, True))

LAYERS = Hyperparameter(
    name="layers",
    distribution=IntDistribution(1, 6),
    default=4,
    grid_values=(2, 4, 6),
    domain=(1, 200),
    static=True,
    task="language",
    help="Transformer blocks. With a budget of seconds two are better than four, with minutes "
    "four: a smaller model trains on more text in the same time.",
)
HEADS = Hyperparameter(
    name="heads",
    distribution=IntDistribution(2, 8),
    default=4,
    grid_values=(2, 4, 8),
    domain=(1, 256),
    static=True,
    task="language",
    help="Attention heads; the width of the model is heads times `head_size`.",
)
HEAD_SIZE = Hyperparameter(
    name="head_size",
    distribution=CategoricalDistribution((8, 16, 32, 64, 80, 96, 128)),
    default=16,
    grid_values=(16, 32, 64),
    domain=(2, 1024),
    static=True,
    tuned=False,
    task="language",
    help="Channels per attention head; an even number.",
)
CONTEXT = Hyperparameter(
    name="context",
    distribution=CategoricalDistribution((32, 64, 128, 256)),
    default=64,
    grid_values=(32, 64, 128, 256),
    domain=(2, 1_000_000),
    static=True,
    task="language",
    help="Length of the context in tokens. A longer one helps only with a large budget: on tiny "
    "Shakespeare 128 was better than 64 by 0.03 nats after three minutes, and equal before.",
)
BATCH_TOKENS = Hyperparameter(
    name="batch_tokens",
    distribution=IntDistribution(256, 4096, log=True),
    default=768,
    grid_values=(512, 1024, 2048),
    domain=(2, 100_000_000),
    static=True,
    task="language",
    help="Tokens per step, rounded to whole windows of `context`. More tokens mean fewer steps "
    "with less noise.",
)
TOKENS = Hyperparameter(
    name="tokens",
    distribution=CategoricalDistribution(("char", "byte", "bpe")),
    default="char",
    grid_values=("char", "byte", "bpe"),
    static=True,
    tuned=False,
    task="language",
    help="Tokenization: characters (default for small alphabets), bytes (work for any text), or "
    "byte pair encoding, trained on the training part (needs the extra `bpe`).",
)
VOCABULARY = Hyperparameter(
    name="vocabulary",
    distribution=IntDistribution(300, 8192, log=True),
    default=1024,
    grid_values=(512, 1024, 4096),
    domain=(2, 1_000_000),
    static=True,
    tuned=False,
    task="language",
    active_if={"tokens": ("bpe",)},
    help="Vocabulary size of byte pair encoding; not used for characters and bytes. A large "
    "vocabulary takes most of the parameters of a small model.",
)
POSITIONS = Hyperparameter(
    name="positions",
    distribution=CategoricalDistribution(("rotary", "learned")),
    default="rotary",
    grid_values=("rotary", "learned"),
    static=True,
    tuned=False,
    task="language",
    help="Position encoding: rotary (rotates queries and keys), or learned vectors (GPT-2). "
    "Rotary was better by 0.08 nats.",
)
GPT_NORMALIZATION = Hyperparameter(
    name="normalization",
    distribution=CategoricalDistribution(("layer", "layer-gain", "rms")),
    default="layer",
    grid_values=("layer", "layer-gain", "rms"),
    static=True,
    tuned=False,
    task="language",
    help="Normalization before each sublayer: LayerNorm without parameters (fastest), with a "
    "gain, or RMSNorm without parameters; no significant difference was measured.",
)
QK_NORM = Hyperparameter(
    name="qk_norm",
    distribution=_YES_NO,
    default=False,
    grid_values=(False, True),
    static=True,
    tuned=False,
    task="language",
    help="Whether queries and keys are normalized; allows larger learning rates in deep models.",
)
FEED_FORWARD = Hyperparameter(
    name="feed_forward",
    distribution=CategoricalDistribution(("relu2", "gelu", "swiglu")),
    default="relu2",
    grid_values=("relu2", "gelu", "swiglu"),
    static=True,
    tuned=False,
    task="language",
    help="Activation of the feed-forward layer: squared ReLU (fastest), GELU (GPT-2), or SwiGLU; "
    "no significant difference was measured at this size.",
)
TOKEN_SHIFT = Hyperparameter(
    name="token_shift",
    distribution=_YES_NO,
    default=True,
    grid_values=(False, True),
    static=True,
    tuned=False,
    task="language",
    help="Whether half the input channels of a sublayer come from the previous token; better by "
    "0.07 nats.",
)
TIED_HEAD = Hyperparameter(
    name="tied_head",
    distribution=_YES_NO,
    default=False,
    grid_values=(False, True),
    static=True,
    tuned=False,
    task="language",
    help="Whether the output layer shares the weights of the embedding; useful for large "
    "vocabularies only.",
)
LOGIT_CAP = Hyperparameter(
    name="logit_cap",
    distribution=FloatDistribution(0.0, 50.0),
    default=0.0,
    grid_values=(0.0, 15.0, 30.0),
    domain=(0.0, 1000.0),
    static=True,
    tuned=False,
    task="language",
    help="Bound of logits, applied by tanh; 0 is off.",
)
GPT_INIT = Hyperparameter(
    name="weight_init",
    distribution=CategoricalDistribution(("fan-in", "gpt2")),
    default="fan-in",
    grid_values=("fan-in", "gpt2"),
    tuned=False,
    task="language",
    help="Initial matrices: normal with standard deviation 1 / sqrt(inputs), or 0.02.",
)
PROJECTION_INIT = Hyperparameter(
    name="projection_init",
    distribution=CategoricalDistribution(("zero", "scaled", "plain")),
    default="zero",
    grid_values=("zero", "scaled", "plain"),
    tuned=False,
    task="language",
    help="Initial weights of the projections into the residual stream: zero (also for the head), "
    "scaled by 1 / sqrt(2 layers) (GPT-2), or plain, as the other matrices.",
)
PARAMETRIZATION = Hyperparameter(
    name="parametrization",
    distribution=CategoricalDistribution(("standard", "mup")),
    default="standard",
    grid_values=("standard", "mup"),
    static=True,
    tuned=False,
    task="language",
    help="mup: learning rates that are good at `base_width` are good at other widths, so that "
    "results with a narrow model can be used for a wide one.",
)
BASE_WIDTH = Hyperparameter(
    name="base_width",
    distribution=IntDistribution(16, 1024, log=True),
    default=64,
    grid_values=(64, 256),
    domain=(1, 100_000),
    static=True,
    tuned=False,
    task="language",
    active_if={"parametrization": ("mup",)},
    help="Width at which mup uses the learning rates unchanged.",
)
SECONDS = Hyperparameter(
    name="seconds",
    distribution=FloatDistribution(0.0, 86_400.0),
    default=0.0,
    grid_values=(10.0, 60.0),
    domain=(0.0, 1e9),
    static=True,
    tuned=False,
    task="language",
    active_if={"iterations": (0,), "train_tokens": (0,)},
    help="Budget of a trial in seconds of training, converted to steps by a measurement. 0: the "
    "budget follows from `train_tokens`, `iterations` or the timeout.",
)
TRAIN_TOKENS = Hyperparameter(
    name="train_tokens",
    distribution=IntDistribution(0, 1_000_000_000),
    default=0,
    grid_values=(100_000, 1_000_000),
    domain=(0, 1e15),
    static=True,
    tuned=False,
    task="language",
    active_if={"iterations": (0,)},
    help="Budget of a trial in tokens of training, so that all trials train on equally much text.",
)
TRANSFORMER = (
    *(LAYERS, HEADS, HEAD_SIZE, CONTEXT, TOKENS, VOCABULARY, POSITIONS, GPT_NORMALIZATION),
    *(QK_NORM, FEED_FORWARD, TOKEN_SHIFT, TIED_HEAD, LOGIT_CAP, GPT_INIT, PROJECTION_INIT),
    *(PARAMETRIZATION, BASE_WIDTH, BATCH_TOKENS, SECONDS, TRAIN_TOKENS),
)
