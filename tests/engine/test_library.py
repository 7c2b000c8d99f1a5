"""The compiled engines are loaded only if they are wanted and match the Python code."""

from __future__ import annotations

import ctypes
from ctypes import c_int32
from ctypes import c_int64
import importlib.util
import signal
import threading
import time
from types import ModuleType

import pytest
import torch

from optuna_nnhp import optimize
from optuna_nnhp.engine import gpt
from optuna_nnhp.engine import library
from optuna_nnhp.engine import mlp
from optuna_nnhp.engine.library import ENGINE_VARIABLE
from optuna_nnhp.engine.library import CStructure
from optuna_nnhp.engine.library import check_layout
from optuna_nnhp.engine.library import check_range
from optuna_nnhp.engine.library import run_on_threads
from tests.conftest import is_engine_built
from tests.tiny import classes

needs_engine = pytest.mark.skipif(not is_engine_built(), reason="there was no C compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been loaded so far, and the environment chooses nothing."""
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)


@pytest.mark.parametrize("engine_module", [mlp, gpt])
def test_torch_is_chosen_by_the_environment(
    engine_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINE_VARIABLE, "torch")
    assert engine_module.load_library() is None


@needs_engine
@pytest.mark.parametrize("engine_module", [mlp, gpt])
@pytest.mark.parametrize("choice", ["c", None])
def test_the_compiled_engine_is_used_if_it_is_there(
    choice: str | None, engine_module: ModuleType, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice is not None:
        monkeypatch.setenv(ENGINE_VARIABLE, choice)
    assert isinstance(engine_module.load_library(), ctypes.CDLL)


@pytest.mark.parametrize("choice", ["fast", ""])
def test_an_unknown_engine_is_an_error(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_VARIABLE, choice)
    message = f"`OPTUNA_NNHP_ENGINE` must be `c` or `torch`, but got '{choice}'"
    with pytest.raises(ValueError, match=message):
        mlp.load_library()
    with pytest.raises(ValueError, match=message):
        optimize("dnn", *classes(), n_trials=1, storage=None)


def test_a_missing_engine_is_logged_and_torch_computes(
    fresh: None, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mlp.load_library() is None
    assert "compiled engine is missing" in log.text


def test_a_missing_engine_is_an_error_if_it_is_required(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv(ENGINE_VARIABLE, "c")
    message = "`OPTUNA_NNHP_ENGINE` must be `torch` without the compiled engine, but got 'c'"
    with pytest.raises(RuntimeError, match=message):
        mlp.load_library()


def c_structure(name: str, *fields: tuple[str, type]) -> type[CStructure]:
    return type(name, (CStructure,), {"__slots__": (), "_fields_": fields})


@pytest.mark.parametrize("structure", [*mlp.STRUCTURES, *gpt.STRUCTURES])
def test_a_misspelt_field_is_an_error(structure: type[CStructure]) -> None:
    with pytest.raises(AttributeError):
        structure().drop_out = 0.5  # type: ignore[attr-defined]


@needs_engine
@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        (
            ["matrices", "rows", "count", "columns", "is_double", "next"],  # two swapped
            "field `MatrixStack.rows` is at byte 16 with 8 bytes in C and at byte 8 with 8 bytes",
        ),
        (
            ["matrices", "count", "rows", "columns", "is_double"],
            "structure `MatrixStack` is at byte 0 with 48 bytes in C and at byte 0 with 40 bytes",
        ),
        (
            ["matrices", "count", "rows", "columns", "is_single", "next"],
            "field `MatrixStack.is_single` is missing in C and at byte 32 with 8 bytes in Python",
        ),
    ],
)
def test_a_structure_with_another_layout_is_an_error_that_names_the_field(
    fields: list[str], difference: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = c_structure("_MatrixStack", *((name, c_int64) for name in fields))
    monkeypatch.setattr(gpt, "STRUCTURES", (*gpt.STRUCTURES[:-1], damaged))
    with pytest.raises(RuntimeError, match=difference) as error:
        gpt.load_library()
    assert "setup.py build_ext --inplace" in str(error.value)


@needs_engine
def test_every_field_of_every_structure_is_compared() -> None:
    for name, module in (("mlp", mlp), ("gpt", gpt)):
        engine = module.load_library()
        assert engine is not None
        for index, structure in enumerate(module.STRUCTURES):
            for changed, (field, kind) in enumerate(structure._fields_):
                other = c_int32 if ctypes.sizeof(kind) != 4 else c_int64
                fields = [*structure._fields_]
                fields[changed] = (field, other)
                damaged = [*module.STRUCTURES]
                damaged[index] = c_structure(structure.__name__, *fields)
                with pytest.raises(RuntimeError, match=structure.__name__.removeprefix("_")):
                    check_layout(engine, name, damaged)


@needs_engine
def test_an_engine_that_does_not_describe_itself_is_an_error() -> None:
    engine = gpt.load_library()
    assert engine is not None
    with pytest.raises(RuntimeError, match="`Layer` is missing in C"):
        check_layout(engine, "mlp", mlp.STRUCTURES)


def test_integers_out_of_range_are_an_error_of_the_wanted_type() -> None:
    check_range(torch.tensor([[0, 4]]), 5, "rows")
    check_range(torch.tensor([], dtype=torch.long), 0, "rows")
    with pytest.raises(IndexError, match="All rows must be from 0 to 4, but got -2"):
        check_range(torch.tensor([9, -2]), 5, "rows", IndexError)
    with pytest.raises(ValueError, match=r"All rows must be int64, but got torch\.int32"):
        check_range(torch.tensor([1], dtype=torch.int32), 5, "rows")


def test_an_error_on_any_thread_is_raised_after_all_have_ended() -> None:
    ended: list[int] = []

    def fail_on(failing: int) -> None:
        barrier = threading.Barrier(3)

        def work(number: int) -> None:
            barrier.wait(10)
            if number == failing:
                raise KeyError(number)
            ended.append(number)

        run_on_threads(3, work, on_error=lambda: ended.append(-1))

    with pytest.raises(KeyError, match="2"):
        fail_on(2)
    assert sorted(ended) == [0, 1]
    ended.clear()
    with pytest.raises(KeyError, match="0"):
        fail_on(0)
    assert sorted(ended) == [-1, 1, 2]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX only")
def test_ctrl_c_does_not_leave_threads_that_still_work() -> None:
    ended, main = list[int](), threading.get_ident()

    def work(number: int) -> None:
        if number == 0:
            threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
            return
        time.sleep(0.3)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_on_threads(3, work)
    assert sorted(ended) == [1, 2]
