"""Plain Optuna: an objective that trains one network after the other, as well as a loop can.

The space, the data, the metric, the budget of a trial and early stopping are ours; the sampler,
the pruner and the storage are Optuna's defaults. The loop has its data in memory, torch's fused
optimizers, and does no work that a trial's hyperparameters do not ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
import math
import time
from typing import Any

import optuna
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from optuna_nnhp.hyperparameters.activation import ACTIVATIONS
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.learning_rate import learning_rates
from optuna_nnhp.hyperparameters.weight_init import initial_weight
from optuna_nnhp.networks.mlp import build_mlp
from optuna_nnhp.study.running import suggest
from optuna_nnhp.templates.dnn import DNNTemplate
from optuna_nnhp.training.metrics import to_target_units
from tests.benchmarks.common import peak_memory
from tests.benchmarks.sides import Settings
from tests.benchmarks.sides import Side
from tests.benchmarks.sides import Watch
from tests.benchmarks.sides import load_sampler

CUT_SHORT = "cut short"  # trial attribute
Params = dict[str, Any]


def plain(settings: Settings) -> Side:
    """Run the side."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    load_sampler()
    load_optimizers()
    table, start_mib = settings.table(), peak_memory()
    watch = Watch()
    problem = DNNTemplate(**table, fixed={"epochs": settings.epochs}, seed=settings.seed)
    training = Training(problem, watch, settings.timeout)
    directions = optuna.study.StudyDirection
    direction = directions.MAXIMIZE if problem.maximize else directions.MINIMIZE
    sampler = optuna.samplers.TPESampler(seed=settings.seed)
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.enqueue_trial(problem.defaults())
    left = None if settings.timeout is None else settings.timeout - watch.seconds
    study.optimize(training.objective, settings.trials, left, callbacks=[watch])
    trials = study.get_trials(deepcopy=False)
    side = Side(problem.metric.name, problem.maximize, seconds=watch.seconds)
    side.epochs, side.start_mib, side.peak_mib = training.epochs, start_mib, peak_memory()
    side.count(trials, {t.number for t in trials if CUT_SHORT in t.user_attrs})
    watch.write(side, trials)
    side.best = side.told[-1][1] if side.told else None
    return side


def load_optimizers() -> None:
    """Import what torch's first optimizer imports, which takes three seconds, before the study.

    Not on our side, which has no `torch.optim` and is judged by its memory.
    """
    weight = nn.Parameter(torch.ones(1))
    weight.square().backward()
    torch.optim.AdamW([weight], fused=True).step()


class Training:
    """The objective.

    Args:
        problem:
            The prepared data, the space and the metric.
        watch:
            Told of every value.
        timeout:
            Seconds after which the trial that runs is ended, as ours are; Optuna itself would
            wait for its end.

    Attributes:
        epochs: Passes over the data, of all trials.
    """

    def __init__(self, problem: DNNTemplate, watch: Watch, timeout: float | None) -> None:
        self.problem, self.watch, self.epochs = problem, watch, 0.0
        self.until = float("inf") if timeout is None else watch.started + timeout
        data = problem.data
        self.train = torch.from_numpy(data.train_X), torch.from_numpy(data.train_y)
        self.valid = torch.from_numpy(data.valid_X), torch.from_numpy(data.valid_y)

    def objective(self, trial: optuna.Trial) -> float:
        """Train one network and return its best value over the epochs."""
        problem, best, waited = self.problem, None, 0
        task, drawn = problem.target.task, suggest(trial, problem.space)
        params = effective_params(task, {**problem.fixed, **drawn})
        network = build(params, problem.inputs, problem.outputs)
        course = self.course(network, params)
        for epoch, value in enumerate(course, start=1):
            self.watch.saw(trial.number, value)
            if math.isnan(value):
                break  # diverged: with its best value so far, as ours
            better = best is None or (value > best if problem.maximize else value < best)
            best, waited = (value, 0) if better else (best, waited + 1)
            if waited >= int(params["patience"] or 1):
                break
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        if time.monotonic() >= self.until:
            trial.set_user_attr(CUT_SHORT, True)
        if best is None:
            raise optuna.TrialPruned
        return float(best)

    def course(self, network: nn.Module, params: Params) -> Iterator[float]:
        """Yield the metric after each epoch until the timeout."""
        (x, y), (valid_x, valid_y) = self.train, self.valid
        step = Step(network, params, loss_of(self.problem.target.task, params))
        size = int(params["batch_size"])
        rows = len(y) - (len(y) % size == 1)  # batch normalization cannot do with a single row
        per_epoch = math.ceil(rows / size)
        rates = schedule(params, per_epoch * int(params["epochs"]))
        for epoch in range(int(params["epochs"])):
            network.train()
            batches = torch.randperm(len(y))[:rows].split(size)
            for batch, rate in zip(batches, rates[epoch * per_epoch :], strict=False):
                if time.monotonic() >= self.until:
                    return
                step(x[batch], y[batch], rate)
                self.epochs += 1 / per_epoch
            network.eval()
            with torch.inference_mode():
                outputs = network(valid_x)[None]
                units = to_target_units(self.problem.target, outputs, valid_y)
                value = float(self.problem.metric.compute(*units))
            yield value


