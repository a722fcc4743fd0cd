"""Convolutions on JAX in the one form that XLA's CPU compiler runs fast wherever they stand: channels last, kernels (*k, in, out).

Outside of a loop the compiler turns other forms (channels first, gradients, whose kernels have in and out swapped) into
this one. In the body of a loop it does not, and takes a path of its own that is some twenty times slower. So arrays are
transposed here, and the gradients written out (Dumoulin and Visin 2016, "A guide to convolution arithmetic"): that of
the input is a convolution of the result's gradient with the flipped kernel, that of the kernel a convolution of the
input, whose samples are channels, with the result's gradient.

Enter at `convolve` and `transpose`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ranger_nn.keras.loops import now_tracing

Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


def convolve(x: Any, w: Any, strides: Ints, dilation: Ints, pads: Pads, channels_last: bool, groups: int) -> Any:
    """Convolution of `x` with (*kernel, in, out) weights, zeros (before, after) along each spatial dimension."""
    x = x.astype(w.dtype) if channels_last else jnp.moveaxis(x, 1, -1).astype(w.dtype)
    kind = {x.shape[-1]: _depthwise, 1: _dense}.get(groups)
    if kind is not None and now_tracing().gradients:
        y = kind(x, w, strides, dilation, pads)
    else:
        y = _run(x, w, strides, dilation, (1,) * len(strides), pads, groups)
    return y if channels_last else jnp.moveaxis(y, -1, 1)


def transpose(x: Any, w: Any, strides: Ints, dilation: Ints, channels_last: bool) -> Any:
    """Transposed convolution of `x` with (*kernel, out, in) weights, nothing cut off."""
    x = x.astype(w.dtype) if channels_last else jnp.moveaxis(x, 1, -1).astype(w.dtype)
    y = (_transposed if now_tracing().gradients else _transposed.fun)(x, w, strides, dilation)
    return y if channels_last else jnp.moveaxis(y, -1, 1)


def _run(x: Any, w: Any, strides: Ints, dilation: Ints, spread: Ints, pads: Pads, groups: int = 1) -> Any:
    """`spread`: dilation of the input."""
    rank = len(strides)
    data = (0, rank + 1, *range(1, rank + 1))
    numbers = lax.ConvDimensionNumbers(data, (rank + 1, rank, *range(rank)), data)
    cut = [(max(0, -a), max(0, -b)) for a, b in pads]
    if spread == (1,) * rank and any(a or b for a, b in cut):  # padding below zero is off the fast path
        x = x[(slice(None), *(slice(a, n - b) for (a, b), n in zip(cut, x.shape[1:-1], strict=True)))]
        pads = tuple((max(0, a), max(0, b)) for a, b in pads)
    return lax.conv_general_dilated(
        x, w, strides, pads, spread, dilation, dimension_numbers=numbers, feature_group_count=groups
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense(x: Any, w: Any, strides: Ints, dilation: Ints, pads: Pads) -> Any:
    return _run(x, w, strides, dilation, (1,) * len(strides), pads)


def _dense_ahead(x: Any, w: Any, *form: Any) -> Any:
    return _dense(x, w, *form), (x, w)


def _dense_back(strides: Ints, dilation: Ints, pads: Pads, kept: Any, g: Any) -> Any:
    x, w = kept
    into_x, into_w = [], []
    for n, k, out, stride, dil, (before, _) in zip(
        x.shape[1:-1], w.shape, g.shape[1:-1], strides, dilation, pads, strict=False
    ):
        span, made = dil * (k - 1) + 1, stride * (out - 1) + 1
        into_x.append((span - 1 - before, n - made + before))
        into_w.append((before, made + span - 1 - n - before))
    none = (1,) * len(strides)
    dx = _run(g, _flipped(w), none, dilation, strides, tuple(into_x))
    return dx.astype(x.dtype), _met(x, g, dilation, strides, tuple(into_w)).astype(w.dtype)


_dense.defvjp(_dense_ahead, _dense_back)


def _met(x: Any, g: Any, steps: Ints, spread: Ints, pads: Pads) -> Any:
    """(*kernel, channels of x, channels of g): the products of all that each element of a kernel brings together."""
    # channels as samples and samples as channels
    found = _run(jnp.swapaxes(x, 0, -1), jnp.moveaxis(g, 0, -2), steps, spread, (1,) * len(steps), pads)
    return jnp.moveaxis(found, 0, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _transposed(x: Any, w: Any, strides: Ints, dilation: Ints) -> Any:
    spans = [d * (k - 1) + 1 for k, d in zip(w.shape, dilation, strict=False)]
    pads = tuple((span - 1, max(span, s) - 1) for span, s in zip(spans, strides, strict=True))
    return _run(x, _flipped(w), (1,) * len(strides), dilation, strides, pads)


def _transposed_ahead(x: Any, w: Any, *form: Any) -> Any:
    return _transposed(x, w, *form), (x, w)


def _transposed_back(strides: Ints, dilation: Ints, kept: Any, g: Any) -> Any:
    x, w = kept
    read = [
        s * (n - 1) + d * (k - 1) + 1 for n, k, s, d in zip(x.shape[1:-1], w.shape, strides, dilation, strict=False)
    ]
    g = g[(slice(None), *map(slice, read))]  # what lies behind is zero in the result, whatever x is
    none = ((0, 0),) * len(strides)
    dx = _run(g, w, strides, dilation, (1,) * len(strides), none)
    return dx.astype(x.dtype), _met(g, x, dilation, strides, none).astype(w.dtype)


_transposed.defvjp(_transposed_ahead, _transposed_back)


def _flipped(w: Any) -> Any:
    """The kernel turned round, in and out swapped."""
    return jnp.swapaxes(jnp.flip(w, tuple(range(w.ndim - 2))), -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x: Any, w: Any, strides: Ints, dilation: Ints, pads: Pads) -> Any:
    return _run(x, w, strides, dilation, (1,) * len(strides), pads, x.shape[-1])


def _depthwise_ahead(x: Any, w: Any, *form: Any) -> Any:
    return _depthwise(x, w, *form), (x, w)


def _depthwise_back(strides: Ints, dilation: Ints, pads: Pads, kept: Any, g: Any) -> Any:
    """The kernel's: for each of its elements the products of what it met."""
    x, w = kept
    channels = x.shape[-1]
    dx = jax.vjp(lambda x: _run(x, w, strides, dilation, (1,) * len(strides), pads, channels), x)[1](g)[0]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    grads = g.reshape(*g.shape[:-1], channels, -1)
    found = []
    for place in np.ndindex(*w.shape[:-2]):
        start = [0, *(i * d for i, d in zip(place, dilation, strict=True)), 0]
        made = [s * (n - 1) + 1 for s, n in zip(strides, g.shape[1:-1], strict=True)]
        limit = [x.shape[0], *(a + n for a, n in zip(start[1:-1], made, strict=True)), channels]
        met = lax.slice(padded, start, limit, (1, *strides, 1))
        found.append(jnp.sum(met[..., None] * grads, axis=tuple(range(x.ndim - 1))).reshape(-1))
    return dx, jnp.stack(found).reshape(w.shape).astype(w.dtype)


_depthwise.defvjp(_depthwise_ahead, _depthwise_back)
