"""What a plan depends on beside its inputs: everything on the module tree, and in PyTorch, that capture freezes.

Weights are read at each call; numbers, layers, hooks and methods that forward reads as Python are not. `Identity.of`
gives the state of a tree a number, at each call. A walk over the tree writes down its values (`Walk.key`: seconds for
ten thousand modules); as long as every dictionary and list that it went through holds the very same objects, and every
tensor its shape and dtype (`Walk.same`: a few milliseconds for a thousand modules), no other walk is needed. Enter at
`Identity` and `settings`.
"""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import ctypes
import enum
import functools
import hashlib
import itertools
import operator
import os
import struct
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Container, Iterator
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from ranger_nn.errors import InputError
from ranger_nn.torch.twin import inside

SMALL = 64
"""A tensor attribute of so few elements may have been read as numbers: with others in it, it is another state."""
LARGE = 4 << 20
"""Bytes of a NumPy array that are all looked at, at each call: a few milliseconds."""
MOST = 1 << 20
"""Python values that are looked at in each call: some ten milliseconds."""
STATES = 256
"""States of one model that are known apart; forgetting one costs a new plan."""
_OTHER = {
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_non_persistent_buffers_set", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
}
"""Fields of every module that forward does not read."""
_HOOKS = {
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
}
_SCALARS = {
    *(int, float, complex, bool, str, bytes, type(None), slice, range, torch.dtype, torch.device),
    *(torch.memory_format, torch.layout, torch.Size, type(Ellipsis)),
}
_SIGNATURE = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_END = object()
"""After the last of what a container or an object holds; in the place of what is not there."""
_LIBRARY = {
    *sys.stdlib_module_names,
    *("torch", "numpy", "functorch", "torchgen", "triton", "sympy", "ranger_nn"),
    *(
        "hypothesis",
        "pytest",
        "_pytest",
        "pluggy",
        "IPython",
        "ipykernel",
        "matplotlib",
    ),  # around networks, not of them
}
"""Code of these is not the user's: its globals are not looked at."""
_OPAQUE = {
    *("torch", "numpy", "builtins", "threading", "_thread", "multiprocessing", "asyncio", "logging", "concurrent"),
    *(
        "pathlib",
        "random",
        "re",
        "inspect",
        "abc",
        "_abc",
        "typing",
        "io",
        "_io",
        "os",
        "tempfile",
        "subprocess",
        "socket",
    ),
    *("queue", "contextvars", "itertools", "functools", "operator", "time", "datetime", "warnings", "sympy", "triton"),
    *(
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "accelerate",
        "deepspeed",
        "wandb",
        "tensorboard",
        "mlflow",
    ),
}
"""Objects of these are handles, cannot change, or are training loops, which count at each step."""
_APART = {
    *(
        "__init__",
        "__new__",
        "__post_init__",
        "__init_subclass__",
        "__class_getitem__",
        "__repr__",
        "__str__",
        "__del__",
    ),
    *(
        "__getstate__",
        "__setstate__",
        "__reduce__",
        "__reduce_ex__",
        "__copy__",
        "__deepcopy__",
        "__dir__",
        "__sizeof__",
    ),
}
"""Special methods that forward does not call on what is there already."""
_WRAPPERS = (staticmethod, classmethod, property, functools.cached_property, type(functools.lru_cache(id)))
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)


