"""Cumulative operators take the form that suits the axes of their network: carried, in blocks, or plain.

Which dimensions are cut is known only of the whole graph. Along a lone axis, and where no gradient is asked for, a slide hands
the last row on. Along one of several, or in training, the operator is three: totals of blocks, what comes before each, and
both joined (`ops/cumulative.py`). Along a dimension that is never cut it is as it was. Enter at `settled`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from ranger_nn.bounds.axes import find_axes
from ranger_nn.core.graph import COMPUTED, Graph, Node, Rule, Value
from ranger_nn.ops import cumulative


class Cumulative(Protocol):
    """A kernel that has all three forms. `wide`, `itemsize`: dtype of totals, and bytes of an element."""

    along: int
    block: int
    wide: str
    wide_bytes: int

    def plain(self) -> Any:
        """On all rows."""
        ...

    def carried(self) -> Any:
        """Gives the last row besides, and takes that of the region before."""
        ...

    def parts(self) -> tuple[Any, Any, Any]:
        """Totals of blocks, what comes before each, both joined."""
        ...


def settled(graph: Graph, carries: bool) -> Graph:
    """The graph with each cumulative operator in one of its forms; `carries`: states may be handed on."""
    if all(getattr(node.kernel, "along", None) is None for node in graph.nodes):
        return graph
    axes = find_axes(graph)
    found = _Settled(graph)
    for node in graph.nodes:
        dim = getattr(node.kernel, "along", None)
        cut = dim is not None and any(axis.dims.get(node.outputs[0]) == dim for axis in axes)
        if dim is None:
            found.nodes.append(node)
        elif not cut:
            found.plain(node)
        elif carries and len(axes) == 1:
            found.carried(node)
        else:
            found.in_blocks(node)
    return replace(graph, values=tuple(found.values), nodes=tuple(found.nodes))


class _Settled:
    """Values and nodes of the new graph."""

    def __init__(self, graph: Graph) -> None:
        self.values, self.nodes = list(graph.values), list[Node]()

    def _value(self, like: Node, name: str, rows: int) -> int:
        """Another value of a node, in the dtype of totals: `rows` along its dimension."""
        y, kernel = self.values[like.outputs[0]], like.kernel
        shape = tuple(rows if d == kernel.along else n for d, n in enumerate(y.shape))
        made = Value(
            len(self.values), f"{y.name}_{name}", shape, kernel.wide, kernel.wide_bytes, COMPUTED, y.differentiable
        )
        self.values.append(made)
        return made.index

    def _add(self, node: Node, inputs: tuple[int, ...], outputs: tuple[int, ...], rule: Rule, kernel: Any) -> None:
        kernel.op, kernel.itemsize = node.op, self.values[inputs[0]].itemsize
        name = node.name if outputs[0] in node.outputs else self.values[outputs[0]].name
        reads = tuple(range(len(inputs)))
        part = replace(node, name=name, inputs=inputs, outputs=outputs, rule=rule, kernel=kernel, vjp_reads=reads)
        self.nodes.append(part)

    def plain(self, node: Node) -> None:
        """Local in all other dimensions."""
        rule = cumulative.before(self.values[node.inputs[0]].shape, node.kernel.along)
        self._add(node, node.inputs, node.outputs, rule, node.kernel.plain())

    def carried(self, node: Node) -> None:
        """With the last row as a second output."""
        rule = cumulative.carried(self.values[node.inputs[0]].shape, node.kernel.along)
        self._add(node, node.inputs, (*node.outputs, self._value(node, "state", 1)), rule, node.kernel.carried())

    def in_blocks(self, node: Node) -> None:
        """Three nodes."""
        (x,), kernel = node.inputs, node.kernel
        shape, dim, block = self.values[x].shape, kernel.along, kernel.block
        totals, before = (self._value(node, name, -(-shape[dim] // block)) for name in ("totals", "before"))
        first, middle, last = kernel.parts()
        self._add(node, (x,), (totals,), cumulative.totals(shape, dim, block), first)
        self._add(node, (totals,), (before,), cumulative.before(shape, dim), middle)
        self._add(node, (x, before), node.outputs, cumulative.joined(shape, dim, block), last)
