"""`verify=True` sees wrong numbers of the right shape in any sweep, in forward and in gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn import VerificationError
from ranger_nn.core import program as P
from ranger_nn.core.program import Instruction
from ranger_nn.torch.engine import TorchEngine
from ranger_nn.torch.verification import verify_small


def net() -> nn.Module:
    """Two sweeps: the group norm ends the first."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, 2),
        nn.Conv2d(4, 2, 3, padding=1),
    )


@pytest.mark.parametrize("options", [{}, {"memory": "64MB"}, {"regions": (512, 512)}, {"schedule": "tile"}], ids=str)
def test_a_good_model_passes(options: dict[str, Any]) -> None:
    """With and without gradients; the model and its gradients are left alone."""
    model = net().train()
    small = ranger_nn.regionalize(model, verify=True, **options)
    small(torch.randn(1, 2, 40, 33))
    with torch.no_grad():
        small(torch.randn(1, 2, 40, 33))
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("op", [P.RUN, P.VJP])
@pytest.mark.parametrize("name", ["conv2d_0", "conv2d_2"])
def test_damage_in_any_sweep_is_seen(name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong in the second region only, with a result of the right shape."""
    bind = TorchEngine.bind

    def damaged(self: TorchEngine, i: Instruction) -> Callable[..., Any]:
        function = bind(self, i)
        if i.op != op or self.graph.nodes[i.node].name != name or i.out_box[2][0] == 0:
            return function
        if op == P.RUN:
            return lambda *args: function(*args).roll(1, 2)
        return lambda *args: [g.flip(-1) for g in function(*args)]

    monkeypatch.setattr(TorchEngine, "bind", damaged)
    with pytest.raises(VerificationError, match=r"Sequential: (output 0|gradient of .*) by regions"):
        ranger_nn.regionalize(net(), verify=True)(torch.randn(1, 2, 64, 48))


def test_sizes_that_the_network_refuses() -> None:
    """A network of one size is checked at that size."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2 * 98 * 6, 3))
    ranger_nn.regionalize(model, verify=True)(torch.randn(1, 2, 100, 8))
    with pytest.raises(VerificationError, match="could not verify"):
        verify_small(ranger_nn.regionalize(model), [torch.randn(1, 2, 90, 8)], *_spec())


def _spec() -> tuple[Any, bool]:
    from torch.utils import _pytree as pytree

    return pytree.tree_flatten(((torch.zeros(1),), {}))[1], False


class Labels(nn.Module):
    """A map of classes, a mask, or a spectrum, of a convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "labels":
            return y.argmax(1)
        return y > 0 if self.kind == "mask" else torch.complex(y, -y)


def damage(monkeypatch: pytest.MonkeyPatch, name: str = "conv2d_0") -> None:
    """The second region of a convolution is rolled by one."""
    bind = TorchEngine.bind

    def damaged(self: TorchEngine, i: Instruction) -> Callable[..., Any]:
        function = bind(self, i)
        if i.op != P.RUN or self.graph.nodes[i.node].name != name or i.out_box[2][0] == 0:
            return function
        return lambda *args: function(*args).roll(1, 2)

    monkeypatch.setattr(TorchEngine, "bind", damaged)


@pytest.mark.parametrize("kind", ["labels", "mask", "spectrum"])
def test_outputs_that_are_no_real_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers and booleans by how many differ, complex numbers as their parts."""
    model, x = Labels(kind).eval(), torch.randn(1, 2, 48, 40)
    with torch.no_grad():
        ranger_nn.regionalize(model, verify=True)(x)
        damage(monkeypatch)
        with pytest.raises(VerificationError, match="output 0 by regions"):
            ranger_nn.regionalize(model, verify=True)(x)


class Infinite(nn.Module):
    """Logarithms of zeros, and of numbers below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.relu().log() + (y - y.mean()).sqrt()


def test_what_is_not_finite_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinities and NaN in the same places are no difference; in others they are."""
    torch.manual_seed(0)
    model, x = Infinite().eval(), torch.randn(1, 1, 40, 33)
    with torch.no_grad():
        ranger_nn.regionalize(model, verify=True)(x)
        damage(monkeypatch)
        with pytest.raises(VerificationError, match="no number in other places"):
            ranger_nn.regionalize(model, verify=True)(x)


class Randomly(nn.Module):
    """Batch statistics, and dropout of a module and of a function."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.3), nn.Conv2d(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.nn.functional.dropout(y, 0.4, self.training) if self.functional else y


@pytest.mark.parametrize("functional", [False, True])
def test_batch_statistics_in_training(functional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are checked, with the running ones; those of the user's model stay as they are."""
    model, x = Randomly(functional).train(), torch.randn(2, 2, 33, 28)
    small = ranger_nn.regionalize(model, verify=True)
    before, state = {k: b.clone() for k, b in model.named_buffers()}, torch.get_rng_state()
    small.plan_for(x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(b, before[k]) for k, b in model.named_buffers())
    seen = verification_of(monkeypatch, lambda: ranger_nn.regionalize(model, verify=True).plan_for(x))
    assert any(what == "buffer body.1.num_batches_tracked" and value == 1 for what, value in seen)
    damage(monkeypatch)
    with pytest.raises(VerificationError, match="by regions"):
        ranger_nn.regionalize(model, verify=True).plan_for(x)


def verification_of(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[tuple[str, Tensor]]:
    """What the untouched network gave."""
    from ranger_nn.torch import verification

    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(verification, "_compare", lambda name, options, want, *rest: seen.extend(want))
        call()
    return seen


def test_a_batch_norm_that_pytorch_gets_wrong() -> None:
    """One image in training, its gradient channels-last: right gradients are no difference."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(2), Turned()).train()
    ranger_nn.regionalize(model, verify=True)(torch.randn(1, 2, 24, 21))


class Turned(nn.Module):
    """Tokens of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
