"""What capture freezes is part of a plan's identity: whatever is changed on a model shows in the next call."""

from __future__ import annotations

import array
import contextvars
import copy
import ctypes
import dataclasses
import functools
import math
import multiprocessing
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn
import ranger_nn.torch
from ranger_nn.errors import CaptureError, InputError
from ranger_nn.torch.identity import Identity, Walk, token
from ranger_nn.torch.recent import PLANS, Recent
from tests.support import difference, random_inputs

Change = Callable[[Any], Any]


def conv() -> nn.Module:
    """A layer."""
    return nn.Conv2d(3, 3, 3, padding=1)


class Free(nn.Module):
    """A convolution, then `then(self, y)`; `a` is whatever the case needs."""

    scale = 2.0

    def __init__(self, then: Callable[[Any, Tensor], Tensor], a: Any = None) -> None:
        super().__init__()
        self.conv, self.a = conv(), a
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.then(self, self.conv(x))
        return y


class Settings:
    """A configuration with a section."""

    def __init__(self) -> None:
        self.section = types.SimpleNamespace(scale=2.0)


def put(name: str, value: Any) -> Change:
    """Set an attribute."""
    return lambda model: setattr(model, name, value)


def at(index: int, name: str, value: Any) -> Change:
    """Set an attribute of a layer."""
    return lambda model: setattr(model[index], name, value)


def patched(model: Any) -> None:
    """A forward put on the instance, which calls the old one."""
    old = model[0].forward
    model[0].forward = lambda x: old(x) * 3


def layers(*more: nn.Module) -> nn.Module:
    """A convolution and more."""
    return nn.Sequential(conv(), *more)


