"""What code takes from outside of itself: what is installed, what it imports, and what nobody can tell from one run to the next.

installed   the standard library, packages with a version: `installed`, `version`
imported    by statements inside of a function: `imported`
refused     files, the environment, code in text: `check_names`, `check_value`
"""

from __future__ import annotations

import builtins
import dis
import functools
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np


class NoFingerprintError(Exception):
    """Something that has no contents to tell it by."""


STDLIB, SITE = (
    tuple(str(Path(found).resolve()) + os.sep for name in names if (found := sysconfig.get_path(name)))
    for names in (("stdlib", "platstdlib"), ("purelib", "platlib"))
)
BUILTINS = ("open", "input", "eval", "exec", "compile", "globals", "locals", "vars", "__import__")
"""Functions that read files, or run or look up what their text says."""
READING = {*BUILTINS, "environ", "environb", "getenv", "getenvb", "read_text", "read_bytes", "fromfile", "loadtxt", "genfromtxt", "memmap", "imread", "import_module"}  # fmt: skip
"""Names of functions and attributes by which code reads what is not its own."""
OUTSIDE = (*(getattr(builtins, n) for n in BUILTINS), os.environ, getattr(os, "environb", os.environ), os.getenv, os.open, io.open, np.load, np.fromfile, np.loadtxt, np.genfromtxt, importlib.import_module)  # fmt: skip
"""The same, under whatever name."""


def check_names(names: set[str]) -> None:
    """Refuse code that names what reads files or the environment.

    Raises:
        NoFingerprintError: it does.
    """
    found = sorted(names & READING)
    if found:
        raise NoFingerprintError(f"{found[0]}, whose contents may be others the next time")


def check_value(value: Any) -> None:
    """Refuse what reads files or the environment.

    Raises:
        NoFingerprintError: it does.
    """
    if any(value is o for o in OUTSIDE):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        raise NoFingerprintError(f"{name}, whose contents may be others the next time")


def imported(function: FunctionType) -> list[ModuleType]:
    """Modules that statements inside of a function import."""
    package = function.__globals__.get("__package__") or ""
    found = []
    for level, name in sorted(set(_imports(function.__code__))):
        full = importlib.util.resolve_name("." * level + name, package) if level else name
        found.append(importlib.import_module(full))
        top = full.partition(".")[0]
        found += [sys.modules[top]] if top != full else []
    return found


def _imports(code: CodeType) -> Iterator[tuple[int, str]]:
    """(dots, name): the number of dots is loaded two instructions before."""
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("EXTENDED_ARG", "CACHE")]
    for k, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            yield int(steps[k - 2].argval), str(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _imports(inner)


def installed(value: Any) -> bool:
    """Of the standard library or an installed package: its version stands for its code."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    module = value if isinstance(value, ModuleType) else sys.modules.get(name)
    if module is None or name == "__main__":
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        return _without_file(module, name)
    return _lies_in_packages(str(Path(file).resolve()), name)


def _without_file(module: ModuleType, name: str) -> bool:
    """Built in; part of a package whose own file tells; a folder without one."""
    top = sys.modules.get(name.partition(".")[0])
    folders = [str(Path(p).resolve()) + os.sep for p in getattr(module, "__path__", ())]
    if folders:
        return all(_lies_in_packages(folder, name) for folder in folders)
    if top is not None and top is not module:
        return installed(top)
    return name in sys.builtin_module_names


def _lies_in_packages(path: str, name: str) -> bool:
    return path.startswith(SITE) and bool(version(name)) if path.startswith(SITE) else path.startswith(STDLIB)


@functools.cache
def version(module: str) -> str:
    """Of the package that a module belongs to; of the standard library Python's; empty: nobody knows."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return platform.python_version()
    names = sorted(set(_packages().get(top, ())))
    return " ".join(importlib.metadata.version(n) for n in names)


@functools.cache
def _packages() -> dict[str, list[str]]:
    """Module -> packages that bring it."""
    return {k: list(v) for k, v in importlib.metadata.packages_distributions().items()}
