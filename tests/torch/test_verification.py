"""`verify=True` sees wrong numbers of the right shape in any sweep, in forward and in gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

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
