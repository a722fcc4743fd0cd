"""Capture works on a twin: the untouched module, other threads and the process notice nothing of it."""

from __future__ import annotations

import builtins
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn.torch.alone import alone
from ranger_nn.torch.twin import Twin
from tests.support import difference


def net() -> nn.Sequential:
    """A small network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
    ).eval()


class Odd(nn.Module):
    """Reaches layers in every way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.again = self.conv
        self.loose = [nn.Conv2d(3, 3, 1), {"act": nn.ReLU()}]
        self.method = self.conv.forward
        old = self.conv.forward
        self.conv.forward = lambda x: old(x) + 1  # type: ignore[method-assign]
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        y = self.loose[1]["act"](self.loose[0](self.again(x)))  # type: ignore[index,operator]
        result: Tensor = self.method(y)
        return result


def test_a_twin_is_another_tree_of_the_same_tensors() -> None:
    """Modules, lists, methods and closures are the twin's own; tensors and locks are shared."""
    model = Odd()
    twin: Any = Twin(model).module
    assert type(twin) is Odd
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert twin.again is twin.conv
    assert twin.method.__self__ is twin.conv
    assert twin.loose[0] is not model.loose[0]
    assert twin.lock is model.lock
    assert twin.conv.forward.__closure__[0].cell_contents.__self__ is twin.conv
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(twin(x), model(x))
    assert difference(ranger_nn.regionalize(model, regions=(3, 3))(x), model(x)) <= 1e-5


class Notes(nn.Module):
    """Writes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 3, 1), []

    def forward(self, x: Tensor) -> Tensor:
        self.last: Tensor = self.conv(x)
        self.seen.append(self.last)
        return self.last


class Hook:
    """Keeps what passes."""

    def __call__(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.kept = y


def test_nothing_stays_behind() -> None:
    """Neither modules nor hooks are left with tensors that hold nothing."""
    model, hook, gathered = Notes(), Hook(), []
    model.conv.register_forward_hook(hook)
    model.conv.register_forward_hook(lambda module, args, y: gathered.append(y))
    fields = set(model.__dict__)
    ranger_nn.regionalize(model, regions=(4,))(torch.rand(1, 3, 8, 8))
    assert set(model.__dict__) == fields
    assert not model.seen
    assert not gathered
    assert not hasattr(hook, "kept")


def test_modes_are_the_untouched_modules() -> None:
    """There is one mode, whoever sets it, and calls leave it as it is, layer by layer."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.BatchNorm2d(3))
    small, x = ranger_nn.regionalize(model), torch.rand(1, 3, 8, 8)
    model.eval()
    assert not small.training
    assert torch.equal(small(x), small(x))
    assert not any(m.training for m in model.modules())
    model[2].train()
    small(x)
    assert [m.training for m in model.modules()] == [False, False, False, True]
    small.train()
    assert all(m.training for m in model.modules())
    small.training = False
    assert not model.training


def test_planning_draws_nothing() -> None:
    """Random numbers go on as if there were no plan, under autocast and with recurrent layers too."""
    model, x = nn.LSTM(3, 4, batch_first=True), torch.rand(1, 8, 3)
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranger_nn.plan(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_threads_see_no_capture() -> None:
    """Flags, patched methods and builtins hold in the thread that captures only."""
    model, found = net(), []

    def look() -> None:
        kinds = math.pow(2, 3), builtins.max(1, 2), torch.compiler.is_compiling(), torch.compiler.is_exporting()
        found.append(
            (*map(bool, kinds), type(kinds[0]), torch.backends.mkldnn.enabled, type(model(torch.rand(1, 3, 8, 8))))
        )

    class Looked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return x * (2 if torch.compiler.is_exporting() else 3)

    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(ranger_nn.regionalize(Looked(), regions=(4,))(x), 2 * x)
    assert set(found) == {(True, True, False, False, float, torch.backends.mkldnn.enabled, Tensor)}


def test_new_shapes_in_eight_threads() -> None:
    """Plans are made in eight threads while two more run the wrapper and the untouched module: all are right."""
    model = net()
    small, x, found, stop = (
        ranger_nn.regionalize(model, "20MB"),
        torch.rand(1, 3, 40, 40),
        Counter[str](),
        threading.Event(),
    )
    with torch.no_grad():
        right = {f: f(x) for f in (small, model)}

    def call(f: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            while not stop.is_set():
                found["worker" if torch.equal(f(x), right[f]) else "wrong"] += 1

    def meet(n: int) -> None:
        try:
            y = torch.rand(1, 3, 20 + n, 24, requires_grad=True)
            with torch.set_grad_enabled(n % 2 == 0):
                found["new" if difference(small(y), model(y)) <= 1e-5 else "wrong"] += 1
        except Exception as error:
            found[repr(error)] += 1

    workers = [threading.Thread(target=call, args=(f,)) for f in right]
    fresh = [threading.Thread(target=meet, args=(n,)) for n in range(8)]
    for t in (*workers, *fresh):
        t.start()
    for t in fresh:
        t.join()
    stop.set()
    for t in workers:
        t.join()
    assert set(found) == {"worker", "new"}
    assert found["new"] == 8


def test_alone_puts_everything_back() -> None:
    """Also after an error."""
    before = torch.export._trace._override_builtin_ops, torch.fx._symbolic_trace._Patcher.patch_method, builtins.max
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    after = torch.export._trace._override_builtin_ops, torch.fx._symbolic_trace._Patcher.patch_method, builtins.max
    assert after == before
