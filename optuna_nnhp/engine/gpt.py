"""The compiled engine of GPTs: gradients and evaluation on a CPU, twice as fast as by torch.

The engine (`gpt_engine.c`) takes a few windows of a text through a whole network and back while
all they need is in a core's cache. A step's windows are two halves, for two threads, whose
gradients are added in any case: a member's course depends neither on its mates nor on the number
of threads. Where there is no engine, the same is done by torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait
import ctypes
from ctypes import POINTER
from ctypes import Structure
from ctypes import byref
from ctypes import c_double
from ctypes import c_int32
from ctypes import c_int64
from ctypes import c_void_p
import functools

import torch
from torch import Tensor

from optuna_nnhp.engine.mlp import check_layout
from optuna_nnhp.engine.mlp import load_extension
from optuna_nnhp.engine.mlp import thread_pool
from optuna_nnhp.engine.threads import available_threads
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.networks.transformer import rotary_angles

MAX_LAYERS = 96
# In the order of the engine's own lists.
NORMS = ("layer", "layer-gain", "rms")
FEED_FORWARD = ("relu2", "gelu", "swiglu")
BLOCK_PARAMETERS = ("qkv", "out", "up", "down", "gain1", "gain2")
EVALUATED_WINDOWS = 16  # windows that a thread has in memory at once in evaluation


class _Block(Structure):
    _fields_ = tuple((name, c_int64) for name in BLOCK_PARAMETERS)


class _Gpt(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "y", "turns")),
        *((name, c_int64) for name in ("vocabulary", "layers", "heads", "head_size")),
        *((name, c_int64) for name in ("inner", "parameters", "length", "windows")),
        *((name, c_int64) for name in ("embedding", "position", "head", "gain")),
        *((name, c_double) for name in ("attention_scale", "head_scale", "logit_cap")),
        *((name, c_int32) for name in ("norm", "feed_forward", "qk_norm", "shift")),
        *((name, c_int32) for name in ("training", "is_double")),
        ("blocks", _Block * MAX_LAYERS),
    )


class _Task(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "grads", "starts", "keys")),
        *((name, c_int64) for name in ("first", "end")),
        *((name, c_double) for name in ("dropout", "loss")),
    )


class _Job(Structure):
    _fields_ = (
        ("gpt", POINTER(_Gpt)),
        ("tasks", POINTER(_Task)),
        *((name, c_int64) for name in ("count", "next")),
    )


class _Stack(Structure):
    _fields_ = (
        ("matrices", c_void_p),
        *((name, c_int64) for name in ("count", "rows", "columns", "is_double", "next")),
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled engine; None, and a line in the log, without it."""
    engine = load_extension("optuna_nnhp.engine._gpt_engine")
    if engine is None:
        return None
    engine.gpt_start.argtypes = [c_int64] * 4
    engine.gpt_memory.argtypes = [POINTER(_Gpt)]
    engine.gpt_memory.restype = c_int64
    engine.gpt_run.argtypes = [POINTER(_Job), c_void_p]
    engine.gpt_straighten.argtypes = [POINTER(_Stack), c_void_p]
    engine.gpt_run.restype = engine.gpt_straighten.restype = None
    return check_layout(engine, engine.gpt_start(*map(ctypes.sizeof, (_Gpt, _Task, _Job, _Stack))))


def _run_on_threads(count: int, work: Callable[[int], None]) -> None:
    """Have so many threads do something; each with its number."""
    others, futures = thread_pool(count - 1) if count > 1 else None, list[Future[None]]()
    try:
        if others:
            futures += [others.submit(work, i) for i in range(1, count)]
        work(0)
    finally:  # none may still compute with what is freed after this
        wait(futures)
    for future in futures:
        future.result()


def supports_tensors(*tensors: Tensor) -> bool:
    """Whether the engine can compute with such tensors."""
    kinds = {t.dtype for t in tensors}
    return (
        load_library() is not None
        and kinds <= {torch.float32, torch.float64}
        and len(kinds) == 1
        and all(t.device.type == "cpu" for t in tensors)
    )


