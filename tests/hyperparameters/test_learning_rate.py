from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from optuna_nnhp.hyperparameters.learning_rate import LEARNING_RATE_DECAY
from optuna_nnhp.hyperparameters.learning_rate import learning_rates

PEAK = 0.4
DECAYS: tuple[str, ...] = LEARNING_RATE_DECAY.distribution.choices  # type: ignore
TO_THE_END = [name for name in DECAYS if name != "constant"]


def rates(
    decay: str, total: int, final: float = 0.01, warmup: float = 0.0, steps: int | None = None
) -> Tensor:
    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    step = torch.arange(total if steps is None else steps)[None]
    return learning_rates(one(PEAK), [decay], one(warmup), one(final), step, one(total))[0]


def one_cycle(optimizer: SGD, total: int, final: float) -> LRScheduler:
    # torch has its peak at step 0.3 * total - 1, we at 0.3 * (total - 1), where 30 % of the
    # way from the first step to the last is gone.
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK,
        total_steps=total,
        pct_start=(0.3 * (total - 1) + 1) / total,
        cycle_momentum=False,
        final_div_factor=1 / (25 * final),
    )


ORACLES: dict[str, Callable[[SGD, int, float], LRScheduler]] = {
    "constant": lambda o, n, f: lr_scheduler.ConstantLR(o, factor=1.0),
    "exponential": lambda o, n, f: lr_scheduler.ExponentialLR(o, f ** (1 / (n - 1))),
    "linear": lambda o, n, f: lr_scheduler.LinearLR(o, 1.0, f, total_iters=n - 1),
    "cosine": lambda o, n, f: lr_scheduler.CosineAnnealingLR(o, n - 1, eta_min=f * PEAK),
    "one_cycle": one_cycle,
    "step": lambda o, n, f: lr_scheduler.MultiStepLR(
        o, [-(-(n - 1) * part // 4) for part in (1, 2, 3)], gamma=f ** (1 / 3)
    ),
}


def follow(make: Callable[[SGD], LRScheduler], steps: int) -> Tensor:
    """What a torch scheduler gives at each step."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, seen = make(optimizer), []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return torch.tensor([float(rate) for rate in seen], dtype=torch.float64)


def test_every_decay_has_an_oracle() -> None:
    assert set(DECAYS) == set(ORACLES)


@pytest.mark.parametrize("final", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("total", [12, 41, 100])
@pytest.mark.parametrize("decay", DECAYS)
def test_decays_are_those_of_torch(decay: str, total: int, final: float) -> None:
    expected = follow(lambda o: ORACLES[decay](o, total, final), total)
    torch.testing.assert_close(rates(decay, total, final), expected, rtol=1e-9, atol=1e-12)


def test_step_plateaus() -> None:
    plateaus = [1.0] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001] * 4
    expected = PEAK * torch.tensor(plateaus, dtype=torch.float64)
    torch.testing.assert_close(rates("step", 13, 0.001), expected)


def test_one_cycle_climbs_from_a_25th_for_30_percent() -> None:
    cycle = rates("one_cycle", 101, 0.01)
    assert float(cycle[0]) == pytest.approx(PEAK / 25)
    assert int(cycle.argmax()) == 30
    assert bool((cycle[:31].diff() > 0).all()) and bool((cycle[30:].diff() < 0).all())


@pytest.mark.parametrize("decay", [name for name in DECAYS if name != "one_cycle"])
@pytest.mark.parametrize("total, warmup, climb", [(40, 0.25, 10), (33, 0.1, 3), (1000, 0.3, 300)])
def test_warm_up(decay: str, total: int, warmup: float, climb: int) -> None:
    whole = rates(decay, total, 0.1, warmup)
    expected = follow(
        lambda o: lr_scheduler.LinearLR(o, 1 / climb, 1.0, total_iters=climb - 1), climb
    )
    torch.testing.assert_close(whole[:climb], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole[climb:], rates(decay, total - climb, 0.1))


def test_one_cycle_has_no_other_warm_up() -> None:
    torch.testing.assert_close(rates("one_cycle", 50, warmup=0.3), rates("one_cycle", 50))


@pytest.mark.parametrize("decay", TO_THE_END)
@pytest.mark.parametrize("total", [2, 5, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_the_last_step_has_the_final_fraction(decay: str, total: int, warmup: float) -> None:
    assert float(rates(decay, total, 0.05, warmup)[-1]) == pytest.approx(0.05 * PEAK)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("total", [1, 7])
def test_zero_after_the_budget(decay: str, total: int) -> None:
    whole = rates(decay, total, 0.5, 0.2, steps=total + 4)
    assert whole[total:].tolist() == [0.0] * 4
    assert bool((whole[:total] > 0).all())


@pytest.mark.parametrize("decay", DECAYS)
def test_a_schedule_is_stretched_to_the_budget(decay: str) -> None:
    short, long = rates(decay, 26, 0.1), rates(decay, 251, 0.1)
    torch.testing.assert_close(short, long[::10])


def random_members(k: int, seed: int) -> dict[str, Any]:
    source = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(k, generator=source)

    return {
        "peak": 10 ** uniform(-6, 1),
        "decay": [DECAYS[i] for i in torch.randint(len(DECAYS), (k,), generator=source).tolist()],
        "warmup": uniform(0, 0.9) * (torch.rand(k, generator=source) > 0.2),
        "min_lr_ratio": 10 ** uniform(-6, 0),
        "total": torch.randint(1, 200, (k,), generator=source),
    }


@pytest.mark.parametrize("seed", range(3))
def test_never_above_the_peak_nor_below_zero(seed: int) -> None:
    members = random_members(400, seed)
    found = learning_rates(**members, step=torch.arange(220).expand(400, -1))
    assert bool(torch.isfinite(found).all()) and bool((found >= 0).all())
    peak = members["peak"].double()[:, None]
    assert bool((found <= peak * (1 + 1e-12)).all())
    running = torch.arange(220) < members["total"][:, None]
    assert bool((found[running] > 0).all()) and bool((found[~running] == 0).all())


def test_members_do_not_mix_and_steps_may_differ() -> None:
    members = random_members(30, 7)
    step = torch.arange(30)[:, None] + torch.arange(9)  # each member is at another step
    together = learning_rates(**members, step=step)
    assert together.dtype == torch.float64
    for i in range(30):
        alone = {name: value[i : i + 1] for name, value in members.items()}
        torch.testing.assert_close(together[i], learning_rates(**alone, step=step[i : i + 1])[0])
