"""Rules of operations that move elements. See `lowering.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import keras
from keras import ops

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.keras import kernels_movement as M
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Ref
from ranger_nn.keras.operation import Call, rule
from ranger_nn.ops import movement


@rule("Reshape", "Ravel", "ExpandDims", "Squeeze")
def _view(call: Call) -> Any:
    function, inputs = call.function()
    shape, out = call.shape(inputs[0]), call.out
    groups = movement.view_groups(shape, out)
    if groups is None:
        return None
    row = list(movement.view(shape, out).links[0])
    for left, _ in groups:
        merges = sum(shape[d] > 1 for d in left) > 1
        lead = movement.leading(left, shape)
        if call.lower.channels_last and merges and len(shape) - 1 in left and lead is not None:
            row[lead] = None  # rows and channels in one: nothing that could be cut
    function = _batch_free(function, shape, out)
    return call.emit(inputs, Rule((tuple(row),)), M.Reshape(function, shape, out, groups))


def _batch_free(function: Any, shape: Sequence[int], out: Sequence[int]) -> Any:
    """The view for any batch, where the batch stays in front."""
    if len(shape) and len(out) and shape[0] == out[0]:
        return lambda x: ops.reshape(x, (-1, *out[1:])) if prod(out) else function(x)
    return function


@rule("Transpose", "Swapaxes", "Moveaxis")
def _permute(call: Call) -> Any:
    function, inputs = call.function()
    rank, op = len(call.out), call.op
    order = list(range(rank))
    if call.name == "Transpose":
        order = list(range(rank))[::-1] if op.axes is None else [a % rank for a in op.axes]
    elif call.name == "Swapaxes":
        a, b = op.axis1 % rank, op.axis2 % rank
        order[a], order[b] = order[b], order[a]
    else:
        source, target = [a % rank for a in op.source], [a % rank for a in op.destination]
        rest = [d for d in order if d not in source]
        for t, s in sorted(zip(target, source, strict=True)):
            rest.insert(t, s)
        order = rest
    return call.emit(inputs, movement.permute(order), Kernel(function))


@rule("GetItem")
def _getitem(call: Call) -> Any:
    key = call.args[1] if len(call.args) > 1 else call.kwargs["key"]
    x = call.arg("x")
    found = _crop(call.shape(x), key if isinstance(key, tuple) else (key,))
    if found is None:
        return None
    full, region, where = found
    return call.emit([x], region, M.Crop(lambda t: t[full], full, where))


def _crop(shape: Sequence[int], key: tuple[Any, ...]) -> tuple[tuple[Any, ...], Rule, dict[int, int]] | None:
    """The key with one entry for each dimension, the rule, and the place in the key of each output dimension."""
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in key):
        return None
    taken = sum(k is not None and k is not Ellipsis for k in key)
    fill = (slice(None),) * (len(shape) - taken)
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    full = (*key[:at], *fill, *key[at + 1 :])
    row: list[Link | None] = []
    where, out = {}, 0
    for place, k in enumerate(full):
        if k is None:
            out += 1
            continue
        size = shape[len(row)]
        if isinstance(k, int):
            row.append(None)
            continue
        start, _, step = k.indices(size)
        if step < 1:
            return None
        row.append(Link(out, Reach(step, start, start)))
        where[out] = place
        out += 1
    return full, Rule((tuple(row),)), where


@rule("Split", "Unstack")
def _split(call: Call) -> Any:
    x = call.arg("x")
    shape = call.shape(x)
    axis = call.op.axis % len(shape)
    position, found = 0, []
    for n, out in enumerate(call.outs):
        width = out.shape[axis] if call.name == "Split" else 1
        one: Any = slice(position, position + width) if call.name == "Split" else n
        full, region, where = _crop(shape, (*(slice(None),) * axis, one)) or ((), Rule(()), {})
        kern = M.Crop(lambda t, full=full: t[full], full, where)
        found += call.lower.emit("split", [x], [(tuple(out.shape), call.dtype)], region, kern)
        position += width
    return found


@rule("Pad")
def _pad(call: Call) -> Any:
    x, op = call.arg("x"), call.op
    shape = call.shape(x)
    value = call.named.get("constant_values")
    pairs = [tuple(int(n) for n in pair) for pair in op.pad_width]
    widths: list[Any] = pairs * len(shape) if len(pairs) == 1 else pairs
    function, inputs = call.function()
    if op.mode == "constant":
        if len(inputs) > 1 or not isinstance(value, (int, float, type(None))):
            return None
        row = tuple(Link(d, Reach(1, -a, -a)) for d, (a, _) in enumerate(widths))
        return call.emit([x], Rule((row,)), M.Pad(function, widths, float(value or 0.0)))
    if op.mode not in {"reflect", "symmetric"} or (op.mode == "symmetric" and keras.backend.backend() == "torch"):
        return None  # the PyTorch back end repeats the edge instead
    row = tuple(Link(d, M.Mirror.reach(*w)) for d, w in enumerate(widths))
    return call.emit([x], Rule((row,)), M.Mirror(function, op.mode, shape, widths))


@rule("Repeat")
def _repeat(call: Call) -> Any:
    function, inputs = call.function()
    if call.op.axis is None or not isinstance(call.op.repeats, int):
        return None
    axis = call.op.axis % len(call.out)
    row = tuple(Link(d, Reach(1, 0, 0, call.op.repeats)) if d == axis else Link(d) for d in range(len(call.out)))
    return call.emit(inputs, Rule((row,)), M.Repeat(function, call.op.repeats, axis))


@rule("Concatenate")
def _concatenate(call: Call) -> Any:
    function, inputs = call.function()
    rank = len(call.out)
    axis = call.op.axis % rank
    shapes = [call.shape(v) for v in inputs]
    if any(len(s) != rank for s in shapes):
        return None
    along = axis in range(1, rank - 1) if call.lower.channels_last else axis > 1
    links = movement.concatenate(shapes, axis).links
    if not along:
        links = tuple(tuple(None if d == axis else link for d, link in enumerate(row)) for row in links)
    offsets = [sum(s[axis] for s in shapes[:i]) for i in range(len(shapes))]
    return call.emit(inputs, Rule(links), M.Concatenate(function, axis, offsets, along))


@rule("Stack")
def _stack(call: Call) -> Any:
    function, inputs = call.function()
    axis = call.op.axis % len(call.out)
    return call.emit(inputs, movement.stack([call.shape(v) for v in inputs], axis), Kernel(function))


@rule("Resize")
def _resize(call: Call) -> Any:
    x, op = call.arg("images"), call.op
    shape = call.shape(x)
    plain = not (op.antialias or op.crop_to_aspect_ratio or op.pad_to_aspect_ratio)
    if len(shape) != 4 or op.interpolation not in {"nearest", "bilinear"} or not plain:
        return None
    linear = op.interpolation == "bilinear"
    sides = [(d, shape[d], call.out[d]) for d in call.space(4)]
    data_format = "channels_last" if call.channels_last() else "channels_first"

    def other(t: Any, dim: int) -> Any:
        size = tuple(t.shape[d] if d == dim else out for d, _, out in sides)
        same = all(t.shape[d] == n for (d, _, _), n in zip(sides, size, strict=True))
        return t if same else ops.image.resize(t, size, op.interpolation, data_format=data_format)

    row: list[Link | None] = [Link(d) for d in range(4)]
    for d, size, out in sides:
        row[d] = M.Resize.link(d, size, out, linear)
    return call.emit([x], Rule((tuple(row),)), M.Resize(call.function()[0], other, linear, sides))


@rule("MapCoordinates")
def _sampled(call: Call) -> Any:
    """Each place by itself; what is sampled is read whole."""
    function, inputs = call.function()
    if inputs != [call.arg("inputs"), call.arg("coordinates")]:
        return None
    places: tuple[Link | None, ...] = (None, *(Link(d) for d in range(len(call.out))))
    return call.emit(inputs, Rule(((None,) * len(call.shape(inputs[0])), places)), Kernel(function))


@rule("Take")
def _take(call: Call) -> Any:
    table, indices = call.arg("x"), call.arg("indices")
    if not isinstance(table, Ref) or not isinstance(indices, Ref) or call.op.axis is None:
        return None
    function, inputs = call.function()
    axis = call.op.axis % len(call.shape(table))
    if axis != 0:  # picks along a dimension that is read whole
        more = len(call.shape(indices)) - 1
        row = tuple(None if d == axis else Link(d + more * (d > axis)) for d in range(len(call.shape(table))))
        return call.emit(inputs, Rule((row, (None,) * (more + 1))), Kernel(function))
    rows = tuple(Link(d) for d in range(len(call.shape(indices))))
    links = ((None,) * len(call.shape(table)), rows)
    return call.emit(inputs, Rule(links), Kernel(function))


@rule("Tile")
def _tile(call: Call) -> Any:
    """Along the dimensions that are not repeated."""
    function, inputs = call.function()
    shape, out = call.shape(inputs[0]), call.out
    more = len(out) - len(shape)
    row = tuple(Link(d + more) if n == out[d + more] else None for d, n in enumerate(shape))
    return call.emit(inputs, Rule((row,)), Kernel(function))


@rule("Diff")
def _diff(call: Call) -> Any:
    """Each row and those after it."""
    function, inputs = call.function()
    axis, n = call.op.axis % len(call.out), call.op.n
    row = tuple(Link(d, Reach(1, 0, n)) if d == axis else Link(d) for d in range(len(call.out)))
    return call.emit(inputs, Rule((row,)), Kernel(function))


@rule("OneHot")
def _one_hot(call: Call) -> Any:
    function, inputs = call.function()
    shape, rank = call.shape(inputs[0]), len(call.out)
    axis = call.op.axis % rank
    row = tuple(Link(d + (d >= axis)) for d in range(len(shape)))
    return call.emit(inputs, Rule((row,)), Kernel(function))


@rule("DepthToSpace", "SpaceToDepth")
def _shuffle(call: Call) -> Any:
    function, inputs = call.function()
    factor = call.op.block_size
    apart = Reach(1, 0, 0, factor) if call.name == "DepthToSpace" else Reach(factor, 0, factor - 1)
    row: list[Link | None] = [Link(0), None, None, None]
    for d in call.space(4):
        row[d] = Link(d, apart)
    if call.name == "SpaceToDepth":
        return call.emit(inputs, Rule((tuple(row),)), Kernel(function))
    return call.emit(inputs, Rule((tuple(row),)), M.Shuffle(function, factor, call.space(4)))
