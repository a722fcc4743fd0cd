"""What a plan depends on beside shapes: everything in Python that a model's `call` may read.

A capture freezes it: numbers, functions, arrays, policies, the layers themselves, what closures and helper objects hold.
So it is part of a plan's identity, and a change of any of it makes another plan. Numbers of Variables and tensors are
read when a plan runs, and are no part of it.

    identity(model)     a hashable value; equal as long as the model would be captured alike

Equal numbers that are not the same (1, True and 1.0; 0.0 and -0.0) are told apart. Enter at `identity`.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.keras import private

LIBRARIES = frozenset(sys.stdlib_module_names) | {
    *(
        "keras",
        "tensorflow",
        "jax",
        "jaxlib",
        "torch",
        "numpy",
        "ml_dtypes",
        "optree",
        "scipy",
        "h5py",
        "flax",
        "ranger_nn",
    ),
}
"""Packages whose classes and functions do not change; what users patch in them is looked for where they do: at `call`."""

APART = (
    keras.optimizers.Optimizer,
    keras.Metric,
    keras.Loss,
    keras.initializers.Initializer,
    keras.random.SeedGenerator,
)
"""Objects that no capture reads, or whose state is in Variables."""


HOLDERS = (keras.Operation, keras.Regularizer, keras.constraints.Constraint, SimpleNamespace, Namespace)
"""Of libraries' classes, those whose objects hold what a `call` reads."""


class Same:
    """An object, equal to itself alone; it lives as long as what is compared with it."""

    __slots__ = ("it",)

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        """The same object."""
        return isinstance(other, Same) and self.it is other.it

    def __hash__(self) -> int:
        """By identity."""
        return id(self.it)


def identity(model: Any) -> tuple[Hashable, ...]:
    """Everything that a capture of `model` may read and freeze."""
    walk = _Walk()
    walk.visit(model)
    walk.found += [keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format()]
    walk.found += [keras.config.is_flash_attention_enabled(), keras.config.dtype_policy().name]
    return tuple(walk.found)


