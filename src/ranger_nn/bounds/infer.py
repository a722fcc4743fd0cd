"""Bounds inference: the interval of an input that an interval of a node's output needs, along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ranger_nn.bounds import arrays
from ranger_nn.bounds.arrays import Rows
from ranger_nn.bounds.axes import Axis
from ranger_nn.core.graph import Graph, Node
from ranger_nn.core.reach import Box, Interval, Link

Side = tuple[Interval, "int | None", "Link | None", bool]
"""All of a dimension of an input; the output's dimension that decides of it; by which link; whether it goes round."""


@dataclass(frozen=True)
class Bounds:
    """Sizes and needs along the axes that a sweep cuts; along axis `circle`, if any, regions lie across the seam."""

    graph: Graph
    axes: tuple[Axis, ...]
    circle: int | None = None

    def across(self, value: int, box: Box) -> tuple[int, int] | None:
        """Dimension and period of a value, of which `box` lies across the seam of the axis that goes round."""
        if self.circle is None:
            return None
        axis = self.axes[self.circle]
        if value not in axis.dims or axis.periods is None:
            return None
        dim = axis.dims[value]
        inside = box[dim][0] >= 0 and box[dim][1] <= self.graph.values[value].shape[dim]
        return None if inside else (dim, axis.periods[value])

    def dim(self, value: int, axis: int) -> int | None:
        """Dimension of `value` on `axis`, None where it has none."""
        return self.axes[axis].dims.get(value)

    def size(self, value: int, axis: int) -> int:
        """Length of `value` along `axis` (1 where it has none)."""
        d = self.dim(value, axis)
        return 1 if d is None else self.graph.values[value].shape[d]

    def needs(self, node: Node, position: int, axis: int, start: int, stop: int) -> Interval:
        """Interval of input `position` that output [start, stop) needs along `axis`."""
        value = node.inputs[position]
        d = self.dim(value, axis)
        if stop <= start:
            return 0, 0
        if d is None:
            return 0, 1
        size = self.graph.values[value].shape[d]
        link = node.rule.links[position][d]
        out = self.dim(node.outputs[0], axis)
        if link is None or link.out_dim != out:
            return 0, size
        return link.reach.needs(start, stop) if axis == self.circle else link.needs(start, stop, size)

    def all_needs(self, node: Node, position: int, axis: int, start: Rows, stop: Rows) -> tuple[Rows, Rows]:
        """The same for many output intervals at once."""
        value, zero = node.inputs[position], np.zeros_like(stop)
        d = self.dim(value, axis)
        link = node.rule.links[position][d] if d is not None else None
        size = self.size(value, axis)
        if d is None or link is None or link.out_dim != self.dim(node.outputs[0], axis):
            return zero, np.where(stop > start, size, 0)
        if axis == self.circle:
            lo, hi = arrays.reached(link.reach, start, stop)
            return np.where(stop > start, lo, 0), np.where(stop > start, hi, 0)
        return arrays.needs(link, start, stop, size)

    def box(self, node: Node, position: int, out: Box) -> Box:
        """Region of input `position` that the region `out` of the node's output needs.

        A dimension of length one lies on no axis (`find_axes`), yet what it is linked to may be cut: a class token
        is read by the region that holds its row, and by no other.
        """
        place = (node.outputs[0], position)
        sides = self._sides.get(place)
        if sides is None:
            sides = self._sides[place] = [self._side(node, position, d) for d in range(len(node.rule.links[position]))]
        box = []
        for whole, made, link, circle in sides:
            if made is None:
                box.append(whole)
                continue
            start, stop = out[made]
            if stop <= start:
                box.append((0, 0))
            elif link is None:
                box.append(whole)
            else:
                box.append(link.reach.needs(start, stop) if circle else link.needs(start, stop, whole[1]))
        return tuple(box)

    @cached_property
    def _sides(self) -> dict[tuple[int, int], list[Side]]:
        """What is known of the inputs of nodes, by (first output, position)."""
        return {}

    def _side(self, node: Node, position: int, d: int) -> Side:
        """Dimension `d` of an input: all of it; which dimension of the output decides of it, by which link."""
        value, result = node.inputs[position], node.outputs[0]
        size, link = self.graph.values[value].shape[d], node.rule.links[position][d]
        axis = next((a for a, axis in enumerate(self.axes) if axis.dims.get(value) == d), None)
        if axis is not None:
            out = self.dim(result, axis)
            linked = link is not None and link.out_dim == out
            return (0, size), out, link if linked else None, axis == self.circle
        if link is not None and link.out_dim in {a.dims[result] for a in self.axes if result in a.dims}:
            return (0, size), link.out_dim, link, False
        return (0, size), None, None, False

    def follow(self, node: Node, position: int, axis: int, row: Rows, end: bool) -> Rows:
        """First rows of input `position` that output rows from `row` on read; with `end`, the row after the last
        that rows up to `row` read. Not clipped to the value: rows before 0 and beyond the size go on evenly.
        """
        value = node.inputs[position]
        d = self.dim(value, axis)
        if d is None:
            return np.full_like(row, end)
        link = node.rule.links[position][d]
        if link is None or not link.reach.advances or link.out_dim != self.dim(node.outputs[0], axis):
            return np.full_like(row, self.graph.values[value].shape[d] * end)
        return arrays.reached(link.reach, row - 1, row)[1] if end else arrays.reached(link.reach, row, row + 1)[0]

    def blocked(self, node: Node, position: int, axis: int) -> bool:
        """True where input `position` is cut along `axis` but must be whole before any of it is read."""
        value = node.inputs[position]
        d = self.dim(value, axis)
        if d is None:
            return False
        link = node.rule.links[position][d]
        several = len(node.outputs) != 1 and node.rule.ordered is None
        return link is None or several or not link.reach.advances or link.out_dim != self.dim(node.outputs[0], axis)

    def is_cut(self, value: int) -> bool:
        """True where the value has a dimension on one of the axes."""
        return any(value in axis.dims for axis in self.axes)


def share(size: int, index: int, count: int) -> Interval:
    """Region `index` of `count` of a dimension: sizes differ by at most one."""
    return size * index // count, size * (index + 1) // count
