"""The compiled engine: multilayer perceptrons on a CPU, several to many times as fast as torch.

A small network's step is mostly the calls of its operations. The engine (`mlp_engine.c`) has a
member's whole round in one call, and a thread for each core; members are shared out among them,
so their courses do not depend on how many there are. Where there is no engine (it could not be
compiled, another device, another network), the same is done by torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
import ctypes
from ctypes import POINTER
from ctypes import Structure
from ctypes import byref
from ctypes import c_double
from ctypes import c_int32
from ctypes import c_int64
from ctypes import c_uint64
from ctypes import c_void_p
import functools
import importlib.util
from itertools import product
import logging
import math
import os
import threading
from typing import Any

import torch
from torch import Tensor

from optuna_nnhp.engine.threads import available_threads
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.loss import Loss
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.mlp import StackedMLP
from optuna_nnhp.networks.mlp import hidden_widths
from optuna_nnhp.training.step_params import StepParams

_logger = logging.getLogger(f"optuna.{__name__}")

TIME_SLICES = 0.005, 0.05  # seconds between two looks at the clock and at Ctrl-C: first, and later
# A step with more arithmetic is shared by two threads if it is that of the only member; its sums
# are those of two halves in any case, so that a member's course does not depend on its mates.
# Without normalization: its sums would be more places to wait at.
MIN_TEAM_FLOPS = 3e6
MAX_LAYERS = 64
MAX_EVALUATED_ACTIVATIONS = (
    2**15
)  # numbers of a layer's outputs in evaluation: they stay in the cache

# In the order of the engine's own lists.
NORMS = ("none", "batch", "layer")
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "gelu", "silu", "mish")
CROSS_ENTROPY, MSE, MAE, HUBER = range(4)
OPTIMIZERS = {"sgd": 0, "nesterov": 1, "adam": 2, "adamw": 2, "rmsprop": 3}


class _Layer(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("weight", "bias", "scale", "shift")),
        *((name, c_void_p) for name in ("running_mean", "running_var")),
    )


class _Network(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "y")),
        *((name, c_int64) for name in ("inputs", "outputs", "padded", "depth", "parameters")),
        *((name, c_int64) for name in ("batch", "steps", "examples")),
        *((name, c_int32) for name in ("norm", "training", "is_double", "halves")),
        ("layers", _Layer * (MAX_LAYERS + 1)),
    )


_HYPERPARAMETERS = (
    *("dropout", "momentum", "beta2", "weight_decay", "l1", "clip_norm"),
    *("smoothing", "gamma", "delta"),
)


class _Member(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "first", "second", "steps")),
        *((name, c_void_p) for name in ("widths", "rows", "rates", "outputs")),
        *((name, c_int64) for name in ("begin", "end")),
        ("key", c_uint64),
        *((name, c_int64) for name in ("place", "done")),
        ("loss_sum", c_double),
        *((name, c_double) for name in _HYPERPARAMETERS),
        *((name, c_int32) for name in ("activation", "optimizer", "loss", "decoupled")),
    )


class _Team(Structure):
    _fields_ = (
        ("met", c_int64 * 16),
        *((name, c_double * 2) for name in ("loss", "squares")),
        *((name, c_int64) for name in ("stop", "given_up")),
    )


class _Job(Structure):
    _fields_ = (
        ("network", POINTER(_Network)),
        ("members", POINTER(_Member)),
        ("count", c_int64),
        ("next", c_int64),
        ("team", POINTER(_Team)),
    )


def load_extension(name: str) -> ctypes.CDLL | None:
    """A compiled extension as a library; None, and a line in the log, without it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        _logger.info(
            "The compiled engine is missing: training by torch's operations, which is slower. "
            "Installing optuna_nnhp where there is a C compiler makes it."
        )
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError as error:
        _logger.warning(f"The compiled engine cannot be loaded, training without it: {error}")
        return None


