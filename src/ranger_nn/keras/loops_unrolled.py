"""Loops on TensorFlow for ONNX, written out: converters know no `tf.while_loop` that fills arrays under a condition.

As on PyTorch, steps are integers and a branch is an `if`. For inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from ranger_nn.keras.loops import Backward, Body, Forward, where_inside
from ranger_nn.keras.loops_tensorflow import TensorFlowLoops


class UnrolledLoops(TensorFlowLoops):
    """One step after the other in the graph."""

    def loop(self, start: int, stop: int, body: Body, carry: Any) -> Any:
        """The body is traced for each step."""
        for t in range(start, stop):
            carry = body(t, carry)
        return carry

    def branch(self, on: Any, then: Callable[[], list[Any]], other: Callable[[], list[Any]]) -> list[Any]:
        """`if`."""
        return then() if on else other()

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """A slice; a gather where it hangs over."""
        size = x.shape[dim]
        if start >= 0 and start + length <= size:
            return x[(slice(None),) * dim + (slice(start, start + length),)]
        return tf.gather(x, [min(max(i, 0), size - 1) for i in range(start, start + length)], axis=dim)

    def mask(self, x: Any, dim: int, first: Any, size: int, fill: float) -> Any:
        """x itself where all of it is inside."""
        return x if first >= 0 and first + x.shape[dim] <= size else where_inside(x, dim, first, size, fill)

    def open(self, shape: Sequence[int], dtype: str, dim: int, rate: int, count: int, size: int) -> Any:
        """A list."""
        return []

    def put(self, sink: Any, dim: int, i: Any, count: int, rows: Any, first: Any) -> Any:
        """Longer by a part."""
        return [*sink, rows] if 0 <= i < count else sink

    def close(self, sink: Any, dim: int, first: int, size: int) -> Any:
        """Parts joined along `dim`."""
        return tf.concat(sink, dim)[(slice(None),) * dim + (slice(-first, size - first),)]

    def differentiable(self, forward: Forward, backward: Backward, args: Sequence[Any]) -> list[Any]:
        """Without gradients."""
        return forward(args, False)[0]
