"""What a plan depends on beside shapes: everything in Python that a model's `call` may read.

A capture freezes it: numbers, functions, arrays, policies, the layers themselves, what closures and helper objects hold.
So it is part of a plan's identity, and a change of any of it makes another plan. Numbers of Variables and tensors are
read when a plan runs, and are no part of it.

    identity(model)     a hashable value; equal as long as the model would be captured alike

Equal numbers that are not the same (1, True and 1.0; 0.0 and -0.0) are told apart. Enter at `identity`.
"""

from __future__ import annotations

import array
import functools
import gc
import hashlib
import itertools
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from types import BuiltinFunctionType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
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

APART = (keras.optimizers.Optimizer, keras.Metric)
"""Objects of Keras's own that no capture reads, or whose state is in Variables."""

LARGEST = 1 << 20
"""Bytes of a tensor above which its numbers are not looked at in each call."""

HANDLES = frozenset(["tensorflow", "jax", "jaxlib", "torch", "logging", "threading", "concurrent", "asyncio", "optree"])
"""Packages whose objects, but for modules of layers and what belongs to a thread, hold nothing that a `call` reads."""


_TORCH = sys.modules["torch"].nn if "torch" in sys.modules else None
_TORCH_BYTES: Any = sys.modules["torch"].uint8 if _TORCH else None
_MODULE: Any = _TORCH.Module if _TORCH else ()
_PARAMETERS: Any = (_TORCH.ParameterDict, _TORCH.ParameterList) if _TORCH else ()
"""PyTorch's modules, where PyTorch is about, and those that only hold parameters, which are read when a plan runs."""


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
    walk = walked(model)
    walk.found += [keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format()]
    walk.found += [keras.config.is_flash_attention_enabled(), keras.config.dtype_policy().name]
    return tuple(walk.found)


def walked(x: Any, alone: bool = False) -> _Walk:
    """A walk through all that x holds; `alone`: not through the layers inside."""
    walk = _Walk()
    walk.root = x if alone else None
    walk.visit(x)
    return walk


