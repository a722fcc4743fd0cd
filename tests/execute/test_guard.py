"""Damage to a kernel or to a region is an error that names both, on the first run of a plan, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn import PlanError
from ranger_nn.bounds.infer import Bounds
from ranger_nn.core import program as P
from ranger_nn.core.program import Instruction
from ranger_nn.execute.guard import guarded, lengths
from ranger_nn.execute.machine import bind
from ranger_nn.planning import search
from ranger_nn.planning.search import Options, make_plan
from ranger_nn.torch.capture import capture
from ranger_nn.torch.engine import TorchEngine


class Net(nn.Module):
    """A norm over space between convolutions, a row joined in front: every kind of instruction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.last(torch.cat([y[:, :, :1], y], 2))


def step(net: nn.Module) -> None:
    net(torch.randn(1, 2, 17, 12, requires_grad=True)).square().sum().backward()


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a row short": lambda y: y.narrow(2, 0, y.shape[2] - 1),
    "a row twice": lambda y: torch.cat([y, y.narrow(2, 0, 1)], 2),
    "a row for all": lambda y: y.narrow(2, 0, 1),
    "another precision": lambda y: y.double(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("op", [P.RUN, P.VJP, P.REDUCE_VJP])
def test_damage_is_named(op: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of instruction in turn gives what its region did not ask for."""
    bind, seen = TorchEngine.bind, []

    def damaged(self: TorchEngine, i: Instruction) -> Callable[..., Any]:
        function = bind(self, i)
        if seen or i.op != op or len(i.reads[0].box) < 4 or i.reads[0].box[2][1] - i.reads[0].box[2][0] < 2:
            return function
        seen.append(self.graph.nodes[i.node].name)
        return lambda *args: spoilt(function(*args), DAMAGE[damage])

    monkeypatch.setattr(TorchEngine, "bind", damaged)
    with pytest.raises(PlanError, match="of region") as raised:
        step(ranger_nn.regionalize(Net(), regions=(5, 12), schedule="slide"))
    assert f"Net: {seen[0]} " in str(raised.value)


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "another precision"])
@pytest.mark.parametrize("op", [P.WRITE, P.ADD])
def test_nothing_is_broadcast(op: str, damage: str) -> None:
    """A copy and a sum take what has the very shape of their region."""
    planned = make_plan(capture(Net(), (torch.randn(1, 2, 17, 12),), grad=True).graph, Options(regions=(5, 12)), True)
    assert planned.backward is not None
    written = [i for p in (planned.forward, planned.backward) for i in p.instructions if i.op == op]
    i = next(i for i in written if len(i.reads[0].box) == 4)
    engine = TorchEngine(planned.graph, torch.device("cpu"))
    ((function, *_),) = guarded(bind([i], engine), [i], planned.graph, engine.form)
    region = torch.zeros(lengths(i.reads[0].box))
    function(region, region)
    with pytest.raises(PlanError, match="of region"):
        function(region, DAMAGE[damage](region))


def spoilt(result: Any, damage: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(result, Tensor):
        return damage(result)
    return [damage(result[0]), *result[1:]]


def test_a_region_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row joined in front that every region is given, not its own alone: seen when the plan is made, and were it not, when
    it runs; both messages name the node.
    """
    box = Bounds.box
    monkeypatch.setattr(
        Bounds, "box", lambda self, node, i, out: tuple((0, 1) if b == (1, 1) else b for b in box(self, node, i, out))
    )
    net = ranger_nn.regionalize(Net(), regions=(5, 12), schedule="slide")
    with pytest.raises(PlanError, match=r"run of cat_0.*rows .* are asked for, \(0, 1\) are given"):
        net(torch.randn(1, 2, 17, 12))
    monkeypatch.setattr(search, "check", lambda *args: None)
    with pytest.raises(
        PlanError, match=r"Net: cat_0 gave shape \(1, 4, \d+, 12\).*of region \(\(0, 1\), \(0, 4\), \(2"
    ):
        net(torch.randn(1, 2, 17, 12))


def test_only_the_first_run_is_held() -> None:
    """Later runs of the plan call the bare kernels."""
    net = ranger_nn.regionalize(Net(), regions=(5, 12))
    step(net)
    (ready,) = net._ready.values()
    assert ready.tried == {"forward", "backward"}
