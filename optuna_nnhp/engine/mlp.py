"""The compiled engine for multilayer perceptrons on a CPU.

A step of a small network takes less time than calling torch once for each of its operations. The C
code in `csrc/mlp.c` trains a member for a whole round in one call. Each thread trains other
members, so a member's result depends neither on the other members nor on the number of threads.
What the engine does not support (another device, another network, no C compiler) is computed by
torch with the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import ctypes
from ctypes import POINTER
from ctypes import byref
from ctypes import c_double
from ctypes import c_int32
from ctypes import c_int64
from ctypes import c_uint64
from ctypes import c_void_p
from itertools import product
import math
import threading

import torch
from torch import Tensor

from optuna_nnhp.engine.library import CFunction
from optuna_nnhp.engine.library import CStructure
from optuna_nnhp.engine.library import available_threads
from optuna_nnhp.engine.library import check_range
from optuna_nnhp.engine.library import load_engine
from optuna_nnhp.engine.library import run_on_threads
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.flat_parameters import StepParams
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.mlp import hidden_widths

# Seconds of C code between two looks at the clock and at Ctrl-C: at first, and at most.
TIME_SLICES = 0.005, 0.05
# If a cohort has one member only, and its step has more floating-point operations than this, two
# threads (a team) share the step. A network of this size adds up two halves of each sum in any
# case, so that the result does not depend on the number of members. Networks with normalization
# have no team: each normalization would be one more point where the threads wait for each other.
MIN_TEAM_FLOPS = 3e6
MAX_LAYERS = 64  # hidden layers: MAX_LAYERS in csrc/mlp.c
# Outputs of a layer that an evaluation computes at once: they stay in the cache.
MAX_EVALUATED_ACTIVATIONS = 2**15

# In the order of the enums in csrc/mlp.c and csrc/instruction_sets.h.
NORMS = ("none", "batch", "layer")
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "gelu", "silu", "mish")
CROSS_ENTROPY, MSE, MAE, HUBER = range(4)
OPTIMIZERS = {"sgd": 0, "nesterov": 1, "adam": 2, "adamw": 2, "rmsprop": 3}


class _Layer(CStructure):
    __slots__ = ()
    _fields_ = (
        *((name, c_int64) for name in ("weight", "bias", "norm_weight", "norm_bias")),
        *((name, c_void_p) for name in ("running_mean", "running_var")),
    )


class _Network(CStructure):
    __slots__ = ()
    _fields_ = (
        *((name, c_void_p) for name in ("x", "y")),
        *((name, c_int64) for name in ("inputs", "outputs", "padded", "depth", "parameters")),
        *((name, c_int64) for name in ("batch", "steps", "examples")),
        *((name, c_int32) for name in ("norm", "training", "is_double", "split_sums")),
        ("layers", _Layer * (MAX_LAYERS + 1)),
    )


_HYPERPARAMETERS = (
    *("dropout", "momentum", "beta2", "weight_decay", "l1", "clip_norm"),
    *("smoothing", "gamma", "delta"),
)


class _Member(CStructure):
    __slots__ = ()
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "exp_avg", "exp_avg_sq", "updates")),
        *((name, c_void_p) for name in ("widths", "rows", "rates", "outputs")),
        *((name, c_int64) for name in ("begin", "end")),
        ("key", c_uint64),
        *((name, c_int64) for name in ("index", "steps_done")),
        ("loss_sum", c_double),
        *((name, c_double) for name in _HYPERPARAMETERS),
        *((name, c_int32) for name in ("activation", "optimizer", "loss", "decoupled")),
    )


class _Team(CStructure):
    __slots__ = ()
    _fields_ = (
        ("arrivals", c_int64 * 16),
        *((name, c_double * 2) for name in ("loss", "squares")),
        *((name, c_int64) for name in ("stop", "aborted")),
    )


class _Job(CStructure):
    __slots__ = ()
    _fields_ = (
        ("network", POINTER(_Network)),
        ("members", POINTER(_Member)),
        ("count", c_int64),
        ("next", c_int64),
        ("team", POINTER(_Team)),
    )


STRUCTURES = (_Layer, _Network, _Member, _Team, _Job)
FUNCTIONS = (
    CFunction("mlp_workspace_size", c_int64, (POINTER(_Network),)),
    CFunction("mlp_run", None, (POINTER(_Job), c_double, c_void_p, c_int32)),
)

_team_lock = threading.Lock()  # two teams at once would wait for each other's threads


def load_library() -> ctypes.CDLL | None:
    """Return the compiled engine, or None if torch computes; see `library.load_engine`."""
    return load_engine("mlp", STRUCTURES, FUNCTIONS)


class CompiledMLP:
    """Trains and evaluates a stack of perceptrons; made anew when its members change."""

    def __init__(
        self,
        network: StackedMLP,
        flat: FlatParameters,
        step_params: StepParams,
        loss: Loss,
        batch: int,
    ) -> None:
        library = load_library()
        assert library is not None
        self._library, self._flat, self._dtype = library, flat, flat.weights.dtype
        self._network, self._referenced = _describe_network(network, flat)
        is_large = 6.0 * batch * self._network.parameters > MIN_TEAM_FLOPS
        self._network.split_sums = int(is_large and not self._network.norm)
        self._has_labels = isinstance(loss, ClassificationLoss)
        self._checked_y: Tensor | None = None
        self._members = (_Member * len(flat.weights))()
        for i, (member, params) in enumerate(zip(self._members, network.params, strict=True)):
            widths = torch.tensor(hidden_widths(params))
            self._referenced.append(widths)
            member.index, member.widths = i, widths.data_ptr()
            member.weights, member.updates = (t[i].data_ptr() for t in (flat.weights, flat.steps))
            member.exp_avg, member.exp_avg_sq = (
                t[i].data_ptr() for t in (flat.exp_avg, flat.exp_avg_sq)
            )
            member.activation = ACTIVATIONS.index(str(params["activation"]))
        _set_hyperparameters(self._members, network, step_params)
        _set_losses(self._members, loss)

    @staticmethod
    def supports(network: StackedModule, *data: Tensor) -> bool:
        """Return whether the engine can train a network on some data."""
        if not isinstance(network, StackedMLP) or load_library() is None:
            return False
        dtype = next(network.parameters()).dtype
        return (
            dtype in (torch.float32, torch.float64)
            and len(network.linears) <= MAX_LAYERS + 1
            and all(t.device.type == "cpu" and t.dtype in (dtype, torch.long) for t in data)
        )

    def train(
        self,
        x: Tensor,
        y: Tensor,
        rows: Sequence[Tensor],
        size: int,
        keys: Sequence[int],
        rates: Tensor,
        out_of_time: Callable[[], bool],
    ) -> tuple[list[float], list[int]]:
        """Train every member for one round; stop early when ``out_of_time`` returns True.

        ``rows`` holds each member's row numbers in training order, ``size`` the examples per batch
        (the last batch may be smaller), ``keys`` each member's key of this round's dropout noise.
        Return for each member the sum of the examples' losses and the number of steps done.

        Shape:
            - x: ``(n, inputs)``; y: ``(n,)``; each of rows ``(examples,)``.
            - rates: ``(steps, k)``, in float64.

        Raises:
            ValueError: If a label is not that of a class, or the data has another shape or type.
            IndexError: If a row number is not that of an example.
        """
        x, y, rates = x.contiguous(), y.contiguous(), rates.T.contiguous()
        self._check_training_arguments(x, y, rows, size, rates)
        network = self._with_data(x, y)
        network.training, network.batch = 1, size
        network.steps, network.examples = rates.shape[1], len(rows[0])
        for i, member in enumerate(self._members):
            member.rows, member.rates = rows[i].data_ptr(), rates[i].data_ptr()
            member.key, member.steps_done, member.loss_sum = keys[i], 0, 0.0
        self._run(network, self._members, out_of_time)
        return [m.loss_sum for m in self._members], [m.steps_done for m in self._members]

    def evaluate(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the outputs of some members, given by their indices in the stack.

        Shape:
            - x: ``(m, inputs)``; Output: ``(members, m, outputs)``.
        """
        x = x.contiguous()
        self._check_inputs(x)
        network = self._with_data(x, None)
        network.batch = min(len(x), max(1, MAX_EVALUATED_ACTIVATIONS // network.padded))
        network.training, network.steps, network.examples = 0, 1, len(x)
        outputs = torch.empty(len(indices), len(x), network.outputs, dtype=self._dtype)
        parts = -(-available_threads() // len(indices))  # so that all threads have work
        tasks = (_Member * (len(indices) * parts))()
        pairs = product(range(len(indices)), range(parts))
        for task, (i, part) in zip(tasks, pairs, strict=True):
            ctypes.memmove(byref(task), byref(self._members[indices[i]]), ctypes.sizeof(task))
            task.outputs, task.steps_done = outputs[i].data_ptr(), 0
            task.begin, task.end = (len(x) * n // parts for n in (part, part + 1))
        self._run(network, tasks, lambda: False)
        return outputs

    def _check_training_arguments(
        self, x: Tensor, y: Tensor, rows: Sequence[Tensor], size: int, rates: Tensor
    ) -> None:
        """Check all sizes and indices that the C code relies on."""
        self._check_inputs(x)
        if y is not self._checked_y:
            self._check_targets(y)
            self._checked_y = y
        k, steps = len(self._members), -(-len(rows[0]) // size)
        if rates.shape != (k, steps) or rates.dtype != torch.float64:
            raise ValueError(
                f"`rates` must be float64 of shape {(steps, k)}, but got {rates.dtype} of shape "
                f"{tuple(rates.T.shape)}."
            )
        if len(y) != len(x) or any(r.shape != rows[0].shape for r in rows) or len(rows) != k:
            raise ValueError("`x`, `y` and `rows` must have the same number of examples.")
        for distinct in {r.data_ptr(): r for r in rows}.values():
            check_range(distinct, len(x), "row numbers", IndexError)

    def _check_inputs(self, x: Tensor) -> None:
        expected = (len(x), self._network.inputs)
        if x.shape != expected or x.dtype != self._dtype:
            raise ValueError(
                f"`x` must be {self._dtype} of shape {expected}, but got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )

    def _check_targets(self, y: Tensor) -> None:
        if self._has_labels:
            check_range(y, self._network.outputs, "labels")
        elif y.dtype != self._dtype:
            raise ValueError(f"Targets must be {self._dtype}, but got {y.dtype}.")

    def _with_data(self, x: Tensor, y: Tensor | None) -> _Network:
        """Return a copy of the network's description that points to some data."""
        network = _Network.from_buffer_copy(self._network)
        network.x, network.y = x.data_ptr(), None if y is None else y.data_ptr()
        return network

    def _run(
        self, network: _Network, tasks: ctypes.Array[_Member], out_of_time: Callable[[], bool]
    ) -> None:
        """Compute until all steps are done or time is out, by a team if there may be one."""
        is_team = self._is_team(network, len(tasks)) and _team_lock.acquire(blocking=False)
        try:
            self._run_slices(network, tasks, out_of_time, is_team)
        finally:
            if is_team:
                _team_lock.release()

    def _run_slices(
        self,
        network: _Network,
        tasks: ctypes.Array[_Member],
        out_of_time: Callable[[], bool],
        is_team: bool,
    ) -> None:
        """Call the C code for slices of time, so that Python can stop it in between."""
        count = 2 if is_team else min(available_threads(), len(tasks))
        size = self._library.mlp_workspace_size(byref(network))
        memory = [torch.empty(size, dtype=self._dtype) for _ in range(1 if is_team else count)]
        job = _Job(ctypes.pointer(network), tasks, len(tasks), 0)
        seconds, longest = TIME_SLICES if network.training else (math.inf, math.inf)
        while any(task.steps_done < network.steps for task in tasks) and not out_of_time():
            job.next, team = 0, _Team()
            if is_team:
                job.team = ctypes.pointer(team)
            self._run_slice(job, team, seconds, count, memory)
            seconds = min(2 * seconds, longest)

    def _run_slice(
        self, job: _Job, team: _Team, seconds: float, count: int, memory: Sequence[Tensor]
    ) -> None:
        """Compute on several threads for a slice of time; a team's threads share their memory."""

        def work(thread: int) -> None:
            own = memory[thread % len(memory)].data_ptr()
            self._library.mlp_run(byref(job), seconds, own, thread)

        def abort() -> None:
            team.aborted = 1

        purpose = "team" if len(memory) < count else "engine"
        run_on_threads(count, work, purpose, on_error=abort)

    def _is_team(self, network: _Network, members: int) -> bool:
        """Return whether two threads may share the steps of the only member."""
        return bool(network.training and network.split_sums) and members == 1 < available_threads()


def _describe_network(network: StackedMLP, flat: FlatParameters) -> tuple[_Network, list[Tensor]]:
    """Describe what all members share; return also the tensors that it points to."""
    depth, referenced = len(network.linears) - 1, list[Tensor]()
    out = _Network(
        inputs=network.inputs,
        outputs=network.outputs,
        padded=network.get_buffer("mask0").shape[-1],
        depth=depth,
        parameters=flat.weights.shape[1],
        norm=NORMS.index(str(network.params[0]["normalization"])),
        is_double=int(flat.weights.dtype == torch.float64),
    )
    offsets = {id(parameter): offset for parameter, offset in flat.offsets.items()}
    for n, linear in enumerate(network.linears):
        layer = out.layers[n]
        layer.weight, layer.bias = offsets[id(linear.weight)], offsets.get(id(linear.bias), -1)
        layer.norm_weight = layer.norm_bias = -1
        if n < depth and network.norms:
            norm = network.norms[n]
            layer.norm_weight, layer.norm_bias = offsets[id(norm.weight)], offsets[id(norm.bias)]
            for name, buffer in norm.named_buffers():
                if name in ("running_mean", "running_var"):
                    setattr(layer, name, buffer.data_ptr())
                    referenced.append(buffer)
    return out, referenced


def _set_hyperparameters(
    members: Iterable[_Member], network: StackedMLP, step_params: StepParams
) -> None:
    dropout = network.get_buffer("dropout").tolist()
    for i, member in enumerate(members):
        coefficients, optimizer = step_params.coefficients[i], step_params.optimizers[i]
        member.dropout = dropout[i]
        member.momentum, member.beta2 = coefficients.momentum, coefficients.beta2
        member.weight_decay = float(step_params.weight_decay[i])
        member.l1, member.clip_norm = float(step_params.l1[i]), float(step_params.clip_norm[i])
        member.optimizer = OPTIMIZERS[optimizer]
        member.decoupled = int(optimizer == "adamw")


def _set_losses(members: Iterable[_Member], loss: Loss) -> None:
    if isinstance(loss, ClassificationLoss):
        numbers = zip(members, loss.smoothing.tolist(), loss.gamma.tolist(), strict=True)
        for member, smoothing, gamma in numbers:
            member.loss, member.smoothing, member.gamma = CROSS_ENTROPY, smoothing, gamma
        return
    columns = (loss.is_mse.tolist(), loss.is_mae.tolist(), loss.delta.tolist())
    for member, is_mse, is_mae, delta in zip(members, *columns, strict=True):
        member.loss, member.delta = MSE if is_mse else MAE if is_mae else HUBER, delta
