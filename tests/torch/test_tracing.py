"""What forward does while it is looked at: writes that must not stay, hooks of tensors, functions of autograd."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from tests.support import difference


class Net(nn.Module):
    """Two convolutions around a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(self, *x)


class Reversed(torch.autograd.Function):
    """The gradient of something else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -3 * grad


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Clipped(torch.autograd.Function):
    """Another gradient where it is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-1, 1)


class Swish(torch.autograd.Function):
    """The very derivative, in less memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        s = torch.sigmoid(ctx.saved_tensors[0])
        return grad * s * (1 + ctx.saved_tensors[0] * (1 - s))


def regional(net: nn.Module) -> nn.Module:
    return ranger_nn.regionalize(net, regions=(5, 5))


def hooked(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return net.b(y)


@pytest.mark.parametrize("function", [Reversed, Rounded, Clipped])
def test_functions_with_another_gradient_are_refused(function: Any) -> None:
    """By name, in training; what needs no gradient runs."""
    net, x = Net(lambda s, x: s.b(function.apply(s.a(x)))), torch.randn(2, 3, 13, 11)
    with torch.no_grad():
        assert difference(regional(net)(x), net(x)) <= 1e-5
    with pytest.raises(ranger_nn.CaptureError, match=rf"{function.__name__}.*custom_op"):
        regional(net)(x)


def test_a_function_with_the_very_derivative() -> None:
    """Runs and trains; nothing of the check stays behind."""
    net, x = Net(lambda s, x: s.b(Swish.apply(s.a(x)))), torch.randn(2, 3, 13, 11, requires_grad=True)
    apply = torch.autograd.Function.apply
    want = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    got = torch.autograd.grad(regional(net)(x).square().sum(), [x, *net.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.autograd.Function.apply == apply


@pytest.mark.parametrize("how", ["forward", "hook of a module"])
def test_hooks_of_tensors_are_refused(how: str) -> None:
    """In training; they would not be called."""
    net = Net(hooked if how == "forward" else lambda s, x: s.b(s.a(x)))
    if how != "forward":
        net.a.register_forward_hook(
            lambda m, i, o: o.register_hook(lambda g: g * 0) and None if o.requires_grad else None
        )
    x = torch.randn(2, 3, 13, 11)
    with torch.no_grad():
        assert difference(regional(net)(x), net(x)) <= 1e-5
    with pytest.raises(ranger_nn.CaptureError, match="register_hook"):
        regional(net)(x)


WRITES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "small": (lambda s, x: s.b(s.a(x)) * s.t.mul_(0.5)[:1], 1),
    "large": (lambda s, x: s.b(s.a(x)) * s.t.mul_(0.5)[:1], 100),
    "a view": (lambda s, x: s.b(s.a(x)) * s.t[:1].add_(1.0), 100),
    "an item": (lambda s, x: (s.b(s.a(x)) * s.t[0], s.t.__setitem__(0, 3.0))[0], 100),
}


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.parametrize("memory", [None, 1_000_000])
def test_tensors_that_nobody_registered_are_written_once_a_call(case: str, memory: int | None) -> None:
    """And never by a plan."""
    function, size = WRITES[case]
    net, x = Net(function), torch.randn(1, 3, 13, 11)
    net.t = torch.ones(size)
    with torch.no_grad():
        want = [net(x) for _ in range(3)]
        net.t = torch.ones(size)
        ranger_nn.plan(net, x, memory="1MB")
        assert torch.equal(net.t, torch.ones(size))
        small = ranger_nn.regionalize(net, memory=memory) if memory else regional(net)
        for y in want:
            assert difference(small(x), y) <= 1e-5


def test_an_unregistered_norm_counts_each_batch_once() -> None:
    """Running statistics of a layer in a plain list."""
    net, x = Net(lambda s, x: s.b(s.layers[0](s.a(x)))), torch.randn(2, 3, 13, 11)
    net.layers = [nn.BatchNorm2d(4)]
    small = regional(net)
    for _ in range(3):
        small(x)
    assert int(net.layers[0].num_batches_tracked) == 3


def test_one_tensor_given_twice() -> None:
    """Forward may ask; the gradient is that of both places."""
    net = Net(lambda s, x, y: s.b(s.a(x)) * (2 if x is y else 1) + s.a(y).sum())
    small, x = regional(net), torch.randn(1, 3, 13, 11, requires_grad=True)
    for other in (x, x.detach().clone(), x):
        want, got = net(x, other), small(x, other)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (want, got))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-2)


def _stateful() -> dict[str, nn.Module]:
    """Networks whose next call depends on the last, by something that no module's field is."""
    made: dict[str, nn.Module] = {}
    counts = {"n": 0}

    def counting(s: Any, x: Tensor) -> Tensor:
        counts["n"] += 1
        return s.b(s.a(x)) * counts["n"]

    made["a dictionary of a closure"] = Net(counting)
    count = 0

    def nonlocally(s: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return s.b(s.a(x)) * count

    made["a variable of a closure"] = Net(nonlocally)
    made["a hook"] = Net(lambda s, x: s.b(s.a(x)))
    calls = {"n": 0}

    def hook(m: nn.Module, args: Any, y: Tensor) -> Tensor:
        calls["n"] += 1
        return y * calls["n"]

    made["a hook"].b.register_forward_hook(hook)

    def rebinding(s: Any, x: Tensor) -> Tensor:
        s.t = s.t * 0.5
        return s.b(s.a(x)) * s.t

    made["a tensor"] = Net(rebinding)
    made["a tensor"].t = torch.ones(())
    python, numpy = random.Random(1), np.random.default_rng(1)
    made["Python's dice"] = Net(lambda s, x: s.b(s.a(x)) * python.random())
    made["NumPy's dice"] = Net(lambda s, x: s.b(s.a(x)) * float(numpy.random()))
    return made


@pytest.mark.parametrize("case", _stateful())
def test_state_outside_of_modules_is_refused(case: str) -> None:
    """By name: the first call's result would be given for ever."""
    with torch.no_grad(), pytest.raises(ranger_nn.CaptureError, match="a plan, made once, would"):
        regional(_stateful()[case].eval())(torch.randn(1, 3, 13, 11))