class _Walk:
    """One walk: `found` grows by marks that could not be confused."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.seen: dict[int, int] = {}

    def visit(self, x: Any) -> None:
        """Add what stands for x."""
        kind = type(x)
        if kind is dict and not x:
            self.found.append("pairs")
        elif x is None or kind is str:
            self.found.append(x)
        elif kind is float:
            self.found.append(x.hex())
            self.found.append(float)
        elif kind in (bool, int, bytes):
            self.found += (kind, x)
        elif kind in (complex, slice, range) or x is Ellipsis:
            self.found += (kind, repr(x))
        elif isinstance(x, (np.ndarray, np.generic)):
            self._array(x)
        elif id(x) in self.seen:
            self.found += ("again", self.seen[id(x)])
        else:
            self._object(x)

    def _array(self, x: Any) -> None:
        """By its bytes: it may be written in place."""
        x = np.asarray(x)
        if x.dtype.hasobject:
            self.found.append(Same(x))
            return
        self.found += ("array", x.shape, str(x.dtype), hashlib.blake2b(x.tobytes()).digest())

    def _object(self, x: Any) -> None:
        self.seen[id(x)] = len(self.seen)
        if isinstance(x, keras.Variable):
            self.found += (Same(x), x.trainable, str(x.dtype), tuple(x.shape))
        elif isinstance(x, (list, tuple, deque)):
            self.found += ("sequence", len(x))
            for item in list(x):
                self.visit(item)
        elif isinstance(x, dict):
            self._pairs(list(x.items()))
        elif isinstance(x, (set, frozenset)):
            self.found += ("set", len(x), *sorted(map(repr, x)))
        elif isinstance(x, keras.Layer):
            self._layer(x)
        else:
            self._other(x)

    def _pairs(self, pairs: list[tuple[Any, Any]]) -> None:
        self.found += ("pairs", len(pairs))
        for key, value in pairs:
            if key in private.BOOKKEEPING:
                continue
            self.found.append(key if isinstance(key, str) else repr(key))
            self.visit(value)

    def _layer(self, layer: Any) -> None:
        self.found += (Same(layer), Same(type(layer).call))
        self._class(type(layer))
        for name, value in list(vars(layer).items()):
            if name in private.BOOKKEEPING:
                continue
            self.found.append(name)
            kind = type(value)  # most are plain: a short way for them, since this is done at every call
            if value is None or kind is str:
                self.found.append(value)
            elif kind is bool or kind is int:
                self.found += (kind, value)
            else:
                self.visit(value)

    def _other(self, x: Any) -> None:
        if isinstance(x, FunctionType):
            self._function(x)
        elif isinstance(x, MethodType):
            self.visit(x.__func__)
            self.visit(x.__self__)
        elif isinstance(x, functools.partial):
            for part in (x.func, x.args, x.keywords):
                self.visit(part)
        elif isinstance(x, type):
            self.found.append(Same(x))
            self._class(x)
        elif isinstance(x, keras.DTypePolicy):
            self.found += (type(x), x.name, x.compute_dtype, x.variable_dtype)
        elif isinstance(x, (*APART, ModuleType, BuiltinFunctionType)):
            self.found.append(Same(x))
        elif ops.is_tensor(x):  # what a trained one holds is read when the plan runs
            trained = bool(getattr(x, "requires_grad", False))
            self.found += (Same(x), trained, 0 if trained else getattr(x, "_version", 0))
        else:
            self._held(x)

    def _held(self, x: Any) -> None:
        """Of objects that users made, and of Keras's that an operation or a regulariser is: what they hold."""
        self.found.append(Same(x))
        if _library(type(x)) and not isinstance(x, HOLDERS):
            return
        self._class(type(x))
        held = getattr(x, "__dict__", {})
        self._pairs([(k, v) for k, v in list(held.items()) if k not in private.BOOKKEEPING])
        for name in getattr(type(x), "__slots__", ()):
            self.visit(getattr(x, name, None))

    def _class(self, cls: type) -> None:
        """Methods and attributes of users' classes."""
        for each in _users(cls):
            if id(each) in self.seen:
                continue
            self.seen[id(each)] = len(self.seen)
            for name, value in list(vars(each).items()):
                if not name.startswith("__") or name == "__call__":
                    self.found.append(name)
                    self.visit(getattr(value, "__func__", getattr(value, "fget", value)))

    def _function(self, f: FunctionType) -> None:
        self.found.append(Same(f.__code__))
        if _library(f):
            self.found.append(Same(f))
        for held in (f.__defaults__, f.__kwdefaults__):
            self.visit(held)
        for cell in f.__closure__ or ():
            self.visit(_content(cell))
        if not _library(f):
            for value in _globals(f):
                self.visit(value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


@functools.cache
def _users(cls: type) -> tuple[type, ...]:
    """The classes in its line that are not a library's."""
    return tuple(c for c in cls.__mro__ if not _library(c))


def _library(x: Any) -> bool:
    return str(getattr(x, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def _globals(f: FunctionType) -> Iterator[Any]:
    """What a function's code may read by global names, of modules and of users' classes what it may read there."""
    names = _names(f.__code__)
    for name in names:
        value = f.__globals__.get(name)
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in LIBRARIES:
            yield from (vars(value).get(n) for n in names)
        elif value is not None and not isinstance(value, ModuleType):
            yield value


@functools.cache
def _names(code: CodeType) -> tuple[str, ...]:
    """Names in a function's code and in that of the functions that it makes."""
    inner: Callable[[CodeType], tuple[str, ...]] = _names
    return tuple(
        dict.fromkeys([*code.co_names, *(n for c in code.co_consts if isinstance(c, CodeType) for n in inner(c))])
    )
