"""Circular padding along the axis that is cut: regions across the seam, the untouched numbers, a fraction of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ranger_nn
from ranger_nn.bounds.axes import find_axes
from ranger_nn.bounds.circle import pieces
from ranger_nn.torch.capture import capture
from tests.memory.test_promise import peak, work_of
from tests.support import compare, random_inputs


def conv(a: int, b: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(a, b, 3, stride, 1, padding_mode="circular")


class Torus(nn.Module):
    """Both axes go round; with a norm over space, a stride, a roll, a pool or a positional map in the middle."""

    def __init__(self, middle: str = "") -> None:
        super().__init__()
        self.middle, self.norm = middle, nn.GroupNorm(2, 4)
        self.first, self.second, self.last = conv(3, 4), conv(4, 4, 2 if middle == "stride" else 1), conv(4, 2)
        self.place = nn.Parameter(torch.randn(1, 4, 24, 18))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.first(x))
        if self.middle == "norm":
            y = self.norm(y)
        elif self.middle == "roll":
            y = torch.roll(y, (3, -5), (2, 3))
        elif self.middle == "pool":
            y = F.max_pool2d(y, 2)
        elif self.middle == "place":
            y = y + self.place
        elif self.middle == "tokens":
            y = torch.sigmoid(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
        return self.last(self.second(y).relu())


@pytest.mark.parametrize("regions", [(5, 18), (24, 7), (1, 18), (5, 7)], ids=str)
@pytest.mark.parametrize("middle", ["", "norm", "stride", "roll", "pool", "place", "tokens"])
def test_numbers(middle: str, regions: tuple[int, int]) -> None:
    """Forward and gradient; with two axes cut only one of them goes round."""
    inputs = random_inputs(((2, 3, 24, 18),))
    compare(Torus(middle).double(), lambda m: ranger_nn.regionalize(m, regions=regions, schedule="tile"), inputs)


@pytest.mark.parametrize(("shape", "round_"), [((1, 3, 24, 18), True), ((1, 3, 23, 18), False)])
def test_an_axis_goes_round_where_periods_divide(shape: tuple[int, ...], round_: bool) -> None:
    """Not where a stride leaves a row over: the next circle is another one. The numbers stay."""
    model = Torus("stride").double()
    rows = find_axes(capture(model, (torch.zeros(shape).double(),), grad=False).graph)[0]
    assert (rows.periods is not None) == round_
    compare(model, lambda m: ranger_nn.regionalize(m, regions=(5, 18), schedule="tile"), random_inputs((shape,)))


class Ends(nn.Module):
    """Zero padding on the axis beside circular padding: it has ends after all."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(torch.tanh(x), (0, 0, 1, 1), mode="circular") * 2
        return F.avg_pool2d(y, 3, 1, 1)


def test_an_axis_with_ends_does_not_go_round() -> None:
    """And has the numbers of the untouched network."""
    inputs = random_inputs(((1, 3, 13, 11),))
    assert all(a.periods is None for a in find_axes(capture(Ends(), inputs, grad=False).graph))
    compare(Ends(), lambda m: ranger_nn.regionalize(m, regions=(3, 11), schedule="tile"), inputs)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_fraction_of_the_memory(training: bool) -> None:
    """The planner takes tiles by itself; measured <= projected <= allowed."""
    model, x = nn.Sequential(conv(3, 8), nn.GELU(), conv(8, 8), nn.GELU(), conv(8, 2)), torch.randn(1, 3, 256, 256)
    untouched = ranger_nn.plan(model, x, training=training).untouched
    small = ranger_nn.regionalize(model, allowed := untouched // 3)
    plan = ranger_nn.plan(model, x, allowed, training=training)
    measured = peak(work_of(small, x, training))
    assert measured <= plan.projected <= allowed


@pytest.mark.parametrize("rows", [(-2, 3), (-7, 1), (4, 9), (0, 6), (-6, 18)], ids=str)
def test_pieces_are_the_rows_modulo_the_period(rows: tuple[int, int]) -> None:
    """In order, each inside of one period."""
    found: list[Any] = [(at + k, start + k) for at, start, n in pieces(rows, 6) for k in range(n)]
    assert found == [(r, r % 6) for r in range(*rows)]