class Identity:
    """Numbers for the states of one module tree."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._last: tuple[Walk, int] | None = None
        self._states: collections.OrderedDict[Any, int] = collections.OrderedDict()
        self._count = itertools.count()
        self._lock = threading.Lock()

    def of(self, model: nn.Module) -> tuple[int, bool]:
        """The number of the state that `model` is in, and whether a parameter or buffer is trained."""
        last = self._last
        if last is not None and last[0].same():
            return last[1], last[0].trained
        walk = Walk(model)
        with self._lock:
            number = self._states.pop(walk.key, None)
            number = next(self._count) if number is None else number
            self._states[walk.key] = number
            while len(self._states) > STATES:
                self._states.popitem(last=False)
        self._last = (walk, number)
        return number, walk.trained


class Walk:
    """One walk over all that forward can reach: `key` is what was found, as one value; `same` says whether it is still so.

    What is found waits in a queue, so that no depth is too deep. Functions count with the globals that they name; methods
    only from when some such code names them: `forward` does not read what `fit` reads.
    """

    def __init__(self, model: nn.Module) -> None:
        """Walks."""
        self._values: list[Any] = []
        self._places: dict[tuple[int, bool], int] = {}
        self._tied: dict[int, int] = {}
        self._queue: collections.deque[tuple[Callable[[Any], None], Any, bool]] = collections.deque()
        self._hooking = False
        self._alive: list[Any] = []
        self._classes: set[Any] = set()
        self._named = {"forward"}
        self._waiting: dict[str, list[tuple[Any, bool]]] = collections.defaultdict(list)
        self._namespaces: list[types.ModuleType] = []
        self.trained = False
        self._modules: list[nn.Module] = []
        self._mappings: list[Any] = [vars(F)]
        self._dicts: list[Any] = []
        self._sequences: list[Any] = []
        self._tensors: list[weakref.ref[Tensor]] = []
        self._registered = {id(t) for t in itertools.chain(model.parameters(), model.buffers())}
        self._tree = {id(m) for m in model.modules()}
        self._empty: list[dict[str, Any]] = []
        self._functions: list[types.FunctionType] = []
        self._globals_of: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        self._probes: list[Callable[[], Any]] = []
        self._reads: list[Callable[[], Any]] = []
        self._any(model)
        self._through()
        for hooks in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks):
            self._hooks(hooks)
        self._through()
        self._values += (_Same(f) for f in list(vars(F).values()) if callable(f))
        self.key = tuple(self._values)
        self._alive.clear()
        self._values = []
        self._sizes = self._shape()
        self._content = list(self._held())
        self._facts = [_facts(t()) for t in self._tensors]
        self._probed = [probe() for probe in self._probes]
        self._seen = [tuple(read()) for read in self._reads]

    def _through(self) -> None:
        while self._queue:
            visit, x, self._hooking = self._queue.popleft()
            visit(x)
            if len(self._values) > MOST:
                raise InputError(
                    f"the attributes, configuration and globals that the model's forward can reach hold more than {MOST:,} "
                    f"Python values, the last of them in a {type(x).__name__}: a change of any would have to be seen at each "
                    "call. Keep data in tensors or NumPy arrays, or off the model."
                )
        self._hooking = False

    def same(self) -> bool:
        """True where a new walk would find the same: all that was gone through is compared by identity."""
        if self._shape() != self._sizes or any(self._empty) or not all(map(operator.is_, self._held(), self._content)):
            return False
        for read, seen in zip(self._reads, self._seen, strict=True):
            now = tuple(read())
            if len(now) != len(seen) or not all(map(operator.is_, now, seen)):
                return False
        return self._probed == [p() for p in self._probes] and self._facts == [_facts(t()) for t in self._tensors]

    def _shape(self) -> list[Any]:
        return [*map(len, itertools.chain(self._mappings, self._dicts, self._sequences)), *map(type, self._modules)]

    def _held(self) -> Iterator[Any]:
        flat = itertools.chain.from_iterable
        values = flat(map(operator.methodcaller("values"), itertools.chain(self._mappings, self._dicts)))
        signatures = flat(map(_SIGNATURE, self._functions))
        named = flat(map(known.get, names) for known, names in self._globals_of.values())
        return itertools.chain(values, flat(self._dicts), flat(self._sequences), signatures, named)

    def _probe(self, read: Callable[[], Any]) -> None:
        self._probes.append(read)
        self._values.append(read())

    # ---- what there is --------------------------------------------------------------------------------------

    def _any(self, x: Any) -> None:
        kind = type(x)
        if kind in _SCALARS:
            self._values.append(token(x))
        elif isinstance(x, Tensor):
            self._constant(x)
        elif isinstance(x, np.generic):
            self._values.append((kind, x.tobytes()))
        elif is_iterator(x):
            self._values.append(_Same(x))
            self._alive.append(x)
            held = _reference(x)
            self._probe(lambda: position(held()))
        else:
            visit = self._visit(x, kind)
            if visit is None:
                self._values.append(_Same(x))
            else:
                self._later(visit, x)

    def _later(self, visit: Callable[[Any], None], x: Any) -> None:
        """Queues what was not met before: its place says which it is."""
        hooking = self._hooking and not (isinstance(x, nn.Module) and id(x) in self._tree)
        place = self._places.get((id(x), hooking))
        self._values.append(place)
        if place is None:
            self._places[id(x), hooking] = len(self._places)
            self._alive.append(x)
            self._queue.append((visit, x, hooking))

    def _visit(self, x: Any, kind: type) -> Callable[[Any], None] | None:
        for known, visit in _VISITS:
            if isinstance(x, known):
                return functools.partial(visit, self)
        opaque = _top(kind) in _OPAQUE and not kind.__module__.startswith("torch.distributions")
        return None if opaque or isinstance(x, os.PathLike) else self._object

    def _fields(self, fields: Any, left_out: Container[str] = ()) -> None:
        if self._hooking:
            self._reads.append(lambda: list(map(_weakly, list(fields.values()))))
        else:
            self._mappings.append(fields)
        for name, value in list(fields.items()):
            if name not in left_out:
                self._values.append(name)
                self._any(value)
        self._values.append(_END)

    def _module(self, m: Any) -> None:
        self._class(type(m))
        skipped = {*getattr(type(m), "NOT_IN_TWINS", ()), *_OTHER, *_HOOKS, "_parameters", "_buffers"}
        self._modules.append(m)
        self._fields(m.__dict__, skipped)
        for name in _HOOKS:
            self._hooks(m.__dict__.get(name, {}))
        for name in ("_parameters", "_buffers"):
            tensors = m.__dict__.get(name, {})
            self._mappings.append(tensors)
            for key, tensor in list(tensors.items()):
                self._values.append(key)
                self._state(tensor)

    def _state(self, t: Tensor | None) -> None:
        if t is None:
            self._values.append(None)
        elif is_lazy(t):
            raise InputError(
                "a lazy module has parameters without a shape yet: call the untouched module once, with an input of the usual "
                "shape, before the regional one."
            )
        elif id(t) in self._registered:
            self._tensor(t)
            self.trained |= t.requires_grad
        else:  # of a module in a plain list: a constant to torch.export
            self._constant(t)

    def _tensor(self, t: Tensor) -> None:
        self._tensors.append(weakref.ref(t))
        place = self._tied.setdefault(id(t), len(self._tied))  # tied parameters are one value of the graph
        self._values += (type(t), place, _facts(t))

    def _constant(self, t: Tensor) -> None:
        """A tensor that is no parameter and no buffer: the very one is read when the plan runs."""
        self._tensor(t)
        alive = weakref.ref(t)  # as long as it lives, every reference to the tensor is this one
        self._values.append(_Same(alive))
        if t.numel() <= SMALL and not t.requires_grad:
            self._probe(lambda: _content(alive()))

    def _hooks(self, hooks: dict[int, Any]) -> None:
        """Functions, and all that they reach."""
        self._mappings.append(hooks)
        outer, self._hooking = self._hooking, True
        for hook in list(hooks.values()):
            self._any(hook)
        self._values.append(_END)
        self._hooking = outer

    def _object(self, x: Any) -> None:
        cls, get = type(x), _reference(x)
        self._class(cls)
        self._reads.append(lambda: [type(get())])
        for base in (int, float, complex, str, bytes):
            if issubclass(cls, base):
                self._values.append(token(base.__getnewargs__(x)))  # type: ignore[union-attr]
        slots = [d for base in cls.__mro__ for d in vars(base).values() if type(d) is types.MemberDescriptorType]
        if slots and _top(cls) != "builtins":
            self._reads.append(lambda: list(map(_weakly, _slots(slots, get()))))
            for value in _slots(slots, x):
                self._any(value)
        fields = getattr(x, "__dict__", None)
        if isinstance(fields, dict):
            self._fields(fields)

    def _enum(self, x: Any) -> None:
        self._values.append(_Same(x))
        self._any(x._value_)

    def _container(self, x: Any) -> None:
        mapping, keep = isinstance(x, dict), not self._hooking
        self._values.append(type(x))
        if keep:
            (self._dicts if mapping else self._sequences).append(x)
        else:
            self._reads.append(lambda: list(map(_weakly, list(x.values() if mapping else x))))
        if isinstance(x, (set, frozenset)):
            self._values.append(frozenset(map(token, x)))
            items = [(None, v) for v in x if type(v) not in _SCALARS]
        else:
            items = list(x.items()) if mapping else [(None, v) for v in x]
        for key, value in items:
            if mapping:
                self._any(key)
            self._any(value)
        self._values.append(_END)
        if type(x).__module__ not in ("builtins", "collections"):
            self._object(x)
        elif isinstance(x, collections.defaultdict):
            self._any(x.default_factory)

    def _array(self, x: Any) -> None:
        """A tensor may share its memory: the very array, and what is in it."""
        self._values += (type(x), x.dtype, x.shape, _Same(weakref.ref(x)))
        if x.dtype.hasobject:
            self._reads.append(lambda: list(x.flat))
            for item in x.flat:
                self._any(item)
        else:
            self._probe(lambda: _digest(x))

    def _bytes(self, x: Any) -> None:
        self._values.append(_Same(x))
        self._probe(lambda: _digest(np.frombuffer(x, np.uint8)) if len(x) else b"")

    def _shared(self, x: Any) -> None:
        """Memory that other processes or C code may write: a number for an epoch, say."""
        self._values.append(_Same(x))
        held = x.get_obj() if isinstance(x, SynchronizedBase) else x
        self._probe(lambda: bytes(held))

    def _of_thread(self, x: Any) -> None:
        """What this thread sees of it."""
        self._values.append(_Same(x))

        def read() -> list[Any]:
            return [x.get(_END)] if isinstance(x, contextvars.ContextVar) else list(vars(x).values())

        self._reads.append(read)
        for value in read():
            self._any(value)

    def _weak(self, x: Any) -> None:
        self._values.append(_Same(x))
        self._probe(lambda: x() is None)
        self._any(x())

    def _proxy(self, x: Any) -> None:
        try:
            self._any(x.__repr__.__self__)
        except ReferenceError:
            self._values.append(None)

    # ---- code -----------------------------------------------------------------------------------------------

    def _function(self, x: Any) -> None:
        cells = x.__closure__ or ()
        self._values += (_Same(x), _Same(x.__code__))
        self._functions.append(x)
        if cells:
            self._reads.append(lambda: list(map(_weakly, map(_inside, cells))))
        for part in (x.__defaults__, x.__kwdefaults__, *map(_inside, cells)):
            self._any(part)
        if x.__dict__:
            self._fields(x.__dict__)
        else:
            self._empty.append(x.__dict__)
        if not _library(x.__globals__.get("__name__")):
            self._globals(x.__code__, x.__globals__)

    def _globals(self, code: Any, known: dict[str, Any]) -> None:
        """What the code names: globals, modules' members, and methods of all classes met."""
        names, hooking = _names(code), self._hooking
        if hooking:
            self._reads.append(lambda: list(map(_weakly, map(known.get, names))))
        else:
            self._globals_of.setdefault(id(known), (known, {}))[1].update(dict.fromkeys(names))
        for name in names:
            if name in known:
                self._values.append(name)
                self._any(known[name])
        for name in names:
            if name not in self._named:
                self._named.add(name)
                for function, of_hook in self._waiting.pop(name, ()):
                    self._hooking = of_hook
                    self._later(self._function, function)
                self._hooking = hooking
                for module in self._namespaces:
                    self._member(module, name)

    def _namespace(self, x: Any) -> None:
        self._namespaces.append(x)
        self._values.append(_Same(x))
        for name in sorted(self._named):
            self._member(x, name)

    def _member(self, module: types.ModuleType, name: str) -> None:
        known = vars(module)
        if name in known:
            self._globals_of.setdefault(id(known), (known, {}))[1][name] = None
            value = known[name]
            follow = isinstance(value, types.ModuleType) or not _library(module.__name__)
            self._values.append(name)
            self._any(value) if follow else self._values.append(token(value))

    def _method(self, x: Any) -> None:
        self._any(x.__func__)
        self._any(x.__self__)

    def _builtin(self, x: Any) -> None:
        owner = getattr(x, "__self__", None)
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            self._values.append(_Same(x))
        else:
            self._values.append(x.__name__)
            self._any(owner)

    def _partial(self, x: Any) -> None:
        for part in (x.func, x.args, x.keywords):
            self._any(part)
        self._values.append(type(x))

    def _wrapped(self, x: Any) -> None:
        self._values.append(type(x))
        self._any(_under(x))

    def _type(self, x: Any) -> None:
        """A class that code can reach may be called, or be a configuration itself."""
        self._class(x)
        if _library(x.__module__) or issubclass(x, nn.Module):
            return
        for base in x.__mro__:
            for name in ("__new__", "__init__", "__post_init__"):
                function = _under(vars(base).get(name))
                if isinstance(function, types.FunctionType):
                    self._later(self._function, function)

    def _class(self, cls: type) -> None:
        """Class attributes and methods, which may be set from outside."""
        self._values.append(_Same(cls))
        if cls in self._classes:
            return
        self._classes.add(cls)
        for base in cls.__mro__:
            if base in (nn.Module, object) or (_library(base.__module__) and _top(base) != "torch"):
                continue
            if (base, "own") not in self._classes:
                self._classes.add((base, "own"))
                self._mappings.append(vars(base))
                for name, value in list(vars(base).items()):
                    self._attribute(name, value, _top(base) == "torch")

    def _attribute(self, name: str, value: Any, library: bool) -> None:
        special = name.startswith("__") and name.endswith("__")
        function = _under(value)
        if isinstance(function, types.FunctionType):
            self._values += (name, _Same(function))
            if library:
                return
            if name in self._named or (special and name not in _APART):
                self._later(self._function, function)
            else:
                self._waiting[name].append((function, self._hooking))
        elif not special and type(value) not in _DESCRIPTORS:
            self._values.append(name)
            if not library or type(value) in _SCALARS or isinstance(value, tuple):
                self._any(value)


