"""Pieces of any length along the axes that are cut, in one to three dimensions: untouched numbers and gradients.

Convolutions alternate with what `tests/nets/pieces.py` draws; sizes start at one row. Without gradients the plan is
another one, so that it is tried too.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import nn

import ranger_nn
from tests.exactness.test_property import Draw
from tests.nets.pieces import PIECES, Chop, Difference, OneRow, Wrap, piece
from tests.support import check, compare, random_inputs, randomise, run

EXAMPLES = int(os.environ.get("RANGER_EXAMPLES", "40"))
LARGEST = {1: 40, 2: 13, 3: 6}  # rows along an axis: values stay small, and a region of one row is one of many
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def networks(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A network of pieces and convolutions, and its input shape."""
    ndim = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 2)), 2, *(draw(st.integers(1, LARGEST[ndim])) for _ in range(ndim)))
    layers, x = [], torch.zeros(shape)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            layer: nn.Module = CONVOLUTIONS[ndim](x.shape[1], 2, draw(st.sampled_from([1, 3])), padding="same")
        else:
            kind = draw(st.sampled_from(PIECES))
            layer = piece(kind, lambda low, high: draw(st.integers(low, high)), ndim, x.shape[1], list(x.shape[2:]))
        try:
            y = layer(x).detach()
        except (RuntimeError, ValueError):
            continue
        if min(y.shape) > 0 and y.numel() < 4096:
            layers, x = [*layers, layer], y
    assume(layers)
    return nn.Sequential(*layers), shape


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RANGER_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(
    case=networks(),
    regions=st.tuples(*[st.integers(1, 9)] * 3),
    schedule=st.sampled_from(["tile", "slide", None]),
)
def test_random_pieces(
    case: tuple[nn.Sequential, tuple[int, ...]], regions: tuple[int, ...], schedule: str | None
) -> None:
    """Outputs and gradients by random regions, and the plan without gradients."""
    network, shape = case
    randomise(network)
    network, inputs = network.double(), random_inputs((shape,))
    note(f"{network}\n{[vars(m) for m in network]}\ninput {shape}")
    wanted = run(copy.deepcopy(network), inputs)
    small = ranger_nn.regionalize(network, regions=regions[: len(shape) - 2], schedule=schedule)
    check(run(small, inputs), wanted)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), wanted.outputs[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", ["tile", "slide"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [lambda d: Wrap(d, 1, 1), lambda d: OneRow(d, 0, "swap"), lambda d: Difference(d, "own", True), lambda d: Chop(d, (1, 2), 1)],
    ids=["wrap", "swap", "difference", "chop"],
)  # fmt: skip
def test_one_row(make: type[nn.Module], ndim: int, schedule: str) -> None:
    """A piece of one row along each axis in turn, regions of two rows."""
    for axis in range(2, 2 + ndim):
        model = nn.Sequential(CONVOLUTIONS[ndim](2, 2, 3, padding=1), make(axis), CONVOLUTIONS[ndim](2, 2, 3)).double()
        inputs = random_inputs(((1, 2, *[7] * ndim),))
        compare(model, lambda m: ranger_nn.regionalize(m, regions=[2] * ndim, schedule=schedule), inputs)