CASES: dict[str, tuple[Callable[[], nn.Module], list[Change]]] = {
    "dropout p": (lambda: layers(nn.Dropout(0.5)), [at(1, "p", 0.0)]),
    "eps": (lambda: layers(nn.BatchNorm2d(3)).eval(), [at(1, "eps", 1.0)]),
    "slope": (lambda: layers(nn.LeakyReLU(0.1)), [at(1, "negative_slope", 0.9)]),
    "stride": (lambda: layers(), [at(0, "stride", (2, 2))]),
    "another layer": (
        lambda: layers(nn.ReLU()),
        [lambda m: m.__setitem__(1, nn.Sigmoid()), lambda m: m.append(nn.Tanh())],
    ),
    "another class": (lambda: layers(nn.ReLU()), [at(1, "__class__", nn.Sigmoid)]),
    "1, True, 1.0": (
        lambda: Free(lambda s, y: y * {int: 2, bool: 3, float: 4}[type(s.a)], 1),
        [put("a", True), put("a", 1.0)],
    ),
    "0.0, -0.0": (lambda: Free(lambda s, y: y * math.copysign(2.0, s.a), 0.0), [put("a", -0.0)]),
    "class attribute": (lambda: Free(lambda s, y: y * s.scale), [lambda m: setattr(type(m), "scale", 3.0)]),
    "dictionary": (lambda: Free(lambda s, y: y * s.a["k"], {"k": 2.0}), [lambda m: m.a.update(k=3.0)]),
    "list in a list": (lambda: Free(lambda s, y: y * s.a[0][1], [[1, 2]]), [lambda m: m.a[0].__setitem__(1, 5)]),
    "configuration": (
        lambda: Free(lambda s, y: y * s.a.section.scale, Settings()),
        [lambda m: setattr(m.a.section, "scale", 5.0)],
    ),
    "array": (lambda: Free(lambda s, y: y * float(s.a[0]), np.ones(3)), [lambda m: m.a.__setitem__(0, 5.0)]),
    "tensor as number": (
        lambda: Free(lambda s, y: y * s.a.item(), torch.tensor(2.0)),
        [lambda m: m.a.fill_(7.0), lambda m: m.a.data.fill_(9.0), put("a", torch.tensor(4.0))],
    ),
    "tensor": (
        lambda: Free(lambda s, y: y * s.a, torch.rand(1, 3, 24, 20)),
        [
            put("a", torch.rand(1, 3, 24, 20)),
            lambda m: m.a.mul_(3),
            lambda m: setattr(m.a, "data", torch.rand(1, 3, 24, 20)),
        ],
    ),
    "function": (lambda: Free(lambda s, y: s.a(y), F.relu), [put("a", torch.sigmoid)]),
    "partial": (
        lambda: Free(lambda s, y: s.a(y), functools.partial(F.leaky_relu, negative_slope=0.1)),
        [put("a", functools.partial(F.leaky_relu, negative_slope=0.7))],
    ),
    "layers in a list": (
        lambda: Free(lambda s, y: s.a[0](y), [conv()]),
        [
            lambda m: m.a.__setitem__(0, conv()),
            lambda m: m.a[0].weight.data.mul_(2),
            lambda m: setattr(m.a[0], "weight", nn.Parameter(torch.rand(3, 3, 3, 3))),
        ],
    ),
    "patched forward": (layers, [patched]),
    "hook": (layers, [lambda m: m[0].register_forward_hook(lambda module, args, y: y * 3)]),
    "pre-hook with arguments": (
        layers,
        [
            lambda m: m[0].register_forward_pre_hook(
                lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True
            ),
            lambda m: m[0]._forward_pre_hooks.clear(),
        ],
    ),
    "weights": (
        layers,
        [
            at(0, "weight", nn.Parameter(torch.rand(3, 3, 3, 3))),
            lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True),
            at(0, "bias", None),
        ],
    ),
    "tied weights": (
        lambda: layers(conv()),
        [lambda m: setattr(m[1], "weight", m[0].weight), at(1, "weight", nn.Parameter(torch.rand(3, 3, 3, 3)))],
    ),
    "default dtype": (
        lambda: Free(lambda s, y: y * torch.ones(1).div(3).double()),
        [lambda m: torch.set_default_dtype(torch.float64)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_shows(case: str) -> None:
    """Before and after each change the wrapper gives what the module gives."""
    torch.manual_seed(0)
    build, changes = CASES[case]
    model = build()
    small, (x,) = ranger_nn.regionalize(model, regions=(11, 13)), random_inputs(((1, 3, 24, 20),), torch.float32)
    try:
        for change in (None, *changes):
            if change is not None:
                change(model)
            if case == "dropout p" and change is None:
                small(x)
                continue
            assert difference(small(x), model(x)) <= 1e-5
    finally:
        torch.set_default_dtype(torch.float32)
        Free.scale = 2.0


class Mixin:
    """Comes after nn.Module."""

    gain = 1.0


@dataclasses.dataclass(slots=True)
class Slots:
    """No `__dict__`."""

    gain: float = 1.0
    inner: Any = None


class Rich(Free, Mixin):
    """Class attributes of all kinds."""

    items = [1.0]  # noqa: RUF012
    number = np.float64(1.0)
    part = functools.partial(torch.mul, other=1.0)
    section = types.SimpleNamespace(gain=1.0)
    static = staticmethod(lambda: 1.0)

    @property
    def computed(self) -> float:
        """Read by forward."""
        return 1.0

    @classmethod
    def made(cls) -> float:
        """Reads the class."""
        return cls.gain


class Listed(list[Any]):
    """A list with attributes."""


GAINS, NUMBER = {"a": [1.0]}, 1.0


def reads(self: Any, y: Tensor, k: float = 1.0, *, j: float = 1.0) -> Tensor:
    """Numbers of the module that it is in."""
    return y * GAINS["a"][0] * NUMBER * k * j * helps() * self.static() * self.computed


def helps() -> float:
    """Named by `reads`."""
    return LIMITS.gain


LIMITS = Slots()


def nested(depth: int) -> Any:
    """Objects in objects."""
    return functools.reduce(lambda x, _: types.SimpleNamespace(inner=x), range(depth), types.SimpleNamespace(gain=1.0))


def hooked(*held: Any) -> Callable[..., Any]:
    """A hook that closes over `held`."""
    return lambda module, args, y: y if held is None else None


KEPT = Settings()
local = threading.local()
local.gain = 1.0
REACHED: dict[str, tuple[Any, Callable[[pytest.MonkeyPatch, Any], Any]]] = {
    "class's list": (None, lambda p, a: Rich.items.append(2.0)),
    "class's list, another": (None, lambda p, a: p.setattr(Rich, "items", [5.0])),
    "class's scalar of NumPy": (None, lambda p, a: p.setattr(Rich, "number", np.float64(2.0))),
    "class's partial": (None, lambda p, a: p.setattr(Rich, "part", functools.partial(torch.mul, other=2.0))),
    "class's object": (None, lambda p, a: p.setattr(Rich.section, "gain", 2.0)),
    "static method": (None, lambda p, a: p.setattr(Rich, "static", staticmethod(lambda: 2.0))),
    "property": (None, lambda p, a: p.setattr(Rich, "computed", property(lambda self: 2.0))),
    "mixin": (None, lambda p, a: p.setattr(Mixin, "gain", 2.0)),
    "class as configuration": (Mixin, lambda p, a: p.setattr(Mixin, "gain", 2.0)),
    "slots": (Slots(), lambda p, a: setattr(a, "gain", 2.0)),
    "slots in slots": (Slots(inner=Slots()), lambda p, a: setattr(a.inner, "gain", 2.0)),
    "deep": (nested(2000), lambda p, a: setattr(functools.reduce(lambda x, _: x.inner, range(2000), a), "gain", 2.0)),
    "attribute of a list": (Listed(), lambda p, a: setattr(a, "gain", 2.0)),
    "weak reference": (weakref.ref(KEPT), lambda p, a: p.setattr(KEPT.section, "scale", 3.0)),
    "bound method": (KEPT.__getattribute__, lambda p, a: p.setattr(KEPT.section, "scale", 3.0)),
    "bytearray": (bytearray(3), lambda p, a: a.__setitem__(0, 2)),
    "array.array": (array.array("d", [1.0]), lambda p, a: a.__setitem__(0, 2.0)),
    "number shared by processes": (multiprocessing.Value("d", 1.0), lambda p, a: setattr(a, "value", 2.0)),
    "number of C": (ctypes.c_double(1.0), lambda p, a: setattr(a, "value", 2.0)),
    "view of memory": (memoryview(bytearray(3)), lambda p, a: a.__setitem__(0, 2)),
    "context variable": (contextvars.ContextVar("gain", default=1.0), lambda p, a: a.set(2.0)),
    "of this thread": (local, lambda p, a: p.setattr(local, "gain", 2.0)),
    "array of objects": (np.array([1.0, "a"], object), lambda p, a: a.__setitem__(0, 2.0)),
    "larger array": (np.ones(5000), lambda p, a: a.__setitem__(1234, 2.0)),
    "very large array": (np.ones(1 << 20), lambda p, a: a.__imul__(2.0)),
    "large list": ([1.0] * 5000, lambda p, a: a.__setitem__(1234, 2.0)),
    "global": (None, lambda p, a: p.setitem(globals(), "NUMBER", 2.0)),
    "list in a global": (None, lambda p, a: p.setitem(GAINS, "a", [2.0])),
    "global of a function that is called": (None, lambda p, a: p.setattr(LIMITS, "gain", 2.0)),
    "function that is called": (None, lambda p, a: p.setitem(globals(), "helps", lambda: 2.0)),
    "code": (None, lambda p, a: p.setattr(helps, "__code__", (lambda: 2.0).__code__)),
    "defaults": (None, lambda p, a: p.setattr(reads, "__defaults__", (2.0,))),
    "keyword defaults": (None, lambda p, a: p.setattr(reads, "__kwdefaults__", {"j": 2.0})),
    "attribute of a function": (None, lambda p, a: p.setattr(reads, "gain", 2.0, raising=False)),
    "PyTorch's function": (None, lambda p, a: p.setattr(F, "relu", torch.sigmoid)),
}


@pytest.mark.parametrize("case", REACHED)
def test_whatever_forward_reaches_is_another_state(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was not changed is the same one."""
    held, change = REACHED[case]
    model, identity = Rich(reads, held), Identity()
    before = identity.of(model)
    assert identity.of(model) == before == (identity._states[Walk(model).key], True)
    change(monkeypatch, held)
    assert identity.of(model) != before


HELD: dict[str, tuple[Any, Change]] = {
    "dictionary": ({"gain": 1.0}, lambda a: a.update(gain=2.0)),
    "object": (types.SimpleNamespace(gain=1.0), lambda a: setattr(a, "gain", 2.0)),
    "list": ([1.0], lambda a: a.__setitem__(0, 2.0)),
    "layer": (nn.Dropout(0.5), lambda a: setattr(a, "p", 0.1)),
}


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("how", ["closure", "partial"])
def test_what_a_hook_reads_is_another_state(case: str, how: str) -> None:
    """Through its closure and its arguments."""
    held, change = copy.deepcopy(HELD[case][0]), HELD[case][1]
    hook = hooked(held, []) if how == "closure" else functools.partial(hooked([]), held)
    model, identity = layers(), Identity()
    model[0].register_forward_hook(hook)
    before = identity.of(model)
    assert identity.of(model) == before
    change(held)
    assert identity.of(model) != before


class Steering:
    """A hook that adds a vector."""

    def __init__(self, vector: Tensor) -> None:
        self.vector, self.several = vector, [vector]

    def attribute(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + self.vector

    def item(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + self.several[0]


@pytest.mark.parametrize("how", ["attribute", "item", "closure"])
def test_a_vector_that_a_hook_adds_is_rebound(how: str) -> None:
    """The next call reads the new one."""
    model, (x,) = layers(), random_inputs(((1, 3, 24, 20),), torch.float32)
    steer, vector = Steering(torch.ones(1, 1, 1)), torch.ones(1, 1, 1)

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + vector

    model[0].register_forward_hook(hook if how == "closure" else getattr(steer, how))
    small = ranger_nn.regionalize(model, regions=(11, 13))
    assert difference(small(x), model(x)) <= 1e-5
    steer.vector = steer.several[0] = vector = torch.full((1, 1, 1), 5.0)
    assert difference(small(x), model(x)) <= 1e-5


def test_tensors_that_a_hook_gathers_are_not_kept() -> None:
    """They are looked at, and held weakly."""
    model, identity, outputs = layers(), Identity(), [torch.rand(1)]
    model[0].register_forward_hook(hooked([], outputs))
    identity.of(model)
    gathered = weakref.ref(outputs.pop())
    assert gathered() is None


def test_more_than_can_be_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and never passed over."""
    monkeypatch.setattr("ranger_nn.torch.identity.MOST", 10_000)
    with pytest.raises(InputError, match="10,000 Python values"):
        Identity().of(Free(lambda s, y: y, [[1.0] * 20_000]))


def test_global_hooks() -> None:
    """A hook of all modules acts as long as it is registered."""
    model, (x,) = layers(), random_inputs(((1, 3, 24, 20),), torch.float32)
    small = ranger_nn.regionalize(model, regions=(11, 13))
    small(x)
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: y * 3 if isinstance(m, nn.Conv2d) else None
    )
    try:
        assert difference(small(x), model(x)) <= 1e-5
    finally:
        hook.remove()
    assert difference(small(x), model(x)) <= 1e-5


class Argument(nn.Module):
    """Its second argument is a number."""

    def forward(self, x: Tensor, k: Any) -> Tensor:
        return x * {int: 2, bool: 3, float: 4}[type(k)] * math.copysign(1.0, k)


def test_arguments_that_compare_equal() -> None:
    """1, True and 1.0, 0.0 and -0.0 are different calls; nan is one call, not a new plan each time."""
    small, x = ranger_nn.regionalize(Argument()), torch.rand(1, 3, 8, 8)
    for k in (1, True, 1.0, 0.0, -0.0, 0):
        assert torch.equal(small(x, k), Argument()(x, k)), k
    for _ in range(3):
        small(x, float("nan"))
    assert len(small._ready) == 7


def test_tokens() -> None:
    """What stands for a value tells types and signs apart."""
    assert len({token(v) for v in (0, False, 0.0, -0.0, None, "", 0j, ())}) == 8
    assert token(float("nan")) == token(float("nan"))
    assert token((1, 2.0)) != token((1, 2))


def test_the_same_state_is_found_again() -> None:
    """Going back to a state that was seen takes its plan; nothing new is planned while nothing changes."""
    model = layers(nn.LeakyReLU(0.1))
    small, x = ranger_nn.regionalize(model), torch.rand(1, 3, 8, 8)
    for slope in (0.1, 0.9, 0.1, 0.9):
        model[1].negative_slope = slope
        small(x)
        with torch.no_grad():
            model[0].weight.add_(0.1)
    assert len(small._ready) == 2


def test_plans_are_forgotten() -> None:
    """The ones used last are kept."""
    small = ranger_nn.regionalize(nn.ReLU())
    small._ready = Recent(3)
    first = small.plan_for(torch.rand(1, 1, 4, 4))
    for n in (5, 6, 7, 8):
        small(torch.rand(1, 1, 4, n))
        assert small.plan_for(torch.rand(1, 1, 4, 4)) is first
    assert len(small._ready) == 3
    assert f"{PLANS} of them" in str(ranger_nn.torch.regionalize.__doc__)


def test_a_thousand_modules() -> None:
    """A walk that finds nothing new looks at objects, not at values: no more than one walk is made."""
    model, identity = nn.Sequential(*[nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()) for _ in range(300)]), Identity()
    identity.of(model)
    walk = identity._last
    identity.of(model)
    assert identity._last is walk
    model[299][0].padding = (1, 1)
    assert identity.of(model)[0] == 1


class Remembers(nn.Module):
    """What it keeps from call to call, by `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.last, self.table, self.seen = kind, 0, None, None, []
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.calls += 1
        if self.kind == "counter":
            y = y * self.calls
        if self.kind == "once" and self.calls == 1:
            y = y * 2
        if self.kind == "last output":
            y, self.last = (y if self.last is None else y + self.last), y.detach()  # type: ignore[assignment]
        if self.kind == "list":
            self.seen.append(1)
            y = y * len(self.seen)
        if self.kind == "cache":
            self.table = torch.linspace(0, 1, x.shape[-1]) if self.table is None else self.table  # type: ignore[assignment]
            y = y + self.table
        if self.kind == "note":
            self.last, self.size = y, x.shape  # type: ignore[assignment]
        if self.kind == "dice":
            y = y * float(np.random.rand())
        return y


@pytest.mark.parametrize("kind", ["counter", "once", "last output", "list", "dice"])
def test_a_module_that_remembers_is_refused(kind: str) -> None:
    """Its next call gives something else, and no plan can follow it."""
    with pytest.raises(CaptureError, match="NumPy" if kind == "dice" else "reads it in the next call"):
        ranger_nn.regionalize(Remembers(kind), regions=(11, 13))(torch.rand(1, 3, 24, 20))


@pytest.mark.parametrize("kind", ["cache", "note"])
def test_notes_and_caches_are_no_memory(kind: str) -> None:
    """What is computed once, or written and never read, may be written."""
    model, x = Remembers(kind), torch.rand(1, 3, 24, 20)
    small = ranger_nn.regionalize(model, regions=(11, 13))
    for _ in range(2):
        assert difference(small(x), model(x)) <= 1e-5