_VISITS: tuple[tuple[Any, Callable[[Walk, Any], None]], ...] = (
    (weakref.ProxyTypes, Walk._proxy),
    (nn.Module, Walk._module),
    (enum.Enum, Walk._enum),
    ((list, tuple, dict, set, frozenset, collections.deque, types.MappingProxyType), Walk._container),
    (np.ndarray, Walk._array),
    ((bytearray, array.array), Walk._bytes),
    ((memoryview, ctypes._SimpleCData, ctypes.Array, ctypes.Structure, SynchronizedBase), Walk._shared),
    ((contextvars.ContextVar, threading.local), Walk._of_thread),
    (types.FunctionType, Walk._function),
    (types.MethodType, Walk._method),
    ((functools.partial, functools.partialmethod), Walk._partial),
    ((types.BuiltinFunctionType, types.MethodWrapperType), Walk._builtin),
    (_WRAPPERS, Walk._wrapped),
    (weakref.ref, Walk._weak),
    (type, Walk._type),
    (types.ModuleType, Walk._namespace),
)
"""How each kind is gone through; of every other kind, its fields, where it is no handle of a library."""


def _top(cls: Any) -> str:
    return str(cls.__module__).partition(".")[0]


def _library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARY


def is_iterator(x: Any) -> bool:
    """Whether `x` is one of Python's own iterators, such as of a list, a generator or a counter."""
    return isinstance(x, Iterator) and type(x).__module__ in ("builtins", "itertools")