class _Walk:
    """One walk: `found` grows by marks that could not be confused, `places` by what may be written, `tensors` by
    those of the back end, and `loose` by those of them whose numbers are no part of the identity.
    """

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.seen: dict[int, int] = {}
        self.classes: set[type] = set()
        self.places: list[Any] = []
        self.root: Any = None
        self.tensors: list[Any] = []
        self.loose: list[Any] = []

    def visit(self, x: Any) -> None:
        """Add what stands for x."""
        kind = type(x)
        if x is None or kind is str:
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
        self.places.append(x)
        x = np.asarray(x)
        if x.dtype.hasobject:
            self.found.append(Same(x))
            return
        self.found += ("array", x.shape, str(x.dtype), hashlib.blake2b(x.tobytes()).digest())

    def _object(self, x: Any) -> None:
        self.seen[id(x)] = len(self.seen)
        self.places.append(x)
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
            self.found.append(key if isinstance(key, str) else repr(key))
            self.visit(value)

    def _layer(self, layer: Any) -> None:
        if self.root is not None and layer is not self.root:
            return
        self.found += (Same(layer), Same(type(layer).call))
        self._class(type(layer))
        users = bool(_users(layer.__class__))
        skipped = private.bookkeeping(layer.__class__, users)
        for name, value in list(vars(layer).items()):
            if name in skipped or (not users and isinstance(value, keras.initializers.Initializer)):
                continue
            self.found.append(name)
            if name == "_modules":  # PyTorch's; among them Keras's own list of parameters, which it makes anew at times
                value = {k: v for k, v in value.items() if k not in skipped}
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
        elif isinstance(x, ModuleType):
            self._module(x)
        elif isinstance(x, functools._lru_cache_wrapper):
            self._referents(x)
        elif isinstance(x, BuiltinFunctionType) or (isinstance(x, APART) and not _users(x.__class__)):
            self.found.append(Same(x))
        elif ops.is_tensor(x) or hasattr(x, "handle"):
            self._tensor(x)
        else:
            self._held(x)

    def _tensor(self, x: Any) -> None:
        """What a trained one holds is read when the plan runs; small ones that are not may be written past any count."""
        self.tensors.append(x)
        trained, written = bool(getattr(x, "requires_grad", False)), hasattr(x, "_version")
        small = written and not trained and x.nbytes <= LARGEST
        if trained or (written and not small) or hasattr(x, "handle"):
            self.loose.append(x)
        self.found += (Same(x), trained, 0 if trained else getattr(x, "_version", 0), _bytes(x) if small else None)

    def _module(self, module: ModuleType) -> None:
        """Of users' modules, the values: what is kept there for many to read."""
        self.found.append(Same(module))
        if module.__name__.partition(".")[0] not in LIBRARIES:
            values = [(k, v) for k, v in list(vars(module).items()) if not k.startswith("__") and not callable(v)]
            self._pairs([(k, v) for k, v in values if not isinstance(v, ModuleType) or not _library_module(v)])

    def _held(self, x: Any) -> None:
        """Of other objects: what they hold, in attributes, slots, bytes or otherwise."""
        self.found.append(Same(x))
        if type(x).__module__.partition(".")[0] in HANDLES and not isinstance(x, (_MODULE, threading.local)):
            return
        self._class(type(x))
        if isinstance(x, _PARAMETERS):
            return
        held, slots = getattr(x, "__dict__", None), _slots(x.__class__)
        if isinstance(held, dict):
            skipped = private.bookkeeping(x.__class__, bool(_users(x.__class__)))
            self._pairs([(k, v) for k, v in list(held.items()) if k not in skipped])
        for name in slots:
            self.visit(getattr(x, name, None))
        if not isinstance(held, dict) and not slots:
            self._inside(x)

    def _inside(self, x: Any) -> None:
        """Of objects in C: bytes, what they stand for, the state of generators, or what they refer to."""
        if isinstance(x, (bytearray, array.array, memoryview, mmap.mmap)):
            self.found.append(hashlib.blake2b(bytes(x)).digest())
        elif isinstance(x, weakref.ref):
            self.visit(x())
        elif isinstance(x, ContextVar):
            self.visit(x.get(None))
        elif isinstance(x, np.random.Generator):
            self.found.append(repr(x.bit_generator.state))
        elif isinstance(x, (itertools.count, itertools.repeat)):
            self.found.append(repr(x))
        elif isinstance(x, GeneratorType):
            self.found.append(x.gi_frame and x.gi_frame.f_lasti)
            self.visit(x.gi_frame and dict(x.gi_frame.f_locals))
        elif isinstance(x, Iterator):
            self.visit(_remaining(x))
        elif not isinstance(x, Hashable) or type(x).__module__ in ("builtins", "functools"):
            self._referents(x)

    def _referents(self, x: Any) -> None:
        for held in gc.get_referents(x):
            if not isinstance(held, (type, ModuleType)):
                self.visit(held)

    def _class(self, cls: type) -> None:
        """Methods and attributes of users' classes."""
        for each in _users(cls):
            if each in self.classes:
                continue
            self.classes.add(each)
            self.places.append(each)
            if _users(type(each)):
                self._class(type(each))
            for name, value in list(vars(each).items()):
                if not name.startswith("__") or (isinstance(value, FunctionType) and name != "__init__"):
                    self.found.append(name)
                    self.visit(getattr(value, "__func__", getattr(value, "fget", value)))

    def _function(self, f: FunctionType) -> None:
        self.found.append(Same(f.__code__))
        if _library(f):
            self.found.append(Same(f))
        for held in (f.__defaults__, f.__kwdefaults__):
            self.visit(held)
        for cell in f.__closure__ or ():
            self.places.append(cell)
            self.visit(_content(cell))
        if not _library(f):
            if f.__dict__:
                self.visit(f.__dict__)
            for value in _globals(f):
                self.visit(value)


def _bytes(tensor: Any) -> Any:
    """Of a tensor of PyTorch's, by what it holds; None for one that stands for others."""
    try:
        found = tensor.detach().cpu().contiguous().flatten()
        return hashlib.blake2b(found.view(_TORCH_BYTES).numpy().tobytes()).digest()
    except Exception:
        return None


@functools.cache
def _slots(cls: Any) -> tuple[str, ...]:
    """Names of its slots, those of the classes above it too."""
    found = []
    for each in cls.__mro__:
        names = vars(each).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            private_name = name.startswith("__") and not name.endswith("__")
            found.append(f"_{each.__name__.lstrip('_')}{name}" if private_name else name)
    return tuple(n for n in dict.fromkeys(found) if n not in ("__dict__", "__weakref__"))


def _remaining(x: Any) -> Any:
    """Where an iterator stands, without a step of it."""
    try:
        return x.__reduce__()[1:]
    except Exception:
        return [held for held in gc.get_referents(x) if not isinstance(held, type)]


def _library_module(x: ModuleType) -> bool:
    return x.__name__.partition(".")[0] in LIBRARIES


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


@functools.cache
def _users(cls: Any) -> tuple[type, ...]:
    """The classes in its line that are not a library's."""
    return tuple(c for c in cls.__mro__ if not _library(c))


def _library(x: Any) -> bool:
    return str(getattr(x, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


def _globals(f: FunctionType) -> Iterator[Any]:
    """What a function's code may read by global names, of modules and of users' classes what it may read there."""
    names = _names(f.__code__)
    for name in names:
        value = f.__globals__.get(name, sys.modules.get(name))  # what the code itself imports is there
        if value is os and not {"environ", "getenv"}.isdisjoint(names):
            yield os.environ
        elif isinstance(value, ModuleType) and not _library_module(value):
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
