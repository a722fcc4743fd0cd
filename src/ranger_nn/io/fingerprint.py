"""What a callable does, as a hash: its name says little (two lambdas have the same one).

    function    bytecode, names, constants, defaults, what its closure and the globals that it names hold, each in turn
    object      its class (methods as functions) and its attributes
    installed   name and version of the package: its source is not looked into
    array       dtype, shape, bytes

The hash is the same in every process of one Python version. What cannot be told from another of its kind (an open file, a
pointer) has none. Enter at `fingerprint`.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import hashlib
import importlib.metadata
import struct
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

PLAIN = (bool, int, str, bytes, complex, type(None), type(Ellipsis), np.dtype)
"""Told apart by their text."""
INSTALLED = tuple(
    str(Path(found).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib") if (found := sysconfig.get_path(name))
)  # fmt: skip


class NoFingerprintError(Exception):
    """Something that has no contents to tell it by."""


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
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # an id stands for an object only as long as it lives

    def _say(self, *parts: str) -> None:
        for part in parts:
            self.digest.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))

    def add(self, value: Any) -> None:
        if isinstance(value, PLAIN):
            self._say(type(value).__name__, repr(value))
        elif isinstance(value, float):
            self._say("float", struct.pack("<d", value).hex())
        elif id(value) in self._met:
            self._say("met", str(self._met[id(value)]))
        else:
            self._met[id(value)] = len(self._met)
            self._kept.append(value)
            self._compound(value)

    def _compound(self, value: Any) -> None:
        if isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, ModuleType):
            self._say("module", value.__name__, _version(value.__name__))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._say("method")
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self._say("partial")
            self._all([value.func, value.args, value.keywords])
        elif isinstance(value, BuiltinFunctionType | np.ufunc):
            self._named(value)
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, ModuleType | None):
                self.add(owner)
        elif isinstance(value, type):
            self._class(value)
        else:
            self._data(value)

    def _data(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._say("mapping", type(value).__qualname__, str(len(value)))
            self._all([part for pair in value.items() for part in pair])
        elif isinstance(value, tuple | list):
            self._say(type(value).__qualname__, str(len(value)))
            self._all(value)
        elif isinstance(value, set | frozenset):
            self._say("set", *sorted(fingerprint(v) for v in value))
        elif isinstance(value, np.ndarray | np.generic) or _is_tensor(value):
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
        known = _installed(function)
        if known:
            self._named(function)
        else:
            self._say("function")
            self.add(function.__code__)
        self._all([function.__defaults__, function.__kwdefaults__] if not known else [])
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # not assigned yet
                self._say("empty cell")
        for name in sorted(_names(function.__code__)) if not known else ():
            if name in function.__globals__:
                self._say("global", name)
                self.add(function.__globals__[name])
            elif hasattr(builtins, name):
                self._say("builtin", name)

    def _class(self, kind: type) -> None:
        self._say("class", kind.__module__, kind.__qualname__)
        if _installed(kind):
            self._say(_version(kind.__module__))
            return
        self._all(kind.__bases__)
        for name, member in sorted(vars(kind).items()):
            if isinstance(member, property):
                self._say(name)
                self._all([member.fget, member.fset])
            elif isinstance(member, staticmethod | classmethod):
                self._say(name)
                self.add(member.__func__)
            elif isinstance(member, (FunctionType, float, tuple, *PLAIN)) and name not in ("__doc__", "__module__"):
                self._say(name)
                self.add(member)

    def _object(self, value: Any) -> None:
        """Its class, and what it would be pickled from: that names what C objects hold as well, or refuses."""
        known = copyreg.dispatch_table.get(type(value))
        parts: Any = known(value) if known is not None else value.__reduce_ex__(4)
        self._say("object")
        self.add(type(value))
        if isinstance(parts, str):
            self._say(parts)
            self.add(getattr(value, "__wrapped__", None))
            return
        _, arguments, state, *items = (*parts, None, None, None)[:5]
        self.add(arguments)
        self.add(dict(sorted(state.items(), key=lambda pair: str(pair[0]))) if isinstance(state, dict) else state)
        self._all([list(i) if i is not None else None for i in items])

    def _named(self, value: Any) -> None:
        module = getattr(value, "__module__", None) or ""
        self._say("named", module, getattr(value, "__qualname__", value.__name__), _version(module))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "dtype")


def _names(code: CodeType) -> set[str]:
    """Names that a function and those inside of it look up; those of attributes among them do no harm."""
    return {*code.co_names, *(n for c in code.co_consts if isinstance(c, CodeType) for n in _names(c))}


def _installed(value: Any) -> bool:
    """Of the standard library or an installed package: its version stands for its code."""
    import sys

    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if module is None or module.__name__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    return file is None or str(Path(file).resolve()).startswith(INSTALLED)


@functools.cache
def _version(module: str) -> str:
    top = module.partition(".")[0]
    try:
        return importlib.metadata.version(top)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
