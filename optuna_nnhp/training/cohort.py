"""A cohort: many trials trained together as one stacked network."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.engine.gpt import CompiledGPTSubset
from optuna_nnhp.engine.mlp import CompiledMLP
from optuna_nnhp.engine.threads import limited_threads
from optuna_nnhp.engine.threads import no_op
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.hyperparameters.regularization import EarlyStopping
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.layers import subset
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.training.device import keep_freed_memory
from optuna_nnhp.training.numerics_context import extend_numerics_context
from optuna_nnhp.training.rounds import next_evaluation
from optuna_nnhp.training.step_params import Member as Member
from optuna_nnhp.training.step_params import StepParams
from optuna_nnhp.training.task import Apply as Apply
from optuna_nnhp.training.task import Arrays as Arrays
from optuna_nnhp.training.task import Scores as Scores
from optuna_nnhp.training.task import Task as Task
from optuna_nnhp.training.torch_compile import compile_forward

MAX_EVALUATION_ACTIVATIONS = 2**22  # numbers of layers' outputs in evaluation, to bound memory

NO_EARLY_STOPPING = 10**9  # epochs of patience where there is no early stopping
STEP_OVERHEAD_FLOPS = (
    2e6  # operations in the time that a small network's step takes whatever its size
)


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
        numerics_context: The numerics context of each, see `extend_numerics_context`.
        stopping: Best values and rounds, per member.
    """

    def __init__(self, members: Sequence[Member], task: Task) -> None:
        self.members, self.task = _sort_by_activation(members), task
        with limited_threads(0.0):  # many small decompositions, where weights start orthogonal
            self.network = task.build(self.members)
        self.forward = compile_forward(self.network.forward) if task.compile else self.network
        self.flat = FlatParameters(self.network)
        keep_freed_memory()
        self.best_weights = {n: w.clone() for n, w in self.network.state_dict().items()}
        self.reset_best()
        device, k = task.arrays.train_x.device, len(self.members)
        self.batches = task.make_batches(self.members)
        self.total_steps = [task.total_steps(m, self.batches.per_round) for m in self.members]
        self.rounds_done, self.iterations, self.steps_into_round = [0] * k, [0] * k, 0
        self.numerics_context: list[list[list[int]]] = [[] for _ in self.members]
        self.next_evaluations, self.evaluates_all_data = (
            [next_evaluation(0, task.rounds)] * k,
            False,
        )
        self.loss_sum, self.examples_seen = torch.zeros(k, device=device), torch.zeros(k)
        self.refresh()

    def train_round(self, out_of_time: Callable[[], bool] = lambda: False) -> Scores | None:
        """Train every member up to the next evaluation of any, and evaluate.

        Args:
            out_of_time:
                Asked before every step; once it says yes, training stops.

        Returns:
            The scores, or None if time ran out. Then the next call goes on in the middle of the
            round; but not where the engine trains members one beside the other (``compiled_mlp``),
            each of which is somewhere else.
        """
        # Beside an engine's own threads those of torch would spin; compiled code is for as many
        # threads as there are when it is made.
        is_compiled = self.compiled_mlp is not None or self.engine is not None
        work = 0.0 if is_compiled else 3 * self._forward_flops * len(self.members)
        with nullcontext(no_op) if self.task.compile else limited_threads(work) as before_step:
            while self._train(out_of_time, before_step):
                if places := self._members_to_evaluate():
                    return self._evaluate(places)
        return None

    def _train(self, out_of_time: Callable[[], bool], before_step: Callable[[], None]) -> bool:
        """THE loop: every member's steps of one round; whether there was time for it."""
        self.network.train()
        left = max(t - i for t, i in zip(self.total_steps, self.iterations, strict=True))
        begin = self.steps_into_round  # where a round was left, it goes on
        end = min(left + begin, self.batches.per_round)
        rates = self.step_params.rates(self.iterations, end - begin, self.total_steps)
        if self.compiled_mlp is not None:
            return self._train_compiled(self.compiled_mlp, rates, out_of_time)
        if self.engine is None:
            each = zip(self.numerics_context, self.rounds_done, strict=True)
            self.numerics_context = [
                extend_numerics_context(known, done, self.rounds_done) for known, done in each
            ]
        self.flat.allocate_grads(by_autograd=self.engine is None)
        steps = islice(self.batches.rows(self.rounds_done), begin, end)
        for step, (rate, rows) in enumerate(zip(rates, steps, strict=True), begin):
            if out_of_time():
                return False
            before_step()
            losses = self._backward(rows, self.batches.noise(self.rounds_done, step))
            self.update.step(rate)
            self.loss_sum += losses * rows.shape[-1]
            self.examples_seen += rows.shape[-1]
            self.iterations, self.steps_into_round = [i + 1 for i in self.iterations], step + 1
        self.rounds_done, self.steps_into_round = [d + 1 for d in self.rounds_done], 0
        return True

    def _backward(self, rows: Tensor, noise: DropoutNoise) -> Tensor:
        """Gradients of a step; each member's loss."""
        if self.engine is not None:
            return self.engine.backward(rows, noise)
        data = self.task.arrays
        losses: Tensor = self.loss(self.forward(data.train_x[rows], noise), data.train_y[rows])
        self.flat.backward(losses.sum())
        return losses.detach()

    def _train_compiled(
        self, compiled_mlp: CompiledMLP, rates: Tensor, out_of_time: Callable[[], bool]
    ) -> bool:
        """The same by the compiled engine."""
        data, batches, steps = self.task.arrays, self.batches, len(rates)
        rows = [order[: steps * batches.size] for order in batches.orders(self.rounds_done)]
        keys = {
            rounds_done: batches.noise_key(rounds_done) for rounds_done in set(self.rounds_done)
        }
        losses, done = compiled_mlp.train(
            *(data.train_x, data.train_y, rows, batches.size),
            *([keys[rounds_done] for rounds_done in self.rounds_done], rates, out_of_time),
        )
        self.iterations = [i + n for i, n in zip(self.iterations, done, strict=True)]
        if min(done) < steps:
            return False
        self.loss_sum += torch.tensor(losses)
        self.examples_seen += len(rows[0])
        self.rounds_done = [d + 1 for d in self.rounds_done]
        return True

    def reset_best(self) -> None:
        """Let no evaluation have been so far."""
        self.stopping = EarlyStopping.start(
            [int(m.params.get("patience") or NO_EARLY_STOPPING) for m in self.members],
            [float(m.params.get("min_improvement") or 0) for m in self.members],
        )

    def set_next_evaluation(self, done: int) -> None:
        """Evaluate all members next when they have done so many rounds, on all of the data."""
        self.next_evaluations, self.evaluates_all_data = [done] * len(self.members), True

    def select(self, places: Sequence[int]) -> None:
        """Go on with some members only, given by their places in ``self.members``.

        A place that is named twice is copied.
        """
        index = torch.tensor(places, dtype=torch.long)
        for name in PER_MEMBER:
            setattr(self, name, [getattr(self, name)[i] for i in places])
        self.stopping.select(index)
        self.examples_seen = self.examples_seen[index]
        index = index.to(self.loss_sum.device)
        self.loss_sum = self.loss_sum[index]
        self.network.select(index)
        self.flat.select(index, self.network)
        self.best_weights = {n: w[index] for n, w in self.best_weights.items()}
        self.refresh()

    def append(self, members: Sequence[Member]) -> None:
        """Take in new members with the same signature and batch size, at their beginning.

        They must count their budget in epochs: the steps of a number of iterations may end
        within a round, where a mate has others still to do.
        """
        new = Cohort(members, self.task)
        for name in PER_MEMBER:
            setattr(self, name, getattr(self, name) + getattr(new, name))
        self.stopping.append(new.stopping)
        self.examples_seen = torch.cat([self.examples_seen, new.examples_seen])
        self.loss_sum = torch.cat([self.loss_sum, new.loss_sum])
        self.network.append(new.network)
        self.flat.append(new.flat, self.network)
        self.best_weights = {
            n: torch.cat([w, new.best_weights[n]]) for n, w in self.best_weights.items()
        }
        order = {m.number: place for place, m in enumerate(self.members)}
        self.select([order[m.number] for m in _sort_by_activation(self.members)])

    @property
    def step_flops(self) -> float:
        """Operations of a step of all members, about, and what a small step costs beside them."""
        return len(self.members) * (3 * self._forward_flops + STEP_OVERHEAD_FLOPS)

    @property
    def _forward_flops(self) -> float:
        """Operations of one member's forward pass of a batch, about."""
        return self.batches.size * (self.network.flops or 2.0 * self.flat.weights.shape[1])

    @property
    def can_append(self) -> bool:
        """Whether new members may join those that have trained already."""
        if self.steps_into_round:
            return False
        return self.task.can_append and not any(m.params["iterations"] for m in self.members)

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

    def refresh(self) -> None:
        """Read anew what training needs of the members' hyperparameters."""
        self.loss = self.task.loss(self.members)
        self.step_params = StepParams(self.members, self.flat.weights)
        self.update = self.task.make_updater(
            self.flat, self.step_params, self.network, self.members
        )
        network, data = self.network, self.task.arrays
        self.compiled_mlp, self.engine = None, self.task.engine(network, self.flat)
        if isinstance(network, StackedMLP) and CompiledMLP.supports(network, *vars(data).values()):
            assert isinstance(self.loss, Loss)
            self.compiled_mlp = CompiledMLP(
                network, self.flat, self.step_params, self.loss, self.batches.size
            )

    def _members_to_evaluate(self) -> list[int]:
        """Who is to be evaluated now."""
        return [
            place
            for place, member in enumerate(self.members)
            if self.rounds_done[place] >= self.next_evaluations[place]
            or self.iterations[place] >= self.total_steps[place]
        ]

    @torch.no_grad()
    def _evaluate(self, places: list[int]) -> Scores:
        """Evaluate some members, note who is at its best, and say who has ended."""
        index = torch.tensor(places)
        is_over = any(self.iterations[place] >= self.total_steps[place] for place in places)
        is_over = is_over or self.evaluates_all_data
        members = [self.members[place] for place in places]
        validation_loss, value, counts = self.task.evaluate(self.apply(index), members, is_over)
        train_loss, value = (self.loss_sum.cpu() / self.examples_seen)[index], value.double().cpu()
        broken = ~(torch.isfinite(train_loss) & torch.isfinite(value))
        greater = torch.where(broken, torch.nan, value if self.task.maximize else -value)
        greater = greater if counts else torch.full_like(greater, torch.nan)
        waited_long = self.stopping.update(
            greater, validation_loss, index, self.rounds_done, self.task.rounds
        )
        best_round = self.stopping.best_round[index].tolist()
        done = [self.rounds_done[place] for place in places]
        best = [p for p, b, d in zip(places, best_round, done, strict=True) if b == d]
        for name, tensor in self.network.state_dict().items():
            self.best_weights[name][best] = tensor[best]
        for place in places:
            self.next_evaluations[place] = next_evaluation(
                self.rounds_done[place], self.task.rounds
            )
            self.loss_sum[place] = self.examples_seen[place] = 0
        return Scores(
            indices=places,
            rounds=done,
            train_loss=train_loss.tolist(),
            validation_loss=validation_loss.tolist(),
            value=value.tolist(),
            best_round=best_round,
            ended=self._end_reasons(places, broken.tolist(), waited_long.tolist()),
        )

    def _end_reasons(
        self, places: list[int], broken: list[bool], waited_long: list[bool]
    ) -> list[str | None]:
        over = [self.iterations[place] >= self.total_steps[place] for place in places]
        return [
            "diverged" if b else "finished" if o else "early stopping" if w else None
            for b, o, w in zip(broken, over, waited_long, strict=True)
        ]

    def apply(self, index: Tensor) -> Apply:
        """Some members' network, in evaluation: from inputs to outputs ``(k, m, outputs)``, or
        what their engine says a text costs."""
        network, compiled_mlp = self.network, self.compiled_mlp
        if compiled_mlp is not None:
            return lambda x: compiled_mlp.evaluate(x, index.tolist())
        if self.engine is not None:
            return CompiledGPTSubset(self.engine, index.tolist())
        if len(index) < len(self.members):
            network = subset(network, index.to(self.loss_sum.device))
        network.eval()
        each = network.activations_per_example or max(p.shape[-1] for p in network.parameters())
        rows = max(1, MAX_EVALUATION_ACTIVATIONS // (len(index) * each))
        return lambda x: torch.cat([network(part) for part in x.split(rows)], dim=1)


# Lists, one entry for each.
PER_MEMBER = (
    "members",
    "total_steps",
    "rounds_done",
    "iterations",
    "next_evaluations",
    "numerics_context",
)


def _sort_by_activation(members: Sequence[Member]) -> list[Member]:
    return sorted(members, key=lambda m: str(m.params.get("activation")))
