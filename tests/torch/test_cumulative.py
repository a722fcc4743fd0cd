"""Sums, products and extrema of all rows so far, of which the rows are cut: with a state carried, or in blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from tests.nets import between
from tests.support import compare, random_inputs
from tests.torch.cut import WAYS, check_cut

SHAPE = (2, 3, 13, 11)
SERIES = (2, 2, 131)
FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cumsum": lambda x, d: x.cumsum(d),
    "cumprod": lambda x, d: (1 + 0.3 * x).cumprod(d),
    "logcumsumexp": lambda x, d: x.logcumsumexp(d),
    "cummax": lambda x, d: x.cummax(d).values,
    "cummin": lambda x, d: x.cummin(d)[0],
}


class Series(nn.Module):
    """Between two convolutions of a series."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.stem, self.head = function, nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.stem(x)))


def blocks(*names: str) -> list[str]:
    """Of the operators in blocks, the one that may be whole."""
    return [f"{name}_{n}_before" for name in names for n in range(4)]


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
@pytest.mark.parametrize("name", FORMS)
def test_of_an_image(name: str, schedule: str, regions: tuple[int, ...]) -> None:
    """Along rows, columns and channels: a row for each block is finished before."""
    form = FORMS[name]
    check_cut(between(lambda x: form(x, 2) * form(x.tanh(), -1) + form(x, 1)), SHAPE, schedule, regions, blocks(name))


@pytest.mark.parametrize("name", FORMS)
def test_of_a_series(name: str) -> None:
    """In inference the last step goes along, and nothing is whole; tiles and training go in blocks."""
    form = FORMS[name]
    model = Series(lambda x: form(x, 2) + form(x.sin(), 2) * x)
    inference, training = check_cut(model, SERIES, "slide", (7,), blocks(name))
    assert inference.whole == () and len(inference.sweeps) == 1
    assert len(training.sweeps) == 2
    small = ranger_nn.regionalize(model, regions=(9,), schedule="tile")
    (x,) = random_inputs((SERIES,))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_an_integral_image(schedule: str, regions: tuple[int, ...]) -> None:
    """Sums of boxes of any size, as a difference of four."""

    def boxes(x: Tensor) -> Tensor:
        total = nn.functional.pad(x.cumsum(2).cumsum(3), (3, 2, 3, 2), mode="replicate")
        total = total * (torch.arange(18) > 2).to(x)[:, None] * (torch.arange(16) > 2).to(x)
        return (total[..., 5:, 5:] - total[..., :-5, 5:] - total[..., 5:, :-5] + total[..., :-5, :-5]) / 25

    check_cut(between(boxes), SHAPE, schedule, regions, blocks("cumsum"))


class CumulativeNorm(nn.Module):
    """Conv-TasNet's (Luo and Mesgarani 2019): moments of all steps so far."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.randn(channels, 1)), nn.Parameter(torch.randn(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[2] + 1).to(x) * x.shape[1]
        mean, power = x.sum(1).cumsum(1) / count, x.square().sum(1).cumsum(1) / count
        spread = (power - mean.square())[:, None]
        return self.gain * (x - mean[:, None]) / (spread + 1e-8).sqrt() + self.bias


def test_cumulative_norms() -> None:
    """Several in a row: one sweep in inference."""
    model = nn.Sequential(
        Series(CumulativeNorm(6)), nn.PReLU(), nn.Conv1d(3, 6, 3, padding=2, dilation=2), CumulativeNorm(6)
    )
    inference, _ = check_cut(model, SERIES, "slide", (7,), blocks("cumsum"))
    assert inference.whole == () and len(inference.sweeps) == 1


class Ties(nn.Module):
    """Equal values, zeros, one row more than blocks have, other types, and indices beside values."""

    def forward(self, y: Tensor) -> list[Tensor]:
        counts = (y > 0).cumsum(2) + y.long().cumsum(2, dtype=torch.int32)
        largest = y.long().cummax(2).values + y.long().cummin(2).values
        values, places = y.cummax(2)
        return [y.cummax(2).values, y.cummin(2).values, y.cumprod(2), (counts + largest).to(y), values + places.to(y)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17])
@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_ties_and_lengths(size: int, schedule: str, regions: tuple[int, ...]) -> None:
    """The last of equal elements has the gradient, in whichever block; a zero does not end a product's gradient."""
    inputs = tuple(x.round().clamp(-1, 1) for x in random_inputs(((1, 2, size, 5),)))
    compare(Ties(), lambda m: ranger_nn.regionalize(m, regions=regions, schedule=schedule), inputs)


@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """Totals are added up in 32 bits: no further from the sum in 64 bits than PyTorch's own."""
    (x,) = random_inputs(((1, 2, 401),))
    x = (x / 100).to(dtype)
    form = FORMS[name]

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return form(x + 0.5, 2)

    for grad in (False, True):
        given = x.clone().requires_grad_(grad)
        ours, theirs = ranger_nn.regionalize(Sum(), regions=(30,), schedule="slide")(given), Sum()(given)
        true = form((given + 0.5).double(), 2)
        assert (ours - true).abs().max() <= 1.01 * (theirs - true).abs().max() + 1e-6
