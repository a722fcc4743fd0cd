"""Rows picked by indices that are known when the plan is made: near a line, backwards, and in no order."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tests.keras.between import check

SHAPE = (2, 17, 7, 3)
NEAR = [1, 0, 2, 4, 3, 5, 5, 6, 8, 7, 9, -7, 11, 13, 12, 14, -1]
FAR = np.arange(17) * 5 % 17


def near(h: Any) -> Any:
    """Rows a little out of order, each second one, and repeated ones."""
    h = h + ops.take(h, NEAR, axis=1)
    twice = ops.take(h, np.arange(34) // 2, axis=1)
    return ops.take(twice, np.arange(0, 34, 2), axis=1) + ops.take(h, np.arange(7)[::-1], axis=2)


def far(h: Any) -> Any:
    """The last row first, rows in no order, all rows again."""
    sliced = ops.flip(h, axis=1) if keras.backend.backend() == "torch" else h[:, ::-1]  # it has no such slices
    back = ops.flip(h, axis=1) + sliced + ops.flip(h, axis=(0, 2))
    return ops.concatenate([back + ops.take(h, FAR, axis=1), h], axis=1) + ops.tile(h, (1, 2, 1, 1))


def test_near_a_line() -> None:
    """A halo is all that it takes."""
    check(near, SHAPE, 4)


def test_in_no_order() -> None:
    """What is picked from is finished before; the result is cut."""
    plans = check(far, SHAPE, 4, whole=4)
    assert all("reads all of an input" in w for plan in plans for w in plan.whole)
