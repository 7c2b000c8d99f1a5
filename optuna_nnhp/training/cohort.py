"""A cohort: many trials trained together as one stacked network."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.hyperparameters.regularization import EarlyStopping
from optuna_nnhp.networks.layers import subset
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.training.company import in_company
from optuna_nnhp.training.compiling import compiled
from optuna_nnhp.training.gpt_native import NativeApply
from optuna_nnhp.training.knobs import Knobs
from optuna_nnhp.training.knobs import Member as Member
from optuna_nnhp.training.machine import do_nothing
from optuna_nnhp.training.machine import keep_freed_memory
from optuna_nnhp.training.machine import threads_for
from optuna_nnhp.training.native import Native
from optuna_nnhp.training.noise import Noise
from optuna_nnhp.training.parameters import FlatParameters
from optuna_nnhp.training.rounds import next_evaluation
from optuna_nnhp.training.task import Apply as Apply
from optuna_nnhp.training.task import Arrays as Arrays
from optuna_nnhp.training.task import Scores as Scores
from optuna_nnhp.training.task import Task as Task

EVALUATED_AT_ONCE = 2**22  # numbers of layers' outputs in evaluation, to bound memory

NEVER = 10**9  # epochs of patience where there is no early stopping
STEP_OVERHEAD = 2e6  # operations in the time that a small network's step takes whatever its size


class Cohort:
    """k trials with one signature and one batch size, trained as one network.

    A member's course does not depend on its mates: its weights start from its own seed, batch
    order and noise from the study's seed and the member's own rounds, and nothing is shared
    across the first axis. Members may leave and join between rounds.

    Args:
        members:
            The trials. They are kept sorted by activation, so that each function works on one
            contiguous slice; see the attribute `members` for the order of all results.
        task:
            What they train on.

    Attributes:
        members: Those still training.
        done: Rounds that each has done (see `training.rounds`).
        iterations: Steps of the optimizer that each has done.
        stepped: Steps that all have done of a round that they have begun.
        company: In what company each has trained where torch computes, see `in_company`.
        stopping: Best values and rounds, per member.
    """

    def __init__(self, members: Sequence[Member], task: Task) -> None:
        self.members, self.task = _sorted(members), task
        with threads_for(0.0):  # many small decompositions, where weights start orthogonal
            self.network = task.build(self.members)
        self.forward = compiled(self.network.forward) if task.compile else self.network
        self.flat = FlatParameters(self.network)
        keep_freed_memory()
        self.best_weights = {n: w.clone() for n, w in self.network.state_dict().items()}
        self.forget_best()
        device, k = task.arrays.train_x.device, len(self.members)
        self.batches = task.batches(self.members)
        self.total = [task.total(m, self.batches.per_round) for m in self.members]
        self.done, self.iterations, self.stepped = [0] * k, [0] * k, 0
        self.company: list[list[list[int]]] = [[] for _ in self.members]
        self.due, self.judges_all = [next_evaluation(0, task.rounds)] * k, False
        self.loss_sum, self.seen = torch.zeros(k, device=device), torch.zeros(k)
        self.tabulate()

    def train_round(self, out_of_time: Callable[[], bool] = lambda: False) -> Scores | None:
        """Train every member up to the next evaluation of any, and evaluate.

        Args:
            out_of_time:
                Asked before every step; once it says yes, training stops.

        Returns:
            The scores, or None if time ran out. Then the next call goes on in the middle of the
            round; but not where the engine trains members one beside the other (``native``),
            each of which is somewhere else.
        """
        # Beside an engine's own threads those of torch would spin; compiled code is for as many
        # threads as there are when it is made.
        is_native = self.native is not None or self.engine is not None
        work = 0.0 if is_native else 3 * self._operations * len(self.members)
        with nullcontext(do_nothing) if self.task.compile else threads_for(work) as before_step:
            while self._train(out_of_time, before_step):
                if places := self._due():
                    return self._score(places)
        return None

    def _train(self, out_of_time: Callable[[], bool], before_step: Callable[[], None]) -> bool:
        """THE loop: every member's steps of one round; whether there was time for it."""
        self.network.train()
        left = max(t - i for t, i in zip(self.total, self.iterations, strict=True))
        begin = self.stepped  # where a round was left, it goes on
        end = min(left + begin, self.batches.per_round)
        rates = self.knobs.rates(self.iterations, end - begin, self.total)
        if self.native is not None:
            return self._train_natively(self.native, rates, out_of_time)
        if self.engine is None:
            each = zip(self.company, self.done, strict=True)
            self.company = [in_company(known, done, self.done) for known, done in each]
        self.flat.prepare(by_autograd=self.engine is None)
        steps = islice(self.batches.rows(self.done), begin, end)
        for step, (rate, rows) in enumerate(zip(rates, steps, strict=True), begin):
            if out_of_time():
                return False
            before_step()
            losses = self._backward(rows, self.batches.noise(self.done, step))
            self.update.step(rate)
            self.loss_sum += losses * rows.shape[-1]
            self.seen += rows.shape[-1]
            self.iterations, self.stepped = [i + 1 for i in self.iterations], step + 1
        self.done, self.stepped = [d + 1 for d in self.done], 0
        return True

    def _backward(self, rows: Tensor, noise: Noise) -> Tensor:
        """Gradients of a step; each member's loss."""
        if self.engine is not None:
            return self.engine.backward(rows, noise)
        data = self.task.arrays
        losses: Tensor = self.loss(self.forward(data.train_x[rows], noise), data.train_y[rows])
        self.flat.backward(losses.sum())
        return losses.detach()

    def _train_natively(
        self, native: Native, rates: Tensor, out_of_time: Callable[[], bool]
    ) -> bool:
        """The same by the compiled engine."""
        data, batches, steps = self.task.arrays, self.batches, len(rates)
        rows = [order[: steps * batches.size] for order in batches.orders(self.done)]
        keys = {age: batches.noise_key(age) for age in set(self.done)}
        losses, done = native.train(
            *(data.train_x, data.train_y, rows, batches.size),
            *([keys[age] for age in self.done], rates, out_of_time),
        )
        self.iterations = [i + n for i, n in zip(self.iterations, done, strict=True)]
        if min(done) < steps:
            return False
        self.loss_sum += torch.tensor(losses)
        self.seen += len(rows[0])
        self.done = [d + 1 for d in self.done]
        return True

    def forget_best(self) -> None:
        """Let no evaluation have been so far."""
        self.stopping = EarlyStopping.start(
            [int(m.params.get("patience") or NEVER) for m in self.members],
            [float(m.params.get("min_improvement") or 0) for m in self.members],
        )

    def evaluate_at(self, done: int) -> None:
        """Evaluate all members next when they have done so many rounds, on all of the data."""
        self.due, self.judges_all = [done] * len(self.members), True

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some members only, given by their places in ``self.members``.

        A place that is named twice is copied.
        """
        index = torch.tensor(places, dtype=torch.long)
        for name in PER_MEMBER:
            setattr(self, name, [getattr(self, name)[i] for i in places])
        self.stopping.keep(index)
        self.seen = self.seen[index]
        index = index.to(self.loss_sum.device)
        self.loss_sum = self.loss_sum[index]
        self.network.keep(index)
        self.flat.keep(index, self.network)
        self.best_weights = {n: w[index] for n, w in self.best_weights.items()}
        self.tabulate()

    def join(self, members: Sequence[Member]) -> None:
        """Take in new members with the same signature and batch size, at their beginning.

        They must count their budget in epochs: the steps of a number of iterations may end
        within a round, where a mate has others still to do.
        """
        new = Cohort(members, self.task)
        for name in PER_MEMBER:
            setattr(self, name, getattr(self, name) + getattr(new, name))
        self.stopping.join(new.stopping)
        self.seen = torch.cat([self.seen, new.seen])
        self.loss_sum = torch.cat([self.loss_sum, new.loss_sum])
        self.network.join(new.network)
        self.flat.join(new.flat, self.network)
        self.best_weights = {
            n: torch.cat([w, new.best_weights[n]]) for n, w in self.best_weights.items()
        }
        order = {m.number: place for place, m in enumerate(self.members)}
        self.keep([order[m.number] for m in _sorted(self.members)])

    @property
    def work_of_step(self) -> float:
        """Operations of a step of all members, about, and what a small step costs beside them."""
        return len(self.members) * (3 * self._operations + STEP_OVERHEAD)

    @property
    def _operations(self) -> float:
        """Operations of one member's forward pass of a batch, about."""
        return self.batches.size * (self.network.flops or 2.0 * self.flat.weights.shape[1])

    @property
    def joinable(self) -> bool:
        """Whether new members may join those that have trained already."""
        if self.stepped:
            return False
        return self.task.joinable and not any(m.params["iterations"] for m in self.members)

    def best_value(self, place: int) -> float:
        """Best value of a member so far; infinite, on the bad side, before the first."""
        best = float(self.stopping.best[place])
        return best if self.task.maximize else -best

    @property
    def best(self) -> float:
        """Best value of all members so far."""
        best = float(self.stopping.best.max())
        return best if self.task.maximize else -best

    def best_network(self, place: int) -> nn.Module:
        """A member's network as it was at its best round, plain."""
        return self.network.member(place, self.best_weights)

    def tabulate(self) -> None:
        """Read anew what training needs of the members' hyperparameters."""
        self.loss = self.task.loss(self.members)
        self.knobs = Knobs(self.members, self.flat.weights)
        self.update = self.task.updater(self.flat, self.knobs, self.network, self.members)
        network, data = self.network, self.task.arrays
        self.native, self.engine = None, self.task.engine(network, self.flat)
        if isinstance(network, StackedMLP) and Native.can(network, *vars(data).values()):
            assert isinstance(self.loss, Loss)
            self.native = Native(network, self.flat, self.knobs, self.loss, self.batches.size)

    def _due(self) -> list[int]:
        """Who is to be evaluated now."""
        return [
            place
            for place, member in enumerate(self.members)
            if self.done[place] >= self.due[place] or self.iterations[place] >= self.total[place]
        ]

    @torch.no_grad()
    def _score(self, places: list[int]) -> Scores:
        """Evaluate some members, note who is at its best, and say who has ended."""
        index = torch.tensor(places)
        is_over = any(self.iterations[place] >= self.total[place] for place in places)
        is_over = is_over or self.judges_all
        members = [self.members[place] for place in places]
        validation_loss, value, counts = self.task.judge(self.apply(index), members, is_over)
        train_loss, value = (self.loss_sum.cpu() / self.seen)[index], value.double().cpu()
        broken = ~(torch.isfinite(train_loss) & torch.isfinite(value))
        greater = torch.where(broken, torch.nan, value if self.task.maximize else -value)
        greater = greater if counts else torch.full_like(greater, torch.nan)
        waited_long = self.stopping.update(
            greater, validation_loss, index, self.done, self.task.rounds
        )
        best_round = self.stopping.best_round[index].tolist()
        done = [self.done[place] for place in places]
        best = [p for p, b, d in zip(places, best_round, done, strict=True) if b == d]
        for name, tensor in self.network.state_dict().items():
            self.best_weights[name][best] = tensor[best]
        for place in places:
            self.due[place] = next_evaluation(self.done[place], self.task.rounds)
            self.loss_sum[place] = self.seen[place] = 0
        return Scores(
            places=places,
            rounds=done,
            train_loss=train_loss.tolist(),
            validation_loss=validation_loss.tolist(),
            value=value.tolist(),
            best_round=best_round,
            ended=self._endings(places, broken.tolist(), waited_long.tolist()),
        )

    def _endings(
        self, places: list[int], broken: list[bool], waited_long: list[bool]
    ) -> list[str | None]:
        over = [self.iterations[place] >= self.total[place] for place in places]
        return [
            "diverged" if b else "finished" if o else "early stopping" if w else None
            for b, o, w in zip(broken, over, waited_long, strict=True)
        ]

    def apply(self, index: Tensor) -> Apply:
        """Some members' network, in evaluation: from inputs to outputs ``(k, m, outputs)``, or
        what their engine says a text costs."""
        network, native = self.network, self.native
        if native is not None:
            return lambda x: native.evaluate(x, index.tolist())
        if self.engine is not None:
            return NativeApply(self.engine, index.tolist())
        if len(index) < len(self.members):
            network = subset(network, index.to(self.loss_sum.device))
        network.eval()
        each = network.numbers or max(p.shape[-1] for p in network.parameters())
        rows = max(1, EVALUATED_AT_ONCE // (len(index) * each))
        return lambda x: torch.cat([network(part) for part in x.split(rows)], dim=1)


# Lists, one entry for each.
PER_MEMBER = ("members", "total", "done", "iterations", "due", "company")


def _sorted(members: Sequence[Member]) -> list[Member]:
    return sorted(members, key=lambda m: str(m.params.get("activation")))
