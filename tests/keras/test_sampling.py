"""Samples at places that the network computes: the places are cut, what is sampled is finished before."""

from __future__ import annotations

from typing import Any

import pytest
from keras import ops

from tests.keras.between import check

SHAPE = (1, 13, 11, 3)


@pytest.mark.parametrize(("order", "mode"), [(1, "constant"), (1, "reflect"), (0, "nearest")])
def test_map_coordinates(order: int, mode: str) -> None:
    """Rows and columns moved by what a layer says."""

    def moved(h: Any) -> Any:
        rows, columns = ops.meshgrid(*(ops.arange(n, dtype="float32") for n in SHAPE[1:3]), indexing="ij")
        flow = 3 * ops.tanh(h[0])
        places = ops.stack([flow[..., 0] + rows, flow[..., 1] + columns])
        return h * ops.image.map_coordinates(h[0, :, :, 2], places, order, mode)[None, :, :, None]

    plans = check(moved, SHAPE, 4, whole=1)
    assert all("mapcoordinates" in w and "reads all of an input" in w for plan in plans for w in plan.whole)
