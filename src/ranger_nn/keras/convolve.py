"""Convolution with any padding, and pooling without, on each back end's own call.

`keras.ops.conv` pads all dimensions or none ("same", "valid"). A region pads the dimensions that are not cut and none
along the one that is, and a padded copy of each region would cost more memory and time than the call itself. On
PyTorch the channels stay last in memory: Keras copies the input to have them first. Enter at `convolve`,
`add_up` and `pool`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import keras
from keras import ops

Pads = Sequence[tuple[int, int]]


def convolve(x: Any, w: Any, strides: Any, dilation: Any, pads: Pads, channels_last: bool, depthwise: bool) -> Any:
    """Convolution of `x` with (*kernel, in, out) weights, or depthwise with (*kernel, in, multiplier).

    Args:
        pads: zeros (before, after) along each spatial dimension.
    """
    if depthwise:
        w = ops.reshape(w, (*w.shape[:-2], 1, prod(w.shape[-2:])))
    groups = x.shape[-1 if channels_last else 1] // w.shape[-2]
    run = {"jax": _jax, "torch": _torch}.get(keras.backend.backend(), _tensorflow)
    return run(x, w, tuple(strides), tuple(dilation), tuple(pads), channels_last, groups)


def transpose(x: Any, w: Any, strides: Any, dilation: Any, channels_last: bool) -> Any:
    """Transposed convolution of `x` with (*kernel, out, in) weights; nothing of the result is cut off."""
    if keras.backend.backend() == "jax":
        from ranger_nn.keras import convolve_jax

        return convolve_jax.transpose(x, w, tuple(strides), tuple(dilation), channels_last)
    name = "channels_last" if channels_last else "channels_first"
    return ops.conv_transpose(x, w, strides, "valid", None, name, dilation)


def add_up(x: Any, kernel: Any, strides: Any, dilation: Any) -> Any:
    """Patches (samples, channels * window, rows, columns of places) added up where they overlap; nothing is cut off.

    Elsewhere than on PyTorch one element of the window after the other: in a loop TensorFlow's own differentiates in a
    circle, and Keras's on JAX multiplies by an identity of the window and all channels.
    """
    places = list(zip(x.shape[2:], kernel, strides, dilation, strict=True))
    size = tuple((n - 1) * s + max(d * (k - 1) + 1, s) for n, k, s, d in places)
    if keras.backend.backend() == "torch":
        from torch.nn import functional

        return functional.fold(x.flatten(2), size, kernel, dilation, 0, strides)
    (rows, _, down, _), (columns, _, across, _) = places
    x = ops.reshape(x, (-1, x.shape[1] // prod(kernel), *kernel, rows, 1, columns, 1))
    x = ops.pad(x, [(0, 0)] * 5 + [(0, down - 1), (0, 0), (0, across - 1)])
    x = ops.reshape(x, (-1, *x.shape[1:4], rows * down, columns * across))
    found: Any = 0
    for at in product(*map(range, kernel)):
        around = [(i * d, (k - 1 - i) * d) for i, (_, k, _, d) in zip(at, places, strict=True)]
        found = found + ops.pad(x[:, :, at[0], at[1]], [(0, 0), (0, 0), *around])
    return found[:, :, : size[0], : size[1]]


def pool(x: Any, size: Any, strides: Any, channels_last: bool, average: bool) -> Any:
    """Maximum or average over windows, without padding."""
    name = "channels_last" if channels_last else "channels_first"
    if keras.backend.backend() != "torch":
        return (ops.average_pool if average else ops.max_pool)(x, size, strides, "valid", name)
    from torch.nn import functional

    rank = len(size)
    kind = "avg" if average else "max"
    run = getattr(functional, f"{kind}_pool{rank}d")
    if not channels_last:
        return run(x, size, strides)
    return run(x.permute(0, rank + 1, *range(1, rank + 1)), size, strides).permute(0, *range(2, rank + 2), 1)


def _jax(x: Any, w: Any, strides: Any, dilation: Any, pads: Pads, channels_last: bool, groups: int) -> Any:
    from ranger_nn.keras import convolve_jax

    return convolve_jax.convolve(x, w, strides, dilation, tuple((a, b) for a, b in pads), channels_last, groups)


def _torch(x: Any, w: Any, strides: Any, dilation: Any, pads: Any, channels_last: bool, groups: int) -> Any:
    import torch
    from torch.nn import functional

    rank = len(pads)
    w = w.permute(rank + 1, rank, *range(rank))
    if channels_last:
        x = x.permute(0, rank + 1, *range(1, rank + 1))
    even = all(a == b for a, b in pads)
    if not even:
        x = functional.pad(x, [n for pair in reversed(pads) for n in pair])
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    y = conv(x, w, None, strides, [a for a, _ in pads] if even else 0, dilation, groups)
    return y.permute(0, *range(2, rank + 2), 1) if channels_last else y


def _tensorflow(x: Any, w: Any, strides: Any, dilation: Any, pads: Any, channels_last: bool, groups: int) -> Any:
    import tensorflow as tf

    rank, name = len(pads), "channels_last" if channels_last else "channels_first"
    around = [(0, 0), *pads, (0, 0)] if channels_last else [(0, 0), (0, 0), *pads]
    padded = any(n for pair in pads for n in pair)
    depthwise = groups > 1 and groups == x.shape[-1 if channels_last else 1]
    if depthwise and rank < 3:
        w = ops.reshape(w, (*w.shape[:-2], groups, w.shape[-1] // groups))
        if rank == 2 and channels_last and not _both(strides, dilation) and not (padded and _onednn()):
            explicit = [list(pair) for pair in around] if padded else "VALID"
            return tf.nn.depthwise_conv2d(x, w, [1, *strides, 1], explicit, dilations=dilation)
    # a copy, but the gradient of an explicitly padded convolution is never oneDNN's, and takes a copy of the input for
    # every element of the kernel
    x = ops.pad(x, around) if padded else x
    run = ops.depthwise_conv if depthwise and rank < 3 else ops.conv
    return run(x, w, strides, "valid", name, dilation)


@functools.cache
def _onednn() -> bool:
    """Whether TensorFlow's graphs use oneDNN here. They then join a depthwise convolution and the bias after it, and where the
    padding is explicit the joined operator aborts the process (TensorFlow 2.21: `DepthwiseConv2DNativeShapeImpl`).
    """
    try:
        from tensorflow.python.util import _pywrap_util_port

        return bool(_pywrap_util_port.IsMklEnabled())
    except (ImportError, AttributeError):
        return True  # a copy more


def _both(strides: Sequence[int], dilation: Sequence[int]) -> bool:
    """TensorFlow has no depthwise convolution with both, nor with uneven strides."""
    return (max(strides) > 1 and max(dilation) > 1) or len(set(strides)) > 1
