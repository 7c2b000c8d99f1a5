"""What two networks must have in common to be stacked, found by looking at them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import fields
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from hashlib import blake2b
from itertools import chain
from types import BuiltinFunctionType
from types import CodeType
from types import FunctionType
from types import MethodType
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import nn

# Their rates are stacked, so they are no part of a structure.
DROPOUT_TYPES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
PRIMITIVE_TYPES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    range,
    slice,
    type(...),
)
TORCH_TYPES = (torch.dtype, torch.device, torch.memory_format, torch.layout)
MODULE_INTERNALS = ("_parameters", "_buffers", "_modules", "training")  # described on their own


class CannotStack(ValueError):
    """A network cannot be stacked with another; the message is for a log line."""


def structure_key(network: nn.Module) -> str:
    """Return a text that is equal for networks that can be stacked.

    That is the names and types of all submodules, whatever numbers, texts, tuples and functions
    they hold as attributes, and the names, shapes and types of all parameters and buffers. The
    weights themselves are no part of it, and neither is the rate of a `torch.nn.Dropout`.

    Args:
        network:
            Any module.

    Raises:
        CannotStack: If it holds something that cannot be compared with another network's.

    Example:
        >>> one, other = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> (
        ...     structure_key(one) == structure_key(other),
        ...     structure_key(one) == structure_key(nn.Linear(4, 3)),
        ... )
        (True, False)
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise CannotStack(f"{type(network).__name__} is a compiled module")
    description = [_describe_tensors(network), *_describe_modules(network)]
    return blake2b(repr(description).encode(), digest_size=12).hexdigest()


def _describe_tensors(network: nn.Module) -> list[Any]:
    """Describe parameters and buffers; tied ones by the first name."""
    first: dict[int, str] = {}
    return [
        (name, first.setdefault(id(t), name), tuple(t.shape), str(t.dtype), t.requires_grad)
        for name, t in chain(
            network.named_parameters(remove_duplicate=False),
            network.named_buffers(remove_duplicate=False),
        )
    ]


def _describe_modules(network: nn.Module) -> Iterable[Any]:
    """Describe submodules and their attributes; repeated ones by the first name."""
    names: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if names.setdefault(id(module), name) != name:
            yield name, names[id(module)]
            continue
        if isinstance(module, nn.RNNBase):
            raise CannotStack(f"{type(module).__name__} holds its weights in a second place too")
        describe = _Describer(network)
        yield name, describe.type(type(module))
        for attribute, value in sorted(vars(module).items()):
            rate = type(module) in DROPOUT_TYPES and attribute == "p"
            if attribute not in MODULE_INTERNALS and not rate:
                try:
                    yield attribute, describe(_without_hook_ids(attribute, value))
                except CannotStack as error:
                    where = f"`{attribute}` of {type(module).__name__}"
                    raise CannotStack(f"{where} {error}") from error


def _without_hook_ids(attribute: str, value: Any) -> Any:
    """Return a module's hooks without their IDs; other attributes unchanged."""
    named = attribute.startswith("_") and "_hooks" in attribute
    return list(value.values()) if named and isinstance(value, Mapping) else value


class _Describer:
    """Describes values so that equal descriptions mean equal behaviour.

    Args:
        network:
            The network they belong to: what refers to its submodules is described by their
            names.
    """

    def __init__(self, network: nn.Module) -> None:
        self._names = {id(m): name for name, m in network.named_modules()}
        self._ancestors: list[int] = []  # ids of the objects being described, to detect cycles

    def __call__(self, value: Any) -> Any:
        """Describe a value as nested tuples of texts."""
        if isinstance(value, PRIMITIVE_TYPES) and not isinstance(value, torch.Size):
            return type(value).__name__, repr(value)
        if isinstance(value, TORCH_TYPES):
            return repr(value)
        if id(value) in self._ancestors:
            return "above", len(self._ancestors) - self._ancestors.index(id(value))
        self._ancestors.append(id(value))
        try:
            return self._describe_nested(value)
        finally:
            self._ancestors.pop()

    def _describe_nested(self, value: Any) -> Any:
        match value:
            case type():
                return self.type(value)
            case nn.Module():
                if id(value) not in self._names:
                    raise CannotStack("holds a module that is not registered")
                return "module", self._names[id(value)]
            case Tensor() | np.ndarray():
                return self._describe_array(value)
            case FunctionType():
                return self._describe_function(value)
            case MethodType():
                return self(value.__func__), self(value.__self__)
            case partial():
                return self(value.func), self(value.args), self(value.keywords)
            case BuiltinFunctionType():
                return value.__module__, value.__qualname__
        return self._describe_container(value)

    def _describe_container(self, value: Any) -> Any:
        name = type(value).__qualname__
        match value:
            case list() | tuple():
                return name, [self(item) for item in value]
            case set() | frozenset():
                return name, sorted(repr(self(item)) for item in value)
            case dict():
                return name, [(self(key), self(item)) for key, item in value.items()]
            case SimpleNamespace():
                return name, self(vars(value))
        if is_dataclass(value):
            return name, [(f.name, self(getattr(value, f.name))) for f in fields(value)]
        raise CannotStack(f"is a {name}, which cannot be compared")

    def _describe_array(self, value: Tensor | np.ndarray[Any, Any]) -> Any:
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad):
            raise CannotStack("holds weights that are not registered")
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        if array.dtype == object:
            raise CannotStack("is an array of objects, which cannot be compared")
        content = blake2b(np.ascontiguousarray(array).tobytes(), digest_size=12).hexdigest()
        return type(value).__name__, str(array.dtype), array.shape, content

    def _describe_function(self, value: FunctionType) -> Any:
        cells = [self._describe_closure_cell(cell) for cell in value.__closure__ or ()]
        defaults = self(value.__defaults__), self(value.__kwdefaults__)
        return value.__module__, self._describe_code(value.__code__), defaults, cells

    def _describe_closure_cell(self, cell: Any) -> Any:
        try:
            return self(cell.cell_contents)
        except ValueError as error:
            if isinstance(error, CannotStack):
                raise
            return "empty"  # a recursive function's cell is empty until its definition ends

    def _describe_code(self, code: CodeType) -> Any:
        constants = [
            self._describe_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts
        ]
        return code.co_name, code.co_code.hex(), code.co_names, constants

    def type(self, kind: type) -> Any:
        """Describe a class by its name, and a local class by its content as well."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        if "<locals>" not in kind.__qualname__:
            return name
        inside = [
            (attribute, self._describe_attribute(item))
            for attribute, item in sorted(vars(kind).items())
            if attribute not in ("__dict__", "__weakref__", "__doc__", "__module__")
        ]
        return name, [self(base) for base in kind.__bases__], inside

    def _describe_attribute(self, item: Any) -> Any:
        """Describe an attribute of a class."""
        match item:
            case staticmethod() | classmethod():
                return self(item.__func__)
            case property():
                return self(item.fget), self(item.fset), self(item.fdel)
        return self(item)
