"""The GPT template: small language models on a text."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from copy import copy
import functools
import math
from numbers import Integral
from typing import Any
from typing import Self

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial
import torch
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.data.text import TextSource
from optuna_nnhp.data.text import TokenizedText
from optuna_nnhp.data.text import bundled_text
from optuna_nnhp.data.text import check_context_fits
from optuna_nnhp.data.text import prepare_text
from optuna_nnhp.data.text import text_paths
from optuna_nnhp.engine import gpt
from optuna_nnhp.hyperparameters.catalogue import as_plain_dict
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.catalogue import nearest_value
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.hyperparameters.spec import is_in_distribution
from optuna_nnhp.networks.gpt import GPT as Network
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.networks.transformer import count_parameters
from optuna_nnhp.study.autotune import measure_seconds_per_step
from optuna_nnhp.study.problem import TrialError
from optuna_nnhp.templates.base import NOT_SAVED
from optuna_nnhp.templates.base import Template
from optuna_nnhp.templates.base import TrainedModel
from optuna_nnhp.templates.base import register
from optuna_nnhp.templates.gpt_defaults import BUDGET_NAMES
from optuna_nnhp.templates.gpt_defaults import defaults_for
from optuna_nnhp.templates.gpt_defaults import expected_trial_seconds
from optuna_nnhp.templates.gpt_defaults import preset_params
from optuna_nnhp.templates.language_model import LanguageModel
from optuna_nnhp.templates.language_model import count_predicted_bytes
from optuna_nnhp.templates.language_model import language_model_rows
from optuna_nnhp.templates.language_model import restore_language_model
from optuna_nnhp.templates.supervised import bounded_cohort_size
from optuna_nnhp.templates.supervised import check_fits_in_memory
from optuna_nnhp.templates.supervised import describe_budget as describe_epochs
from optuna_nnhp.templates.supervised import search_digest
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.device import resolve_device
from optuna_nnhp.training.language import ROUNDS_PER_BUDGET
from optuna_nnhp.training.language import Corpus
from optuna_nnhp.training.language import LanguageTask
from optuna_nnhp.training.language import TokenLoss
from optuna_nnhp.training.language import bits_per_token
from optuna_nnhp.training.metrics import Metric
from optuna_nnhp.training.torch_compile import check_compile

SAMPLE_TOKENS = 300  # of the text that a study keeps

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@register
class GPTTemplate(Template):
    """Small GPTs on a text: data, search space, network, and bits per byte.

    Args:
        X:
            A file, a list of files, a folder, or a text; Python's own documentation if None.
        validation:
            Share of the text, its end, that judges trials; or another text or file.
        errors:
            What becomes of bytes that are not UTF-8: ``"strict"``, ``"replace"``, ``"ignore"``.
        space:
            Distributions that replace the catalogue's.
        fixed:
            Values that are not tuned. One of ``seconds``, ``train_tokens`` and ``iterations`` is
            a trial's budget; ``width`` may be given instead of ``heads``.
        preset:
            Name of a published configuration to begin with, shrunk to a CPU; see
            `optuna_nnhp.preset`.
        timeout:
            Seconds of the whole study: a trial's budget is a tenth of it, if none is given.
        seed:
            Seed of windows, noise and first weights.
        device:
            Where to train; CUDA if there is any, else the CPU, if None.
        compile:
            Whether `torch.compile` makes the networks' code, which takes seconds to minutes once
            for each shape; of no effect on what the compiled engine trains.

    Raises:
        ValueError: If the text or an argument is invalid.
        FileNotFoundError: If there is no such file.

    Example:
        >>> problem = GPTTemplate(
        ...     "to be or not to be\\n" * 99, fixed={"context": 32, "iterations": 50}
        ... )
        >>> problem.metric.name, problem.maximize, problem.defaults()["layers"]
        ('bits_per_byte', False, 2)
    """

    template_name = "gpt"
    model_method = "generate"
    step_title = "share of the budget"
    samples_text = True
    maximize = False
    sequential = True
    min_resource = 3  # a third of the budget; before it, the ranking of optimizers changes
    rounds_per_epoch = ROUNDS_PER_BUDGET

    def __init__(
        self,
        X: TextSource | None = None,
        *,
        validation: float | TextSource = 0.1,
        errors: str = "strict",
        space: Mapping[str, BaseDistribution] | None = None,
        fixed: Mapping[str, Value] | None = None,
        preset: str | None = None,
        timeout: float | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        compile: bool = False,
    ) -> None:
        self.seed, self.device = rng.check_seed(seed), resolve_device(device)
        self.compile = check_compile(compile, self.device)
        source = bundled_text() if X is None else X
        if X is None:
            _logger.info("No text was given: Python's documentation is used.")
        self.text = prepare_text(source, validation=validation, errors=errors)
        self.timeout = timeout
        self._corpora: dict[tuple[str, int | None], Corpus] = {}
        preset_values = {} if preset is None else preset_params(preset)
        space, fixed = as_plain_dict("space", space), as_plain_dict("fixed", fixed)
        given = _heads_for_width(fixed, space, preset_values)
        resolve_space("language", space, given)  # checks them before use
        seconds = expected_trial_seconds(given, space, timeout)
        if timeout is not None and given.get("seconds") and seconds > timeout:
            raise ValueError(
                f"`seconds` must be at most the timeout of {timeout:g}, but got {seconds:g}."
            )
        self._base_values = {
            **defaults_for(seconds, len(self.text.train)),
            "tokens": self.text.default_tokenizer,
            **preset_values,
        }
        if not any(given.get(name) or name in space for name in BUDGET_NAMES):
            given["seconds"] = seconds
        self.space, rest = resolve_space("language", space, given)
        self.fixed = {n: v if n in given else self._base_values.get(n, v) for n, v in rest.items()}
        self._check_space()
        if "vocabulary" in (given | self.space):
            self._check_vocabulary()
        self.metric = Metric("bits_per_byte", "minimize", ("language",), bits_per_token)
        mark = search_digest(self.space, self.fixed, preset or "")
        self.name = f"gpt-bits_per_byte-{self.text.fingerprint}-{mark}"
        described = self.text.describe()
        self.description: dict[str, Any] = {
            "template": self.template_name,
            "task": "language",
            "metric": self.metric.name,
            "fingerprint": self.text.fingerprint,
            "data": f"{described['characters']:,} characters, {described['alphabet']} different; "
            f"validated on the last {described['valid_characters']:,}"
            + (" (Python's documentation)" if X is None else ""),
            "budget": self._describe_budget(),
            "rounds_per_epoch": ROUNDS_PER_BUDGET,
        }

    def _check_space(self) -> None:
        """Raise for values that would make every trial fail."""
        smallest = self._smallest_value("context")
        for kind in self._possible_values("tokens"):
            sizes = self._possible_values("vocabulary") if kind == "bpe" else [None]
            for size in sizes:
                check_context_fits(
                    self.text.tokenize(str(kind), None if size is None else int(size)), smallest
                )
        step = getattr(self.space.get("head_size"), "step", 2)
        for value in [*self._possible_values("head_size"), step]:
            if int(value or 0) % 2 and "rotary" in self._possible_values("positions"):
                raise ValueError(
                    f"`head_size` must be even with rotary positions, but can be odd: {value}."
                )

    def _check_vocabulary(self) -> None:
        """Raise if no trial would use the given vocabulary size."""
        kinds = self._possible_values("tokens")
        if "bpe" not in kinds:
            wanted = self.space.get("vocabulary", self.fixed.get("vocabulary"))
            raise ValueError(
                "`vocabulary` must be given only where `tokens` can be 'bpe', but got "
                f"{wanted} with {' or '.join(map(repr, kinds))}."
            )

    def _possible_values(self, name: str) -> Sequence[Any]:
        """Return a hyperparameter's choices, or the ends of its range."""
        if name not in self.space:
            return [self.fixed[name]]
        distribution: Any = self.space[name]
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        return [distribution.low, distribution.high]

    def _smallest_value(self, name: str) -> int:
        return min(int(value) for value in self._possible_values(name))

    def _describe_budget(self) -> str:
        for name, unit in zip(
            BUDGET_NAMES, ("seconds of training", "tokens", "steps"), strict=True
        ):
            if name in self.space:
                return f"a tuned number of {unit} a trial"
            if self.fixed[name]:
                return f"{self.fixed[name]:g} {unit} a trial"
        return describe_epochs(self.space, self.fixed)

    def defaults(self) -> dict[str, Value]:
        """Return the first trial's configuration, which depends on text size and budget."""
        defaults = default_params("language", self.space) | {
            name: nearest_value(value, self.space[name])
            for name, value in self._base_values.items()
            if name in self.space
        }
        defaults = {
            n: value for n, value in defaults.items() if is_in_distribution(self.space[n], value)
        }
        return defaults | self._longest_fitting_context(defaults)

    def _longest_fitting_context(self, defaults: Mapping[str, Value]) -> dict[str, Value]:
        """Return the longest context, up to the wanted one, for which the text is long enough."""
        if "context" not in self.space:
            return {}
        tokens = self._tokens(self.member(0, defaults))
        room = min(len(tokens.train), len(tokens.valid)) - 1
        wanted = int(defaults.get("context") or 0)
        fitting = [int(v) for v in self._possible_values("context") if int(v) <= min(room, wanted)]
        return {"context": max(fitting)} if wanted > room and fitting else {}

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        """Return a trial; the study's seed and the trial's number determine its first weights."""
        return Member(number, number, effective_params("language", {**self.fixed, **params}))

    def signature(self, member: Member) -> Hashable:
        """Return architecture, text, windows, steps and optimizer.

        Raises:
            TrialError: If the trial would need more memory or time than there is.
        """
        shape = self._static_signature(member)
        check_fits_in_memory(self.memory(member), self.device)
        return (*shape, self._iterations(member))

    def _static_signature(self, member: Member) -> tuple[Hashable, ...]:
        """Return the signature without the number of steps."""
        params = member.params
        tokens = self._tokens(member)
        try:
            check_context_fits(tokens, int(params["context"] or 1))
        except ValueError as error:
            raise TrialError(str(error)) from error
        kind = str(params["tokens"])
        bpe = int(params["vocabulary"] or 0) if kind == "bpe" else 0
        architecture = Architecture.from_params(params, tokens.tokenizer.size)
        return (architecture, kind, bpe, self._sequences_per_step(member), params["optimizer"])

    def _tokens(self, member: Member) -> TokenizedText:
        kind = str(member.params["tokens"])
        size = int(member.params["vocabulary"] or 0) if kind == "bpe" else None
        try:
            return self.text.tokenize(kind, size)
        except ValueError as error:
            raise TrialError(str(error)) from error

    @staticmethod
    def _sequences_per_step(member: Member) -> int:
        params = member.params
        return max(1, round(int(params["batch_tokens"] or 1) / int(params["context"] or 1)))

    def _iterations(self, member: Member) -> int:
        """Return the number of steps of a trial's budget.

        Raises:
            TrialError: If they would take longer than the study may.
        """
        params, each = (
            member.params,
            self._sequences_per_step(member) * int(member.params["context"] or 1),
        )
        if params["iterations"]:
            steps = int(params["iterations"])
        elif params["train_tokens"]:
            steps = math.ceil(float(params["train_tokens"]) / each)
        else:
            return max(
                ROUNDS_PER_BUDGET,
                int(float(params["seconds"] or 0) / self.seconds_per_step(member)),
            )
        if self.timeout is not None:
            seconds = steps * self.seconds_per_step(member)
            if seconds > self.timeout:
                raise TrialError(
                    f"A trial must fit into the timeout of {self.timeout:g} s, but this one's "
                    f"{steps:,} steps would take about {seconds:,.0f} s."
                )
        return steps

    def seconds_per_step(self, member: Member) -> float:
        """Return the seconds of a step of one trial, measured once for each shape."""
        static = self._static_signature(member)
        key = repr((static, str(self.device), self.compile, self.uses_compiled_engine()))
        return measure_seconds_per_step(key, lambda: self._cohort([member], iterations=10**6))

    def memory(self, member: Member) -> int:
        """Return about how many bytes a trial takes.

        They hold weights, gradients (also of two halves), optimizer states and best weights; and
        what each layer keeps of a step's tokens.
        """
        architecture = Architecture.from_params(member.params, self._tokens(member).tokenizer.size)
        tokens = self._sequences_per_step(member) * architecture.context
        kept = architecture.layers * (10 * architecture.width + 3 * architecture.inner)
        kept += 4 * architecture.vocabulary
        return 4 * (8 * count_parameters(architecture) + tokens * kept)

    def pin_to_leader(self, leader: Member) -> Callable[[str, Any], Any]:
        """Return a function that sets static values to the leader's."""
        static = _static_names()
        return lambda name, value: leader.params[name] if name in static else value

    def cohort_size(self, leader: Member) -> int:
        """Return a size that fits in memory."""
        architecture = Architecture.from_params(leader.params, self._tokens(leader).tokenizer.size)
        tokens = self._sequences_per_step(leader) * architecture.context
        flops = (
            6.0
            * count_parameters(architecture)
            * tokens
            * self._iterations(leader)
            / ROUNDS_PER_BUDGET
        )
        return bounded_cohort_size(self.memory(leader), flops, self.device)

    def cohort(self, members: Sequence[Member]) -> Cohort:
        """Return a cohort of members with the same signature."""
        return self._cohort(members, self._iterations(members[0]))

    def with_seed(self, seed: int) -> Self:
        """Return the same problem with other first weights, windows and noise."""
        other = copy(self)
        other.seed = seed
        return other

    def _cohort(self, members: Sequence[Member], iterations: int) -> Cohort:
        first = members[0]
        tokens = self._tokens(first)
        corpus = self._corpus(str(first.params["tokens"]), int(first.params["vocabulary"] or 0))
        train, valid = corpus.train, corpus.valid
        architecture = Architecture.from_params(first.params, tokens.tokenizer.size)

        def build(some: Sequence[Member]) -> StackedGPT:
            sources = [rng.generator(self.seed, rng.INITIALIZATION, m.seed) for m in some]
            stack = StackedGPT(architecture, [m.params for m in some], sources)
            return stack.to(self.device)

        task = LanguageTask(
            arrays=Arrays(train[:-1], train[1:], valid[:-1], valid[1:]),
            build=build,
            loss=self._loss,
            metric=None,
            maximize=False,
            seed=self.seed,
            corpus=corpus,
            context=architecture.context,
            sequences=self._sequences_per_step(first),
            iterations=iterations,
            compile=self.compile,
        )
        return Cohort(members, task)

    def _loss(self, members: Sequence[Member]) -> TokenLoss:
        zeros = torch.zeros(len(members), device=self.device)
        return TokenLoss(ClassificationLoss(zeros, zeros))

    def _corpus(self, kind: str, vocabulary: int) -> Corpus:
        """Return the text as tokens on the device; results are cached."""
        key = kind, vocabulary if kind == "bpe" else None
        if key not in self._corpora:
            tokens = self.text.tokenize(*key)
            train, valid = (
                torch.tensor(part, dtype=torch.long, device=self.device)
                for part in (tokens.train, tokens.valid)
            )
            judged = count_predicted_bytes(tokens.tokenizer, valid[:1].cpu(), self.text.valid)
            self._corpora[key] = Corpus(train, valid, judged)
        return self._corpora[key]

    def uses_compiled_engine(self) -> bool:
        """Return whether the compiled engine trains the networks on this device."""
        return self.device.type == "cpu" and gpt.load_library() is not None

    @classmethod
    def restore_model(cls, metadata: Mapping[str, Any]) -> LanguageModel:
        """Return the language model that `LanguageModel.save` wrote, without its weights."""
        return restore_language_model(metadata)

    def sample_text(self, model: TrainedModel) -> str:
        """Return text that a language model writes."""
        assert isinstance(model, LanguageModel)
        return model.generate(tokens=SAMPLE_TOKENS)

    @classmethod
    def trial_rows(cls, trial: FrozenTrial) -> dict[str, str]:
        """Return perplexity, loss, tokens and speed of a trial, for reports."""
        return language_model_rows(trial)

    @classmethod
    def describe_source(cls, source: Any) -> Any:
        """Return where a text is, as a path or a list of paths, or its length."""
        if source is None:
            return None
        paths = text_paths(source)
        return {NOT_SAVED: f"text of {len(source):,} characters"} if paths is None else paths

    @classmethod
    def fixed_by_user(
        cls, fixed: Mapping[str, Value], space: Mapping[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Return the fixed values without epochs and vocabulary where these have no effect."""
        values = super().fixed_by_user(fixed, space)
        tokens: Any = space.get("tokens")
        kinds = (fixed.get("tokens"),) if tokens is None else tokens.choices
        return values if "bpe" in kinds else {n: v for n, v in values.items() if n != "vocabulary"}

    def count_weights(self, member: Member) -> int:
        """Return the number of trained weights."""
        return count_parameters(
            Architecture.from_params(member.params, self._tokens(member).tokenizer.size)
        )

    def network(self, member: Member) -> nn.Module:
        """Return a trial's network as a plain module, its weights not yet loaded."""
        architecture = Architecture.from_params(member.params, self._tokens(member).tokenizer.size)
        return Network(architecture, float(member.params["dropout"] or 0))

    def attributes(self, member: Member) -> dict[str, Any]:
        """Return the tokens of a step and the steps of the budget."""
        each = self._sequences_per_step(member) * int(member.params["context"] or 1)
        return {"tokens_per_step": each, "budget_iterations": self._iterations(member)}

    def predictor(
        self, network: nn.Module, member: Member, best_params: dict[str, Any], best_value: float
    ) -> LanguageModel:
        """Return a trained network as a model that continues texts."""
        assert isinstance(network, Network)
        tokenizer = self._tokens(member).tokenizer
        return LanguageModel(network.cpu(), tokenizer, member.params, best_params, best_value)


@functools.cache
def _static_names() -> frozenset[str]:
    return frozenset(name for name, h in specs("language").items() if h.static)


def _heads_for_width(
    fixed: dict[str, Value],
    space: Mapping[str, BaseDistribution],
    preset_values: Mapping[str, Value],
) -> dict[str, Value]:
    """Convert a user's ``width`` to a number of heads of a fixed or preset size."""
    if "width" not in fixed:
        return fixed
    if "heads" in fixed or "heads" in space or "head_size" in space:
        raise ValueError("`width` must not be given with `heads`, or with a tuned `head_size`.")
    width: Any = fixed.pop("width")
    size: Any = fixed.get("head_size", preset_values.get("head_size", 16))
    if not isinstance(width, Integral) or not isinstance(size, Integral) or size < 1:
        raise ValueError(f"`width` must be a whole number, but got {width!r}.")
    if width < 1 or width % size:
        raise ValueError(f"`width` must be a multiple of `head_size`, {size}, but got {width}.")
    return fixed | {"heads": int(width) // int(size), "head_size": int(size)}
