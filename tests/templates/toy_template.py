"""A template in one file: linear models on a table. Importing it registers the template."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
import torch
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.supervised import InputPreprocessor
from optuna_nnhp.data.supervised import prepare_table
from optuna_nnhp.data.target import Target
from optuna_nnhp.hyperparameters.catalogue import default_params
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.catalogue import resolve_space
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.vmap_stack import VmapStack
from optuna_nnhp.templates import register
from optuna_nnhp.templates.supervised import SupervisedTemplate
from optuna_nnhp.templates.supervised import resolve_target_metric
from optuna_nnhp.training.cohort import Member

TUNED = ("learning_rate", "weight_decay")


@register
class LinearTemplate(SupervisedTemplate):
    """Linear models on a table; only the rate and the penalty are tuned."""

    template_name = "linear"
    step_title = "pass over the table"

    def __init__(
        self,
        X: Any,
        y: Any = None,
        *,
        task: str | None = None,
        validation: float = 0.25,
        metric: str | None = None,
        space: Mapping[str, BaseDistribution] | None = None,
        fixed: Mapping[str, Value] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        compile: bool = False,
    ) -> None:
        data = prepare_table(X, y, task=task, validation=validation, seed=seed)
        tuned, rest = resolve_space(data.target.task, space, fixed)
        defaults = default_params(data.target.task, tuned)
        self.inputs, self.outputs = data.train_X.shape[1], max(1, len(data.target.classes))
        super().__init__(
            data,
            resolve_target_metric(metric, None, data.target),
            {name: tuned[name] for name in TUNED if name in tuned},
            {**{n: v for n, v in defaults.items() if n not in TUNED}, **rest},
            seed=seed,
            device=device,
            compile=compile,
        )

    def defaults(self) -> dict[str, Value]:
        return default_params(self.target.task, self.space)

    def member(self, number: int, params: Mapping[str, Any]) -> Member:
        values = effective_params(self.target.task, {**self.fixed, **params})
        return Member(number, number, values)

    def signature(self, member: Member) -> Hashable:
        return member.params["batch_size"]

    def pin_to_leader(self, leader: Member) -> Callable[[str, Any], Any]:
        return lambda name, value: value

    def cohort_size(self, leader: Member) -> int:
        return 4

    def memory(self, member: Member) -> int:
        return 20 * self.count_weights(member)

    def count_weights(self, member: Member) -> int:
        return (self.inputs + 1) * self.outputs

    def network(self, member: Member) -> nn.Module:
        with rng.global_rng_from(rng.generator(self.seed, rng.INITIALIZATION, member.seed)):
            return nn.Linear(self.inputs, self.outputs)

    @classmethod
    def rebuild_network(
        cls, params: Mapping[str, Any], preprocessor: InputPreprocessor, target: Target
    ) -> nn.Module:
        assert isinstance(preprocessor, Preprocessor)
        return nn.Linear(len(preprocessor.feature_names), max(1, len(target.classes)))

    @classmethod
    def trial_rows(cls, trial: FrozenTrial) -> dict[str, str]:
        return {"kind of model": "linear"}

    def _build_stack(self, members: Sequence[Member]) -> StackedModule:
        return VmapStack([self.network(member) for member in members], dims=2).to(self.device)
