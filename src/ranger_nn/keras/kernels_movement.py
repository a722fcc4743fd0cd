"""Kernels that move elements: reshape, crop, pad, repeat, concatenate, resize.

Each does on rows [start, start + rows) of its output what the untouched operator does there, from the rows that its link
asks for. Where the result depends on the place (mirrored edges, linear weights at an edge) the kernel is positional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from keras import ops

from ranger_nn.core.reach import Link, Reach
from ranger_nn.keras.kernels import Kernel, Local
from ranger_nn.keras.kernels_window import inside, on_torch, pad
from ranger_nn.ops.movement import Group, inner, leading

Ints = tuple[int, ...]


def cut(x: Any, dim: int, start: int, count: int) -> Any:
    """Rows [start, start + count) of x along `dim`."""
    if start == 0 and count == x.shape[dim]:
        return x
    return x[(*(slice(None),) * dim, slice(start, start + count))]


class Reshape(Kernel):
    """A view: the group of dimensions that holds the cut one is flattened, cropped and split again."""

    tame = True

    def __init__(self, function: Any, shape: Ints, out: Ints, groups: Sequence[Group]) -> None:
        """`groups`: see `ops.movement.view_groups`."""
        super().__init__(function)
        self.shape, self.out, self.groups = shape, out, groups

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The same view of the rows given."""
        group = next((g for g in self.groups if dim is not None and leading(g[1], self.out) == dim), None)
        if group is None or dim is None:
            return self.function
        left, right = group
        lead = leading(left, self.shape)
        step_in, step_out = inner(left, lead, self.shape), inner(right, dim, self.out)
        lo, hi = Reach(step_out, 0, step_out - 1, step_in).needs(start, start + rows)
        final = [rows if d == dim else n for d, n in enumerate(self.out)]
        if self.shape[0] == self.out[0] and dim != 0:
            final[0] = -1
        if (hi - lo) * step_in == rows * step_out:
            return lambda x: ops.reshape(x, final)
        before = list(self.shape[: left[0]])
        flat = [*before, (hi - lo) * step_in, *self.shape[left[-1] + 1 :]]
        if left[0] > 0:
            flat[0] = -1
        place, first, count = left[0], start * step_out - lo * step_in, rows * step_out
        return lambda x: ops.reshape(cut(ops.reshape(x, flat), place, first, count), final)


class Crop(Kernel):
    """Slices with steps, indices and new dimensions; `where[output dimension]` is its place in the key."""

    tame = True

    def __init__(self, function: Any, key: Sequence[Any], where: dict[int, int]) -> None:
        """`key`: one entry for each dimension, None for a new one."""
        super().__init__(function)
        self.key, self.where = tuple(key), where

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The rows given start at the first that is asked for."""
        if dim not in self.where:
            return self.function
        key = list(self.key)
        key[self.where[dim]] = slice(None, None, key[self.where[dim]].step)
        return lambda x: x[tuple(key)]


class Pad(Kernel):
    """Constants around: on the cut dimension they are border."""

    tame = True

    def __init__(self, function: Any, widths: Sequence[tuple[int, int]], value: float) -> None:
        """`widths`: (before, after) for each dimension."""
        super().__init__(function)
        self.widths, self.given = tuple(widths), value

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Pad the other dimensions."""
        widths = {d: w for d, w in enumerate(self.widths) if d != dim and any(w)}
        return lambda x: pad(x, widths, self.given or 0.0)


class Mirror(Kernel):
    """Mirrored borders, or the edge repeated, along the cut dimension: the rows are picked one by one."""

    modes = ("reflect", "symmetric", "edge")
    """What may stand outside: the rows mirrored without the edge or with it, or the edge."""

    tame, positional = True, True

    def __init__(self, function: Any, name: str, mode: str, shape: Ints, widths: Sequence[tuple[int, int]]) -> None:
        """`mode`: one of `modes`; `name`: what the back end calls it."""
        super().__init__(function)
        self.name, self.mode, self.shape, self.widths = name, mode, shape, tuple(widths)

    @staticmethod
    def reach(before: int, after: int) -> Reach:
        """Mirrored rows lie up to twice the padding away."""
        return Reach(1, -before - 2 * after, before)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Pick the rows, then mirror the other dimensions."""
        if dim is None or not any(self.widths[dim]):
            rest = self.function
            return lambda x, position=None: rest(x)
        n, (before, after) = self.shape[dim], self.widths[dim]
        others = [(0, 0) if d == dim else w for d, w in enumerate(self.widths)]
        name = self.name
        lo, hi = self.reach(before, after).needs(start, start + rows)

        def local(x: Any, position: Any) -> Any:
            source = self._source(ops.arange(rows, dtype="int32") + position - before, n)
            index = ops.clip(source - (position - before - 2 * after), 0, hi - lo - 1)
            x = ops.take(x, index, axis=dim)
            return ops.pad(x, others, mode=name) if any(w for pair in others for w in pair) else x

        return local

    def _source(self, place: Any, size: int) -> Any:
        """The row of the input that stands at each place, which may lie outside."""
        if self.mode == "edge":
            return ops.clip(place, 0, size - 1)
        again = int(self.mode == "symmetric")
        period = max(1, 2 * (size - 1 + again))  # wider borders are mirrored again; 1: one row is all
        place = place % period
        return ops.where(place < size, place, period - again - place)


class Repeat(Kernel):
    """Each index repeated along `axis`."""

    tame = True

    def __init__(self, function: Any, repeats: int, axis: int) -> None:
        """As in `keras.ops.repeat`."""
        super().__init__(function)
        self.repeats, self.axis = repeats, axis

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Repeat, and drop what lies before the first row."""
        if dim != self.axis:
            return self.function
        first = start - start // self.repeats * self.repeats
        return lambda x: cut(ops.repeat(x, self.repeats, axis=dim), dim, first, rows)


