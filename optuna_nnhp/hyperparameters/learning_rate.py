"""Learning rate: peak value, warm-up and decay."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import math

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.spec import Hyperparameter

# Tuned AdamW rates on 86 tables were between 3.4e-5 and 9.2e-4, many of them close to the upper
# bound of 1e-3 (arXiv:2410.24210); sgd needs up to a hundred times that.
LEARNING_RATE = Hyperparameter(
    name="learning_rate",
    distribution=FloatDistribution(3e-5, 0.5, log=True),
    default=2e-3,
    grid_values=(0.1, 0.01, 0.001),
    domain=(1e-10, 100.0),
    mutable=True,
    task="table",
    help="Peak learning rate, reached after warm-up; the most important hyperparameter. Training "
    "is slow if it is too small and diverges if it is too large.",
)
GPT_LEARNING_RATE = Hyperparameter(
    name="learning_rate",
    distribution=FloatDistribution(1e-3, 3e-2, log=True),
    default=1e-2,
    grid_values=(0.003, 0.01),
    domain=(1e-10, 100.0),
    mutable=True,
    task="language",
    help="Peak learning rate of adamw. Small models on little text need at least ten times the "
    "6e-4 of GPT-2.",
)
EMBEDDING_RATE = Hyperparameter(
    name="embedding_rate",
    distribution=FloatDistribution(0.3, 10.0, log=True),
    default=1.0,
    grid_values=(1.0, 3.0),
    domain=(1e-6, 1e6),
    mutable=True,
    task="language",
    help="Learning rate of embeddings and head, as a multiple of `learning_rate`.",
)
LEARNING_RATE_DECAY = Hyperparameter(
    name="learning_rate_decay",
    distribution=CategoricalDistribution(
        ("constant", "step", "exponential", "linear", "cosine", "one_cycle")
    ),
    default="cosine",
    grid_values=("constant", "step", "cosine"),
    help="Schedule of the learning rate over the trial's budget, down to `min_lr_ratio` of its "
    "peak. one_cycle first rises for 30 % of the budget and ignores `warmup`.",
)
WARMUP = Hyperparameter(
    name="warmup",
    distribution=FloatDistribution(0.0, 0.3),
    default=0.05,
    grid_values=(0.0, 0.1),
    domain=(0.0, 0.9),
    inactive_if={"learning_rate_decay": ("one_cycle",)},
    help="Share of the budget over which the learning rate rises linearly from near zero.",
)
MIN_LR_RATIO = Hyperparameter(
    name="min_lr_ratio",
    distribution=FloatDistribution(1e-3, 1.0, log=True),
    default=1e-2,
    grid_values=(0.001, 0.1),
    domain=(1e-9, 1.0),
    inactive_if={"learning_rate_decay": ("constant",)},
    help="Final learning rate as a share of its peak; 1 is no decay.",
)
NUM_STEP_DROPS = 3  # equal drops of the step schedule, a quarter of the budget apart
ONE_CYCLE_START_RATIO = 1 / 25  # defaults of torch.optim.lr_scheduler.OneCycleLR
ONE_CYCLE_PEAK_POSITION = 0.3

# The rate as a share of its peak, from progress q in [0, 1] after warm-up and the final share f.
_DECAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda q, f: torch.ones_like(q),
    "step": lambda q, f: (
        f ** ((q * (NUM_STEP_DROPS + 1)).floor().clamp(max=NUM_STEP_DROPS) / NUM_STEP_DROPS)
    ),
    "exponential": lambda q, f: f**q,
    "linear": lambda q, f: 1 - (1 - f) * q,
    "cosine": lambda q, f: f + (1 - f) * (1 + torch.cos(math.pi * q)) / 2,
    "one_cycle": lambda q, f: torch.where(
        q < ONE_CYCLE_PEAK_POSITION,
        _anneal(ONE_CYCLE_START_RATIO, 1.0, q / ONE_CYCLE_PEAK_POSITION),
        _anneal(1.0, f, _progress_after_peak(q)),
    ),
}


def _anneal(start: float, end: Tensor | float, share: Tensor) -> Tensor:
    return end + (start - end) * (1 + torch.cos(math.pi * share)) / 2


def _progress_after_peak(q: Tensor) -> Tensor:
    return (q - ONE_CYCLE_PEAK_POSITION) / (1 - ONE_CYCLE_PEAK_POSITION)


def learning_rates(
    peak: Tensor,
    decay: Sequence[str],
    warmup: Tensor,
    min_lr_ratio: Tensor,
    step: Tensor,
    total: Tensor,
) -> Tensor:
    """Return the learning rate of each member at each of its steps.

    Args:
        peak:
            `learning_rate` of each member.
        decay:
            `learning_rate_decay` of each member, k names.
        warmup:
            `warmup` of each member.
        min_lr_ratio:
            `min_lr_ratio` of each member.
        step:
            Step indices, from 0; steps from ``total`` on have the rate 0.
        total:
            Steps of each member's whole budget.

    Shape:
        - peak, warmup, min_lr_ratio, total: ``(k,)``.
        - step, Output: ``(k, s)``, the output in float64.

    Example:
        >>> one = torch.ones(1)
        >>> learning_rates(0.1 * one, ["linear"], 0 * one, 0 * one, torch.arange(4)[None], 3 * one)
        tensor([[0.1000, 0.0500, 0.0000, 0.0000]], dtype=torch.float64)

    Source:
        `torch.optim.lr_scheduler`, which the tests compare with; Smith and Topin 2017
        (arXiv:1708.07120) for one-cycle.
    """
    peak, warmup, final, step, total = (
        x.double() for x in (peak, warmup, min_lr_ratio, step, total)
    )
    one_cycle = torch.tensor([name == "one_cycle" for name in decay], device=peak.device)
    warmup_steps = torch.where(one_cycle, 0.0, (warmup * total).floor())[:, None]
    q = ((step - warmup_steps) / (total[:, None] - 1 - warmup_steps).clamp_min(1)).clamp(0, 1)
    share = torch.empty_like(q)
    for name in set(decay):
        index = torch.tensor([i for i, d in enumerate(decay) if d == name], device=q.device)
        share[index] = _DECAYS[name](q[index], final[index, None])
    share = torch.where(step < warmup_steps, (step + 1) / warmup_steps.clamp_min(1), share)
    return torch.where(step < total[:, None], peak[:, None] * share, 0.0)
