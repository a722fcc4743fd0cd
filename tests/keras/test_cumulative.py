"""Sums and products of all rows so far, of which the rows are cut: totals of blocks come first."""

from __future__ import annotations

from typing import Any

from keras import ops

from tests.keras.between import check


def rows(h: Any) -> Any:
    """Along rows, columns and channels; of a number of each place, and of integers."""
    found = ops.cumsum(h, axis=1) + ops.cumprod(1.0 + 0.1 * h, axis=1) + ops.cumsum(ops.cumsum(h, axis=2), axis=-1)
    places = ops.cast(ops.cumsum(ops.cast(h > 0, "int32"), axis=1), h.dtype)
    return found / (1.0 + places)


def steps(h: Any) -> Any:
    """The mean of all steps so far, as cumulative norms have it."""
    return h - ops.cumsum(h, axis=1) / ops.arange(1.0, 1.0 + h.shape[1])[:, None]


def test_of_an_image() -> None:
    """A row for each block is finished before."""
    plans = check(rows, (2, 17, 7, 3), 4, whole=3)
    assert all("before" in w for plan in plans for w in plan.whole)


def test_of_a_series() -> None:
    """More steps than parts of a step."""
    plans = check(steps, (2, 331, 3), 40, whole=1)
    assert all("before" in w for plan in plans for w in plan.whole)
