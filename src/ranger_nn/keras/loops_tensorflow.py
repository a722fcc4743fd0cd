"""Loops on TensorFlow: see `loops.Loops`. In eager mode, in graphs and under XLA.

Gradients of stored values are added up by slices written in place, where a graph is known to be for TensorFlow's own
executor (`loops.tracing`): `TensorStridedSliceUpdate` does so wherever no one else holds the tensor. XLA has that operator
for constant places alone, and the scatter that it has instead copies the whole tensor each time in an executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from ranger_nn.keras.loops import Backward, Block, Body, Forward, clipped, now_tracing, where_inside

FEW = 1024
"""Numbers that may be made at any time."""


class TensorFlowLoops:
    """`tf.while_loop`, one step at a time: steps that run together would need memory together."""

    def loop(self, start: Any, stop: Any, body: Body, carry: Any) -> Any:
        """The body is traced once, and its operators run in the order in which they are traced."""
        found = tf.while_loop(
            lambda t, _: t < stop,
            lambda t, c: (t + 1, in_order(body, t, c)),
            (tf.convert_to_tensor(start), carry),
            parallel_iterations=1,
        )
        return found[1]

    def branch(self, on: Any, then: Callable[[], list[Any]], other: Callable[[], list[Any]]) -> list[Any]:
        """`tf.cond`."""
        found = tf.cond(on, lambda: tuple(in_order(then)), lambda: tuple(in_order(other)))
        return list(found) if isinstance(found, tuple | list) else [found]

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Made when the graph runs: `tf.zeros` becomes a constant of the graph, which is there for good."""
        return tf.raw_ops.Empty(shape=list(shape), dtype=tf.as_dtype(dtype), init=True)

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """A slice; a gather where it hangs over."""
        size = x.shape[dim]
        shape = [length if d == dim else n for d, n in enumerate(x.shape)]
        if size < length:
            return tf.gather(x, clipped(start, length, size), axis=dim)
        found = tf.cond(
            tf.logical_and(start >= 0, start + length <= size),
            lambda: _slice(x, dim, start, length),
            lambda: tf.gather(x, clipped(start, length, size), axis=dim),
        )
        return tf.ensure_shape(found, shape)

    def own(self, x: Any) -> Any:
        """Tensors are their own."""
        return x

    def used(self, windows: Any, value: int) -> None:
        """The compiler knows."""

    def used_all(self, windows: Any) -> None:
        """The compiler knows."""

    def split(self, x: Any, dim: int, places: Sequence[int]) -> list[Any]:
        """Their gradient is a join; that of slices would be as many zeros as the whole."""
        sizes = [b - a for a, b in zip([0, *places], [*places, x.shape[dim]], strict=True)]
        return list(tf.split(x, sizes, axis=dim))

    def mask(self, x: Any, dim: int, first: Any, size: int, fill: float) -> Any:
        """Where; in inference only in the steps that hang over. (The gradient of a condition is traced out of order.)"""
        spare = size - x.shape[dim]
        if not _in_place() or now_tracing().gradients or spare < 0:
            return where_inside(x, dim, first, size, fill)
        inside = tf.bitcast(first, tf.uint32) <= spare  # what is below zero is large
        return tf.cond(inside, lambda: x, lambda: where_inside(x, dim, first, size, fill))

    def add(self, x: Any, dim: int, start: Any, rows: Any) -> Any:
        """A slice in place, by scatter where it hangs over; else by scatter, which XLA does in place."""
        length, size, rows = rows.shape[dim], x.shape[dim], tf.cast(rows, x.dtype)

        def scatter() -> Any:
            lead = [tf.range(n) for n in x.shape[:dim]]
            index = tf.meshgrid(*lead, clipped(start, length, size), indexing="ij")
            return tf.tensor_scatter_nd_add(x, tf.stack(index, -1), rows)

        if size < length or not _in_place():
            return scatter()
        inside = tf.logical_and(start >= 0, start + length <= size)
        found = tf.cond(inside, lambda: _written(x, dim, start, _slice(x, dim, start, length) + rows), scatter)
        return tf.ensure_shape(found, x.shape)

    def open(self, shape: Sequence[int], dtype: str, dim: int, rate: int, count: int, size: int) -> Any:
        """All rows, written in place; else a TensorArray, whose parts keep the memory between them from the allocator."""
        if _in_place():
            whole = [rate * count if d == dim else n for d, n in enumerate(shape)]
            return tf.raw_ops.Empty(shape=whole, dtype=tf.as_dtype(dtype))
        part = [rate if d == dim else n for d, n in enumerate(shape)]
        return tf.TensorArray(dtype, size=count, element_shape=part)

    def put(self, sink: Any, dim: int, i: Any, count: int, rows: Any, first: Any) -> Any:
        """Written at most once in a loop, where it counts."""
        rows, ok = tf.cast(rows, sink.dtype), tf.logical_and(i >= 0, i < count)
        if isinstance(sink, tf.TensorArray):
            return _rebuilt(sink, tf.cond(ok, lambda: sink.write(i, rows).flow, lambda: sink.flow))
        found = tf.cond(ok, lambda: _written(sink, dim, i * rows.shape[dim], rows), lambda: sink)
        return tf.ensure_shape(found, sink.shape)

    def close(self, sink: Any, dim: int, first: int, size: int) -> Any:
        """The rows wanted: of parts joined along `dim` a view, where nothing comes before it in memory."""
        if not isinstance(sink, tf.TensorArray):
            return sink if sink.shape[dim] == size else _slice(sink, dim, -first, size)
        x, part = sink.stack(), sink.element_shape.as_list()
        if any(n != 1 for n in part[:dim]):
            x = tf.transpose(x, [*range(1, dim + 1), 0, *range(dim + 1, len(part) + 1)])
            return _slice(tf.reshape(x, [*part[:dim], -1, *part[dim + 1 :]]), dim, -first, size)
        x = _slice(tf.reshape(x, [-1, *part[dim + 1 :]]), 0, -first, size)
        return tf.reshape(x, [*part[:dim], size, *part[dim + 1 :]])

    def stack(self, count: int, like: Sequence[Block]) -> Any:
        """A TensorArray for each block; what is not written is zero."""
        return [tf.TensorArray(dtype, size=count, element_shape=shape, clear_after_read=False) for shape, dtype in like]

    def push(self, stack: Any, i: Any, blocks: Sequence[Any]) -> Any:
        """Written."""
        return [array.write(i, tf.cast(b, array.dtype)) for array, b in zip(stack, blocks, strict=True)]

    def blocks(self, stack: Any, i: Any, like: Sequence[Block]) -> list[Any]:
        """Read, or slices."""
        return [array.read(i) if isinstance(array, tf.TensorArray) else array[i] for array in stack]

    def full(self, stack: Any, joined: bool) -> Any:
        """As it is: joined, it would be there twice for a moment. A SavedModel holds gradients, and no TensorArray."""
        return [array.stack() for array in stack] if joined else stack

    def vjp(
        self, function: Callable[..., list[Any]], args: Sequence[Any]
    ) -> tuple[list[Any], Callable[..., list[Any]]]:
        """A tape."""
        args = [tf.identity(a) for a in args]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(args)
            results = function(*args)

        def pull(grads: Sequence[Any]) -> list[Any]:
            given = [tf.cast(g, r.dtype) for g, r in zip(grads, results, strict=True)]
            return list(tape.gradient(results, args, given, unconnected_gradients=tf.UnconnectedGradients.ZERO))

        return results, pull

    def differentiable(self, forward: Forward, backward: Backward, args: Sequence[Any]) -> list[Any]:
        """`tf.custom_gradient`."""
        args = [tf.convert_to_tensor(a) for a in args]
        watched = _watched(args)
        if not now_tracing().gradients or (tf.executing_eagerly() and not any(watched)):
            return forward(args, False)[0]
        # all, where no tape is active here: the function may be differentiated later
        wanted = [a.dtype.is_floating and (w or not any(watched)) for a, w in zip(args, watched, strict=True)]

        @tf.custom_gradient
        def run(*args: Any) -> Any:
            results, saved = forward(args, True)

            def back(*grads: Any) -> Any:
                found = backward(args, saved, results, grads, wanted)
                return tuple(None if g is None else tf.cast(g, a.dtype) for g, a in zip(found, args, strict=True))

            return tuple(results), back

        found = run(*args)
        return list(found) if isinstance(found, tuple | list) else [found]


