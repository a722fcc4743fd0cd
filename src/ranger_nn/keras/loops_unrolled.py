"""Loops written out for ONNX, on any back end: converters know no loop that fills arrays under a condition, or whose body
reads what stands outside.

As on PyTorch, steps are integers and a branch is an `if`. For inference only: what backward needs of `loops.Loops` is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from keras import ops

from ranger_nn.keras.loops import Backward, Forward, IntegerSteps
from ranger_nn.keras.pieces import cut


class UnrolledLoops(IntegerSteps):
    """One step after the other in the graph: the body is traced for each."""

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """A constant: converters do not know what is made at run time."""
        return ops.zeros(shape, dtype)

    def own(self, x: Any) -> Any:
        """Arrays are their own."""
        return x

    def used(self, windows: Any, value: int) -> None:
        """The runtime knows."""

    def used_all(self, windows: Any) -> None:
        """The runtime knows."""

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """A slice; the nearest row again where it hangs over."""
        size = x.shape[dim]
        if start >= 0 and start + length <= size:
            return cut(x, dim, start, length)
        return ops.take(x, [min(max(i, 0), size - 1) for i in range(start, start + length)], axis=dim)

    def split(self, x: Any, dim: int, places: Sequence[int]) -> list[Any]:
        """Slices."""
        ends = [0, *places, x.shape[dim]]
        return [cut(x, dim, a, b - a) for a, b in pairwise(ends)]

    def open(self, shape: Sequence[int], dtype: str, dim: int, rate: int, count: int, size: int) -> Any:
        """A list."""
        return []

    def put(self, sink: Any, dim: int, i: Any, count: int, rows: Any, first: Any) -> Any:
        """Longer by a part."""
        return [*sink, rows] if 0 <= i < count else sink

    def close(self, sink: Any, dim: int, first: int, size: int) -> Any:
        """Parts joined along `dim`."""
        return cut(ops.concatenate(sink, axis=dim), dim, -first, size)

    def differentiable(self, forward: Forward, backward: Backward, args: Sequence[Any]) -> list[Any]:
        """Without gradients."""
        return forward(args, False)[0]
