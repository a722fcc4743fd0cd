"""Rules of operations with a window: convolutions and pooling. See `lowering.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import keras
from keras import ops

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.keras import kernels_window as W
from ranger_nn.keras.convolve import add_up, convolve, pool, transpose
from ranger_nn.keras.kernels_movement import Reshape
from ranger_nn.keras.operation import Call, rule
from ranger_nn.ops import movement, window


def ints(value: Any, rank: int) -> tuple[int, ...]:
    """One integer for each of `rank` dimensions."""
    return (int(value),) * rank if isinstance(value, int) else tuple(int(v) for v in value)


def _sides(call: Call, x: int, kernel: Sequence[int], stride: Any, dilation: Any, out: Sequence[int]) -> list[W.Side]:
    shape = call.shape(x)
    space = call.space(len(shape))
    strides, dilations = ints(stride, len(space)), ints(dilation, len(space))
    sides = []
    for i, d in enumerate(space):
        before, after = W.padding(shape[d], kernel[i], strides[i], dilations[i], call.op.padding)
        sides.append(W.Side(d, shape[d], out[d], kernel[i], strides[i], dilations[i], before, after))
    return sides


def windowed(call: Call, x: int, sides: Sequence[W.Side], reaches: Sequence[Any], others: Sequence[int]) -> Rule:
    """Rule of a window: the batch and space are local, channels and weights are read whole."""
    shape = call.shape(x)
    row: list[Link | None] = [Link(0)] + [None] * (len(shape) - 1)
    for side, reach in zip(sides, reaches, strict=True):
        row[side.dim] = Link(side.dim, reach)
    return Rule((tuple(row), *((None,) * len(call.shape(o)) for o in others)))


@rule("Conv")
def _convolution(call: Call) -> Any:
    return convolution(call, call.arg("inputs"), call.arg("kernel"), ops.conv, call.out)


@rule("DepthwiseConv")
def _depthwise(call: Call) -> Any:
    return convolution(call, call.arg("inputs"), call.arg("kernel"), ops.depthwise_conv, call.out)


@rule("SeparableConv")
def _separable(call: Call) -> Any:
    x, depthwise, point = call.arg("inputs"), call.arg("depthwise_kernel"), call.arg("pointwise_kernel")
    middle = list(call.out)
    middle[call.channel(len(middle))] = call.shape(point)[-2]
    between = convolution(call, x, depthwise, ops.depthwise_conv, middle)[0]
    return convolution(call, between, point, ops.conv, call.out, plain=True)


def convolution(call: Call, x: int, weight: int, operator: Any, out: Sequence[int], plain: bool = False) -> list[int]:
    """A convolution; `plain`: of stride 1 and size 1, whatever the operation's own strides are."""
    op = call.op
    rank = len(call.shape(x)) - 2
    kernel = call.shape(weight)[:rank]
    stride, dilation = (1, 1) if plain else (op.strides, op.dilation_rate)
    sides = _sides(call, x, kernel, stride, dilation, out)
    common = {
        "strides": ints(stride, rank),
        "data_format": "channels_last" if call.channels_last() else "channels_first",
        "dilation_rate": ints(dilation, rank),
    }

    def whole(inputs: Any, weights: Any) -> Any:
        return operator(inputs, weights, padding=op.padding, **common)

    last, depthwise = call.channels_last(), operator is ops.depthwise_conv

    def padded(inputs: Any, weights: Any, pads: Any) -> Any:
        return convolve(inputs, weights, ints(stride, rank), ints(dilation, rank), pads, last, depthwise)

    work = prod(kernel) if depthwise else prod(call.shape(weight)[:-1])
    shape, d = call.shape(x), call.channel(rank + 2)
    groups = shape[d] if depthwise else shape[d] // call.shape(weight)[-2]
    columns = W.Columns.of(work, out[d], shape[sides[-1].dim] if rank == 3 else 1, shape[0], groups, call.dtype)
    kern = W.Convolution(whole, padded, sides, columns)
    region = windowed(call, x, sides, [s.reach for s in sides], [weight])
    name = "depthwise_conv" if depthwise else "conv"
    return call.lower.emit(name, [x, weight], [(tuple(out), call.dtype)], region, kern, macs=prod(out) * work)


@rule("ConvTranspose")
def _transposed(call: Call) -> Any:
    x, weight, op = call.arg("inputs"), call.arg("kernel"), call.op
    rank = len(call.shape(x)) - 2
    kernel, strides, dilation = call.shape(weight)[:rank], ints(op.strides, rank), ints(op.dilation_rate, rank)
    shape, sides = call.shape(x), []
    for i, d in enumerate(call.space(rank + 2)):
        extra = op.output_padding if op.output_padding is None else ints(op.output_padding, rank)[i]
        cut = _cut_before(kernel[i], strides[i], dilation[i], op.padding, extra)
        sides.append(W.Side(d, shape[d], call.out[d], kernel[i], strides[i], dilation[i], cut, 0))
    common = {
        "strides": strides,
        "data_format": "channels_last" if call.channels_last() else "channels_first",
        "dilation_rate": dilation,
    }

    last = call.channels_last()

    def valid(inputs: Any, weights: Any) -> Any:
        return transpose(inputs, weights, strides, dilation, last)

    def whole(inputs: Any, weights: Any) -> Any:
        return ops.conv_transpose(inputs, weights, padding=op.padding, output_padding=op.output_padding, **common)

    channels = (call.shape(weight)[rank + 1], call.shape(weight)[rank])
    size = call.lower.values[x].nbytes // channels[0]
    kern = W.Transposed(whole, valid, sides, channels, size)
    region = windowed(call, x, sides, [kern.reach(s) for s in sides], [weight])
    macs = prod(shape) * prod(call.shape(weight)[:-1])
    return call.emit([x, weight], region, kern, macs=macs)