def position(x: Any, depth: int = 4) -> Any:
    """How far an iterator, or those that it takes from, have come; of anything else what it is.

    `depth`: of iterators over iterators.
    """
    if type(x) is tuple:
        return tuple(position(part, depth) for part in x)
    if not is_iterator(x) or not depth:
        return token(x) if type(x) in _SCALARS else id(x)
    if isinstance(x, types.GeneratorType):
        frame = x.gi_frame
        return None if frame is None else (frame.f_lasti, position(tuple(frame.f_locals.values()), depth - 1))
    with warnings.catch_warnings(), contextlib.suppress(TypeError):
        warnings.simplefilter("ignore")  # later Pythons no longer pickle iterators
        return position(x.__reduce__(), depth - 1)
    return operator.length_hint(x, -1), repr(x)


def _reference(x: Any) -> Callable[[], Any]:
    """`x`, held weakly where it can be: a walk keeps nothing of the model alive."""
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


def _weakly(x: Any) -> Any:
    """A tensor by its weak reference, of which there is one as long as it lives: what hooks gather is not kept alive."""
    return weakref.ref(x) if isinstance(x, Tensor) else x


def _slots(slots: list[Any], x: Any) -> list[Any]:
    found = []
    for slot in slots:
        try:
            found.append(slot.__get__(x))
        except AttributeError:
            found.append(_END)
    return found


