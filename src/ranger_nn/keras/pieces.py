"""Rows of a value at hand in a step, in one piece or in several.

    before the step     [ 0 ............. kept )               the window
    made by the step                  [ kept ... kept + rate )

Where a reader asks for all of them, they are joined once. Where every reader asks for a few (a skip connection that is
kept for long: old rows by the decoder, new ones by the encoder) the window is split where they begin and end instead:
nothing is copied that no one reads, and the gradient of a split is a join, that of a slice as many zeros as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops


class Pieces:
    """Arrays one after the other along `dim`."""

    def __init__(self, dim: int, arrays: Sequence[Any]) -> None:
        """Each begins where the one before ends."""
        self.dim, self.arrays = dim, list(arrays)

    def rows(self, start: int, length: int) -> Any:
        """Rows [start, start + length)."""
        found, at = [], 0
        for x in self.arrays:
            n = x.shape[self.dim]
            lo, hi = max(start - at, 0), min(start + length - at, n)
            if lo < hi:
                found.append(cut(x, self.dim, lo, hi - lo))
            at += n
        return found[0] if len(found) == 1 else ops.concatenate(found, axis=self.dim)


def cut(x: Any, dim: int, start: int, length: int) -> Any:
    """Rows [start, start + length) of x: x itself where these are all."""
    if start == 0 and length == x.shape[dim]:
        return x
    return x[(slice(None),) * dim + (slice(start, start + length),)]
