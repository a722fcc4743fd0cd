"""What a local network changes when it runs: buffers, attributes of its modules, random number generators.

Under `memory` a network runs once more in backward, and where regions that are one call without it are several calls, each
must begin where that one call begins, and leave behind what it leaves behind. So all of it is read before, put back
between, and compared. Buffers are compared by their numbers (what writes through `.data` moves no version). Of
attributes numbers, texts and tensors count, and those in their lists and dictionaries; what else a module keeps is its own.

Enter at `State` and `Random`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ranger_nn.errors import PartitionError

PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Tensor)
HOLDS = (nn.Module, list, tuple, dict, partial, FunctionType, MethodType)
OWN = frozenset(nn.Module().__dict__) - {"training"}  # registries and hooks of every module


@dataclass(frozen=True)
class Snapshot:
    """State of all modules.

    Attributes:
        buffers: for (module, name) the buffer, and a copy of its numbers.
        parameters: for (module, name) the parameter.
        versions: of parameters, and of tensors that are attributes or in their lists and dictionaries: how often they
            were written.
        attributes: for each module its attributes that count.
        inside: what counts in lists and dictionaries among the attributes.
    """

    buffers: dict[tuple[int, str], tuple[Tensor | None, Tensor | None]]
    parameters: dict[tuple[int, str], Tensor | None]
    versions: dict[tuple[int, str], tuple[Tensor, int]]
    attributes: list[dict[str, Any]]
    inside: dict[tuple[int, str], Any]


class State:
    """Reads and puts back what modules hold."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        named = [(n, m) for root in modules for n, m in root.named_modules()]
        self.modules = list({id(m): m for _, m in named}.values())
        self._names = {id(m): n or type(m).__name__ for n, m in reversed(named)}

    def buffers(self) -> list[Tensor]:
        """All buffers."""
        return [b for m in self.modules for b in m._buffers.values() if b is not None]

    def parameters(self) -> list[Tensor]:
        """All parameters."""
        return [p for m in self.modules for p in m._parameters.values() if p is not None]

    def read(self) -> Snapshot:
        """The state now."""
        found = Snapshot({}, {}, {}, [], {})
        for i, module in enumerate(self.modules):
            for name, b in module._buffers.items():
                found.buffers[i, name] = b, None if b is None else b.detach().clone()
            for name, p in module._parameters.items():
                found.parameters[i, name] = p
                if p is not None:
                    found.versions[i, name] = p, _version(p)
            found.attributes.append({n: v for n, v in module.__dict__.items() if n not in OWN})
            for name, value in found.attributes[-1].items():
                found.versions.update(((i, n), (t, _version(t))) for n, t in _tensors(name, value))
                if type(value) is list:
                    found.inside[i, name] = list(value)
                elif type(value) is dict:
                    found.inside[i, name] = {k: v for k, v in value.items() if isinstance(v, PLAIN)}
        return found

    def write(self, before: Snapshot) -> None:
        """Put back what was read."""
        for (i, name), (buffer, numbers) in before.buffers.items():
            own = self.modules[i]._buffers
            if not isinstance(self.modules[i], torch.jit.ScriptModule) and own.get(name) is not buffer:
                own[name] = buffer
            if buffer is not None and numbers is not None and not same(buffer, numbers):
                with torch.no_grad():
                    buffer.copy_(numbers)
        for (i, name), parameter in before.parameters.items():
            if (
                not isinstance(self.modules[i], torch.jit.ScriptModule)
                and self.modules[i]._parameters.get(name) is not parameter
            ):
                self.modules[i]._parameters[name] = parameter
        for module, attributes in zip(self.modules, before.attributes):
            for name in [n for n in module.__dict__ if n not in OWN and n not in attributes]:
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for (i, name), inside in before.inside.items():
            _refill(self.modules[i].__dict__[name], inside)

    def differs(self, a: Snapshot, b: Snapshot) -> str | None:
        """The name of what is not the same in both states, or None."""
        for (i, name), (_, numbers) in a.buffers.items():
            if not same(numbers, b.buffers.get((i, name), (None, None))[1]):
                return f"the buffer {self._name(i, name)}"
        for i, (left, right) in enumerate(zip(a.attributes, b.attributes)):
            for name in left.keys() | right.keys():
                if not same(left.get(name), right.get(name)):
                    return f"the attribute {self._name(i, name)}"
        for (i, name), inside in a.inside.items():
            if not _same_inside(inside, b.inside.get((i, name))):
                return f"the attribute {self._name(i, name)}"
        return None

    def check_written(self, before: Snapshot, after: Snapshot) -> None:
        """Refuse a forward that writes where nothing can be put back.

        Raises:
            PartitionError: a parameter, or a tensor that is no buffer, was written in place.
        """
        for key, (tensor, version) in before.versions.items():
            if key in after.versions and after.versions[key][0] is tensor and after.versions[key][1] != version:
                raise PartitionError(
                    f"memory= runs the local network more than once, and its forward writes into {self._name(*key)} in "
                    "place, which would count each time: register it as a buffer, write it after the optimiser's step "
                    "(or by torch.nn.utils.parametrize), or leave memory out"
                )

    def equal(self, a: Snapshot, b: Snapshot) -> bool:
        """Nothing has changed."""
        return self.differs(a, b) is None and all(p is b.parameters.get(key) for key, p in a.parameters.items())

    def check_seen(self) -> None:
        """Refuse batch norms in training that were not seen where torch calls them.

        Raises:
            PartitionError: of a script, or of many processes.
        """
        for module in self.modules:
            kind = getattr(module, "original_name", type(module).__name__)
            if module.training and ("BatchNorm" in kind and isinstance(module, torch.jit.ScriptModule)):
                raise PartitionError(
                    f"memory= runs the regions in several calls, and {self._names[id(module)]} ({kind}) is a script, "
                    "whose statistics cannot be taken from all: give the module itself, or leave memory out"
                )

    def put_aside(self, before: Snapshot, after: Snapshot) -> dict[tuple[int, str], Tensor]:
        """Tensors with a gradient that a run has put in attributes and buffers."""
        made = {(i, n): v for i, found in enumerate(after.attributes) for n, v in found.items()}
        made |= {key: b for key, (b, _) in after.buffers.items()}
        old = {(i, n): v for i, found in enumerate(before.attributes) for n, v in found.items()}
        old |= {key: b for key, (b, _) in before.buffers.items()}
        return {
            key: v
            for key, v in made.items()
            if isinstance(v, Tensor) and v.grad_fn is not None and old.get(key) is not v
        }

    def name(self, key: tuple[int, str]) -> str:
        """How a user finds it."""
        return self._name(*key)

    def _name(self, module: int, name: str) -> str:
        return f"{self._names[id(self.modules[module])]}.{name}"

    def generators(self) -> list[torch.Generator]:
        """Random number generators that modules hold."""
        return [v for m in self.modules for v in m.__dict__.values() if isinstance(v, torch.Generator)]


