"""What a callable does, as a hash: its name says little (two lambdas have the same one).

    function    bytecode, names, constants, defaults, what its closure and the globals that it names hold, each in turn
    object      its class (methods as functions, all other members, its metaclass) and its attributes
    installed   name and version of the package: its source is not looked into
    module      of the user's own: its source, and those of its members that code names
    array       dtype, shape, bytes

The hash is the same in every process of one Python version. What cannot be told from another of its kind (an open file, a
pointer) has none, nor has code that reads files or the environment, whose contents may be others tomorrow
(`io/outside.py`). Enter at `fingerprint`.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import hashlib
import struct
from collections import OrderedDict
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np

from ranger_nn.io.outside import NoFingerprintError, check_names, check_value, imported, installed, version

PLAIN = (bool, int, str, bytes, complex, type(None), type(Ellipsis))
"""Told apart by their text; not what is derived from them, which may hold more."""
NO_MEMBERS = ("__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__", "__static_attributes__", "_abc_impl")  # fmt: skip
"""Of a class: what code does not depend on."""
CYTHON = "cython_function_or_method"
"""Type of functions that Cython compiles, each library has its own."""
OWN_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__")


def fingerprint(value: Any) -> str:
    """A hash of what `value` is.

    Raises:
        NoFingerprintError: it, or something that it uses, cannot be told from another of its kind.
    """
    found = _Hash()
    try:
        found.add(value)
    except NoFingerprintError:
        raise
    except Exception as error:  # objects raise whatever they like when they are asked what they hold
        raise NoFingerprintError(f"{type(error).__name__}: {error}") from error
    return found.digest.hexdigest()


class _Hash:
    """One walk: what was met before is told by its number, so that cycles end."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._met: dict[Any, int] = {}
        self._kept: list[Any] = []  # an id stands for an object only as long as it lives

    def _say(self, *parts: str) -> None:
        for part in parts:
            self.digest.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))

    def add(self, value: Any) -> None:
        if type(value) in PLAIN or isinstance(value, np.dtype):
            self._say(type(value).__name__, repr(value))
        elif type(value) is float:
            self._say("float", struct.pack("<d", value).hex())
        elif id(value) in self._met:
            self._say("met", str(self._met[id(value)]))
        else:
            self._met[id(value)] = len(self._met)
            self._kept.append(value)
            check_value(value)
            self._compound(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, ModuleType):
            self._module(value, None)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._say("method")
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self._say("partial")
            self._all([type(value), value.func, value.args, value.keywords, vars(value)])
        elif isinstance(value, functools.cached_property):  # its lock holds nothing
            self._say("cached property")
            self.add(value.func)
        elif isinstance(value, BuiltinFunctionType | np.ufunc) or type(value).__name__ == CYTHON:
            self._named(value)
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, ModuleType | None):
                self.add(owner)
        elif isinstance(value, type):
            self._class(value)
        else:
            self._data(value)

    def _data(self, value: Any) -> None:
        if type(value) in (dict, OrderedDict, MappingProxyType):
            self._say("mapping", type(value).__qualname__, str(len(value)))
            self._all([part for pair in value.items() for part in pair])
        elif type(value) in (tuple, list):
            self._say(type(value).__qualname__, str(len(value)))
            self._all(value)
        elif type(value) in (set, frozenset):
            self._say(type(value).__name__, *sorted(fingerprint(v) for v in value))
        elif type(value) in (np.ndarray, np.memmap) or isinstance(value, np.generic) or _is_tensor(value):
            self._array(value)
        else:
            self._object(value)

    def _all(self, values: Any) -> None:
        for value in values:
            self.add(value)

    def _array(self, value: Any) -> None:
        if _is_tensor(value):  # a tensor: sixteen-bit ones have no NumPy type
            self._say(str(value.dtype))
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise NoFingerprintError(f"an array of {array.dtype}")
        self._say("array", str(array.dtype), str(array.shape))
        self.digest.update(np.ascontiguousarray(array).tobytes())

    def _code(self, code: CodeType) -> None:
        """Without file and lines: moving a function changes nothing."""
        self._say("code", code.co_code.hex(), *code.co_names, str(code.co_argcount), str(code.co_flags))
        self._say(*code.co_varnames, *code.co_freevars, *code.co_cellvars, code.co_exceptiontable.hex())
        self._all(code.co_consts)

    def _function(self, function: FunctionType) -> None:
        if installed(function):
            self._named(function)
            self._cells(function, set())
            return
        names = _names(function.__code__)
        check_names(names - function.__globals__.keys())
        self._say("function")
        self._all([function.__code__, function.__defaults__, function.__kwdefaults__, dict(function.__dict__)])
        self._cells(function, names)
        for name in sorted(names):
            if name in function.__globals__:
                self._say("global", name)
                self._used(function.__globals__[name], names)
            elif hasattr(builtins, name):
                self._say("builtin", name)
        for module in imported(function):
            self._used(module, names)

    def _cells(self, function: FunctionType, names: set[str]) -> None:
        for cell in function.__closure__ or ():
            try:
                self._used(cell.cell_contents, names)
            except ValueError:  # not assigned yet
                self._say("empty cell")

    def _used(self, value: Any, names: set[str]) -> None:
        """By code that names these."""
        if isinstance(value, ModuleType):
            self._module(value, frozenset(names))
        else:
            self.add(value)

    def _module(self, module: ModuleType, names: frozenset[str] | None) -> None:
        """Of an installed one its version; else its source and the members that are named, all where nobody knows which."""
        known = installed(module)
        self._say("module", module.__name__, version(module.__name__) if known else _source(module))
        key = (id(module), names)
        if key in self._met or (known and names is None):
            return
        self._met[key] = len(self._met)
        for name, member in sorted(vars(module).items()):
            if name not in names if names is not None else name.startswith("__"):
                continue
            if isinstance(member, ModuleType):
                self._module(member, names)
            elif known:
                check_value(member)
            else:
                self._say(name)
                self.add(member)

    def _class(self, kind: type) -> None:
        self._say("class", kind.__module__, kind.__qualname__)
        if installed(kind):
            self._say(version(kind.__module__))
            return
        self._all([type(kind), *kind.__bases__])
        for name, member in sorted(vars(kind).items()):
            if name in NO_MEMBERS:
                continue
            self._say(name)
            if type(member) is property:
                self._all([member.fget, member.fset, member.fdel])
            elif isinstance(member, staticmethod | classmethod):
                self._say(type(member).__name__)
                self.add(member.__func__)
            elif not isinstance(member, MemberDescriptorType | GetSetDescriptorType):  # slots: places, no contents
                self.add(member)

    def _object(self, value: Any) -> None:
        """Its class, and what it would be pickled from: that names what C objects hold as well, or refuses."""
        known = copyreg.dispatch_table.get(type(value))
        parts: Any = known(value) if known is not None else value.__reduce_ex__(4)
        self._say("object")
        self.add(type(value))
        if any(n in vars(k) for k in type(value).__mro__ if not installed(k) for n in OWN_PICKLING):
            self._all([_attributes(value)])  # it may leave some out
        if isinstance(parts, str):
            self._say(parts)
            self.add(getattr(value, "__wrapped__", None))
            return
        how, arguments, state, *items = (*parts, None, None, None)[:5]
        self._all([how, arguments])
        self.add(dict(sorted(state.items(), key=lambda pair: str(pair[0]))) if isinstance(state, dict) else state)
        self._all([list(i) if i is not None else None for i in items])

    def _named(self, value: Any) -> None:
        module = getattr(value, "__module__", None) or ""
        self._say("named", module, getattr(value, "__qualname__", value.__name__), version(module))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "dtype")


def _names(code: CodeType) -> set[str]:
    """Names that a function and those inside of it look up; those of attributes among them do no harm."""
    return {*code.co_names, *(n for c in code.co_consts if isinstance(c, CodeType) for n in _names(c))}


def _attributes(value: Any) -> dict[str, Any]:
    slots = [s for k in type(value).__mro__ for s, d in vars(k).items() if isinstance(d, MemberDescriptorType)]
    held = {s: getattr(value, s) for s in slots if hasattr(value, s)} | getattr(value, "__dict__", {})
    return dict(sorted(held.items()))


def _source(module: ModuleType) -> str:
    """Of a module that is not installed; empty where it has none."""
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""
