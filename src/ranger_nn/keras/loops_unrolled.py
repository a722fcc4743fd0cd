"""Loops on TensorFlow for ONNX, written out: converters know no `tf.while_loop` that fills arrays under a condition.

As on PyTorch, steps are integers and a branch is an `if`. For inference only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from ranger_nn.keras.loops import Backward, Forward, IntegerSteps
from ranger_nn.keras.loops_tensorflow import TensorFlowLoops


class UnrolledLoops(IntegerSteps, TensorFlowLoops):
    """One step after the other in the graph: the body is traced for each."""

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """A constant: converters do not know what is made at run time."""
        return tf.zeros(shape, dtype)

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """A slice; a gather where it hangs over."""
        size = x.shape[dim]
        if start >= 0 and start + length <= size:
            return x[(slice(None),) * dim + (slice(start, start + length),)]
        return tf.gather(x, [min(max(i, 0), size - 1) for i in range(start, start + length)], axis=dim)

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
