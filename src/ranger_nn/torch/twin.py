"""A twin of a module tree for `torch.export` to work on: new modules around the very same tensors.

`torch.export` puts fake tensors in the place of the parameters while it traces, and runs the model's own Python: what
forward and its hooks write would stay behind in modules that other threads use. A twin has its own modules, lists,
dictionaries, closures and plain objects; tensors, arrays and everything else are shared. Enter at `Twin`.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ranger_nn.errors import CaptureError

LARGEST = 4096
"""Containers of more items are data (vocabularies, samples), no place for modules: shared, not copied."""
_SHARED = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    enum.Enum,
    torch.dtype,
    torch.device,
)
_LIBRARIES = (
    "torch",
    "numpy",
    "builtins",
    "threading",
    "multiprocessing",
    "asyncio",
    "logging",
    "concurrent",
    "weakref",
)
"""Objects of these are handles or hold none of the model's: shared."""


class Twin:
    """`module` is the twin of a model; `restored` gives a program of it the caller's tensors."""

    def __init__(self, model: nn.Module) -> None:
        """Copies the tree, no tensor."""
        self._memo: dict[int, Any] = {}
        self.sources: list[Any] = []
        """All that was gone through: alive, so that no id is given out again meanwhile."""
        self._true: dict[int, Tensor] = {}
        self._registered = {id(p) for p in model.parameters()}
        self.module: nn.Module = self._of(model)

    def modules(self) -> list[nn.Module]:
        """All of the twin's own, also those that plain lists and closures hold."""
        own = (m for key, m in self._memo.items() if isinstance(m, nn.Module) and id(m) != key)
        return list({id(m): m for m in own}.values())

    def held(self) -> list[Any]:
        """Its own containers, plain objects, and cells of its own functions."""
        own = [
            made
            for key, made in list(self._memo.items())
            if id(made) != key and not isinstance(made, (Tensor, nn.Module))
        ]
        cells = [cell for made in own if isinstance(made, types.FunctionType) for cell in made.__closure__ or ()]
        return [*(x for x in own if isinstance(x, (list, dict, set, collections.deque)) or plain(x)), *cells]

    def restored(
        self, program: torch.export.ExportedProgram, very: Callable[[Tensor], Tensor]
    ) -> torch.export.ExportedProgram:
        """The twin's program with the caller's own tensors as its constants; `very` tells which of the twin's one is."""
        for name, constant in list(program.constants.items()):
            if isinstance(constant, Tensor):
                own = very(constant)
                program.constants[name] = self._true.get(id(own), own)
        for module in program.graph_module.modules():
            for fields in (module.__dict__, module._buffers):
                fields.update({n: self._true[id(x)] for n, x in fields.items() if id(x) in self._true})
        return program

    def _of(self, x: Any) -> Any:
        if isinstance(x, _SHARED):
            return x
        known = self._memo.get(id(x), self)
        if known is not self:
            return known
        return self._kind(x)(x)

    def _keep(self, x: Any, made: Any) -> Any:
        self._memo[id(x)] = made
        self.sources.append(x)
        return made

    def _kind(self, x: Any) -> Callable[[Any], Any]:
        if isinstance(x, torch.jit.ScriptModule):
            return self._same
        if isinstance(x, nn.Module):
            return self._module
        if isinstance(x, nn.Parameter):
            return self._parameter
        if isinstance(x, (list, dict, tuple, set, collections.deque)):
            return self._container if len(x) <= LARGEST else self._same
        if isinstance(x, types.MethodType):
            return self._method
        if isinstance(x, types.FunctionType):
            return self._function
        if isinstance(x, functools.partial):
            return self._partial
        return self._object if plain(x) else self._same

    def _same(self, x: Any) -> Any:
        return self._keep(x, x)

    def _module(self, x: nn.Module) -> nn.Module:
        made = self._keep(x, object.__new__(type(x)))
        shared = getattr(type(x), "NOT_IN_TWINS", ())
        for name, value in list(x.__dict__.items()):
            if name == "_parameters":
                made.__dict__[name] = self._parameters(value)
            else:
                made.__dict__[name] = value if name in shared else self._of(value)
        if type(made.__dict__.get("_buffers")) is dict:
            made.__dict__["_buffers"] = Buffers(made.__dict__["_buffers"])
        return made

    def _parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if id(parameters) in self._memo:
            return self._memo[id(parameters)]  # a wrapper's are its module's
        made = self._keep(parameters, type(parameters)())
        for name, p in parameters.items():
            given = isinstance(p, Tensor) and not isinstance(p, nn.Parameter)
            made[name] = self._given(p) if given else p if p is None or id(p) in self._registered else self._of(p)
        return made

    def _given(self, x: Tensor) -> Any:
        """`functional_call` puts plain tensors in the parameters' places, which `torch.export` refuses."""
        if id(x) not in self._memo:
            self._keep(x, nn.Parameter(x.detach(), x.requires_grad))
        return self._memo[id(x)]

    def _parameter(self, x: nn.Parameter) -> Tensor:
        """A parameter that no module of the tree has registered is a constant to `torch.export`, which takes tensors only."""
        if id(x) in self._registered:
            return self._same(x)
        made: Tensor = self._keep(x, x.detach().requires_grad_(x.requires_grad))
        self._true[id(made)] = x
        return made

    def _container(self, x: Any) -> Any:
        if isinstance(x, tuple):
            items = [self._of(i) for i in x]
            if all(a is b for a, b in zip(items, x, strict=True)):
                return self._same(x)
            return self._keep(x, tuple(items) if type(x) is tuple else type(x)(*items))
        try:
            made = self._keep(x, copy.copy(x))
        except Exception:
            return self._same(x)
        if isinstance(x, dict):
            for key, value in list(x.items()):
                dict.__setitem__(made, key, self._of(value))
        elif not isinstance(x, set):
            for i, value in enumerate(x):
                made[i] = self._of(value)
        return made

    def _method(self, x: Any) -> Any:
        owner, function = self._of(x.__self__), self._of(x.__func__)
        same = owner is x.__self__ and function is x.__func__
        return self._keep(x, x if same else types.MethodType(function, owner))

    def _partial(self, x: Any) -> Any:
        function, args, named = self._of(x.func), self._of(x.args), self._of(dict(x.keywords))
        return self._keep(x, type(x)(function, *args, **named))

    def _function(self, x: Any) -> Any:
        """A patched forward or a hook reaches modules, lists and counters through its closure."""
        if not x.__closure__:
            return self._same(x)
        cells = tuple(types.CellType() for _ in x.__closure__)
        made = types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, cells)
        made.__kwdefaults__, made.__dict__ = x.__kwdefaults__, dict(x.__dict__)
        self._keep(x, made)
        for cell, old in zip(cells, x.__closure__, strict=True):
            try:
                cell.cell_contents = self._of(old.cell_contents)
            except ValueError:  # not assigned yet
                continue
        return made

    def _object(self, x: Any) -> Any:
        try:
            made = object.__new__(type(x))
        except TypeError:  # built on a type in C: what it holds is not to be seen
            return self._same(x)
        self._keep(x, made)
        made.__dict__.update({name: self._of(value) for name, value in list(x.__dict__.items())})
        return made


class Buffers(dict[str, Any]):
    """Buffers of a module of a twin: `torch.export` sees `module.name = value`, and nothing of what is put here directly."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Refuses code that is neither PyTorch's nor ours; `copy` fills a dictionary of its own."""
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] not in ("torch", "copy", "ranger_nn"):
            raise CaptureError(
                f"forward puts a tensor into _buffers[{name!r}], which no graph of operators shows: assign it to the module "
                f"(self.{name} = value), or write in place (self.{name}.copy_(value))."
            )
        super().__setitem__(name, value)


def inside(cell: types.CellType, empty: Any = None) -> Any:
    """What a cell of a closure holds, `empty` where nothing was assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return empty


def plain(x: Any) -> bool:
    """An object of a Python class that holds nothing but its `__dict__`, and that nothing happens to when it goes."""
    return _plain_class(cast("Hashable", type(x))) and isinstance(getattr(x, "__dict__", None), dict)


@functools.lru_cache(maxsize=1024)  # more classes than a model has
def _plain_class(cls: Any) -> bool:
    slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    return not (slots or cls.__module__.partition(".")[0] in _LIBRARIES or hasattr(cls, "__del__"))
