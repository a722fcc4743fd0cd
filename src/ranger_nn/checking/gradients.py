"""Gradients as fingerprints: what each node gives back to each row of its inputs, and what each row must have got at the end.

A region of a node's output gives to a row of input i the sum of the gradients of those of its rows that read it, times a
number of the node and of i. That is linear, as every pull-back is: whatever the regions, and however much of the gradient is
known in each of them, it adds up to the same if nothing is lost and nothing counted twice. Enter at `Gradients`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ranger_nn.checking.asked import returned
from ranger_nn.checking.numbers import Bits, Numbers, named, rows
from ranger_nn.core import program as P
from ranger_nn.core.graph import Graph, Node
from ranger_nn.core.program import Program
from ranger_nn.core.reach import Box, Link

GIVEN = 1 << 40
"""Stands for a node's number in the gradient of an output, which the caller gives."""
ONE = Bits(1)
NOTHING = np.ones(1, Bits)
"""Stands for a side along which all rows have the number 1."""


@dataclass(frozen=True)
class Way:
    """From the gradients of a node's output to one of its inputs.

    `links`: of dimensions that are cut; `others`: dimensions of the output that are summed; `order`: of the output's dimensions,
    so that those of the input come first and in their order, which is another one if `turned`; `free`: dimensions of the input
    along which a reduction gives each row its own number.
    """

    links: tuple[tuple[int, Link], ...]
    others: tuple[int, ...]
    order: tuple[int, ...]
    turned: bool
    free: frozenset[int]
    name: Bits


class Gradients:
    """Numbers of all gradients of one graph. `periods`: of values on an axis that goes round, dimension and period."""

    def __init__(self, graph: Graph, programs: Sequence[Program], periods: Mapping[int, tuple[int, int]]) -> None:
        """`programs` say which dimensions are cut: along all others one number stands for all rows."""
        self.graph, self.periods = graph, periods
        self.cut = _closed(graph, _cut(graph, programs))
        self.expected: dict[int, Numbers] = {}
        self._ways: dict[tuple[int, int], Way] = {}

    def full(self, v: int) -> Box:
        """All of a value."""
        return tuple((0, n) for n in self.graph.values[v].shape)

    def shape(self, v: int, box: Box) -> tuple[int, ...]:
        """Of the numbers of a region."""
        return tuple(hi - lo if (v, d) in self.cut else 1 for d, (lo, hi) in enumerate(box))

    def period(self, v: int, d: int) -> int:
        """Rows after which a dimension repeats; 0 where it has an end."""
        dim, rows_ = self.periods.get(v, (-1, 0))
        return rows_ if dim == d else 0

    def given(self, v: int) -> Numbers:
        """Gradient of an output, as the caller gives it."""
        return self._product(v, [rows(d, *side) for d, side in enumerate(self.full(v))], named(GIVEN, v))

    def zeros(self, v: int, box: Box) -> Numbers:
        """Nothing yet."""
        return np.zeros(self.shape(v, box), Bits)

    def _product(self, v: int, sides: Sequence[Numbers], name: Bits = ONE) -> Numbers:
        """Numbers along the sides that are cut, multiplied, times a number."""
        found = np.full((1,) * len(sides), name, Bits)
        for d, side in enumerate(sides):
            if (v, d) in self.cut and side is not NOTHING:
                found = found * side.reshape([-1 if k == d else 1 for k in range(len(sides))])
        return found

    def given_back(
        self, k: int, i: int, grads: Sequence[Numbers | None], box: Box, out: Box, region: bool = True
    ) -> Numbers:
        """What a region of node k's output, whose gradients are `grads`, gives to the region `box` of its input i."""
        node = self.graph.nodes[k]
        v, way = node.inputs[i], self._way(k, i, len(out))
        total, moved = self._gathered(node, grads, len(out)), [1] * len(box)
        for d, link in way.links:
            size, round_ = self.graph.values[v].shape[d], region and self.period(v, d) > 0
            total = returned(link, total, link.out_dim, out[link.out_dim], box[d], size, round_)
            moved[d] = box[d][1] - box[d][0]
        if any(total.shape[d] != 1 for d in way.others):
            total = total.sum(way.others, dtype=Bits, keepdims=True)
        if way.turned:
            total = total.transpose(way.order)
        total = total.reshape(moved) * way.name
        if way.free:
            total = total * self._product(
                v, [rows(d, *side) if d in way.free else NOTHING for d, side in enumerate(box)]
            )
        shape = self.shape(v, box)
        if total.shape == shape:
            return np.asarray(total)  # products of no dimension are no arrays, and could not be added to
        return np.broadcast_to(total, shape).copy()

    def _way(self, k: int, i: int, rank: int) -> Way:
        """How gradients of node k's output, of `rank` dimensions, get to its input i."""
        if (k, i) in self._ways:
            return self._ways[k, i]
        node, links, places = self.graph.nodes[k], list[tuple[int, Link]](), dict[int, int]()
        v = node.inputs[i]
        for d, link in enumerate(node.rule.links[i]) if len(node.outputs) == 1 else ():
            if link is None or (v, d) not in self.cut:
                continue
            if link.out_dim in places:
                raise NotImplementedError(f"{node.op}: two dimensions of an input that are one of the output")
            places[link.out_dim] = d
            links.append((d, link))
        others = tuple(d for d in range(rank) if d not in places)
        order = (*sorted(places, key=places.__getitem__), *others)
        reduces = i == 0 and node.rule.reduces
        free = (
            frozenset(d for d, link in enumerate(node.rule.links[0]) if link is None) if reduces else frozenset[int]()
        )
        self._ways[k, i] = way = Way(tuple(links), others, order, order != tuple(range(rank)), free, named(k, i))
        return way

    def _gathered(self, node: Node, grads: Sequence[Numbers | None], rank: int) -> Numbers:
        """The gradients of all outputs of a node in one array: where there are several, in one number."""
        if len(node.outputs) == 1:
            (only,) = grads
            return np.zeros((1,) * rank, Bits) if only is None else only
        parts = [g.sum(dtype=Bits) * named(j) for j, g in enumerate(grads) if g is not None]
        return np.full((1,) * rank, sum(parts, Bits(0)), Bits)

    def lifted(self, k: int, box: Box) -> int:
        """What a region adds to the state of reduction k: every row once."""
        node = self.graph.nodes[k]
        total = 1
        for d, (side, link) in enumerate(zip(box, node.rule.links[0])):
            if link is None:
                total = total * int(rows(d, *side).sum(dtype=Bits)) % (1 << 64)
        return total

    def expect(self, given: Mapping[int, Numbers]) -> dict[int, Numbers]:
        """Gradients of all values on which something is given back, each node pulled back once and whole."""
        graph, found = self.graph, dict(given)
        for k in reversed(range(len(graph.nodes))):
            node = graph.nodes[k]
            if not any(v in found and graph.values[v].differentiable for v in node.outputs):
                continue
            out, grads = self.full(node.outputs[0]), [found.get(v) for v in node.outputs]
            for i, v in enumerate(node.inputs):
                if not graph.values[v].differentiable:
                    continue
                whole = self.given_back(k, i, grads, self.full(v), out, False)
                found[v] = found[v] + whole if v in found else whole
        return found


