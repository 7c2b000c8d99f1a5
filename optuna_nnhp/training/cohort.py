"""A cohort: many trials trained together as one stacked network."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
import math

import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.engine.gpt import CompiledGPTSubset
from optuna_nnhp.engine.library import limited_threads
from optuna_nnhp.engine.library import no_op
from optuna_nnhp.engine.mlp import CompiledMLP
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.hyperparameters.regularization import EarlyStopping
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.flat_parameters import StepParams
from optuna_nnhp.networks.layers import subset_stack
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.training.batches import next_evaluation
from optuna_nnhp.training.device import keep_freed_memory
from optuna_nnhp.training.task import Apply as Apply
from optuna_nnhp.training.task import Arrays as Arrays
from optuna_nnhp.training.task import Member as Member
from optuna_nnhp.training.task import Scores as Scores
from optuna_nnhp.training.task import Task as Task
from optuna_nnhp.training.torch_compile import compile_forward

MAX_EVALUATION_ACTIVATIONS = 2**22  # computed at once, to bound the memory of an evaluation
NO_EARLY_STOPPING = 10**9  # epochs of patience of a trial without early stopping
STEP_OVERHEAD_FLOPS = 2e6  # the fixed cost of a step, in floating-point operations

# Attributes of a cohort that are lists with one entry for each member.
PER_MEMBER = (
    "members",
    "total_steps",
    "rounds_done",
    "iterations",
    "next_evaluations",
    "numerics_context",
)

# Torch rounds the matrix products and convolutions of one network differently from those of a
# stack; stacks of any two sizes are rounded alike (measured: perceptrons, convolutions,
# attention). It also matters whether all members see the same examples. So retraining a member of
# a cohort exactly needs a copy beside it. The compiled engines round alike in every context.
SINGLE, SAME_STEP, DIFFERENT_STEPS = 0, 1, 2
NUMERICS_CONTEXT_KEY = "numerics_context"  # the trial attribute that holds it
NumericsContext = Sequence[Sequence[int]]  # pairs: first round, and one of the three constants


def extend_numerics_context(
    numerics_context: NumericsContext, done: int, rounds_done: Sequence[int]
) -> list[list[int]]:
    """Return a member's numerics context, extended by that of its next round.

    The member has finished ``done`` rounds, the members of its cohort ``rounds_done``.

    Example:
        >>> context = extend_numerics_context([], 0, rounds_done=[0, 0])
        >>> context = extend_numerics_context(context, 1, rounds_done=[1, 1])
        >>> extend_numerics_context(context, 2, rounds_done=[2])
        [[0, 1], [2, 0]]
    """
    kind = SAME_STEP if len(set(rounds_done)) == 1 else DIFFERENT_STEPS
    kind = SINGLE if len(rounds_done) == 1 else kind
    known = [list(entry) for entry in numerics_context]
    return known if known and known[-1][1] == kind else [*known, [done, kind]]


class Cohort:
    """k trials with one signature and one batch size, trained as one network.

    A member's training does not depend on the other members: its initial weights come from its
    own seed, the batch order and the dropout noise from the study's seed and the member's
    finished rounds, and no operation mixes members. Between rounds, members may leave and new
    ones may be appended.

    Args:
        members:
            The trials. They are sorted by activation, so that each activation function is applied
            to one contiguous slice; all results are in the order of the attribute `members`.
        task:
            The data, network, loss and metric.

    Attributes:
        members: The trials that are still training.
        rounds_done: Rounds that each member has finished (see `training.batches`).
        iterations: Optimizer steps that each member has done.
        total_steps: Optimizer steps of each member's budget.
        next_evaluations: The round after which each member is evaluated next.
        numerics_context: Each member's numerics context, see `extend_numerics_context`.
        steps_into_round: Steps that all members have done of an unfinished round.
        evaluates_all_data: Whether every evaluation reads the whole validation part.
        stopping: The best values and rounds of all members.
        best_weights: The network's `state_dict`, each member at its best round.
    """

    def __init__(self, members: Sequence[Member], task: Task) -> None:
        self.members, self.task = _sort_by_activation(members), task
        with limited_threads(0.0):  # orthogonal initialization does many small decompositions
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
        self.next_evaluations = [next_evaluation(0, task.rounds)] * k
        self.evaluates_all_data = False
        self.loss_sum, self.examples_seen = torch.zeros(k, device=device), torch.zeros(k)
        self.refresh()

    def train_round(self, out_of_time: Callable[[], bool] = lambda: False) -> Scores | None:
        """Train all members until the next evaluation of any member, and evaluate.

        Args:
            out_of_time:
                Called before every step; if it returns True, training stops.

        Returns:
            The scores, or None if time ran out. The next call then continues in the middle of the
            round, except where the compiled engine trains members in parallel (`compiled_mlp`):
            there each member has stopped at a different step.
        """
        # Torch's threads would compete with the engine's. Compiled code keeps the number of
        # threads that it was compiled for.
        is_compiled = self.compiled_mlp is not None or self.engine is not None
        flops = 0.0 if is_compiled else 3 * self._forward_flops * len(self.members)
        with nullcontext(no_op) if self.task.compile else limited_threads(flops) as before_step:
            while self._train(out_of_time, before_step):
                if indices := self._members_to_evaluate():
                    return self._evaluate(indices)
        return None

    def _train(self, out_of_time: Callable[[], bool], before_step: Callable[[], None]) -> bool:
        """Train all members for one round, the training loop; return False if time ran out."""
        self.network.train()
        left = max(t - i for t, i in zip(self.total_steps, self.iterations, strict=True))
        begin = self.steps_into_round
        end = min(left + begin, self.batches.per_round)
        rates = self.step_params.rates(self.iterations, end - begin, self.total_steps)
        if self.compiled_mlp is not None:
            return self._train_compiled(self.compiled_mlp, rates, out_of_time)
        if self.engine is None:
            self.numerics_context = [
                extend_numerics_context(context, done, self.rounds_done)
                for context, done in zip(self.numerics_context, self.rounds_done, strict=True)
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
        """Compute the gradients of one step, and return each member's loss ``(k,)``."""
        if self.engine is not None:
            return self.engine.backward(rows, noise)
        data = self.task.arrays
        losses: Tensor = self.loss(self.forward(data.train_x[rows], noise), data.train_y[rows])
        self.flat.backward(losses.sum())
        return losses.detach()

    def _train_compiled(
        self, compiled_mlp: CompiledMLP, rates: Tensor, out_of_time: Callable[[], bool]
    ) -> bool:
        """Train all members for one round with the compiled engine, as `_train`."""
        data, batches, steps = self.task.arrays, self.batches, len(rates)
        rows = [order[: steps * batches.size] for order in batches.orders(self.rounds_done)]
        keys = {done: batches.noise_key(done) for done in set(self.rounds_done)}
        losses, steps_done = compiled_mlp.train(
            *(data.train_x, data.train_y, rows, batches.size),
            *([keys[done] for done in self.rounds_done], rates, out_of_time),
        )
        self.iterations = [i + n for i, n in zip(self.iterations, steps_done, strict=True)]
        if min(steps_done) < steps:
            return False
        self.loss_sum += torch.tensor(losses)
        self.examples_seen += len(rows[0])
        self.rounds_done = [d + 1 for d in self.rounds_done]
        return True

    def reset_best(self) -> None:
        """Forget the results of all earlier evaluations."""
        self.stopping = EarlyStopping.start(
            [int(m.params.get("patience") or NO_EARLY_STOPPING) for m in self.members],
            [float(m.params.get("min_improvement") or 0) for m in self.members],
        )

    def set_next_evaluation(self, done: int) -> None:
        """Evaluate all members after round ``done``, on the whole validation part."""
        self.next_evaluations, self.evaluates_all_data = [done] * len(self.members), True

    def select(self, indices: Sequence[int]) -> None:
        """Keep only some members, given by their indices; a repeated index copies the member."""
        index = torch.tensor(indices, dtype=torch.long)
        for name in PER_MEMBER:
            setattr(self, name, [getattr(self, name)[i] for i in indices])
        self.stopping.select(index)
        self.examples_seen = self.examples_seen[index]
        index = index.to(self.loss_sum.device)
        self.loss_sum = self.loss_sum[index]
        self.network.select(index)
        self.flat.select(index, self.network)
        self.best_weights = {n: w[index] for n, w in self.best_weights.items()}
        self.refresh()

    def append(self, members: Sequence[Member]) -> None:
        """Append new members with the same signature and batch size, before their first step.

        Their budget must be given in epochs: a budget in iterations may end within a round, in
        which other members still have steps to do.
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
        order = {m.number: index for index, m in enumerate(self.members)}
        self.select([order[m.number] for m in _sort_by_activation(self.members)])

    @torch.no_grad()
    def resume_from(
        self, sources: Sequence[int], members: Sequence[Member], fresh: Collection[int] = ()
    ) -> None:
        """Replace the members by ``members``, each of which continues from its source's state.

        Sources are indices of the old members, whose structure the new ones must have. The new
        members take over weights, optimizer state, running statistics, counters and best values.
        Those at the positions ``fresh`` start with new initial weights and a new optimizer; their
        counters, which the learning rate schedule follows, are the source's. Call it between two
        rounds.

        Raises:
            ValueError: If a member's activation, optimizer or batch size is not its source's.
                Whether shapes are equal is not checked.
        """
        for source, member in zip(sources, members, strict=True):
            old, new = self.members[source].params, member.params
            for name in ("activation", "optimizer", "batch_size"):
                if old.get(name) != new.get(name):
                    raise ValueError(
                        f"`{name}` must stay {old.get(name)!r} when a member resumes from "
                        f"another, but got {new.get(name)!r}."
                    )
        order = sorted(range(len(sources)), key=lambda i: str(members[i].params.get("activation")))
        members = [members[i] for i in order]
        self.select([sources[i] for i in order])
        self.members = members
        self.network.set_hyperparameters(
            [m.params for m in members], lambda: self.task.build(members)
        )
        for index, member in enumerate(members):
            if order[index] in fresh:
                self._restart_member(index, member)
        self.refresh()

    def _restart_member(self, index: int, member: Member) -> None:
        """Give a member new initial weights and a new optimizer."""
        initial = self.task.build([member]).state_dict()
        for name, tensor in self.network.state_dict().items():
            tensor[index].copy_(initial[name][0])
        for state in (self.flat.exp_avg, self.flat.exp_avg_sq, self.flat.steps):
            state[index] = 0

    @property
    def step_flops(self) -> float:
        """Estimated floating-point operations of a step of all members, with its fixed cost."""
        return len(self.members) * (3 * self._forward_flops + STEP_OVERHEAD_FLOPS)

    @property
    def _forward_flops(self) -> float:
        """Estimated floating-point operations of one member's forward pass of a batch."""
        return self.batches.size * (self.network.flops or 2.0 * self.flat.weights.shape[1])

    @property
    def can_append(self) -> bool:
        """Whether new members can be appended now."""
        if self.steps_into_round:
            return False
        return self.task.can_append and not any(m.params["iterations"] for m in self.members)

    def best_value(self, index: int) -> float:
        """Return a member's best value so far; before the first value the worst infinity."""
        best = float(self.stopping.best[index])
        return best if self.task.maximize else -best

    @property
    def best(self) -> float:
        """The best value of all members so far."""
        best = float(self.stopping.best.max())
        return best if self.task.maximize else -best

    def best_network(self, index: int) -> nn.Module:
        """Return a member's plain network with the weights of its best round."""
        return self.network.member(index, self.best_weights)

    def refresh(self) -> None:
        """Recompute everything that depends on the members' hyperparameters."""
        params, data = [m.params for m in self.members], self.task.arrays
        self.loss = self.task.loss(self.members)
        self.step_params = StepParams(params, self.flat.weights)
        self.update = self.task.make_updater(
            self.flat, self.step_params, self.network, self.members
        )
        network = self.network
        self.compiled_mlp, self.engine = None, self.task.engine(network, self.flat)
        if isinstance(network, StackedMLP) and CompiledMLP.supports(network, *vars(data).values()):
            assert isinstance(self.loss, Loss)
            self.compiled_mlp = CompiledMLP(
                network, self.flat, self.step_params, self.loss, self.batches.size
            )

    def _members_to_evaluate(self) -> list[int]:
        return [
            index
            for index in range(len(self.members))
            if self.rounds_done[index] >= self.next_evaluations[index] or self._is_over(index)
        ]

    def _is_over(self, index: int) -> bool:
        return self.iterations[index] >= self.total_steps[index]

    @torch.no_grad()
    def _evaluate(self, indices: list[int]) -> Scores:
        """Evaluate some members, store the weights of new best rounds, and return the scores."""
        index = torch.tensor(indices)
        is_over = self.evaluates_all_data or any(self._is_over(i) for i in indices)
        members = [self.members[i] for i in indices]
        validation_loss, value, counts = self.task.evaluate(self.apply(index), members, is_over)
        train_loss, value = (self.loss_sum.cpu() / self.examples_seen)[index], value.double().cpu()
        diverged = ~(torch.isfinite(train_loss) & torch.isfinite(value))
        greater = torch.where(diverged, torch.nan, value if self.task.maximize else -value)
        greater = greater if counts else torch.full_like(greater, torch.nan)
        out_of_patience = self.stopping.update(
            greater, validation_loss, index, self.rounds_done, self.task.rounds
        )
        best_round = self.stopping.best_round[index].tolist()
        done = [self.rounds_done[i] for i in indices]
        best = [i for i, b, d in zip(indices, best_round, done, strict=True) if b == d]
        if best:
            where = torch.tensor(best).to(self.loss_sum.device)
            for name, tensor in self.network.state_dict().items():
                self.best_weights[name][where] = tensor[where]
        for i in indices:
            self.next_evaluations[i] = next_evaluation(self.rounds_done[i], self.task.rounds)
            self.loss_sum[i] = self.examples_seen[i] = 0
        reasons = zip(indices, diverged.tolist(), out_of_patience.tolist(), strict=True)
        return Scores(
            indices=indices,
            rounds=done,
            train_loss=train_loss.tolist(),
            validation_loss=validation_loss.tolist(),
            value=value.tolist(),
            best_round=best_round,
            ended=[self._end_reason(*reason) for reason in reasons],
        )

    def _end_reason(self, index: int, diverged: bool, out_of_patience: bool) -> str | None:
        if diverged:
            return "diverged"
        if self._is_over(index):
            return "finished"
        return "early stopping" if out_of_patience else None

    def apply(self, index: Tensor) -> Apply:
        """Return the forward pass of some members ``(m,)`` in evaluation mode.

        Returns:
            A function from inputs to outputs ``(m, rows, outputs)``; or, if the compiled GPT
            engine is used, an object that computes the members' loss on a text.
        """
        network, compiled_mlp = self.network, self.compiled_mlp
        if compiled_mlp is not None:
            return lambda x: compiled_mlp.evaluate(x, index.tolist())
        if self.engine is not None:
            return CompiledGPTSubset(self.engine, index.tolist())
        if len(index) < len(self.members):
            network = subset_stack(network, index.to(self.loss_sum.device))
        network.eval()
        each = network.activations_per_example or max(p.shape[-1] for p in network.parameters())
        rows = max(1, MAX_EVALUATION_ACTIVATIONS // (len(index) * each))
        return lambda x: torch.cat([network(part) for part in x.split(rows)], dim=1)

    def evaluate_best(self, index: int) -> float:
        """Return the metric of a member's best weights, as `training.retrain` computes it.

        The compiled engines compute the same value in every cohort, so the best value is returned.
        Without a compiled engine, the weights are evaluated again in a cohort of one.
        """
        value = self.best_value(index)
        is_compiled = self.compiled_mlp is not None or self.engine is not None
        if is_compiled or not math.isfinite(value):
            return value
        return self.evaluate_weights(index, self.best_weights)

    def evaluate_weights(self, index: int, weights: Mapping[str, Tensor]) -> float:
        """Return the metric of one member in a cohort of one, with weights of a `state_dict`."""
        single = Cohort([self.members[index]], self.task)
        with torch.no_grad():
            for name, tensor in single.network.state_dict().items():
                tensor[0].copy_(weights[name][index])
        return single.evaluate_single()

    def evaluate_single(self) -> float:
        """Return the metric of a cohort of one on the whole validation part.

        It depends on the weights alone, not on the number of threads: torch uses one thread.
        """
        with limited_threads(0.0), torch.no_grad():
            _, value, _ = self.task.evaluate(self.apply(torch.tensor([0])), self.members, True)
        return float(value.double()[0])


def _sort_by_activation(members: Sequence[Member]) -> list[Member]:
    return sorted(members, key=lambda m: str(m.params.get("activation")))


def ended_members(scores: Scores) -> list[int]:
    """Return the indices of the members that have ended with an evaluation."""
    return [i for i, end in zip(scores.indices, scores.ended, strict=True) if end is not None]


def run_to_end(
    cohorts: Iterable[Cohort],
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Cohort, Scores]]:
    """Train cohorts one after the other, and yield the scores of every evaluation.

    A member that has ended leaves its cohort after its scores were yielded. The caller may stop
    iterating at any time; a generator of cohorts creates each one when the one before has ended.
    Training stops when ``out_of_time``, called before every step, returns True.
    """
    for cohort in cohorts:
        while True:
            scores = cohort.train_round(out_of_time)
            if scores is None:
                return
            yield cohort, scores
            leaving = set(ended_members(scores))
            remaining = [i for i in range(len(cohort.members)) if i not in leaving]
            if not remaining:
                break
            if leaving:
                cohort.select(remaining)