def build(params: Params, inputs: int, outputs: int) -> nn.Sequential:
    """Build a plain network with its initial weights."""
    network = build_mlp(params, inputs, outputs)
    source = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in linears:
            gain = 1.0 if layer is linears[-1] else ACTIVATIONS[params["activation"]].gain
            shape = layer.in_features, layer.out_features
            layer.weight.copy_(initial_weight(params["weight_init"], *shape, gain, source).T)
            if layer.bias is not None:
                layer.bias.zero_()
    return network


@dataclass
class Step:
    """One step of one network.

    Args:
        network:
            The network.
        params:
            Its hyperparameters.
        loss:
            Its loss.
    """

    network: nn.Module
    params: Params
    loss: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        self.weights = list(self.network.parameters())
        self.matrices = [w for w in self.weights if w.dim() > 1]
        self.l1, self.clip = float(self.params["l1"]), float(self.params["clip_norm"])
        self.optimizer = optimizer_of(self.weights, self.params)

    def __call__(self, x: Tensor, y: Tensor, rate: float) -> None:
        """Train on one batch at one learning rate."""
        self.optimizer.zero_grad()
        self.loss(self.network(x), y).backward()
        if self.l1:
            for w in self.matrices:
                assert w.grad is not None
                w.grad.add_(w.detach().sign(), alpha=self.l1)
        if self.clip < float("inf"):
            nn.utils.clip_grad_norm_(self.weights, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


def optimizer_of(weights: list[nn.Parameter], params: Params) -> torch.optim.Optimizer:
    """Return torch's optimizer, fused if possible, with weight decay on matrices only."""
    decay, momentum = float(params["weight_decay"]), float(params["momentum"])
    groups: list[dict[str, Any]] = [{"params": weights}]
    if decay:
        groups = [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": decay},
            {"params": [w for w in weights if w.dim() == 1]},
        ]
    name, squared = params["optimizer"], float(params["beta2"])
    match name:
        case "sgd" | "nesterov":
            fast = name == "nesterov" and momentum > 0
            return torch.optim.SGD(groups, momentum=momentum, nesterov=fast, fused=True)
        case "adam":
            return torch.optim.Adam(groups, betas=(momentum, squared), fused=True)
        case "adamw":
            betas = (momentum, squared)
            return torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
        case "rmsprop":  # not fused anywhere; 128 us by foreach, else 156 (2 x 64 units)
            return torch.optim.RMSprop(groups, alpha=squared, momentum=momentum, foreach=True)
    raise ValueError(f"`optimizer` must be one of the catalogue's, but got {name!r}.")


def schedule(params: Params, total: int) -> list[float]:
    """Return the learning rate of each step."""

    def one(name: str) -> Tensor:
        return torch.tensor([float(params[name])])

    rates: list[float] = learning_rates(
        one("learning_rate"),
        [params["learning_rate_decay"]],
        one("warmup"),
        one("min_lr_ratio"),
        torch.arange(total)[None],
        torch.tensor([total]),
    )[0].tolist()
    return rates


def loss_of(task: str, params: Params) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss made of torch's functions."""
    if task == "regression":
        delta = float(params["huber_delta"])
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "mse": functional.mse_loss,
            "mae": functional.l1_loss,
            "huber": lambda out, y: functional.huber_loss(out, y, delta=delta),
        }
        loss = losses[params["loss"]]
        return lambda out, y: loss(out.squeeze(-1), y)
    smoothing, gamma = float(params["label_smoothing"]), float(params["focal_gamma"])
    if params["loss"] == "cross_entropy":
        return lambda out, y: functional.cross_entropy(out, y, label_smoothing=smoothing)

    def focal(out: Tensor, y: Tensor) -> Tensor:
        log_p = functional.log_softmax(out, -1)
        right = log_p.gather(-1, y[:, None]).squeeze(-1)
        each = -right
        if smoothing:
            each = torch.lerp(each, -log_p.mean(-1), smoothing)
        return ((-torch.expm1(right)).clamp_min(1e-7).pow(gamma) * each).mean()

    return focal
