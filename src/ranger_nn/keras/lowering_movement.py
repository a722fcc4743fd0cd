"""Rules of operations that move elements. See `lowering.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.core.graph import COMPUTED, INPUT, Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.keras import kernels_movement as M
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Ref, may_change
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
    x, full = _backwards(call, x, _full(call.shape(x), key if isinstance(key, tuple) else (key,)))
    found = _crop(call.shape(x), full)
    if found is None:
        return None
    region, where = found
    return call.emit([x], region, M.Crop(lambda t: t[full], full, where))


def _full(shape: Sequence[int], key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key with one entry for each dimension, besides those for new ones."""
    taken = sum(k is not None and k is not Ellipsis for k in key)
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    return (*key[:at], *(slice(None),) * (len(shape) - taken), *key[at + 1 :])


def _backwards(call: Call, x: int, full: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
    """The value with the slices taken that go backwards, and the rest of the key."""
    rest, dim = list(full), 0
    for at, k in enumerate(full):
        places = range(*k.indices(call.shape(x)[dim])) if isinstance(k, slice) else range(0)
        if dim and places and places.step < 0:
            x, rest[at] = picked(call, x, dim, places), slice(None)
        dim += k is not None
    return x, tuple(rest)


def picked(call: Call, x: int, dim: int, places: Sequence[int]) -> int:
    """The value with these indices of `dim`, in this order: negative ones count from the end."""
    shape = call.shape(x)
    rows = [n + shape[dim] if n < 0 else n for n in places]
    region = movement.pick(shape, dim, rows)
    link = region.links[0][dim]
    out = (*shape[:dim], len(rows), *shape[dim + 1 :])
    kern = M.Pick(dim, rows, link.reach if link is not None else Reach())
    return int(call.lower.emit("pick", [x], [(out, call.lower.values[x].dtype)], region, kern)[0])


@rule("Flip", "Flipud", "Fliplr")
def _flip(call: Call) -> Any:
    """The last row first."""
    x = call.arg("x")
    rank = len(call.shape(x))
    axis = {"Flipud": 0, "Fliplr": 1}.get(call.name, getattr(call.op, "axis", None))
    for d in range(rank) if axis is None else [axis] if isinstance(axis, int) else axis:
        x = picked(call, x, d % rank, range(call.shape(x)[d])[::-1]) if d % rank else _turned(call, x)
    return [x]


@rule("Roll")
def _roll(call: Call) -> Any:
    """The rows of the other end come first: along what is cut the input is finished before, and the result is cut."""
    x, axis, shift = call.arg("x"), call.op.axis, call.op.shift
    axes = [axis] if isinstance(axis, int) else list(axis or ())
    shifts = list(shift) if isinstance(shift, (tuple, list)) else [shift] * len(axes)
    plain = len(shifts) == len(axes) and all(isinstance(n, int) for n in shifts)
    rank = len(call.out)
    if not axes or not plain or any(d % rank == 0 for d in axes):
        return None
    for d, by in zip(axes, shifts, strict=True):
        size = call.shape(x)[d % rank]
        x = picked(call, x, d % rank, [(n - by) % size for n in range(size)]) if size else x
    return [x]


def _turned(call: Call, x: int) -> int:
    """The last sample first, however many there are."""
    shape = call.shape(x)
    row = tuple(Link(d) if d else None for d in range(len(shape)))
    kern = Kernel(lambda t: ops.flip(t, axis=0), tame=True)
    return int(call.lower.emit("flip", [x], [(shape, call.lower.values[x].dtype)], Rule((row,)), kern)[0])


def _crop(shape: Sequence[int], full: tuple[Any, ...]) -> tuple[Rule, dict[int, int]] | None:
    """The rule of a full key, and the place in the key of each output dimension."""
    if not all(k is None or isinstance(k, (int, slice)) for k in full):
        return None
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
    return Rule((tuple(row),)), where


@rule("Split", "Unstack")
def _split(call: Call) -> Any:
    x = call.arg("x")
    shape = call.shape(x)
    axis = call.op.axis % len(shape)
    position, found = 0, []
    for n, out in enumerate(call.outs):
        width = out.shape[axis] if call.name == "Split" else 1
        one: Any = slice(position, position + width) if call.name == "Split" else n
        full = _full(shape, (*(slice(None),) * axis, one))
        region, where = _crop(shape, full) or (Rule(()), {})
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
    mode = "edge" if op.mode == "symmetric" and keras.backend.backend() == "torch" else op.mode  # it repeats the edge
    if mode not in M.Mirror.modes:
        along = tuple(None if any(w) else Link(d) for d, w in enumerate(widths))  # whole where it pads, cut elsewhere
        return call.emit([x], Rule((along,)), Kernel(function))
    row = tuple(Link(d, M.Mirror.reach(*w)) for d, w in enumerate(widths))
    return call.emit([x], Rule((row,)), M.Mirror(function, op.mode, mode, shape, widths))


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
    places = _places(call, table, call.named.get("indices"))
    if places is not None:
        return [picked(call, table, call.op.axis % len(call.shape(table)), places)]
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


def _places(call: Call, table: Any, indices: Any) -> list[int] | None:
    """A row of indices whose numbers are fixed, along what may be cut; of arrays those that nobody can write into."""
    known = isinstance(indices, (list, tuple, range, np.ndarray)) or (
        ops.is_tensor(indices) and not may_change(indices)
    )
    axis = call.op.axis % len(call.shape(table)) if isinstance(table, Ref) and call.op.axis is not None else 0
    if not known or not axis or call.lower.values[table].kind not in (COMPUTED, INPUT):
        return None
    found, size = np.asarray(ops.convert_to_numpy(indices)), call.shape(table)[axis]
    fits = found.ndim == 1 and found.size and found.dtype.kind in "iu" and -size <= found.min() <= found.max() < size
    return [int(n) for n in found] if fits else None


@rule("Tile")
def _tile(call: Call) -> Any:
    """All indices of a dimension, and again; of dimensions of length one along the others alone."""
    function, inputs = call.function()
    shape, out = call.shape(inputs[0]), call.out
    more = len(out) - len(shape)
    if not more and 1 not in shape[1:] and shape[0] == out[0]:
        (x,) = inputs
        for d, (n, m) in enumerate(zip(shape, out, strict=True)):
            x = picked(call, x, d, list(range(n)) * (m // n)) if m != n else x
        return [x]
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
