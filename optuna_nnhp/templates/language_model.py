"""A trained language model together with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import math
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial
import torch
from torch import Tensor

from optuna_nnhp import rng
from optuna_nnhp.data.tokenizers import Tokenizer
from optuna_nnhp.data.tokenizers import tokenizer_from_json
from optuna_nnhp.data.utf8_text import encode_utf8
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.networks.gpt import GPT
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.templates.model_files import write_model_files
from optuna_nnhp.training.language import total_nats


@dataclass(frozen=True)
class LanguageModel:
    """Continues texts, and measures how well it predicts them.

    Args:
        model:
            The network.
        tokenizer:
            From text to tokens and back.
        params:
            Hyperparameters of the network as trained.
        best_params:
            Hyperparameters as proposed, of what was tuned.
        best_value:
            Bits per byte of the validation part.

    Shape:
        - model: token ids ``(batch, length)`` to logits ``(batch, length, vocabulary)``.
    """

    model: GPT
    tokenizer: Tokenizer
    params: dict[str, Any]
    best_params: dict[str, Any]
    best_value: float

    def generate(
        self,
        prompt: str | None = None,
        tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 0,
    ) -> str:
        """Continue a text.

        Args:
            prompt:
                The beginning, which is part of the result; a new line if None, or the tokenizer's
                first token if it has no new line.
            tokens:
                The number of tokens to add.
            temperature:
                0 takes the most probable token; 1 draws from the model's distribution.
            top_k:
                Draw from this many of the most probable tokens; from all if None.
            seed:
                Seed of the draws.

        Raises:
            ValueError: If the prompt is empty or has a character that the tokenizer lacks, or an
                argument is out of range.
        """
        if prompt is None:
            prompt = self._default_prompt()
        if not prompt:
            raise ValueError("`prompt` must have at least one character, but is empty.")
        number: Any
        for name, number, least in (("tokens", tokens, 0), ("top_k", top_k, 1)):
            if number is not None and (not isinstance(number, Integral) or number < least):
                raise ValueError(
                    f"`{name}` must be a whole number of at least {least}, but got {number!r}."
                )
        rng.check_seed(seed)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0, but got {temperature}.")
        ids = torch.from_numpy(self.tokenizer.encode(prompt).astype("int64"))
        out = self.model.generate(
            ids,
            tokens,
            temperature=temperature,
            top_k=top_k,
            generator=rng.generator(seed),
        )
        return self.tokenizer.decode(out.numpy())

    def _default_prompt(self) -> str:
        """Return a text that the tokenizer can encode, to begin with."""
        try:
            self.tokenizer.encode("\n")
        except ValueError:
            return self.tokenizer.decode(np.array([0]))
        return "\n"

    def bits_per_byte(self, text: str) -> float:
        """Return the cross-entropy of a text in bits per byte, without its first token.

        Raises:
            ValueError: If the text has fewer than two tokens.
        """
        ids = torch.from_numpy(self.tokenizer.encode(text).astype("int64"))
        if len(ids) < 2:
            raise ValueError(f"`text` must have at least 2 tokens, but has {len(ids)}.")

        def logits(some: Tensor) -> Tensor:
            out: Tensor = self.model(some)
            return out.flatten(0, 1)[None]

        nats = float(total_nats(logits, ids, self.model.architecture.context, 1))
        return nats / math.log(2) / count_predicted_bytes(self.tokenizer, ids, text)

    def save(self, folder: str | Path) -> Path:
        """Write weights (safetensors) and everything else (JSON) for `optuna_nnhp.load`."""
        metadata = {
            "template": "gpt",
            "params": {n: None if v == math.inf else v for n, v in self.params.items()},
            "best_params": self.best_params,
            "best_value": self.best_value,
            "tokenizer": self.tokenizer.to_json(),
        }
        return write_model_files(folder, self.model, metadata)


def restore_language_model(metadata: Mapping[str, Any]) -> LanguageModel:
    """Return what `LanguageModel.save` wrote, its weights not yet loaded.

    Raises:
        ValueError: If an entry is damaged.
        KeyError: If an entry is missing.
    """
    params, known = dict(metadata["params"]), specs("language")
    for name, value in params.items():
        if value is None and name in known:
            params[name] = math.inf
    for name in ("layers", "heads", "head_size", "context", "positions", "normalization"):
        known[name].check(params[name])
    tokenizer = tokenizer_from_json(metadata["tokenizer"])
    model = GPT(Architecture.from_params(params, tokenizer.size), float(params["dropout"]))
    best = dict(metadata["best_params"]), float(metadata["best_value"])
    return LanguageModel(model, tokenizer, params, *best)


def count_predicted_bytes(tokenizer: Tokenizer, ids: Tensor, text: str) -> int:
    """Return a text's bytes without those of its first token, which no model can predict."""
    whole = len(encode_utf8(text))
    return max(1, whole - len(encode_utf8(tokenizer.decode(ids[:1].numpy()))))


def language_model_rows(trial: FrozenTrial) -> dict[str, str]:
    """Return perplexity, loss, tokens and speed of a language model's trial, for reports.

    Args:
        trial:
            The trial.

    Returns:
        Texts by label; none for a trial that was not trained.

    Example:
        >>> import optuna
        >>> attrs = {"tokens_per_step": 768, "iterations": 100, "validation_loss": [2.0, 1.0]}
        >>> trial = optuna.trial.create_trial(value=1.4, user_attrs=attrs | {"seconds": 2.0})
        >>> rows = language_model_rows(trial)
        >>> rows["perplexity"], rows["speed"]
        ('2.718 per token', '38,400 tokens per second')
    """
    attrs = trial.user_attrs
    if "tokens_per_step" not in attrs or not attrs.get("validation_loss"):
        return {}
    tokens = attrs["tokens_per_step"] * attrs["iterations"]
    nats = attrs["validation_loss"][-1]
    return {
        "perplexity": f"{math.exp(min(nats, 700.0)):.4g} per token",
        "loss": f"{nats:.4g} nats per token",
        "trained on": f"{tokens:,} tokens in {attrs['iterations']:,} steps",
        "speed": f"{tokens / max(attrs['seconds'], 1e-3):,.0f} tokens per second",
    }
