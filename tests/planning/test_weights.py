"""Weights that forward computes: made where they are read, within a budget that could not hold them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ranger_nn
from ranger_nn.bounds.axes import Axis
from ranger_nn.core.graph import PARAMETER
from ranger_nn.core.program import RUN
from ranger_nn.planning import search
from ranger_nn.planning.forward import Schedule
from tests.support import compare, random_inputs


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, padding=1)


class LowRank(nn.Module):
    """A weight and the product of two thin ones, as LoRA adds them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(channels, channels))
        self.a, self.b = nn.Parameter(torch.randn(channels, 2)), nn.Parameter(0.1 * torch.randn(2, channels))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight + self.a @ self.b
        return torch.einsum("nchw,oc->nohw", x, w)


class SharedStem(nn.Module):
    """One computed weight read by two convolutions, and by an operator after a global mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(channels, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight / self.weight.norm()
        y = F.conv2d(F.relu(F.conv2d(x, w, padding=1)), w, padding=1)
        return y * torch.sigmoid(F.conv2d(y.mean((2, 3), keepdim=True), w.sum((2, 3), keepdim=True)))


def remaking(axes: Sequence[Axis]) -> Schedule:
    """Five steps, weights made again at each."""
    return Schedule(5, (1,) * len(axes), grain=False, remake=True)


def convolution(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "standardised": lambda c: Standardised(c, c, 3),
    "weight_norm": lambda c: parametrizations.weight_norm(convolution(c)),
    "spectral_norm": lambda c: parametrizations.spectral_norm(convolution(c)),
    "orthogonal": lambda c: parametrizations.orthogonal(nn.Conv2d(c, c, 1)),
    "low_rank": LowRank,
    "shared": SharedStem,
}


def chain(kind: str, channels: int, depth: int) -> nn.Module:
    """A stem and `depth` layers with such weights; the running vectors of spectral norm stand still."""
    torch.manual_seed(0)
    layers = [KINDS[kind](channels) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1), *(m for x in layers for m in (x, nn.Tanh()))).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several regions, each of which makes the weights that it reads, forward and backward."""
    monkeypatch.setattr(search, "_starting", lambda graph, axes, options: [remaking(axes)])
    (x,) = random_inputs(((2, 3, 19, 17),))
    small = compare(chain(kind, 6, 2).double(), ranger_nn.regionalize, (x,))
    (ready,) = small._ready.values()
    steps, values = ready.planned.forward.instructions, ready.planned.graph.values
    assert len({i.region for i in steps}) > 4
    made = [i.node for i in steps if i.op == RUN]
    inputs = {k: set(ready.planned.graph.nodes[k].inputs) for k in made}
    of_weights = [k for k in made if inputs[k] and all(values[v].kind == PARAMETER for v in inputs[k])]
    assert max(map(of_weights.count, of_weights)) > 2


def test_many_layers_need_no_more_than_few() -> None:
    """What a plan needs at least does not grow by the weights of all layers."""
    least = []
    for depth in (2, 12):
        with pytest.raises(ranger_nn.BudgetError) as caught:
            ranger_nn.plan(chain("standardised", 64, depth), (1, 3, 64, 64), memory=1000)
        least.append(caught.value.least)
    weights = 64 * 64 * 9 * 4
    assert least[1] - least[0] < 4 * weights


def test_said_in_the_plan() -> None:
    """A plan that makes weights again says so."""
    model = chain("standardised", 64, 4)
    with pytest.raises(ranger_nn.BudgetError) as caught:
        ranger_nn.plan(model, (1, 3, 64, 64), memory=1000)
    assert "weights that forward computes" in str(ranger_nn.plan(model, (1, 3, 64, 64), memory=caught.value.least))