def _cut_before(kernel: int, stride: int, dilation: int, mode: str, extra: int | None) -> int:
    """Indices that "same" cuts off before the first of a transposed convolution."""
    if mode != "same":
        return 0
    span = dilation * (kernel - 1) + 1
    total = stride + span - 2 if extra is None else span + span % 2 - 2 + extra
    return span - 1 - min(total // 2 + total % 2, span - 1)


# --------------------------------------------------------------------------------------- pooling


@rule("MaxPool", "AveragePool")
def _pool(call: Call) -> Any:
    x, op = call.arg("inputs"), call.op
    shape = call.shape(x)
    rank = len(shape) - 2
    size = ints(op.pool_size, rank)
    stride = size if op.strides is None else ints(op.strides, rank)
    sides = _sides(call, x, size, stride, 1, call.out)
    function, _ = call.function()
    last, average = call.channels_last(), call.name == "AveragePool"

    def valid(inputs: Any) -> Any:
        return pool(inputs, size, stride, last, average)

    if not average:
        kern: W.Window = W.Window(function, valid, sides, -float("inf"))
    else:
        uneven = any(s.before != s.after for s in sides) and keras.backend.backend() == "torch"
        kern = W.AveragePool(function, valid, sides, uneven)
    row = [Link(d) for d in range(len(shape))]
    for side in sides:
        row[side.dim] = Link(side.dim, side.reach)
    return call.emit([x], Rule((tuple(row),)), kern)


# --------------------------------------------------------------------------------------- patches


@rule("ExtractPatches")
def _extracted(call: Call) -> Any:
    """What a window holds, as channels."""
    x, op = call.arg("images"), call.op
    size, rank = tuple(op.size), len(op.size)
    if len(call.shape(x)) != rank + 2:
        return None
    sides = _sides(call, x, size, op.strides, op.dilation_rate, call.out)
    strides, dilation = ints(op.strides, rank), ints(op.dilation_rate, rank)

    def valid(t: Any) -> Any:
        return ops.image.extract_patches(t, size, strides, dilation, "valid", op.data_format)

    region = windowed(call, x, sides, [s.reach for s in sides], [])
    return call.emit([x], region, W.Window(call.function()[0], valid, sides, 0.0))


def _pairs(call: Call, *names: str) -> list[tuple[int, ...]]:
    return [ints(getattr(call.op, name), 2) for name in names]


def _joined(call: Call, x: int, shape: tuple[int, ...]) -> list[int]:
    """Rows and columns of places as one dimension, or that one apart."""
    before, dtype = call.shape(x), call.lower.values[x].dtype
    groups = movement.view_groups(before, shape) or []
    kern = Reshape(lambda t: ops.reshape(t, (-1, *shape[1:])), before, shape, groups)
    return call.lower.emit("reshape", [x], [(shape, dtype)], movement.view(before, shape), kern)


@rule("Unfold")
def _unfold(call: Call) -> Any:
    """A column of values for each place of a window: (samples, channels * window, places)."""
    x, (kernel, dilation, padding, stride) = call.arg("x"), _pairs(call, "kernel_size", "dilation", "padding", "stride")
    shape, sides = call.shape(x), []
    for i, d in enumerate((2, 3)):
        places = window.pooled_size(shape[d], kernel[i], stride[i], dilation[i], padding[i], False)
        sides.append(W.Side(d, shape[d], places, kernel[i], stride[i], dilation[i], padding[i], padding[i]))

    def apart(t: Any, padding: Any = 0) -> Any:
        rows, columns = (s.places(t.shape[s.dim] + 2 * p) for s, p in zip(sides, ints(padding, 2), strict=True))
        return ops.reshape(ops.nn.unfold(t, kernel, dilation, padding, stride), (-1, call.out[1], rows, columns))

    kern = W.Window(lambda t: apart(t, padding), apart, sides, 0.0)
    out = (*call.out[:2], *(s.out for s in sides))
    region = windowed(call, x, sides, [s.reach for s in sides], [])
    (found,) = call.lower.emit("unfold", [x], [(out, call.dtype)], region, kern)
    return _joined(call, found, call.out)


@rule("Fold")
def _fold(call: Call) -> Any:
    """Patches added up where they overlap."""
    x, (kernel, dilation, padding, stride) = call.arg("x"), _pairs(call, "kernel_size", "dilation", "padding", "stride")
    if not call.as_declared():
        return None
    sides = []
    for i, d in enumerate((2, 3)):
        places = window.pooled_size(call.out[d], kernel[i], stride[i], dilation[i], padding[i], False)
        sides.append(W.Side(d, places, call.out[d], kernel[i], stride[i], dilation[i], padding[i], padding[i]))

    def whole(t: Any) -> Any:
        joined = ops.reshape(t, (-1, t.shape[1], prod(t.shape[2:])))
        return ops.nn.fold(joined, call.out[2:], kernel, dilation, padding, stride)

    (apart,) = _joined(call, x, (*call.shape(x)[:2], *(s.size for s in sides)))
    channels, valid = (call.shape(x)[1], call.out[1]), partial(add_up, kernel=kernel, strides=stride, dilation=dilation)
    kern = W.Transposed(whole, valid, sides, channels, call.lower.values[x].nbytes // channels[0])
    region = windowed(call, apart, sides, [kern.reach(s) for s in sides], [])
    return call.emit([apart], region, kern)