def _cut(graph: Graph, programs: Sequence[Program]) -> set[tuple[int, int]]:
    """Dimensions of values of which some instruction makes or reads a part."""
    values, found = graph.values, set()
    for value in values:
        found |= {(value.index, d) for d, n in enumerate(value.shape) if n == 0}
    full = [tuple((0, n) for n in value.shape) for value in values]
    for v, box in _regions(graph, programs):
        if box != full[v]:
            found |= {(v, d) for d, (side, whole) in enumerate(zip(box, full[v], strict=True)) if side != whole}
    return found


def _regions(graph: Graph, programs: Sequence[Program]) -> Iterator[tuple[int, Box]]:
    for program in programs:
        for i in program.instructions:
            if i.op in (P.RUN, P.VJP):
                node = graph.nodes[i.node]
                yield node.outputs[0], i.out_box
                for v, read in zip(node.inputs, i.reads):  # rows behind the last window are no part of it
                    yield v, read.box
            elif i.op in (P.LIFT, P.REDUCE_VJP):
                yield graph.nodes[i.node].inputs[0], i.reads[0].box
            elif i.op in (P.ALLOC, P.ZEROS):
                yield i.value, tuple((0, n) for n in i.shape)


def _closed(graph: Graph, cut: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """With all dimensions that links tie to them."""
    ties: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for node in graph.nodes:
        for v, row in zip(node.inputs, node.rule.links, strict=True):
            for d, link in enumerate(row):
                if link is not None:
                    out = (node.outputs[0], link.out_dim)
                    ties.setdefault((v, d), []).append(out)
                    ties.setdefault(out, []).append((v, d))
    todo = list(cut)
    while todo:
        for other in ties.get(todo.pop(), ()):
            if other not in cut:
                cut.add(other)
                todo.append(other)
    return cut