class CompiledGPT:
    """A stack of GPTs as the engine sees it; made anew when members come or go.

    Args:
        network:
            The stack.
        flat:
            Its parameters.
        x:
            The text.
        y:
            Each token's next one.
        windows:
            Of a step.

    Shape:
        - x, y: ``(n,)``, int64.
    """

    def __init__(
        self, network: StackedGPT, flat: FlatParameters, x: Tensor, y: Tensor, windows: int
    ) -> None:
        engine, self._dtype = load_library(), flat.weights.dtype
        assert engine is not None
        self._engine, self._flat, self._network = engine, flat, network
        self._gpt, self._turns = _describe(network, flat)
        self._x, self._y = x.contiguous(), y.contiguous()
        self._gpt.x, self._gpt.y = self._x.data_ptr(), self._y.data_ptr()
        self._gpt.windows, self._gpt.training = windows, 1
        halves = [(0, windows // 2), (windows // 2, windows)]
        self._halves = halves if windows > 1 else [(0, windows)]
        self._dropout = network.dropout.flatten().tolist()
        self._draws = 2 * self._gpt.layers + (self._gpt.position >= 0)
        self._memory: list[Tensor] = []
        self._parts = torch.empty(0)

    @staticmethod
    def supports(network: StackedModule, weights: Tensor) -> bool:
        """Whether the engine can train a network."""
        return (
            isinstance(network, StackedGPT)
            and network.architecture.layers <= MAX_LAYERS
            and supports_tensors(weights)
        )

    def backward(self, rows: Tensor, noise: DropoutNoise) -> Tensor:
        """Compute the gradients of a step, over those of the step before.

        Args:
            rows:
                Places in the text, window after window; those of a window are neighbours.
            noise:
                Of the step.

        Shape:
            - rows: ``(windows, length)``, or ``(k, windows, length)``.
            - Output: each member's mean loss, ``(k,)``.
        """
        flat, k, halves = self._flat, len(self._flat.weights), self._halves
        starts = rows[..., 0].expand(k, -1).contiguous()
        keys, which = noise.draw_keys(self._draws) if self._network.has_dropout else (None, None)
        if not self._memory:
            self._memory = self._allocate(self._gpt, k * len(halves))
            self._parts = torch.empty(len(halves), *flat.weights.shape, dtype=self._dtype)
        tasks = (_Task * (k * len(halves)))()
        for i in range(k):
            for half, (first, end) in enumerate(halves):
                task = tasks[i * len(halves) + half]
                task.weights = flat.weights[i].data_ptr()
                task.grads = self._parts[half, i].data_ptr()
                task.starts, task.first, task.end = starts[i].data_ptr(), first, end
                if keys is not None and which is not None:
                    task.keys = keys[which[i]].data_ptr()
                    task.dropout = self._dropout[i]
        self._run(self._gpt, tasks, self._memory)
        if len(halves) == 2:
            torch.add(self._parts[0], self._parts[1], out=flat.grads)
        else:
            flat.grads.copy_(self._parts[0])
        flat.steps += 1
        each = [task.loss for task in tasks]
        sums = [sum(each[i : i + len(halves)]) for i in range(0, len(each), len(halves))]
        return torch.tensor(sums) / rows.shape[-1] / rows.shape[-2]

    def total_nats(self, tokens: Tensor, places: Sequence[int]) -> Tensor:
        """What a text costs some members, as `training.language.total_nats`.

        Shape:
            - tokens: ``(m,)``; Output: ``(members,)``, float64.
        """
        tokens, length = tokens.contiguous(), self._network.architecture.context
        count = len(tokens) - 1
        total = self._nats_of_windows(tokens, count // length, 0, length, places)
        if rest := count % length:
            total += self._nats_of_windows(tokens, 1, count - rest, rest, places)
        return total

    def _nats_of_windows(
        self, tokens: Tensor, windows: int, first: int, length: int, places: Sequence[int]
    ) -> Tensor:
        """Of some windows that follow one another."""
        if not windows:
            return torch.zeros(len(places), dtype=torch.float64)
        gpt = _Gpt.from_buffer_copy(self._gpt)
        gpt.x, gpt.y = tokens.data_ptr(), tokens[1:].data_ptr()
        gpt.windows, gpt.length, gpt.training = 2 * min(windows, EVALUATED_WINDOWS), length, 0
        starts = first + length * torch.arange(windows)
        parts = -(-windows // EVALUATED_WINDOWS)
        tasks = (_Task * (len(places) * parts))()
        for i, task in enumerate(tasks):
            place, part = divmod(i, parts)
            task.weights = self._flat.weights[places[place]].data_ptr()
            task.starts = starts.data_ptr()
            task.first, task.end = (
                part * EVALUATED_WINDOWS,
                min(windows, (part + 1) * EVALUATED_WINDOWS),
            )
        self._run(gpt, tasks, self._allocate(gpt, len(tasks)))
        losses = torch.tensor([task.loss for task in tasks], dtype=torch.float64)
        return losses.view(len(places), parts).sum(1)

    def _allocate(self, gpt: _Gpt, tasks: int) -> list[Tensor]:
        numbers = self._engine.gpt_memory(byref(gpt))
        count = min(available_threads(), tasks)
        return [torch.empty(numbers, dtype=self._dtype) for _ in range(count)]

    def _run(self, gpt: _Gpt, tasks: ctypes.Array[_Task], memory: list[Tensor]) -> None:
        job = _Job(ctypes.pointer(gpt), tasks, len(tasks), 0)
        count = min(len(memory), len(tasks))
        _run_on_threads(count, lambda i: self._engine.gpt_run(byref(job), memory[i].data_ptr()))


class CompiledGPTSubset:
    """Some members of a stack: what a text costs them.

    Args:
        engine:
            The stack.
        places:
            Who they are.
    """

    def __init__(self, engine: CompiledGPT, places: Sequence[int]) -> None:
        self._engine, self._places = engine, places

    def total_nats(self, tokens: Tensor) -> Tensor:
        """See `CompiledGPT.total_nats`."""
        return self._engine.total_nats(tokens, self._places)


def _describe(network: StackedGPT, flat: FlatParameters) -> tuple[_Gpt, Tensor | None]:
    """What the members have in common, and the tensor that it points to."""
    a = network.architecture
    names = {parameter: name for name, parameter in network.named_parameters()}
    starts = {names[p].removesuffix(".weight"): start for p, start in flat.offsets.items()}
    gpt = _Gpt(
        vocabulary=a.vocabulary,
        layers=a.layers,
        heads=a.heads,
        head_size=a.head_size,
        inner=a.inner,
        parameters=flat.weights.shape[1],
        length=a.context,
        attention_scale=a.attention_scale,
        head_scale=a.head_scale,
        logit_cap=a.logit_cap,
        norm=NORMS.index(a.normalization),
        feed_forward=FEED_FORWARD.index(a.feed_forward),
        qk_norm=int(a.qk_norm),
        shift=int(a.token_shift),
        is_double=int(flat.weights.dtype == torch.float64),
    )
    for name in ("embedding", "position", "head", "gain"):
        setattr(gpt, name, starts.get(name, -1))
    for layer in range(a.layers):
        for name in BLOCK_PARAMETERS:
            setattr(gpt.blocks[layer], name, starts.get(f"blocks.{layer}.{name}", -1))
    if a.positions != "rotary":
        return gpt, None
    turns = torch.view_as_real(
        rotary_angles(a.context, a.head_size, flat.weights.dtype, flat.weights.device)
    ).contiguous()
    gpt.turns = turns.data_ptr()
    return gpt, turns


def orthogonalize_(matrices: Tensor) -> None:
    """Make matrices orthogonal, in place, as `hyperparameters.muon.orthogonalized`.

    Shape:
        - matrices: ``(n, rows, columns)``, without gaps.
    """
    engine, (count, rows, columns) = load_library(), matrices.shape
    assert engine is not None and matrices.is_contiguous()
    stack = _Stack(
        matrices.data_ptr(), count, rows, columns, int(matrices.dtype == torch.float64), 0
    )
    numbers = 2 * min(rows, columns) ** 2 + rows * columns
    threads = min(available_threads(), count)
    memory = matrices.new_empty(threads, numbers)
    _run_on_threads(threads, lambda i: engine.gpt_straighten(byref(stack), memory[i].data_ptr()))
