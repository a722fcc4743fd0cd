"""What a plan depends on beside its inputs: everything on the module tree, and in PyTorch, that capture freezes.

Weights are read at each call; numbers, layers, hooks and methods that forward reads as Python are not. `Identity.of`
gives the state of a tree a number, at each call. A walk over the tree writes down its values (`Walk.key`: seconds for
ten thousand modules); as long as every dictionary and list that it went through holds the very same objects, and every
tensor its shape and dtype (`Walk.same`: a few milliseconds for a thousand modules), no other walk is needed. Enter at
`Identity` and `settings`.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import struct
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from ranger_nn.errors import InputError
from ranger_nn.torch.twin import LARGEST, plain

SMALL = 64
"""A tensor attribute of so few elements may have been read as numbers: with others in it, it is another state."""
DEPTH = 2
"""Objects within objects are looked into: a configuration and its sections, not a whole training loop."""
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
    """One walk over a module tree: `key` is what was found, as one value; `same` says whether it is still so."""

    def __init__(self, model: nn.Module) -> None:
        """Walks."""
        self._values: list[Any] = []
        self._seen: dict[int, int] = {}
        self._classes: set[type] = set()
        self._depth = 0
        self.trained = False
        self._modules: list[nn.Module] = []
        self._mappings: list[Any] = []
        self._dicts: list[Any] = []
        self._sequences: list[Any] = []
        self._tensors: list[weakref.ref[Tensor]] = []
        self._registered = {id(t) for t in itertools.chain(model.parameters(), model.buffers())}
        self._probes: list[Callable[[], Any]] = []
        self._module(model)
        for hooks in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks):
            self._hooks(hooks)
        self.key = tuple(self._values)
        self._sizes = self._shape()
        self._content = list(self._held())
        self._facts = [_facts(t()) for t in self._tensors]
        self._probed = [probe() for probe in self._probes]

    def same(self) -> bool:
        """True where a new walk would find the same: all that was gone through is compared by identity."""
        if self._shape() != self._sizes or not all(map(operator.is_, self._held(), self._content)):
            return False
        return self._probed == [p() for p in self._probes] and self._facts == [_facts(t()) for t in self._tensors]

    def _shape(self) -> list[Any]:
        return [*map(len, itertools.chain(self._mappings, self._dicts, self._sequences)), *map(type, self._modules)]

    def _held(self) -> Iterator[Any]:
        flat = itertools.chain.from_iterable
        values = flat(map(operator.methodcaller("values"), itertools.chain(self._mappings, self._dicts)))
        return itertools.chain(values, flat(self._dicts), flat(self._sequences))

    def _new(self, x: Any) -> bool:
        """False where `x` was met before: its place says which."""
        place = self._seen.get(id(x))
        self._values.append(place)
        if place is None:
            self._seen[id(x)] = len(self._seen)
        return place is None

    def _module(self, m: Any) -> None:
        if not self._new(m):
            return
        self._class(type(m))
        skipped = getattr(type(m), "NOT_IN_TWINS", ())
        self._modules.append(m)
        self._mappings.append(m.__dict__)
        for name, value in list(m.__dict__.items()):
            if name in _OTHER or name in skipped:
                continue
            self._values.append(name)
            if name in ("_parameters", "_buffers"):
                self._mappings.append(value)
                for key, tensor in list(value.items()):
                    self._values.append(key)
                    self._state(tensor)
            elif name in _HOOKS:
                self._hooks(value)
            else:
                self._any(value)

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
        place = self._seen.setdefault(id(t), len(self._seen))  # tied parameters are one value of the graph
        self._values += (type(t), place, _facts(t))

    def _any(self, x: Any) -> None:
        kind = type(x)
        if kind in _SCALARS:
            self._values.append(token(x))
        elif isinstance(x, Tensor):
            self._constant(x)
        elif isinstance(x, nn.Module):
            self._module(x)
        elif isinstance(x, (list, tuple, dict, set, frozenset, collections.deque)):
            self._container(x)
        elif kind is np.ndarray and x.size <= SMALL and x.dtype != object:
            self._probe(x.tobytes)
        elif isinstance(x, (types.FunctionType, types.MethodType, functools.partial)):
            self._function(x)
        elif self._depth < DEPTH and plain(x):
            self._object(x)
        else:
            self._values.append(_Same(x))

    def _probe(self, read: Callable[[], Any]) -> None:
        self._probes.append(read)
        self._values.append(read())

    def _object(self, x: Any) -> None:
        if not self._new(x):
            return
        self._depth += 1
        self._class(type(x))
        self._mappings.append(x.__dict__)
        for name, value in list(x.__dict__.items()):
            self._values.append(name)
            self._any(value)
        self._depth -= 1

    def _constant(self, t: Tensor) -> None:
        """A tensor that is no parameter and no buffer: the very one is read when the plan runs."""
        self._tensor(t)
        alive = weakref.ref(t)  # as long as it lives, every reference to the tensor is this one
        self._values.append(_Same(alive))
        if t.numel() <= SMALL and not t.requires_grad:
            self._probe(lambda: _content(alive()))

    def _container(self, x: Any) -> None:
        self._values += (type(x), len(x))
        if len(x) > LARGEST:
            self._values.append(_Same(x))
        elif self._new(x):
            (self._dicts if isinstance(x, dict) else self._sequences).append(x)
            for item in list(x.items()) if isinstance(x, dict) else [*x]:
                if isinstance(x, dict):
                    self._values.append(token(item[0]))
                    item = item[1]
                self._any(item)

    def _function(self, x: Any) -> None:
        if isinstance(x, types.MethodType):
            self._any(x.__func__)
            self._any(x.__self__)
        elif isinstance(x, functools.partial):
            for part in (x.func, x.args, x.keywords):
                self._any(part)
        elif self._new(x):
            self._values.append(_Same(x))
            self._probe(lambda: tuple(_Same(c.cell_contents) for c in x.__closure__ or () if _filled(c)))
            for cell in x.__closure__ or ():
                if _filled(cell):
                    self._any(cell.cell_contents)

    def _hooks(self, hooks: dict[int, Any]) -> None:
        """Functions, and the numbers that they close over; what they gather (tensors, lists) changes nothing."""
        self._mappings.append(hooks)
        for hook in list(hooks.values()):
            self._values.append(_Same(getattr(hook, "__func__", hook)))
            self._probe(functools.partial(_numbers, hook))

    def _class(self, cls: type) -> None:
        """Class attributes and methods, which may be set from outside."""
        self._values.append(_Same(cls))
        if cls in self._classes:
            return
        self._classes.add(cls)
        for base in cls.__mro__:
            if base in (nn.Module, object):
                return
            self._mappings.append(vars(base))
            for name, value in list(vars(base).items()):
                if type(value) in _SCALARS or isinstance(value, (types.FunctionType, tuple)):
                    self._values += (name, token(value))


def _facts(t: Tensor | None) -> Any:
    if t is None:
        return None
    strides = t.stride() if t.layout == torch.strided else t.layout
    return t.dtype, t.shape, t.device, t.requires_grad, strides


def _content(t: Tensor | None) -> Any:
    """What a small tensor holds, which forward may have read as numbers; elsewhere than on the CPU, how often it changed."""
    if t is None or type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
        return None
    if t.device.type != "cpu":
        return None if t.is_inference() else t._version
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _numbers(hook: Any) -> Any:
    """Numbers in the closure of a hook or on the object whose method it is."""
    cells = getattr(getattr(hook, "__func__", hook), "__closure__", None) or ()
    held = [c.cell_contents for c in cells if _filled(c)]
    owner = getattr(hook, "__self__", hook)
    if plain(owner) and not isinstance(owner, nn.Module):
        held += list(vars(owner).values())
    return tuple(token(x) for x in held if type(x) in _SCALARS)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


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