def check_layout(engine: ctypes.CDLL, fits: int) -> ctypes.CDLL | None:
    """An engine, if its structures are as large as Python's; else None, and a warning."""
    if fits:
        return engine
    _logger.warning("The compiled engine is of another version: install optuna_nnhp again.")
    return None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled engine; None, and a line in the log, without it."""
    engine = load_extension("optuna_nnhp.engine._mlp_engine")
    if engine is None:
        return None
    engine.engine_start.argtypes = [c_int64] * 4
    engine.engine_memory.argtypes = [POINTER(_Network)]
    engine.engine_memory.restype = c_int64
    engine.engine_run.argtypes = [POINTER(_Job), c_double, c_void_p, c_int32]
    engine.engine_run.restype = None
    sizes = map(ctypes.sizeof, (_Network, _Member, _Team, _Job))
    return check_layout(engine, engine.engine_start(*sizes))


@functools.cache
def _thread_pool(count: int, is_team: bool) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "optuna_nnhp-engine")


def thread_pool(count: int) -> ThreadPoolExecutor:
    """Threads for the engines, besides the one that calls them."""
    return _thread_pool(count, False)


if hasattr(os, "register_at_fork"):  # a new process has none of its parent's threads
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)

_team_lock = threading.Lock()  # two teams at once would wait for each other's threads


class CompiledMLP:
    """A stack of perceptrons as the engine sees it; made anew when members come or go.

    Args:
        network:
            The stack.
        flat:
            Its parameters.
        step_params:
            Its members' hyperparameters.
        loss:
            Its members' loss.
        batch:
            Examples in a step.

    Shape:
        - Data and outputs: see `train` and `evaluate`.
    """

    def __init__(
        self,
        network: StackedMLP,
        flat: FlatParameters,
        step_params: StepParams,
        loss: Loss,
        batch: int,
    ) -> None:
        engine = load_library()
        assert engine is not None
        self._engine, self._flat, self._dtype = engine, flat, flat.weights.dtype
        self._network, self._keep_alive = _describe(network, flat)
        is_long = 6.0 * batch * self._network.parameters > MIN_TEAM_FLOPS
        self._network.halves = int(is_long and not self._network.norm)
        k = len(flat.weights)
        self._members = (_Member * k)()
        dropout = network.get_buffer("dropout").tolist()
        numbers = zip(*_loss_numbers(loss), strict=True)
        for i, (me, params, (kind, smoothing, gamma, delta)) in enumerate(
            zip(self._members, network.params, numbers, strict=True)
        ):
            for name, tensor in (
                *(("weights", flat.weights), ("first", flat.exp_avg), ("second", flat.exp_avg_sq)),
                ("steps", flat.steps),
            ):
                setattr(me, name, _data_pointer(tensor[i]))
            true = torch.tensor(hidden_widths(params))
            self._keep_alive.append(true)
            me.widths, me.place, me.dropout = _data_pointer(true), i, dropout[i]
            me.momentum = step_params.coefficients[i].momentum
            me.beta2 = step_params.coefficients[i].beta2
            me.weight_decay = float(step_params.weight_decay[i])
            me.l1, me.clip_norm = float(step_params.l1[i]), float(step_params.clip_norm[i])
            me.loss, me.smoothing, me.gamma, me.delta = kind, smoothing, gamma, delta
            me.activation = ACTIVATIONS.index(str(params["activation"]))
            me.optimizer = OPTIMIZERS[step_params.optimizers[i]]
            me.decoupled = int(step_params.optimizers[i] == "adamw")

    @staticmethod
    def supports(network: StackedModule, *data: Tensor) -> bool:
        """Whether the engine can train a network on some data."""
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
        """Every member's steps of a round.

        Args:
            x:
                The examples.
            y:
                Their labels or numbers.
            rows:
                Numbers of each member's examples of this round, in the order in which they are
                taken.
            size:
                Examples in a batch; the last one may be smaller.
            keys:
                Where each member's noise comes from.
            rates:
                Learning rate of each step.
            out_of_time:
                Asked now and then; once it says yes, training stops.

        Returns:
            The sum of the examples' losses and the number of steps done, of each member.

        Shape:
            - x: ``(n, inputs)``; y: ``(n,)``; each of rows ``(examples,)``.
            - rates: ``(steps, k)``, in float64.
        """
        x, y, rates = x.contiguous(), y.contiguous(), rates.T.contiguous()
        steps = rates.shape[1]
        network = self._network_with(
            x, y, training=1, batch=size, steps=steps, examples=len(rows[0])
        )
        for i, me in enumerate(self._members):
            me.rows, me.rates, me.key = _data_pointer(rows[i]), _data_pointer(rates[i]), keys[i]
            me.done, me.loss_sum = 0, 0.0
        self._run(network, self._members, out_of_time)
        return [me.loss_sum for me in self._members], [me.done for me in self._members]

    def evaluate(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """Outputs of some members, given by their places.

        Shape:
            - x: ``(m, inputs)``; Output: ``(members, m, outputs)``.
        """
        x = x.contiguous()
        size = min(len(x), max(1, MAX_EVALUATED_ACTIVATIONS // self._network.padded))
        network = self._network_with(x, None, training=0, batch=size, steps=1, examples=len(x))
        outputs = torch.empty(len(places), len(x), network.outputs, dtype=self._dtype)
        parts = -(-available_threads() // len(places))  # of the examples, for all threads to work
        tasks = (_Member * (len(places) * parts))()
        for task, (i, part) in zip(tasks, product(range(len(places)), range(parts)), strict=True):
            ctypes.memmove(byref(task), byref(self._members[places[i]]), ctypes.sizeof(task))
            task.outputs, task.done = _data_pointer(outputs[i]), 0
            task.begin, task.end = (len(x) * n // parts for n in (part, part + 1))
        self._run(network, tasks, lambda: False)
        return outputs

    def _network_with(self, x: Tensor, y: Tensor | None, **values: int) -> _Network:
        """The description of the network, with its data."""
        network = _Network.from_buffer_copy(self._network)
        network.x, network.y = _data_pointer(x), None if y is None else _data_pointer(y)
        for name, value in values.items():
            setattr(network, name, value)
        return network

    def _run(
        self, network: _Network, tasks: ctypes.Array[_Member], out_of_time: Callable[[], bool]
    ) -> None:
        """Have the threads work on some members until all steps are done or time is out."""
        is_team = self._is_team(network, len(tasks)) and _team_lock.acquire(blocking=False)
        try:
            self._run_on_threads(network, tasks, out_of_time, is_team)
        finally:
            if is_team:
                _team_lock.release()

    def _run_on_threads(
        self,
        network: _Network,
        tasks: ctypes.Array[_Member],
        out_of_time: Callable[[], bool],
        is_team: bool,
    ) -> None:
        count = 2 if is_team else min(available_threads(), len(tasks))
        numbers = self._engine.engine_memory(byref(network))
        memory = [torch.empty(numbers, dtype=self._dtype) for _ in range(1 if is_team else count)]
        job = _Job(ctypes.pointer(network), tasks, len(tasks), 0)
        others = _thread_pool(count - 1, is_team) if count > 1 else None
        share, longest = TIME_SLICES if network.training else (math.inf, math.inf)

        def work(thread: int, seconds: float) -> None:
            own = _data_pointer(memory[0 if is_team else thread])
            self._engine.engine_run(byref(job), seconds, own, thread)

        while any(task.done < network.steps for task in tasks) and not out_of_time():
            job.next, team, futures = 0, _Team(), list[Future[None]]()
            if is_team:
                job.team = ctypes.pointer(team)
            try:
                futures += (
                    [others.submit(work, i, share) for i in range(1, count)] if others else []
                )
                work(0, share)
            except BaseException:
                team.given_up = 1
                raise
            finally:  # none may still compute with what is freed after this
                wait(futures)
            for future in futures:
                future.result()
            share = min(2 * share, longest)

    def _is_team(self, network: _Network, members: int) -> bool:
        """Whether two threads share the steps of a single member."""
        return bool(network.training and network.halves) and members == 1 < available_threads()


def _data_pointer(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _describe(network: StackedMLP, flat: FlatParameters) -> tuple[_Network, list[Any]]:
    """What the members have in common, and the tensors that it points to."""
    depth, alive = len(network.linears) - 1, list[Any]()
    out = _Network(
        inputs=network.inputs,
        outputs=network.outputs,
        padded=network.get_buffer("mask0").shape[-1],
        depth=depth,
        parameters=flat.weights.shape[1],
        norm=NORMS.index(str(network.params[0]["normalization"])),
        is_double=int(flat.weights.dtype == torch.float64),
    )
    starts = {id(parameter): start for parameter, start in flat.offsets.items()}
    for n, linear in enumerate(network.linears):
        layer = out.layers[n]
        layer.weight, layer.bias = starts[id(linear.weight)], starts.get(id(linear.bias), -1)
        layer.scale = layer.shift = -1
        if n < depth and network.norms:
            norm = network.norms[n]
            layer.scale, layer.shift = starts[id(norm.weight)], starts[id(norm.bias)]
            for name, buffer in norm.named_buffers():
                if name.startswith("running_"):
                    setattr(layer, name, _data_pointer(buffer))
                    alive.append(buffer)
    return out, alive


def _loss_numbers(loss: Loss) -> tuple[list[Any], ...]:
    """Kind, smoothing, gamma and delta of each member's loss."""
    if isinstance(loss, ClassificationLoss):
        k = len(loss.gamma)
        return [CROSS_ENTROPY] * k, loss.smoothing.tolist(), loss.gamma.tolist(), [0.0] * k
    kinds = [
        MSE if is_mse else MAE if is_mae else HUBER
        for is_mse, is_mae in zip(loss.is_mse.tolist(), loss.is_mae.tolist(), strict=True)
    ]
    return kinds, [0.0] * len(kinds), [0.0] * len(kinds), loss.delta.tolist()
