"""A cohort: many trials trained in lockstep as one stacked network."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp import seeds
from optuna_nnhp.data.splits import batch_order
from optuna_nnhp.hyperparameters.epochs import iterations_per_epoch
from optuna_nnhp.hyperparameters.epochs import total_iterations
from optuna_nnhp.hyperparameters.learning_rate import learning_rates
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.hyperparameters.loss import take
from optuna_nnhp.hyperparameters.optimizer import Coefficients
from optuna_nnhp.hyperparameters.optimizer import update
from optuna_nnhp.hyperparameters.record import Value
from optuna_nnhp.hyperparameters.regularization import EarlyStopping
from optuna_nnhp.hyperparameters.regularization import add_l1
from optuna_nnhp.hyperparameters.regularization import clip_gradients
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.training.machine import keep_freed_memory
from optuna_nnhp.training.machine import threads_for
from optuna_nnhp.training.parameters import FlatParameters
from optuna_nnhp.training.rounds import next_evaluation
from optuna_nnhp.training.rounds import rounds_per_epoch

SHARED_KNOBS = ("momentum", "squared_decay", "weight_decay")
EVALUATED_AT_ONCE = 2**22  # numbers of one layer's output in evaluation, to bound memory


@dataclass(frozen=True)
class Member:
    """One trial in a cohort.

    Args:
        number:
            The trial's number, by which the caller knows it.
        seed:
            Where its first weights come from.
        params:
            All its hyperparameters, "off" as 0 (see `hyperparameters.effective`).
    """

    number: int
    seed: int
    params: dict[str, Value]


@dataclass(frozen=True)
class Arrays:
    """The data of a study, on the device it is trained on; held once for all cohorts.

    Shape:
        - train_x: ``(n, features)``; train_y: ``(n,)``.
        - valid_x: ``(m, features)``; valid_y: ``(m,)``.
    """

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor


@dataclass(frozen=True)
class Task:
    """What a cohort trains on and is judged by.

    Args:
        arrays:
            The data.
        build:
            Makes the stacked network of some members.
        loss:
            Makes their loss.
        metric:
            Value of each member, ``(k,)``, from the outputs on the validation part,
            ``(k, m, outputs)``.
        maximize:
            Whether a greater metric is better.
        seed:
            The study's seed: batch order and dropout noise, which all members share, so that
            trials differ by their hyperparameters and not by their luck.
    """

    arrays: Arrays
    build: Callable[[Sequence[Member]], StackedModule]
    loss: Callable[[Sequence[Member]], Loss]
    metric: Callable[[Tensor], Tensor]
    maximize: bool
    seed: int

    @property
    def rounds(self) -> int:
        """Rounds in an epoch."""
        return rounds_per_epoch(len(self.arrays.train_y))


@dataclass(frozen=True)
class Scores:
    """What training up to an evaluation brought, in the order of ``cohort.members``.

    Args:
        train_loss:
            Mean loss over the batches since the last one, while training.
        validation_loss:
            Loss on the validation part after it.
        value:
            Metric on the validation part after it.
        best_round:
            Round with the best value so far, 0 while there is none.
        ended:
            Why a member has ended: ``"finished"``, ``"early stopping"``, ``"diverged"``; None
            while it goes on.
    """

    train_loss: list[float]
    validation_loss: list[float]
    value: list[float]
    best_round: list[int]
    ended: list[str | None]


class Cohort:
    """k trials with one signature and one batch size, trained as one network.

    A member's course does not depend on its mates: its weights start from its own seed, batch
    order and noise from the study's seed and the epoch, and nothing is shared across the
    first axis.

    Args:
        members:
            The trials. They are kept sorted by activation, so that each function works on one
            contiguous slice; see the attribute `members` for the order of all results.
        task:
            What they train on.

    Attributes:
        members: Those still training.
        round: Rounds done (see `training.rounds`).
        iterations: Steps of the optimizers done.
        stopping: Best values and rounds, per member.
    """

    def __init__(self, members: Sequence[Member], task: Task) -> None:
        self.members = sorted(members, key=lambda m: str(m.params["activation"]))
        self.task, self.round, self.iterations = task, 0, 0
        self.network = task.build(self.members)
        self.loss = task.loss(self.members)
        self.flat = FlatParameters(self.network)
        keep_freed_memory()
        self.best_weights = {n: w.clone() for n, w in self.network.state_dict().items()}
        self.stopping = EarlyStopping.start(
            [int(m.params["patience"] or 1) for m in self.members],
            [float(m.params["min_improvement"] or 0) for m in self.members],
        )
        examples = len(task.arrays.train_y)
        self.batch = min(int(self.members[0].params["batch_size"] or 1), examples)
        self.per_epoch = iterations_per_epoch(examples, self.batch)
        self.total = torch.tensor([total_iterations(m.params, examples) for m in self.members])
        self._batches: tuple[Tensor, ...] = ()
        self._tabulate()

    def train_round(self, out_of_time: Callable[[], bool] = lambda: False) -> Scores | None:
        """Train every member up to the next evaluation, and evaluate.

        Args:
            out_of_time:
                Asked before every step; once it says yes, training stops.

        Returns:
            The scores, or None if time ran out.
        """
        with threads_for(6.0 * self.batch * self.flat.weights.numel()):
            train_loss = self._train(out_of_time)
            return None if train_loss is None else self._score(train_loss)

    def _train(self, out_of_time: Callable[[], bool]) -> Tensor | None:
        """THE loop: every member's steps up to the next evaluation; the mean losses ``(k,)``."""
        data, rounds = self.task.arrays, self.task.rounds
        upto, last, end = self.round, self.iterations, int(self.total.max())
        while last == self.iterations < end:  # batches may be larger than rounds
            upto = next_evaluation(upto, rounds)
            last = min(-(-upto * self.per_epoch // rounds), end)
        rates = self._rates(last - self.iterations)
        self.network.train()
        loss_sum, seen = torch.zeros(len(self.members), device=data.train_x.device), 0
        for rate in rates:
            if out_of_time():
                return None
            batch = self._next_batch()
            losses = self.loss(self.network(data.train_x[batch], self._noise), data.train_y[batch])
            self.flat.backward(losses.sum())
            self._update(rate)
            loss_sum += losses.detach() * len(batch)
            seen += len(batch)
        self.round = upto
        return loss_sum / seen

    def _next_batch(self) -> Tensor:
        """Rows of the next step ``(batch,)``; every epoch has a new order and new noise."""
        epoch, place = divmod(self.iterations, self.per_epoch)
        if place == 0:
            seed, device = self.task.seed, self.task.arrays.train_x.device
            order = torch.from_numpy(batch_order(len(self.task.arrays.train_y), seed, epoch))
            self._batches = order.to(device).split(self.batch)
            self._source = seeds.generator(seed, seeds.NOISE, epoch, device=device)
        self.iterations += 1
        return self._batches[place]

    def _noise(self, batch: int, width: int) -> Tensor:
        """Uniform numbers for dropout, the same for all members."""
        return torch.rand(batch, width, generator=self._source, device=self._source.device)

    def keep(self, members: Sequence[int]) -> None:
        """Go on with some members only, given by their places in ``self.members``."""
        index = torch.tensor(members, dtype=torch.long)
        self.members = [self.members[i] for i in members]
        self.total = self.total[index]
        self.stopping.keep(index)
        index = index.to(self.task.arrays.train_x.device)
        self.network.keep(index)
        self.loss = take(self.loss, index)
        self.flat.keep(index, self.network)
        self.best_weights = {n: w[index] for n, w in self.best_weights.items()}
        self._tabulate()

    @property
    def best_values(self) -> list[float]:
        """Best value of each member so far; infinite, on the bad side, before the first."""
        best = self.stopping.best if self.task.maximize else -self.stopping.best
        return best.tolist()

    def best_network(self, place: int) -> nn.Module:
        """A member's network as it was at its best round, plain."""
        return self.network.member(place, self.best_weights)

    def _tabulate(self) -> None:
        """Hyperparameters of the step as tensors ``(k,)`` and as numbers."""
        like = self.flat.weights

        def column(name: str) -> Tensor:
            return torch.tensor([float(m.params[name] or 0) for m in self.members]).to(like)

        self.l1, self.clip_norm = column("l1"), column("clip_norm")
        self.coefficients = [
            Coefficients(0.0, *(float(m.params[name] or 0) for name in SHARED_KNOBS))
            for m in self.members
        ]

    def _rates(self, steps: int) -> list[list[float]]:
        """Learning rates of the next steps: for each step, of each member."""

        def column(name: str) -> Tensor:
            return torch.tensor([float(m.params[name] or 0) for m in self.members])

        rates = learning_rates(
            column("learning_rate"),
            [str(m.params["learning_rate_decay"]) for m in self.members],
            column("warmup"),
            column("final_fraction"),
            torch.arange(self.iterations, self.iterations + steps).expand(len(self.members), -1),
            self.total,
        )
        return rates.T.tolist()

    @torch.no_grad()
    def _update(self, rates: list[float]) -> None:
        """Regularize and clip the gradients, then step each member by its own optimizer."""
        flat = self.flat
        if bool((self.l1 > 0).any()):
            matrices = slice(None, flat.decayed)  # not biases, not normalization
            add_l1(flat.weights[:, matrices], flat.grads[:, matrices], self.l1[:, None])
        clip_gradients(flat.grads, self.clip_norm)
        for i, member in enumerate(self.members):
            now = replace(self.coefficients[i], rate=rates[i])
            matrices_row, rest = flat.rows[i]
            name = str(member.params["optimizer"])
            update(name, matrices_row, now)
            update(name, rest, replace(now, weight_decay=0.0))

    @torch.no_grad()
    def _score(self, train_loss: Tensor) -> Scores:
        """Evaluate all members, note who is at its best, and say who has ended."""
        outputs = self._evaluate()
        validation_loss = self.loss(outputs, self.task.arrays.valid_y)
        value = self.task.metric(outputs).double().cpu()
        broken = ~(torch.isfinite(train_loss).cpu() & torch.isfinite(value))
        greater = torch.where(broken, torch.nan, value if self.task.maximize else -value)
        whole_epoch = self.round % self.task.rounds == 0
        waited_long = self.stopping.update(greater, validation_loss, self.round, whole_epoch)
        best = (self.stopping.best_round == self.round).nonzero().squeeze(1)
        for name, tensor in self.network.state_dict().items():
            self.best_weights[name][best] = tensor[best]
        over = self.iterations >= self.total
        ended = [
            "diverged" if b else "finished" if o else "early stopping" if w else None
            for b, o, w in zip(broken.tolist(), over.tolist(), waited_long.tolist(), strict=True)
        ]
        return Scores(
            train_loss=train_loss.tolist(),
            validation_loss=validation_loss.tolist(),
            value=value.tolist(),
            best_round=self.stopping.best_round.tolist(),
            ended=ended,
        )

    def _evaluate(self) -> Tensor:
        """Outputs on the validation part: ``(k, m, outputs)``."""
        self.network.eval()
        widest = max(p.shape[-1] for p in self.network.parameters())
        rows = max(1, EVALUATED_AT_ONCE // (len(self.members) * widest))
        return torch.cat([self.network(x) for x in self.task.arrays.valid_x.split(rows)], dim=1)
