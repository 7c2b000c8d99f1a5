"""The compiled engine for GPTs on a CPU: gradients, evaluation, and Muon's orthogonal matrices.

The C code in `csrc/gpt.c` computes the forward and backward pass of a few windows of a text while
all they need is in a core's cache. A step's windows are divided into two halves, one for each of
two threads, whose gradients are added. The halves are the same on a single thread, so a member's
result depends neither on the other members nor on the number of threads. What the engine does not
support is computed by torch with the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
import ctypes
from ctypes import POINTER
from ctypes import byref
from ctypes import c_double
from ctypes import c_int32
from ctypes import c_int64
from ctypes import c_void_p

import torch
from torch import Tensor

from optuna_nnhp.engine.library import CFunction
from optuna_nnhp.engine.library import CStructure
from optuna_nnhp.engine.library import available_threads
from optuna_nnhp.engine.library import check_range
from optuna_nnhp.engine.library import load_engine
from optuna_nnhp.engine.library import run_on_threads
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.layers import StackedModule
from optuna_nnhp.networks.noise import DropoutNoise
from optuna_nnhp.networks.transformer import rotary_angles

MAX_LAYERS = 96  # MAX_LAYERS in csrc/gpt.c
# In the order of the enums in csrc/gpt.c.
NORMS = ("layer", "layer-gain", "rms")
FEED_FORWARD = ("relu2", "gelu", "swiglu")
PARAMETERS = ("embedding", "position", "head", "gain")
BLOCK_PARAMETERS = ("qkv", "out", "up", "down", "gain1", "gain2")
MAX_EVALUATED_WINDOWS = 16  # that a thread has in memory at once in an evaluation


class _Block(CStructure):
    __slots__ = ()
    _fields_ = tuple((name, c_int64) for name in BLOCK_PARAMETERS)


class _Gpt(CStructure):
    __slots__ = ()
    _fields_ = (
        *((name, c_void_p) for name in ("x", "y", "rotations")),
        *((name, c_int64) for name in ("vocabulary", "layers", "heads", "head_size")),
        *((name, c_int64) for name in ("inner", "parameters", "length", "windows")),
        *((name, c_int64) for name in PARAMETERS),
        *((name, c_double) for name in ("attention_scale", "head_scale", "logit_cap")),
        *((name, c_int32) for name in ("norm", "feed_forward", "qk_norm", "token_shift")),
        *((name, c_int32) for name in ("training", "is_double")),
        ("blocks", _Block * MAX_LAYERS),
    )


class _Task(CStructure):
    __slots__ = ()
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "grads", "starts", "keys")),
        *((name, c_int64) for name in ("first", "end")),
        *((name, c_double) for name in ("dropout", "loss")),
    )


class _Job(CStructure):
    __slots__ = ()
    _fields_ = (
        ("gpt", POINTER(_Gpt)),
        ("tasks", POINTER(_Task)),
        *((name, c_int64) for name in ("count", "next")),
    )


class _MatrixStack(CStructure):
    __slots__ = ()
    _fields_ = (
        ("matrices", c_void_p),
        *((name, c_int64) for name in ("count", "rows", "columns", "is_double", "next")),
    )


STRUCTURES = (_Block, _Gpt, _Task, _Job, _MatrixStack)
FUNCTIONS = (
    CFunction("gpt_workspace_size", c_int64, (POINTER(_Gpt),)),
    CFunction("gpt_run", None, (POINTER(_Job), c_void_p)),
    CFunction("gpt_orthogonalize", None, (POINTER(_MatrixStack), c_void_p)),
)


def load_library() -> ctypes.CDLL | None:
    """Return the compiled engine, or None if torch computes; see `library.load_engine`."""
    return load_engine("gpt", STRUCTURES, FUNCTIONS)


def supports_tensors(*tensors: Tensor) -> bool:
    """Return whether the engine can compute with such tensors."""
    dtypes = {t.dtype for t in tensors}
    return (
        load_library() is not None
        and dtypes <= {torch.float32, torch.float64}
        and len(dtypes) == 1
        and all(t.device.type == "cpu" for t in tensors)
    )


class CompiledGPT:
    """Computes the gradients and the loss of a stack of GPTs; made anew when its members change.

    ``x`` holds the token ids of the text, ``y`` for each token the id of the next one; a step
    reads ``windows`` windows.

    Shape:
        - x, y: ``(n,)``, int64.

    Raises:
        ValueError: If a token id is not in the vocabulary, or x and y differ in length.
    """

    def __init__(
        self, network: StackedGPT, flat: FlatParameters, x: Tensor, y: Tensor, windows: int
    ) -> None:
        library, self._dtype = load_library(), flat.weights.dtype
        assert library is not None
        self._library, self._flat, self._network = library, flat, network
        self._gpt, self._rotations = _describe_network(network, flat)
        self._x, self._y = x.contiguous(), y.contiguous()
        if len(x) != len(y):
            raise ValueError(f"`y` must have {len(x)} tokens as `x` has, but got {len(y)}.")
        for tokens in (self._x, self._y):
            check_range(tokens, self._gpt.vocabulary, "token ids")
        self._gpt.x, self._gpt.y = self._x.data_ptr(), self._y.data_ptr()
        self._gpt.windows, self._gpt.training = windows, 1
        halves = [(0, windows // 2), (windows // 2, windows)]
        self._halves = halves if windows > 1 else [(0, windows)]
        self._dropout = network.dropout.flatten().tolist()
        self._num_draws = 2 * self._gpt.layers + (self._gpt.position >= 0)
        self._memory: list[Tensor] = []
        self._half_grads = torch.empty(0)

    @staticmethod
    def supports(network: StackedModule, weights: Tensor) -> bool:
        """Return whether the engine can train a network."""
        return (
            isinstance(network, StackedGPT)
            and network.architecture.layers <= MAX_LAYERS
            and supports_tensors(weights)
        )

    def backward(self, rows: Tensor, noise: DropoutNoise) -> Tensor:
        """Compute the gradients of a step, which replace the old ones; return the mean losses.

        ``rows`` are positions in the text, window by window; those of a window are consecutive.

        Shape:
            - rows: ``(windows, length)``, or ``(k, windows, length)``.
            - Output: ``(k,)``.

        Raises:
            ValueError: If there are more or fewer windows, or they have another length.
            IndexError: If a window is not within the text.
        """
        flat, halves = self._flat, self._halves
        if not self._memory:
            self._memory = self._allocate(self._gpt, len(flat.weights) * len(halves))
            self._half_grads = torch.empty(len(halves), *flat.weights.shape, dtype=self._dtype)
        starts = self._window_starts(rows)
        keys, which = noise.draw_keys(self._num_draws) if self._network.has_dropout else (None, [])
        tasks = self._training_tasks(starts, keys, which)
        self._run(self._gpt, tasks, self._memory)
        if len(halves) == 2:
            torch.add(self._half_grads[0], self._half_grads[1], out=flat.grads)
        else:
            flat.grads.copy_(self._half_grads[0])
        flat.steps += 1
        each = [task.loss for task in tasks]
        sums = [sum(each[i : i + len(halves)]) for i in range(0, len(each), len(halves))]
        return torch.tensor(sums) / rows.shape[-1] / rows.shape[-2]

    def _window_starts(self, rows: Tensor) -> Tensor:
        """Return where each window begins in the text: ``(k, windows)``."""
        expected = (self._gpt.windows, self._gpt.length)
        if rows.shape[-2:] != expected:
            raise ValueError(
                f"`rows` must end in the dimensions {expected}, but got {tuple(rows.shape)}."
            )
        starts = rows[..., 0]
        end = len(self._x) - self._gpt.length + 1
        check_range(starts, end, "windows' first positions", IndexError)
        return starts.expand(len(self._flat.weights), -1).contiguous()

    def _training_tasks(
        self, starts: Tensor, keys: Tensor | None, which: Sequence[int]
    ) -> ctypes.Array[_Task]:
        """Return a task for each member and half of the windows."""
        flat, halves = self._flat, self._halves
        tasks = (_Task * (len(flat.weights) * len(halves)))()
        for i in range(len(flat.weights)):
            for half, (first, end) in enumerate(halves):
                task = tasks[i * len(halves) + half]
                task.weights = flat.weights[i].data_ptr()
                task.grads = self._half_grads[half, i].data_ptr()
                task.starts, task.first, task.end = starts[i].data_ptr(), first, end
                if keys is not None:
                    task.keys, task.dropout = keys[which[i]].data_ptr(), self._dropout[i]
        return tasks

    def total_nats(self, tokens: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the loss of a text for some members; see `training.language.total_nats`.

        Shape:
            - tokens: ``(m,)``; Output: ``(members,)``, float64.

        Raises:
            ValueError: If a token id is not in the vocabulary.
        """
        tokens, length = tokens.contiguous(), self._network.architecture.context
        check_range(tokens, self._gpt.vocabulary, "token ids")
        count = len(tokens) - 1
        total = self._nats_of_windows(tokens, count // length, 0, length, indices)
        if rest := count % length:
            total += self._nats_of_windows(tokens, 1, count - rest, rest, indices)
        return total

    def _nats_of_windows(
        self, tokens: Tensor, windows: int, first: int, length: int, indices: Sequence[int]
    ) -> Tensor:
        """Return the loss of windows that follow one another from the position `first` on."""
        if not windows:
            return torch.zeros(len(indices), dtype=torch.float64)
        gpt, most = _Gpt.from_buffer_copy(self._gpt), MAX_EVALUATED_WINDOWS
        gpt.x, gpt.y = tokens.data_ptr(), tokens[1:].data_ptr()
        gpt.windows, gpt.length, gpt.training = 2 * min(windows, most), length, 0
        starts = first + length * torch.arange(windows)
        parts = -(-windows // most)
        tasks = (_Task * (len(indices) * parts))()
        for i, task in enumerate(tasks):
            index, part = divmod(i, parts)
            task.weights = self._flat.weights[indices[index]].data_ptr()
            task.starts = starts.data_ptr()
            task.first, task.end = part * most, min(windows, (part + 1) * most)
        self._run(gpt, tasks, self._allocate(gpt, len(tasks)))
        losses = torch.tensor([task.loss for task in tasks], dtype=torch.float64)
        return losses.view(len(indices), parts).sum(1)

    def _allocate(self, gpt: _Gpt, tasks: int) -> list[Tensor]:
        """Return memory for each thread."""
        size = self._library.gpt_workspace_size(byref(gpt))
        count = min(available_threads(), tasks)
        return [torch.empty(size, dtype=self._dtype) for _ in range(count)]

    def _run(self, gpt: _Gpt, tasks: ctypes.Array[_Task], memory: list[Tensor]) -> None:
        job = _Job(ctypes.pointer(gpt), tasks, len(tasks), 0)
        count = min(len(memory), len(tasks))
        run_on_threads(count, lambda i: self._library.gpt_run(byref(job), memory[i].data_ptr()))


class CompiledGPTSubset:
    """Evaluates some members of a stack."""

    def __init__(self, compiled: CompiledGPT, indices: Sequence[int]) -> None:
        self._compiled, self._indices = compiled, indices

    def total_nats(self, tokens: Tensor) -> Tensor:
        """Return the loss of a text for each member; see `CompiledGPT.total_nats`."""
        return self._compiled.total_nats(tokens, self._indices)


def _describe_network(network: StackedGPT, flat: FlatParameters) -> tuple[_Gpt, Tensor | None]:
    """Describe what all members share; return also the tensor that it points to."""
    a = network.architecture
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
        token_shift=int(a.token_shift),
        is_double=int(flat.weights.dtype == torch.float64),
    )
    names = {parameter: name for name, parameter in network.named_parameters()}
    offsets = {names[p].removesuffix(".weight"): offset for p, offset in flat.offsets.items()}
    for name in PARAMETERS:
        setattr(gpt, name, offsets.get(name, -1))
    for layer in range(a.layers):
        for name in BLOCK_PARAMETERS:
            setattr(gpt.blocks[layer], name, offsets.get(f"blocks.{layer}.{name}", -1))
    if a.positions != "rotary":
        return gpt, None
    rotations = torch.view_as_real(
        rotary_angles(a.context, a.head_size, flat.weights.dtype, flat.weights.device)
    ).contiguous()
    gpt.rotations = rotations.data_ptr()
    return gpt, rotations


def orthogonalize_(matrices: Tensor) -> None:
    """Make matrices orthogonal, in place, as `hyperparameters.muon.orthogonalize` does.

    Shape:
        - matrices: ``(n, rows, columns)``, contiguous.
    """
    library, (count, rows, columns) = load_library(), matrices.shape
    assert library is not None and matrices.is_contiguous()
    is_double = int(matrices.dtype == torch.float64)
    stack = _MatrixStack(matrices.data_ptr(), count, rows, columns, is_double, 0)
    size = 2 * min(rows, columns) ** 2 + rows * columns
    threads = min(available_threads(), count)
    memory = matrices.new_empty(threads, size)
    run_on_threads(
        threads, lambda i: library.gpt_orthogonalize(byref(stack), memory[i].data_ptr())
    )
