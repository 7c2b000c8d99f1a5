"""Learning rate: its size, its warm-up and its decay."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import math

from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
import torch
from torch import Tensor

from optuna_nnhp.hyperparameters.spec import Hyperparameter

# Tuned AdamW rates on 86 tables lay between 3.4e-5 and 9.2e-4, piled up against a bound of
# 1e-3 (arXiv:2410.24210); sgd needs up to a hundred times that.
LEARNING_RATE = Hyperparameter(
    name="learning_rate",
    distribution=FloatDistribution(3e-5, 0.5, log=True),
    default=2e-3,
    grid_values=(0.1, 0.01, 0.001),
    domain=(1e-10, 100.0),
    mutable=True,
    task="table",
    help="Step size at its peak, after warm-up; the most important number. Too small trains too "
    "slowly, too large diverges.",
)
GPT_LEARNING_RATE = Hyperparameter(
    name="learning_rate",
    distribution=FloatDistribution(1e-3, 3e-2, log=True),
    default=1e-2,
    grid_values=(0.003, 0.01),
    domain=(1e-10, 100.0),
    mutable=True,
    task="language",
    help="Size of adamw's steps at their peak. Small models on little text need ten times GPT-2's "
    "6e-4 and more.",
)
EMBEDDING_RATE = Hyperparameter(
    name="embedding_rate",
    distribution=FloatDistribution(0.3, 10.0, log=True),
    default=1.0,
    grid_values=(1.0, 3.0),
    domain=(1e-6, 1e6),
    mutable=True,
    task="language",
    help="Rate of embeddings and head over the learning rate.",
)
LEARNING_RATE_DECAY = Hyperparameter(
    name="learning_rate_decay",
    distribution=CategoricalDistribution(
        ("constant", "step", "exponential", "linear", "cosine", "one_cycle")
    ),
    default="cosine",
    grid_values=("constant", "step", "cosine"),
    help="How the rate falls over the trial's own budget, to `min_lr_ratio` of its peak; "
    "one_cycle first climbs for 30 % of the time and has no other warm-up.",
)
WARMUP = Hyperparameter(
    name="warmup",
    distribution=FloatDistribution(0.0, 0.3),
    default=0.05,
    grid_values=(0.0, 0.1),
    domain=(0.0, 0.9),
    inactive_if={"learning_rate_decay": ("one_cycle",)},
    help="Share of the budget over which the rate climbs linearly from near zero.",
)
MIN_LR_RATIO = Hyperparameter(
    name="min_lr_ratio",
    distribution=FloatDistribution(1e-3, 1.0, log=True),
    default=1e-2,
    grid_values=(0.001, 0.1),
    domain=(1e-9, 1.0),
    inactive_if={"learning_rate_decay": ("constant",)},
    help="Rate at the end as a share of its peak; 1 is no decay.",
)
NUM_STEP_DROPS = 3  # the step schedule's equal drops, a quarter of the budget apart
ONE_CYCLE_START_RATIO = 1 / 25  # torch.optim.lr_scheduler.OneCycleLR's defaults
ONE_CYCLE_PEAK_POSITION = 0.3

# The share of the peak rate, given progress q in [0, 1] after warm-up and the final share f.
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
            Share of the budget spent climbing.
        min_lr_ratio:
            Share of the peak at the last step.
        step:
            Steps done before, so 0 is the first; steps from ``total`` on have the rate 0.
        total:
            Steps of the member's whole budget.

    Shape:
        - peak, warmup, final_fraction, total: ``(k,)``.
        - step, Output: ``(k, s)``, the output in float64.

    Example:
        >>> one = torch.ones(1)
        >>> learning_rates(0.1 * one, ["linear"], 0 * one, 0 * one, torch.arange(4)[None], 3 * one)
        tensor([[0.1000, 0.0500, 0.0000, 0.0000]], dtype=torch.float64)

    Source:
        `torch.optim.lr_scheduler` (the oracle in the tests); Smith and Topin 2017
        (arXiv:1708.07120) for one-cycle.
    """
    peak, warmup, final, step, total = (
        x.double() for x in (peak, warmup, min_lr_ratio, step, total)
    )
    one_cycle = torch.tensor([name == "one_cycle" for name in decay], device=peak.device)
    climb = torch.where(one_cycle, 0.0, (warmup * total).floor())[:, None]
    q = ((step - climb) / (total[:, None] - 1 - climb).clamp_min(1)).clamp(0, 1)
    share = torch.empty_like(q)
    for name in set(decay):
        those = torch.tensor([i for i, d in enumerate(decay) if d == name], device=q.device)
        share[those] = _DECAYS[name](q[those], final[those, None])
    share = torch.where(step < climb, (step + 1) / climb.clamp_min(1), share)
    return torch.where(step < total[:, None], peak[:, None] * share, 0.0)