def modules_in(held: Any) -> list[nn.Module]:
    """Modules that something may run: itself, or in lists, in attributes, behind a function, a method or a partial."""
    found: list[nn.Module] = []
    waiting, seen = [held], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            found.append(one)
            for module in one.modules():
                seen.add(id(module))
                waiting += [v for n, v in module.__dict__.items() if n not in OWN and isinstance(v, HOLDS)]
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, MethodType):
            waiting += [one.__self__, one.__func__]
        elif isinstance(one, FunctionType):
            read = [one.__globals__[n] for n in one.__code__.co_names if n in one.__globals__]
            read += [c.cell_contents for c in one.__closure__ or () if c != CellType()]
            waiting += [v for v in (*read, *(one.__defaults__ or ())) if isinstance(v, HOLDS)]
    return found


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an attribute, with how a user finds them: itself, or in lists, tuples and dictionaries of any depth."""
    waiting, seen = [(name, value)], set()
    while waiting:
        at, one = waiting.pop()
        if isinstance(one, Tensor):
            yield at, one
        elif isinstance(one, list | tuple | dict) and id(one) not in seen:
            seen.add(id(one))
            waiting += [(f"{at}[{k!r}]", v) for k, v in (one.items() if isinstance(one, dict) else enumerate(one))]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() or nn.parameter.is_lazy(t) else t._version


def same(a: Any, b: Any) -> bool:
    """Equal numbers, texts or tensors; of other kinds there is nothing to compare."""
    if a is b or not (isinstance(a, PLAIN) and isinstance(b, PLAIN)):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and bool(a == b or a != a)


def _same_inside(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return not isinstance(b, dict) or all(same(v, b[k]) for k, v in a.items() if k in b)


def _refill(value: Any, inside: Any) -> None:
    if isinstance(value, list):
        if len(value) != len(inside) or any(x is not y for x, y in zip(value, inside)):
            value[:] = inside
        return
    for key in [k for k, v in value.items() if isinstance(v, PLAIN) and k not in inside]:
        del value[key]
    value.update(inside)


# -------------------------------------------------------------------------------------------- random


class Random:
    """The generators that a local network may draw from: torch's, Python's, NumPy's, and those its modules hold."""

    def __init__(self, device: torch.device, held: Sequence[torch.Generator] = ()) -> None:
        self._sources: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
        ]
        if device.type == "cuda":
            self._sources.append(
                (lambda: torch.cuda.get_rng_state(device), lambda s: torch.cuda.set_rng_state(s, device))
            )
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            self._sources.append((lambda: _numpy_state(numpy), numpy.random.set_state))
        self._sources += [(g.get_state, g.set_state) for g in held]

    def now(self, last: list[Any] | None = None) -> list[Any]:
        """States of all; the very objects of `last` where nothing was drawn since, so that they are kept once."""
        states = [get() for get, _ in self._sources]
        if last is None:
            return states
        kept = [b if _same_state(a, b) else a for a, b in zip(states, last)]
        return last if all(a is b for a, b in zip(kept, last)) else kept

    def go(self, states: list[Any]) -> None:
        """Go on from these states."""
        for (_, put), state in zip(self._sources, states):
            put(state)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Afterwards as before."""
        before = self.now()
        try:
            yield
        finally:
            self.go(before)


class Again:
    """What was called once, called once more: with the state and the random numbers that it had when this was made."""

    def __init__(self, device: torch.device, modules: Sequence[nn.Module]) -> None:
        self._state = State(modules)
        self._random = Random(device, self._state.generators())
        self._start = self._state.read(), self._random.now()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside as then, afterwards as now."""
        now = self._state.read()
        with self._random.unmoved():
            self._state.write(self._start[0])
            self._random.go(self._start[1])
            try:
                yield
            finally:
                self._state.write(now)


def _numpy_state(numpy: Any) -> tuple[Any, ...]:
    kind, key, *rest = numpy.random.get_state()
    return (kind, tuple(key.tolist()), *rest)


def _same_state(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