def _under(x: Any) -> Any:
    """The function under a decorator of classes."""
    for name in ("__func__", "fget", "func", "__wrapped__"):
        if (
            not isinstance(x, (types.FunctionType, functools.partial, type))
            and type(x) in _WRAPPERS
            and hasattr(x, name)
        ):
            return getattr(x, name)
    return x


@functools.lru_cache(maxsize=65536)  # more code than a model has
def _names(code: types.CodeType) -> tuple[str, ...]:
    """What a function and the functions within it name."""
    inner = (n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c))
    looks_up = {"getattr", "attrgetter", "methodcaller", "__getattribute__"} & set(code.co_names)
    spelled = (c for c in code.co_consts if looks_up and isinstance(c, str) and c.isidentifier())
    return tuple(dict.fromkeys([*code.co_names, *inner, *spelled]))


def _digest(x: Any) -> Any:
    """What is in an array: all of it, of a large one what a thousand places hold."""
    if x.nbytes <= LARGE:
        return hashlib.blake2b(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, digest_size=16).digest()
    step = max(1, x.size // 1024)
    return x.ctypes.data, x.flat[::step].tobytes()


def _facts(t: Tensor | None) -> Any:
    if t is None:
        return None
    if t.is_nested:  # has neither shape nor strides
        return t.dtype, t.numel(), t.device, t.requires_grad, t.layout
    strides = t.stride() if t.layout == torch.strided else t.layout
    return t.dtype, t.shape, t.device, t.requires_grad, strides


def _content(t: Tensor | None) -> Any:
    """What a small tensor holds, which forward may have read as numbers; elsewhere than on the CPU, how often it changed."""
    if t is None or type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_nested:
        return None
    if t.device.type != "cpu":
        return None if t.is_inference() else t._version
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _inside(cell: types.CellType) -> Any:
    return inside(cell, _END)


class _Same:
    """An object compared by identity, and kept, so that its address is not given out again."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.x is self.x


def token(x: Any) -> Any:
    """What stands for a value in a key: 1, True and 1.0 are three, as are 0.0 and -0.0; nan is itself."""
    kind = type(x)
    if kind is float:
        return kind, struct.pack("d", x)
    if kind is complex:
        return kind, struct.pack("dd", x.real, x.imag)
    if kind in (tuple, list):
        return kind, tuple(map(token, x))
    if kind is slice:
        return kind, token(x.start), token(x.stop), token(x.step)
    return (kind, x) if kind in _SCALARS else _Same(x)


def settings(device: torch.device) -> Any:
    """What a graph depends on in PyTorch itself, for this thread."""
    return (
        torch.is_grad_enabled(),
        autocast_dtype(device),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on the device, None where it is off or unknown there."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