class Pick(Kernel):
    """Indices of one dimension, in any order: from the rows that lie near, or where none do from all of them."""

    tame, positional = True, True

    def __init__(self, dim: int, places: Sequence[int], reach: Reach) -> None:
        """`places`: one index of the whole input for each of the whole output; `reach`: that of the link."""
        self.places = np.asarray(places, "int32")
        super().__init__(lambda x: ops.take(x, self.places, axis=dim))
        self.dim, self.reach = dim, reach

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The indices of these rows, counted from the first row that is given."""
        if dim != self.dim:
            function = self.function
            return lambda x, position=None: function(x)
        reach, most = self.reach, len(self.places) - 1

        def local(x: Any, position: Any) -> Any:
            wanted = ops.clip(ops.arange(rows, dtype="int32") + position, 0, most)
            first = (position * reach.num + reach.first) // reach.den if reach.advances else 0
            index = ops.clip(ops.take(self.places, wanted, axis=0) - first, 0, x.shape[dim] - 1)
            return ops.take(x, index, axis=dim)

        return local


class Shuffle(Kernel):
    """Depth to space: blocks of `factor` rows, of which those before the first are dropped."""

    tame = True

    def __init__(self, function: Any, factor: int, space: Ints) -> None:
        """`space`: the dimensions that grow."""
        super().__init__(function)
        self.factor, self.space = factor, space

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The blocks that hold the rows, cropped."""
        if dim not in self.space:
            return self.function
        first, function = start - start // self.factor * self.factor, self.function
        return lambda x: cut(function(x), dim, first, rows)


class Concatenate(Kernel):
    """One after the other; along the cut dimension each row comes from the input that holds it."""

    tame, single = True, True

    def __init__(self, function: Any, axis: int, offsets: Sequence[int], along: bool) -> None:
        """`offsets`: where each input starts; `along`: the axis is one that may be cut."""
        super().__init__(function)
        self.axis, self.offsets, self.positional = axis, tuple(offsets), along

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Choose by position."""
        if dim != self.axis:
            function = self.function
            return lambda *xs, position=None: function(*xs)

        def local(*xs: Any, position: Any) -> Any:
            place = ops.arange(rows, dtype="int32") + position
            place = ops.reshape(place, [-1 if d == dim else 1 for d in range(len(xs[0].shape))])
            found = xs[0]
            for offset, x in zip(self.offsets[1:], xs[1:], strict=True):
                found = ops.where(place >= offset, x, found)
            return found

        return local


class Resize(Kernel):
    """Nearest or linear resizing, half-pixel centres; the cut dimension by a gather, the other by the operator."""

    tame, single, positional = True, True, True

    def __init__(
        self, function: Any, other: Callable[[Any, int], Any], linear: bool, sides: Sequence[tuple[int, int, int]]
    ):
        """`sides`: (dim, size, out) for rows and columns; `other(x, dim)`: the operator on the other one alone."""
        super().__init__(function)
        self.other, self.linear, self.sides = other, linear, tuple(sides)

    @staticmethod
    def link(dim: int, size: int, out: int, linear: bool) -> Link:
        """Nearest: floor((2o + 1) n / 2m). Linear: floor(((2o + 1) n - m) / 2m) and the next."""
        if linear:
            return Link(dim, Reach(2 * size, size - out, size - out + 2 * out, 2 * out))
        return Link(dim, Reach(2 * size, size, size, 2 * out))

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Gather rows; the edge repeats."""
        side = next((s for s in self.sides if s[0] == dim), None)
        if side is None or dim is None:
            function = self.function
            return lambda x, position=None: function(x)
        _, size, out = side

        def local(x: Any, position: Any) -> Any:
            x = self.other(x, dim)
            place = ops.cast(ops.arange(rows, dtype="int32") + position, "int32")
            numerator = (2 * place + 1) * size - (out if self.linear else 0)
            below = numerator // (2 * out)
            first = ((2 * position + 1) * size - (out if self.linear else 0)) // (2 * out)
            low = ops.take(x, inside(below, size, first, x.shape[dim]), axis=dim)
            if not self.linear:
                return low
            high = ops.take(x, inside(below + 1, size, first, x.shape[dim]), axis=dim)
            weight = ops.cast(numerator - below * 2 * out, low.dtype) / (2 * out)
            weight = ops.reshape(weight, [-1 if d == dim else 1 for d in range(len(x.shape))])
            return low + (high - low) * weight

        return local

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """On PyTorch the input and the result in its own order, the input resized along the other dimension, both neighbours
        of each row and their difference.
        """
        if not on_torch():
            return 0
        if self._is_whole(out_bytes, in_bytes[0]):
            return in_bytes[0] + 2 * out_bytes
        return in_bytes[0] + 2 * self._between(in_bytes[0]) + (4 if self.linear else 2) * out_bytes

    def _is_whole(self, out_bytes: int, in_bytes: int) -> bool:
        """Where the operator itself runs: a region of a linear one reads a row more than its share."""
        size, out = (prod(side[k] for side in self.sides) for k in (1, 2))
        return self.linear and out_bytes * size == in_bytes * out

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """On PyTorch a gradient of the input resized along the other dimension, and of each neighbour."""
        if not on_torch():
            return 0
        return (0 if self._is_whole(out_bytes, in_bytes[0]) else self._between(in_bytes[0])) + 2 * out_bytes

    def _between(self, given: int) -> int:
        """Bytes of the input resized along whichever dimension makes it larger."""
        return max(given * out // max(1, size) for _, size, out in self.sides)
