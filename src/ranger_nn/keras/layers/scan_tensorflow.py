"""The linear scan on TensorFlow: loops of `tf.while_loop`, which XLA takes too, and a backward of its own."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ranger_nn.aggregate.monoid import State
from ranger_nn.layers.scan import AFFINE, chunked, gradients, slice_lengths

LENGTH = 32
"""Steps of a slice: see `benchmarks/linear_recurrence.py`."""


class Names:
    """The array API names that the neutral code calls."""

    concat, reshape, zeros_like, ones_like = tf.concat, tf.reshape, tf.zeros_like, tf.ones_like


class Loops:
    """Local computation by `while_loop`, time first; the number of steps may be unknown."""

    def summary(self, a: Any, b: Any, reverse: bool) -> State:
        """Merge the steps in order."""
        a, b = _time_first(a), _time_first(b)
        length = a.shape[0]

        def merge(i: Any, decay: Any, value: Any) -> tuple[Any, Any, Any]:
            t = length - 1 - i if reverse else i
            return i + 1, *AFFINE.merge(Names, (decay, value), (a[t], b[t]))

        return tf.while_loop(lambda i, *_: i < length, merge, (0, *AFFINE.empty(Names, a[0], b[0])))[1:]

    def run(self, a: Any, b: Any, start: Any, reverse: bool, out: Any) -> Any:
        """The step loop, in all slices at once."""
        a, b = _time_first(a), _time_first(b)
        length = tf.shape(a)[0] if a.shape[0] is None else a.shape[0]

        def step(i: Any, state: Any, states: Any) -> tuple[Any, Any, Any]:
            t = length - 1 - i if reverse else i
            state = AFFINE.finish(Names, (a[t], b[t]), state)
            return i + 1, state, states.write(t, state)

        states = tf.TensorArray(b.dtype, length, element_shape=b.shape[1:])
        states = tf.while_loop(lambda i, *_: i < length, step, (0, start, states))[2].stack()
        return tf.transpose(states, (1, 2, 0, *range(3, len(b.shape))))


def _time_first(x: Any) -> Any:
    """(batch, slices, length, ...) -> (length, batch, slices, ...)."""
    return tf.transpose(x, (2, 0, 1, *range(3, len(x.shape))))


def scan(a: Any, b: Any, initial: Any, chunk: int | None) -> Any:
    """All states."""
    lengths = () if b.shape[1] is None else slice_lengths(b.shape[1], chunk or LENGTH)

    @tf.custom_gradient
    def run(a: Any, b: Any, initial: Any) -> tuple[Any, Any]:
        h = chunked(Names, Loops(), a, b, initial, lengths)

        def backward(grad: Any) -> tuple[Any, Any, Any]:
            x, y, z = (tf.math.conj(v) for v in (a, h, initial))
            return gradients(Names, Loops(), grad, x, y, z, lengths)

        return h, backward

    return run(a, b, initial)


def pair(re: Any, im: Any) -> Any:
    """A complex array."""
    return tf.complex(re, im)


def parts(z: Any) -> tuple[Any, Any]:
    """Real and imaginary."""
    return tf.math.real(z), tf.math.imag(z)


def polar(size: Any, angle: Any) -> Any:
    """size * exp(i angle), in the precision of both."""
    return tf.complex(size * tf.cos(angle), size * tf.sin(angle))