def in_order(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), traced into a graph of its own, with an edge from each operator that makes more than a few numbers
    to the next. A graph executor runs whatever is ready: the gradients of weights would wait, with all that they need,
    while those of activations go on.
    """
    found = function(*args)
    if tf.executing_eagerly():
        return found
    before = None
    for op in tf.compat.v1.get_default_graph().get_operations():
        if op.type in ("Placeholder", "Const") or all(_few(y) for y in op.outputs):
            continue
        if before is not None:
            op._add_control_input(before)
        before = op
    return found


def _in_place() -> bool:
    return now_tracing().executor and not tf.executing_eagerly()


def _few(x: Any) -> bool:
    count = x.shape.num_elements()
    return count is not None and count < FEW and x.dtype != tf.variant


def _slice(x: Any, dim: int, start: Any, length: int) -> Any:
    begin = [start if d == dim else 0 for d in range(len(x.shape))]
    shape = tf.shape(x)
    size = [length if d == dim else (n if n is not None else shape[d]) for d, n in enumerate(x.shape)]
    return tf.slice(x, begin, size)


def _written(x: Any, dim: int, start: Any, rows: Any) -> Any:
    """x with `rows` at `start`, which lie within it; x is used up."""
    begin = [start if d == dim else 0 for d in range(dim + 1)]
    end = [start + rows.shape[dim] if d == dim else n for d, n in enumerate(x.shape[: dim + 1])]
    return tf.raw_ops.TensorStridedSliceUpdate(input=x, begin=begin, end=end, strides=[1] * (dim + 1), value=rows)


def _rebuilt(sink: Any, flow: Any) -> Any:
    from tensorflow.python.ops import tensor_array_ops

    return sink if tf.executing_eagerly() else tensor_array_ops.build_ta_with_new_flow(sink, flow)


def _watched(args: Sequence[Any]) -> list[bool]:
    """Whether an active tape asks for their gradients."""
    from tensorflow.python.eager import record

    return [record.should_record_backprop([a]) for a in args]
