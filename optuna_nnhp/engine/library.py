"""Load the compiled engines, check their memory layout, and run them on several threads."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from contextlib import contextmanager
import ctypes
from ctypes import POINTER
from ctypes import Structure
from ctypes import c_char_p
from ctypes import c_int64
import functools
import importlib
import importlib.util
import logging
import math
import os
import threading
import time
from typing import Any
from typing import Generic
from typing import NamedTuple
from typing import TypeVar

from threadpoolctl import ThreadpoolController
import torch
from torch import Tensor

_logger = logging.getLogger(f"optuna.{__name__}")
T = TypeVar("T")

ENGINE_VARIABLE = "OPTUNA_NNHP_ENGINE"
HOW_TO_BUILD = "Install optuna_nnhp where there is a C compiler to build it"


# Below this much arithmetic a step is faster on one thread. Two threads on two cores, one of them
# taken by another process, took 896 us a model-step instead of 53 us (64 networks of 2 x 64
# units, batch 32): threads wait for each other after every operation. By size and not by
# measurement, because sums split over threads are rounded differently, and the same seed should
# give the same study; but see STALL.
MIN_FLOPS_FOR_THREADS = 1e8

# Two threads with another process on one of two cores: a step of 16 networks of 2 x 256 units took
# 1.5 s instead of 9 ms. Then one thread is better for a while, though it rounds otherwise.
STALL_FACTOR = 3.0  # a step stalls if it takes this many times as long as on one thread
STALL_SECONDS = 60.0  # seconds


class CStructure(Structure):
    """A structure that C code reads.

    Subclasses set ``__slots__`` too, so that assigning to a field that they lack is an error.
    """

    __slots__ = ()


class _FieldLayout(CStructure):
    __slots__ = ()
    _fields_ = (
        *((name, c_char_p) for name in ("structure", "field")),
        *((name, c_int64) for name in ("offset", "size")),
    )


class CFunction(NamedTuple):
    """The types of a C function."""

    name: str
    restype: Any
    argtypes: tuple[Any, ...]


def load_engine(
    name: str, structures: tuple[type[CStructure], ...], functions: tuple[CFunction, ...]
) -> ctypes.CDLL | None:
    """Load the compiled engine ``"mlp"`` or ``"gpt"``; return None if torch computes instead.

    The structures are those that it shares with Python, the functions those that Python calls. The
    environment variable ``OPTUNA_NNHP_ENGINE`` chooses what computes: ``c`` requires the
    compiled engine, ``torch`` turns it off. If the variable is not set, the compiled engine
    computes if it has been built.

    Raises:
        ValueError: If the environment variable has another value.
        RuntimeError: If the variable is ``c`` and the engine is missing, or if the engine was
            built from C code that does not match this Python code.

    Example:
        >>> import os
        >>> os.environ["OPTUNA_NNHP_ENGINE"] = "torch"
        >>> load_engine("mlp", (), ()) is None
        True
        >>> del os.environ["OPTUNA_NNHP_ENGINE"]
    """
    choice = os.environ.get(ENGINE_VARIABLE)
    if choice not in (None, "c", "torch"):
        raise ValueError(f"`{ENGINE_VARIABLE}` must be `c` or `torch`, but got {choice!r}.")
    if choice == "torch":
        return None
    library = _load(name, structures, functions)
    if library is None and choice == "c":
        raise RuntimeError(
            f"`{ENGINE_VARIABLE}` must be `torch` without the compiled engine, but got 'c'. "
            f"{HOW_TO_BUILD}."
        )
    return library


@functools.cache
def _load(
    name: str, structures: tuple[type[CStructure], ...], functions: tuple[CFunction, ...]
) -> ctypes.CDLL | None:
    found = importlib.util.find_spec(f"optuna_nnhp.engine._{name}_engine")
    if found is None or found.origin is None:
        _logger.info(
            "The compiled engine is missing: training with torch's operations, which is slower. "
            f"{HOW_TO_BUILD}."
        )
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        _logger.warning(f"The compiled engine cannot be loaded, training with torch: {error}")
        return None
    check_layout(library, name, structures)
    for function in functions:
        declared = getattr(library, function.name)
        declared.restype, declared.argtypes = function.restype, function.argtypes
    getattr(library, f"{name}_select_instruction_set")()
    return library


def check_layout(library: ctypes.CDLL, name: str, structures: Sequence[type[CStructure]]) -> None:
    """Compare the structures' fields in Python and in C.

    Raises:
        RuntimeError: If a field is missing on one side, or has another offset or size.
    """
    in_python = {key: place for s in structures for key, place in _fields_of(s)}
    in_c = dict(_fields_in_c(library, name))
    for structure, field in {**in_python, **in_c}:
        ours, theirs = in_python.get((structure, field)), in_c.get((structure, field))
        if ours != theirs:
            what = f"field `{structure}.{field}`" if field else f"structure `{structure}`"
            raise RuntimeError(
                f"The compiled {name} engine does not match this version of optuna_nnhp: {what} "
                f"is {_describe_place(theirs)} in C and {_describe_place(ours)} in Python. "
                f"Rebuild the engine (`python setup.py build_ext --inplace`, or install "
                f"optuna_nnhp again), or set {ENGINE_VARIABLE}=torch."
            )


def _fields_of(structure: type[CStructure]) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
    name = structure.__name__.removeprefix("_")
    yield (name, ""), (0, ctypes.sizeof(structure))
    for field, *_ in structure._fields_:
        descriptor = getattr(structure, field)
        yield (name, field), (descriptor.offset, descriptor.size)


def _fields_in_c(
    library: ctypes.CDLL, name: str
) -> Iterator[tuple[tuple[str, str], tuple[int, int]]]:
    describe = getattr(library, f"{name}_layout", None)
    if describe is None:  # built before engines described themselves
        return
    describe.restype = POINTER(_FieldLayout)
    for entry in describe():
        if entry.structure is None:
            return
        yield (entry.structure.decode(), entry.field.decode()), (entry.offset, entry.size)


def _describe_place(place: tuple[int, int] | None) -> str:
    return "missing" if place is None else f"at byte {place[0]} with {place[1]} bytes"


def check_range(values: Tensor, end: int, name: str, error: type[Exception] = ValueError) -> None:
    """Check that integers by which C code will index memory are at least 0 and less than ``end``.

    The error message calls them by ``name``, a plural.

    Raises:
        Exception: One of type ``error``, if a value is negative or too large.

    Example:
        >>> check_range(torch.tensor([0, 3]), 3, "labels")
        Traceback (most recent call last):
        ...
        ValueError: All labels must be from 0 to 2, but got 3.
    """
    if values.dtype != torch.int64:
        raise error(f"All {name} must be int64, but got {values.dtype}.")
    if not values.numel():
        return
    low, high = (int(value) for value in torch.aminmax(values))
    if low < 0 or high >= end:
        wrong = low if low < 0 else high
        raise error(f"All {name} must be from 0 to {end - 1}, but got {wrong}.")


@functools.cache
def thread_pool(count: int, purpose: str) -> ThreadPoolExecutor:
    """Return a pool of threads, one for each purpose, that stays for the life of the process."""
    return ThreadPoolExecutor(count, f"optuna_nnhp-{purpose}")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=thread_pool.cache_clear)


def run_on_threads(
    count: int,
    work: Callable[[int], None],
    purpose: str = "engine",
    on_error: Callable[[], None] = lambda: None,
) -> None:
    """Call a function on several threads at once, one of which is the calling thread.

    The function gets the thread's number, 0 for the calling thread. If it fails on that thread,
    ``on_error`` is called before waiting for the others.

    Example:
        >>> seen = []
        >>> run_on_threads(3, seen.append)
        >>> sorted(seen)
        [0, 1, 2]
    """
    futures: list[Future[None]] = []
    try:
        if count > 1:
            pool = thread_pool(count - 1, purpose)
            futures += [pool.submit(work, number) for number in range(1, count)]
        work(0)
    except BaseException:
        on_error()
        raise
    finally:
        _wait_for_all(futures)
    for future in futures:
        future.result()


def _wait_for_all(futures: Sequence[Future[None]]) -> None:
    """Wait until no thread uses memory any more that the caller frees; Ctrl-C is raised then."""
    interrupt: BaseException | None = None
    while True:
        try:
            if all(future.done() for future in futures):
                break
            wait(futures)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def limited_threads(flops: float) -> Iterator[Callable[[], None]]:
    """Let torch compute on one thread if a step has few operations, else on as many as before.

    The products that other threads ask of NumPy and scipy are computed on one thread each. The
    returned function must be called before every step: of large steps, the first one is computed
    on one thread, to notice when several threads keep each other waiting.

    Example:
        >>> with limited_threads(1e6) as before_step:
        ...     before_step()
        ...     torch.get_num_threads()
        1
    """
    with single_threaded_blas, _torch_threads as threads:
        if flops < MIN_FLOPS_FOR_THREADS or threads == 1:
            torch.set_num_threads(1)
        yield _StallDetector(threads).before_step if torch.get_num_threads() > 1 else no_op


def no_op() -> None:
    """What is done before a step where threads stay as they are."""


class _StallDetector:
    """Compares steps on several threads with the first one, which has one thread."""

    stalled_until = -math.inf  # of the whole process, seconds

    def __init__(self, threads: int) -> None:
        self._threads, self._steps, self._since, self._single = threads, 0, 0.0, math.inf

    def before_step(self) -> None:
        now = time.monotonic()
        if self._steps == 0:
            torch.set_num_threads(1)
        elif self._steps == 1:
            self._single = now - self._since
            if now > _StallDetector.stalled_until:
                torch.set_num_threads(self._threads)
        elif now - self._since > STALL_FACTOR * self._single and torch.get_num_threads() > 1:
            _StallDetector.stalled_until = now + STALL_SECONDS
            torch.set_num_threads(1)
            _logger.info("Threads wait for each other, the cores are busy: training on one.")
        self._steps, self._since = self._steps + 1, now


class SharedSetting(Generic[T]):
    """Changes a setting of the process when the first of several threads enters.

    The last one that leaves calls ``restore`` with what ``change`` returned.
    """

    def __init__(self, change: Callable[[], T], restore: Callable[[T], object]) -> None:
        self._change, self._restore = change, restore
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> T:
        with self._lock:
            if self._inside == 0:
                self._before = self._change()
            self._inside += 1
            return self._before

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore(self._before)

    def before(self) -> T | None:
        """Return what ``change`` returned; None if no thread is inside."""
        with self._lock:
            return self._before if self._inside else None


# Trainings change the number themselves; it is as before when the last one ends.
_torch_threads = SharedSetting(torch.get_num_threads, torch.set_num_threads)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    importlib.import_module("scipy.linalg")  # only BLAS libraries that are loaded are found

    return ThreadpoolController()


# Each product of NumPy and scipy is computed on one thread. For as long as possible, a whole
# study: OpenBLAS's own threads spin for a while after each of its products and each change of
# their number, on the cores that the engine's threads work on (the epochs of a single network of
# 2 x 256 units took twice as long).
single_threaded_blas = SharedSetting(
    lambda: _thread_pools().limit(limits=1, user_api="blas"),
    lambda limit: limit.restore_original_limits(),
)


def available_threads() -> int:
    """How many threads may work for a training, which has fewer of torch's own.

    Example:
        >>> available_threads() >= 1
        True
    """
    return _torch_threads.before() or torch.get_num_threads()
