"""Rows picked by indices that constants decide: near a line, backwards, and in no order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ranger_nn
from ranger_nn.ops.movement import line
from tests.nets import between
from tests.support import compare, random_inputs
from tests.torch.cut import WAYS, check_cut, sized

SHAPE = (2, 3, 13, 11)
NEAR = (1, 0, 2, 4, 3, 5, 5, 6, 8, 7, -4, 11, 12)
FINISHED = ("flip", "index", "gather", "repeat", "slice", "mean")
"""What is picked from in no order, or backwards, is finished before; so is one row that all read."""


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30)
    | st.builds(range, st.integers(0, 9), st.integers(10, 60), st.integers(1, 4)).map(list)
)
def test_a_line_covers_its_indices(places: list[int]) -> None:
    """Whatever they are, an interval of outputs reads all of its own."""
    reach = line(places)
    for start in range(len(places)):
        for stop in range(start + 1, len(places) + 1):
            lo, hi = reach.needs(start, stop)
            assert lo <= min(places[start:stop]) and max(places[start:stop]) < hi
    step = places[1] - places[0] if len(places) > 1 else 1
    if places == [places[0] + step * n for n in range(len(places))] and step:
        assert reach.needs(0, 1) == (places[0], places[0] + 1)


class Near(nn.Module):
    """Indices from a buffer, a literal and an expression; a step, a repetition, a mesh of rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.tensor(NEAR))
        self.register_buffer("columns", torch.arange(11) // 2)

    def forward(self, x: Tensor) -> Tensor:
        twice = x[:, :, torch.arange(26) // 2][:, :, torch.arange(0, 26, 2)]
        moved = x.index_select(2, self.places % 13) + x[:, :, self.places] + x[..., torch.tensor([0, 1, *range(9)])]
        mesh = x[:, :, self.places[:, None], self.columns]
        gathered = x.gather(2, (self.places % 13).clamp(0, 12).view(1, 1, 13, 1).expand(x.shape))
        return twice * moved + mesh * gathered + x.take_along_dim((self.places % 13)[None, None, :, None], 2)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_near_a_line(schedule: str, regions: tuple[int, ...]) -> None:
    """A halo is all that it takes: nothing is whole."""
    check_cut(between(Near()), SHAPE, schedule, regions)


class Far(nn.Module):
    """Rows and columns backwards, in no order, and again; a turned image turned back."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = x[:, :, torch.arange(13) * 5 % 13] + x.index_select(2, torch.tensor([12, 0, 11, 1] * 3 + [6]))
        turned = torch.rot90(torch.rot90(x, 1, (2, 3)).tanh(), 3, (2, 3)) + x.rot90(2, (3, 2)) + x.flipud()
        again = x.repeat(1, 1, 2, 1)[:, :, 5:18] + x.mean(1, keepdim=True).tile(6, 1, 1)
        return mixed * turned + x.flip(2).sin() * again + x[:, :, torch.arange(12, -1, -1)] * x.flip(3)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_in_no_order(schedule: str, regions: tuple[int, ...]) -> None:
    """The result is cut all the same."""
    check_cut(between(Far()), SHAPE, schedule, regions, FINISHED)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_a_few_of_many(schedule: str, regions: tuple[int, ...]) -> None:
    """Fewer rows than regions, one row, and rows from both ends."""
    check_cut(between(lambda x: x[:, :, [2, 6, 10]]), SHAPE, schedule, regions)
    check_cut(
        between(lambda x: x * x[:, :, torch.tensor([7])] + x[:, :, [0, -1]].mean(2, keepdim=True)),
        SHAPE,
        schedule,
        regions,
        FINISHED,
    )


def test_indices_belong_to_the_plan() -> None:
    """Other numbers in a buffer make another plan; a buffer that forward moves is read as it is."""
    model = sized(between(Near()), SHAPE)
    small = ranger_nn.regionalize(model, regions=(3,), schedule="slide")
    (x,) = random_inputs((SHAPE,))
    with torch.no_grad():
        for shift in (0, 3, 12):
            model[1].places.copy_((torch.tensor(NEAR) + shift) % 13)
            torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-9)


def test_indices_that_forward_moves() -> None:
    """They are no constants: each call has its own."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.tensor(NEAR) % 13)

        def forward(self, x: Tensor) -> Tensor:
            self.places.add_(1).remainder_(13)
            return x.index_select(2, self.places)

    theirs, ours = (sized(between(Moving()), SHAPE) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    small = ranger_nn.regionalize(ours, regions=(3,), schedule="slide")
    (x,) = random_inputs((SHAPE,))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(small(x), theirs(x), rtol=1e-11, atol=1e-9)


def test_indices_that_the_input_decides() -> None:
    """As ever: the dimension is read whole."""
    model = between(lambda x: x.gather(2, x.argsort(2)) + x[:, :, x[0, 0, :, 0].argsort()])
    compare(
        sized(model, SHAPE), lambda m: ranger_nn.regionalize(m, regions=(3,), schedule="slide"), random_inputs((SHAPE,))
    )
